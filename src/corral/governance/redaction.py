"""Taking secrets out of what is recorded, by the name of a field and by the shape of a text, and keeping it short."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote

import msgspec

REDACTED = "[redacted]"

MAX_TEXT = 1_000
"""Characters of one string; what is longer is cut, and says how long it was."""
MAX_TOTAL = 8_000
"""Characters of all strings and names of one record together."""
MAX_ITEMS = 64
"""Items of one list or object."""
MAX_DEPTH = 8

_MIN_SECRET = 6
_SAFE_INTEGER = 2**53

# Names are compared in lower case without separators.
_SECRET_PARTS = (
    "password",
    "passwd",
    "passphrase",
    "secret",
    "authorization",
    "cookie",
    "apikey",
    "privatekey",
    "accesskey",
    "signingkey",
    "encryptionkey",
    "credential",
)
_SECRET_ENDINGS = ("token", "jwt", "bearer")
_SECRET_NAMES = frozenset({"auth", "pwd", "pass", "pin", "otp", "sig", "signature", "xauth"})
_NOT_IN_NAMES = re.compile(r"[^a-z0-9]")

_NAMED = r"(?:password|passwd|passphrase|secret|token|pwd|credentials?|(?:api|private|access|signing)[-_ ]?key)"


def _shape(*hints: str, pattern: str, kept: str = "") -> tuple[tuple[str, ...], re.Pattern[str], str]:
    return hints, re.compile(pattern, re.IGNORECASE), kept


# (texts in lower case without which the pattern cannot match, the pattern, what is kept of a match).
# To look for the hints takes a microsecond; to run the patterns, a hundred.
_SHAPES = (
    # A block in armour, whole or cut off.
    _shape("-----begin", pattern=r"-----BEGIN [A-Z0-9 ]{1,64}-----[\s\S]*?(?:-----END [A-Z0-9 ]{1,64}-----|\Z)"),
    # The user and password of a URL.
    _shape("://", pattern=r"(?P<before>://)[^\s/@'\"]{1,500}@", kept="@"),
    # Headers whose value goes to the end of the line.
    _shape(
        "authorization",
        "cookie",
        pattern=r"(?P<before>(?:authorization|cookie)\\?[\"']?\s{0,4}[:=]\s{0,4}\\?[\"']?)[^\r\n\"'\\]+",
    ),
    # name=value, "name": "value", Name: value, --name value
    _shape(
        "pass",
        "secret",
        "token",
        "pwd",
        "credential",
        "key",
        pattern=rf"(?P<before>{_NAMED}\\?[\"']?\s{{0,4}}[=:]\s{{0,4}})"
        r"(?:\\?\"[^\"]*(?:\"|\Z)|'[^']*(?:'|\Z)|[^\s\"'&;,\\]+)",
    ),
    _shape(
        "--",
        pattern=rf"(?P<before>--[\w-]{{0,40}}?{_NAMED}\s{{1,4}})(?:\"[^\"]*(?:\"|\Z)|'[^']*(?:'|\Z)|[^\s-]\S*)",
    ),
    _shape("bearer", pattern=r"(?P<before>\bbearer\s{1,4})[\w.~+/=-]{8,}"),
    # Tokens that tell what they are by how they begin.
    _shape("eyj", pattern=r"\beyJ[\w-]{6,}\.[\w-]{4,}(?:\.[\w-]*){1,3}"),
    _shape("sk-", "sk_", "rk_", "pk_", pattern=r"(?<![a-z0-9])(?:sk|rk|pk)[-_][\w-]{16,}"),
    # Corral's own access tokens.
    _shape("crl_", pattern=r"(?<![a-z0-9])crl_[\w-]{16,}"),
    _shape("akia", "asia", pattern=r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    _shape(
        "ghp_",
        "gho_",
        "ghu_",
        "ghs_",
        "ghr_",
        "hf_",
        "npm_",
        "pypi-",
        "_pat_",
        "glpat-",
        "xox",
        "shpat_",
        "ya29.",
        "aiza",
        pattern=r"(?<![a-z0-9])(?:gh[pousr]_|hf_|npm_|pypi-|github_pat_|dckr_pat_|glpat-|xox[a-z]-|shpat_|ya29\.|AIza)"
        r"[\w-]{16,}",
    ),
)
_HINTS = tuple({hint for hints, _, _ in _SHAPES for hint in hints})


def _hinted(lower: str) -> bool:
    for hint in _HINTS:  # noqa: SIM110 - a generator for any() would take three times as long
        if hint in lower:
            return True
    return False


class Redactor:
    """Makes what was given into JSON that may be kept: without secrets, and bounded in size.

    `secrets` are texts that are never kept, wherever they stand: the server's own access token
    and the keys of its providers. Texts shorter than six characters are not looked for.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        known = {each.strip() for each in secrets}
        known |= {quote(each, safe="") for each in known}
        ordered = sorted((each for each in known if len(each) >= _MIN_SECRET), key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, ordered))) if ordered else None
        self._names: dict[str, tuple[str, bool]] = {}
        self._longest = len(ordered[0]) if ordered else 0

    def name(self, name: str) -> tuple[str, bool]:
        """The name of a field as it may be kept, and whether what it holds is a secret."""
        found = self._names.get(name)
        if found is None:
            found = self.text(name, 100), is_secret_name(name)
            # Most names come again and again; those that callers make up do not fill the memory.
            if len(self._names) < 1000 and len(name) <= 100:
                self._names[name] = found
        return found

    def text(self, text: str, limit: int = MAX_TEXT) -> str:
        """`text` without secrets, and at most `limit` characters of it, with a note of the length if it is cut."""
        length = len(text)
        beyond = length > 4 * limit + self._longest
        if beyond:
            text = text[: 4 * limit + self._longest]
        if self._known is not None:
            text = self._known.sub(REDACTED, text)
        if beyond and self._longest:
            text = text[: -self._longest]  # where the beginning of one may stand that was cut through
        lower = text.lower()
        for hints, pattern, kept in _SHAPES if _hinted(lower) else ():
            if any(hint in lower for hint in hints):
                text = pattern.sub(lambda found, kept=kept: _replaced(found, kept), text)  # type: ignore[misc]
        if len(text) > limit or beyond:
            text = f"{text[:limit]}… [cut, {length} characters in all]"
        return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()

    def value(self, value: Any, *, max_text: int = MAX_TEXT, max_total: int = MAX_TOTAL) -> Any:
        """A JSON value like `value`, which may hold Structs, in which only finite, exact numbers are numbers."""
        return _Walk(self, max_text, max_total).value(value, 0)


