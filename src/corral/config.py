"""Settings: defaults, then `corral.toml` in the data directory, then `CORRAL_*`, then flags.

Every value remembers where it came from. What is wrong with one is told in a line that names
the key and the remedy (`ConfigError`).
"""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import socket
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct, field

CONFIG_FILE = "corral.toml"
MIN_TOKEN_LENGTH = 16

_NOT_SETTINGS = frozenset({"CORRAL_URL", "CORRAL_CONFIG", "CORRAL_REQUIRE_ALL", "CORRAL_FAULT"})
"""Variables with the prefix that say something to somebody else than `load_settings`."""

Millis = Annotated[int, Meta(ge=1, le=7 * 24 * 3600 * 1000)]
Days = Annotated[int, Meta(ge=1, le=36_500)]
Usd = Annotated[float, Meta(ge=0)]


class ConfigError(Exception):
    """A setting that cannot be used; its text is one line with the key and the remedy."""


class AgentSettings(Struct, kw_only=True, forbid_unknown_fields=True):
    """`[agents.NAME]` of corral.toml."""

    system_prompt: str = ""
    model: str | None = None
    tools: list[str] | None = None


class ModelSettings(Struct, kw_only=True, forbid_unknown_fields=True):
    """`[models."provider:name"]` of corral.toml: what is not known of a model, or known wrongly.

    Prices are in US dollars for a million tokens; both or neither are given.
    """

    context_window: Annotated[int, Meta(ge=1)] | None = None
    input_usd_per_million: Usd | None = None
    output_usd_per_million: Usd | None = None


class Settings(Struct, kw_only=True):
    """Everything the server is told. Nothing here comes from the working directory or a workspace."""

    data_dir: Path
    host: Annotated[str, Meta(min_length=1, max_length=255)] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 7077
    token: str | None = None
    model: Annotated[str, Meta(min_length=1, max_length=200)] = "demo"
    fallbacks: list[str] = []
    allowed_origins: list[str] = []
    allowed_hosts: list[str] = []
    roots: list[Path] = []
    agents: dict[str, AgentSettings] = {}
    models: dict[str, ModelSettings] = {}
    max_frame_bytes: Annotated[int, Meta(ge=64 * 1024, le=64 * 1024 * 1024)] = 1024 * 1024
    heartbeat_ms: Annotated[int, Meta(ge=100, le=3_600_000)] = 30_000
    requests_per_second: Annotated[int, Meta(ge=1, le=1_000_000)] = 1000
    max_active_runs: Annotated[int, Meta(ge=1, le=100_000)] = 256
    tool_timeout_ms: Millis = 120_000
    ask_again: list[str] = []
    run_timeout_ms: Millis = 3_600_000
    approval_ttl_ms: Annotated[int, Meta(ge=1, le=366 * 24 * 3600 * 1000)] = 24 * 3600 * 1000
    model_timeout_ms: Millis = 300_000
    compaction: bool = True
    compaction_threshold: Annotated[float, Meta(ge=0.2, le=1)] = 0.8
    memory: bool = True
    audit_keep_days: Days | None = None
    tool_output_keep_days: Days | None = None
    one_core: bool = True
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    origins: dict[str, str] = field(default_factory=dict)
    """Where each value came from: `default`, `flag --port`, `CORRAL_PORT` or the file's path."""

    def __repr__(self) -> str:
        """Without the token, wherever settings may be printed."""
        shown = (
            f"{name}={getattr(self, name)!r}" for name in self.__struct_fields__ if name not in ("token", "origins")
        )
        return f"Settings({', '.join(shown)})"


SETTINGS = {item.name: item for item in msgspec.structs.fields(Settings) if item.name != "origins"}
"""What may be set: the fields of Settings by name."""

_LISTS = frozenset({"fallbacks", "allowed_origins", "allowed_hosts", "roots", "ask_again"})
_TABLES = frozenset({"agents", "models"})
_EXAMPLES = {
    "fallbacks": "openai-chat:small,demo",
    "allowed_origins": "https://agents.example.org",
    "allowed_hosts": "agents.example.org",
    "roots": "/home/me/projects",
    "ask_again": "bash.exec,http.request",
    "log_level": "debug, info, warning or error",
    "log_format": "text or json",
    "audit_keep_days": "400",
    "tool_output_keep_days": "30",
    "data_dir": "/home/me/corral",
    "token": f"a secret of {MIN_TOKEN_LENGTH} characters or more",
}


