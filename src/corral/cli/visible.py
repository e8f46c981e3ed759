"""Text that came from elsewhere, made fit for a terminal: nothing in it is acted on, nothing is hidden.

`visible` is for reading: what a model or a tool wrote. `exact` is for deciding: a text from which what
will be run can be told character for character, so that no two calls look alike.
"""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

# What a terminal would act on instead of showing: C0 without tab and newline, DEL, C1, and the characters
# that have no width, separate lines, or turn the direction of text, with which one text can be made to look
# like another. The joiners that emoji and some scripts are written with stay.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff]"
)
_MANY = {
    "CJK UNIFIED IDEOGRAPH-": "Chinese characters",
    "HIRAGANA LETTER ": "kana",
    "KATAKANA LETTER ": "kana",
    "HANGUL SYLLABLE ": "Hangul syllables",
}
"""How the name of a letter begins, and what such letters are called together."""
_LETTERS_KINDS = frozenset("LMNPS")


def visible(text: str) -> str:
    """`text` with control and direction characters written out (`\\x1b`), so that it cannot drive the terminal."""
    return _CONTROLS.sub(lambda found: _written(found[0]), text)


def harmless(document: str) -> str:
    """A JSON document with such characters as escapes: the same document, whoever looks at it on a terminal.

    JSON itself escapes C0 only; a terminal may also act on C1, and turns text for a direction mark.
    """
    return _CONTROLS.sub(lambda found: _json_escape(found[0]), document)


def exact(value: Any, indent: int | None = 2) -> str:
    """`value` as JSON in which every character that cannot be seen, or seen for what it is, is written out.

    It is JSON of the very same value: reading it back gives `value`. Backslashes are doubled, so a
    text that spells `\\u202e` and one that holds that character look different.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=str)
    return "".join(char if char == "\n" or _plain(char) else _json_escape(char) for char in text)


def unusual(value: Any) -> list[str]:
    """The letters and signs beyond ASCII in `value` by name, for a note: one may look like another.

    For example `U+0430 CYRILLIC SMALL LETTER A`. Each once, in order of first appearance. The letters of a script
    that has too many to tell by name are counted, and come last, so that they do not hide the others.
    """
    text = json.dumps(value, ensure_ascii=False, default=str)
    named, counted = [], dict.fromkeys(_MANY.values(), 0)
    for char in dict.fromkeys(char for char in text if ord(char) > 126):
        name = unicodedata.name(char, "with no name")
        script = next((many for begin, many in _MANY.items() if name.startswith(begin)), None)
        if script is None:
            named.append(f"U+{ord(char):04X} {name}")
        else:
            counted[script] += 1
    return named + [f"{count} {script}" for script, count in counted.items() if count]


def _plain(char: str) -> bool:
    if char.isascii():
        return char.isprintable()
    # Letters, digits, punctuation and symbols; a mark only changes the letter before it, so it is written out.
    kind = unicodedata.category(char)
    return kind[0] in _LETTERS_KINDS - {"M"} and _CONTROLS.match(char) is None


def _written(char: str) -> str:
    point = ord(char)
    if point < 0x100:
        return f"\\x{point:02x}"
    return f"\\u{point:04x}" if point < 0x10000 else f"\\U{point:08x}"


def _json_escape(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))