class _Walk:
    def __init__(self, redactor: Redactor, max_text: int, max_total: int) -> None:
        self._redactor = redactor
        self._max_text = max_text
        self._left = max_total

    def value(self, value: Any, depth: int) -> Any:
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, int | float):
            return _number(value)
        if depth >= MAX_DEPTH or self._left <= 0:
            return "[cut]"
        if isinstance(value, Mapping):
            return self._object(value, depth)
        if isinstance(value, list | tuple | set | frozenset):
            items = list(value)
            kept = [self.value(item, depth + 1) for item in items[:MAX_ITEMS]]
            return kept if len(items) <= MAX_ITEMS else [*kept, f"[cut, {len(items)} in all]"]
        if isinstance(value, bytes | bytearray | memoryview):
            return f"[{len(value)} bytes]"
        try:
            return self.value(msgspec.to_builtins(value), depth)
        except TypeError:
            return f"[{type(value).__name__}]"

    def _object(self, value: Mapping[Any, Any], depth: int) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for number, (key, item) in enumerate(value.items()):
            if number >= MAX_ITEMS or self._left <= 0:
                kept["[cut]"] = f"{len(value)} in all"
                break
            name, secret = self._name(str(key))
            while name in kept:
                name += "'"
            hidden = secret and item is not None and not isinstance(item, bool)
            kept[name] = REDACTED if hidden else self.value(item, depth + 1)
        return kept

    def _name(self, name: str) -> tuple[str, bool]:
        shown, secret = self._redactor.name(name)
        self._left -= len(shown)
        return shown, secret

    def _text(self, text: str) -> str:
        if self._left <= 0 and text:
            return "[cut]"
        kept = self._redactor.text(text, max(1, min(self._max_text, self._left)))
        self._left -= len(kept)
        return kept


def is_secret_name(name: str) -> bool:
    """Whether a field of this name holds a secret: `apiKey`, `X-Auth-Token`, but not `maxTokens`."""
    plain = _NOT_IN_NAMES.sub("", name.lower())
    return plain in _SECRET_NAMES or plain.endswith(_SECRET_ENDINGS) or any(part in plain for part in _SECRET_PARTS)


def _replaced(found: re.Match[str], kept: str) -> str:
    return f"{found.groupdict().get('before', '')}{REDACTED}{kept}"


def _number(value: float) -> float | str:
    """A number that every reader of JSON writes in the same way again; any other as text."""
    if isinstance(value, int):
        return value if abs(value) <= _SAFE_INTEGER else str(value)
    if not math.isfinite(value) or abs(value) > _SAFE_INTEGER:
        return str(value)
    if value.is_integer():
        return int(value)
    return round(value, 9) if abs(value) >= 1e-4 else str(value)