# ---- reading the sources


def load_settings(flags: Mapping[str, Any], env: Mapping[str, str]) -> Settings:
    """Merge the sources into one Settings; later ones win, and `Settings.origins` says which did.

    `flags` has settings by their field name, and `config` for the path of a configuration file
    that takes the place of DATA_DIR/corral.toml; a flag that is None was not given. A variable
    that is empty counts as not set. Lists in variables are separated by commas (`CORRAL_ROOTS`
    like PATH). Reads files, changes nothing. Raises ConfigError.
    """
    values: dict[str, Any] = {}
    origins = dict.fromkeys(SETTINGS, "default")

    def put(key: str, value: Any, origin: str, *, text: bool) -> None:
        values[key] = _checked(key, _convert(key, value, origin, text=text), origin)
        origins[key] = origin

    variables = _variables(env)
    given = {key: value for key, value in flags.items() if value is not None and key != "config"}
    put("data_dir", *_data_dir(given, variables), text=True)

    path, table = _read_toml(values["data_dir"], flags.get("config"))
    for key, value in table.items():
        put(_known(key, path), value, str(path), text=False)
    for key, (value, name) in variables.items():
        if key != "data_dir":
            put(key, _split(key, value), name, text=True)
    for key, value in given.items():
        if key != "data_dir":
            put(_known(key, "flags"), value, f"flag --{key.replace('_', '-')}", text=True)
    return Settings(**values, origins=origins)


def _variables(env: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Setting -> (text, name of the variable). A name that looks like a slip of the pen is refused;
    others that share the prefix are somebody else's (container orchestrators set such)."""
    names = {f"CORRAL_{key.upper()}": key for key in SETTINGS if key not in _TABLES}
    found = {}
    for name, value in env.items():
        if not name.startswith("CORRAL_") or not value.strip() or name in _NOT_SETTINGS:
            continue
        if name in names:
            found[names[name]] = (value.strip(), name)
        elif near := difflib.get_close_matches(name, names, n=1, cutoff=0.85):
            raise ConfigError(f"{name} is not a variable that Corral knows: did you mean {near[0]}?")
    return found


def _data_dir(given: Mapping[str, Any], variables: Mapping[str, tuple[str, str]]) -> tuple[str, str]:
    if "data_dir" in given:
        return str(given["data_dir"]), "flag --data-dir"
    if "data_dir" in variables:
        return variables["data_dir"]
    import platformdirs  # here, as most commands are told the directory or need none

    return platformdirs.user_data_dir("corral", appauthor=False), "default"


def _read_toml(data_dir: Path, named: str | os.PathLike[str] | None) -> tuple[Path, dict[str, Any]]:
    path = Path(named).expanduser().absolute() if named is not None else data_dir / CONFIG_FILE
    try:
        with path.open(encoding="utf-8") as file:
            # It opens folders and lets in pages: who may write it is the owner. Whose it is says nothing: one that a
            # container is given from outside is seldom its user's.
            if os.fstat(file.fileno()).st_mode & stat.S_IWOTH:
                raise ConfigError(f"{path} may be changed by other users: take that from them with chmod o-w")
            return path, tomllib.loads(file.read())
    except FileNotFoundError:
        if named is None:
            return path, {}
        raise ConfigError(f"there is no configuration file {path}: name another with --config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def _known(key: str, where: Path | str) -> str:
    if key == "data_dir":
        raise ConfigError(
            f"data_dir in {where} has no effect: use --data-dir or CORRAL_DATA_DIR, and take the line out"
        )
    if key in SETTINGS:
        return key
    near = difflib.get_close_matches(key, [name for name in SETTINGS if name != "data_dir"], n=1)
    remedy = f"did you mean {near[0]}?" if near else "take it out; docs/reference/settings.md lists what there is"
    raise ConfigError(f"{key} in {where} is not a setting: {remedy}")


def _split(key: str, value: str) -> Any:
    if key not in _LISTS:
        return value
    separator = os.pathsep if key == "roots" else ","
    return [part.strip() for part in value.split(separator) if part.strip()]


# ---- checking one value


def _convert(key: str, value: Any, origin: str, *, text: bool) -> Any:
    try:
        return msgspec.convert(value, SETTINGS[key].type, strict=not text, dec_hook=_path)
    except msgspec.ValidationError as error:
        what = "this value" if key == "token" else repr(value)
        example = _EXAMPLES.get(key, SETTINGS[key].default)
        remedy = "see docs/reference/settings.md" if key in _TABLES else f"give for example {example}"
        detail = str(error).replace("`", "").replace("$", key, 1) if "$" in str(error) else str(error).replace("`", "")
        shown = "" if key in _TABLES else f" ({what})"
        raise ConfigError(f"{key}{shown} from {origin} cannot be used: {detail}; {remedy}") from None


def _path(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value).expanduser()
    raise msgspec.ValidationError(f"Expected `str`, got `{type(value).__name__}`")


def _checked(key: str, value: Any, origin: str) -> Any:
    """What a type cannot say. Returns the value in its normal form."""
    if key == "data_dir":
        return value.absolute()
    if key == "token" and value is not None:
        return _token(value, f"token from {origin}")
    if key == "allowed_origins":
        return [_origin(item, origin) for item in value]
    if key == "allowed_hosts":
        return [_host(item, origin) for item in value]
    if key == "roots":
        return [_root(item, origin) for item in value]
    if key == "agents":
        for name in value:
            if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name):
                raise ConfigError(f"agents.{name} in {origin} is no name for an agent: use 1-64 of A-Z a-z 0-9 _ . -")
    if key == "models":
        for name, model in value.items():
            if (model.input_usd_per_million is None) != (model.output_usd_per_million is None):
                raise ConfigError(
                    f"models.{name} in {origin} has one price of two: "
                    "give input_usd_per_million and output_usd_per_million, or neither"
                )
    return value


def _token(value: str, where: str) -> str:
    if len(value) < MIN_TOKEN_LENGTH:
        raise ConfigError(f"{where} is too short: use {MIN_TOKEN_LENGTH} characters or more")
    if not re.fullmatch(r"[\x21-\x7e]+", value):
        raise ConfigError(f"{where} must be printable ASCII without spaces, as it travels in a header")
    return value


def _origin(value: str, where: str) -> str:
    parts = urlsplit(value)
    if (
        parts.scheme not in ("http", "https")
        or not parts.netloc
        or parts.path.strip("/")
        or parts.query
        or "*" in value
    ):
        raise ConfigError(
            f"allowed_origins ({value!r}) from {where} is no origin: give scheme and host, "
            f"for example {_EXAMPLES['allowed_origins']}"
        )
    return f"{parts.scheme}://{parts.netloc}".lower()


def _host(value: str, where: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]+|\[?[0-9A-Fa-f:.]+\]?", value):
        raise ConfigError(
            f"allowed_hosts ({value!r}) from {where} is no host name: give it without scheme and port, "
            f"for example {_EXAMPLES['allowed_hosts']}"
        )
    return value.strip("[]").lower()


def _root(value: Path, where: str) -> Path:
    if not value.is_absolute():
        raise ConfigError(f"roots ({str(value)!r}) from {where} is not absolute: give the whole path of the folder")
    return value


# ---- where the server listens


def is_loopback_literal(host: str) -> bool:
    """Whether `host` is an IP address, written as one, that never leaves this machine. A name never is."""
    try:
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on `host`; names are resolved."""
    if is_loopback_literal(host):
        return True
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return bool(found) and all(is_loopback_literal(str(item[4][0])) for item in found)


def check_listen(settings: Settings) -> None:
    """Refuse an address that other machines reach unless its owner has an access token in hand.

    A token that this very start would make is one that nobody has seen, so it does not count:
    one set by CORRAL_TOKEN or corral.toml does, and one made earlier and kept in the data directory.
    """
    if is_loopback(settings.host) or settings.token is not None or token_path(settings.data_dir).exists():
        return
    raise ConfigError(
        f"refusing to listen on {settings.host}, which other machines may reach, without an access token: "
        "set CORRAL_TOKEN, or have one made and printed by `corral token`, then start again"
    )


# ---- the data directory


class Endpoint(Struct, kw_only=True, forbid_unknown_fields=False):
    """Where the gateway of a data directory listens, and the process that does."""

    url: str
    pid: int


def token_path(data_dir: Path) -> Path:
    """Where the access token is kept that the first start makes."""
    return data_dir / "token"


def endpoint_path(data_dir: Path) -> Path:
    """Where the running gateway says how it is reached."""
    return data_dir / "gateway.json"


def ensure_data_dir(data_dir: Path) -> None:
    """Make the data directory, for its owner alone (mode 0700). Raises ConfigError if it cannot be.

    A directory that is there already is closed to others only if it is empty or Corral's own:
    somebody may have named one that has another use.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = data_dir.stat()
        if status.st_uid != os.geteuid():
            raise ConfigError(f"{data_dir} belongs to another user: give a directory of your own with --data-dir")
        if status.st_mode & 0o077:
            names = {entry.name for entry in data_dir.iterdir()} - {"lost+found", CONFIG_FILE}
            if names and not names & {"corral.db", "corral.lock", "token"}:
                raise ConfigError(
                    f"{data_dir} is open to other users and holds other things: give a directory of its own "
                    "with --data-dir"
                )
            data_dir.chmod(0o700)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"{data_dir} is no directory: give another with --data-dir") from None
    except OSError as error:
        raise ConfigError(f"{data_dir} cannot be used ({error.strerror}): give another with --data-dir") from None


def ensure_token(settings: Settings) -> str:
    """The access token: the one that was set, else the one in the data directory, else a new one.

    A new one is 32 random bytes in URL-safe base64. Its file appears whole or not at all, and of
    two processes that make one at the same time both get the same. Raises ConfigError.
    """
    if settings.token is not None:
        return settings.token
    ensure_data_dir(settings.data_dir)
    path = token_path(settings.data_dir)
    try:
        if not path.exists():
            import secrets  # here, as only the first start needs it

            create_private(path, secrets.token_urlsafe(32) + "\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be made ({error.strerror}): set CORRAL_TOKEN, or mend that") from None
    return read_token(settings)


def read_token(settings: Settings) -> str:
    """The access token as `ensure_token` says, without making one. Raises ConfigError if there is none."""
    if settings.token is not None:
        return settings.token
    path = token_path(settings.data_dir)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no access token in {settings.data_dir} yet: `corral serve` makes one, or set CORRAL_TOKEN"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): set CORRAL_TOKEN, or mend that") from None
    with os.fdopen(descriptor, encoding="utf-8", errors="replace") as file:
        if os.fstat(descriptor).st_mode & 0o077:
            raise ConfigError(f"{path} may be read by other users: remove it, and the next start makes a new one")
        return _token(file.read(4096).strip(), f"the token in {path}")


def ensure_token_key(data_dir: Path) -> bytes:
    """The secret that the texts of made tokens come from, 32 bytes, made at the first start. Raises ConfigError."""
    path = data_dir / "token.key"
    try:
        if not path.exists():
            create_private(path, os.urandom(32).hex() + "\n")
        key = bytes.fromhex(path.read_text(encoding="ascii").strip())
        open_to_others = path.stat().st_mode & 0o077
    except OSError as error:
        raise ConfigError(f"{path} cannot be used ({error.strerror}): mend that, and start again") from None
    except ValueError:
        key, open_to_others = b"", 0
    if len(key) != 32 or open_to_others:
        what = "may be read by other users" if open_to_others else "is not what a start of this server made"
        raise ConfigError(f"{path} {what}: remove it, and the next start makes a new one")
    return key


def create_private(path: Path, text: str) -> bool:
    """Create a file that only its owner reads, whole or not at all; False if there is one already."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    _write_private(draft, text)
    try:
        os.link(draft, path)  # unlike a rename, this never takes the place of a file that is there
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True


def write_endpoint(data_dir: Path, url: str, pid: int | None = None) -> None:
    """Say where this process's gateway listens, for the commands that look for it."""
    path = endpoint_path(data_dir)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    _write_private(draft, msgspec.json.encode(Endpoint(url=url, pid=pid or os.getpid())).decode() + "\n")
    draft.replace(path)


def remove_endpoint(data_dir: Path, pid: int | None = None) -> None:
    """Take back what `write_endpoint` said, unless another process has said something since."""
    endpoint = read_endpoint(data_dir)
    if endpoint is not None and endpoint.pid == (pid or os.getpid()):
        endpoint_path(data_dir).unlink(missing_ok=True)


def read_endpoint(data_dir: Path) -> Endpoint | None:
    """Where the gateway of a data directory said it listens; it may have died since."""
    try:
        return msgspec.json.decode(endpoint_path(data_dir).read_bytes(), type=Endpoint)
    except (OSError, UnicodeError, msgspec.DecodeError):
        return None


def _write_private(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
