"""What a scripted answer is, and what may go wrong instead of it or around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# ---- how an answer is written


@dataclass(frozen=True)
class Wire:
    """How the server-sent events of an answer look.

    `split_bytes`: write the bytes in pieces of this size, also through the middle of a character. `keep_index`
    and `keep_id`: whether tool call fragments carry their `index` and `id` (some servers leave them out);
    `repeat_name`: the name stands in every fragment; `whole_calls`: each call comes in one fragment.
    `linger`: seconds between `[DONE]` and the end of the body.
    """

    crlf: bool = False
    comments: bool = False
    event_lines: bool = False
    split_bytes: int | None = None
    done: bool = True
    keep_index: bool = True
    keep_id: bool = True
    repeat_name: bool = False
    whole_calls: bool = False
    args_as_object: bool = False
    linger: float = 0
    finish: str | None = "auto"


PLAIN = Wire()

# ---- steps


@dataclass(frozen=True)
class Say:
    """Text, in `chunks` deltas with `delay` seconds before each.

    `finish` is in the words of Chat Completions; the other dialects translate it (and know more, which they
    take as it is). `cached`: how many of the input tokens came out of the cache and went into it. `thinking`:
    thoughts before the text, where the dialect has them; one that begins with `redacted:` is hidden.
    """

    text: str
    chunks: int = 1
    delay: float = 0
    finish: str = "stop"
    usage: tuple[int | None, int | None] = (100, 10)
    refusal: str | None = None
    wire: Wire = PLAIN
    cached: tuple[int, int] = (0, 0)
    thinking: Sequence[str] = ()


@dataclass(frozen=True)
class CallTools:
    """Tool calls `(name as on the wire, arguments)` in parallel; a string for arguments is sent as it is."""

    calls: Sequence[tuple[str, Mapping[str, Any] | str]]
    text: str = ""
    ids: Sequence[str] | None = None
    fragments: int = 4
    delay: float = 0
    finish: str = "tool_calls"
    usage: tuple[int | None, int | None] = (100, 10)
    wire: Wire = PLAIN
    cached: tuple[int, int] = (0, 0)
    thinking: Sequence[str] = ()


@dataclass(frozen=True)
class LengthInToolCall:
    """The token limit in the middle of a call's arguments: `partial_args` is all that comes of them."""

    name: str = "bash_exec"
    partial_args: str = '{"command": "echo hel'
    text: str = ""
    usage: tuple[int | None, int | None] = (100, 10)
    wire: Wire = PLAIN


@dataclass(frozen=True)
class Status:
    """An HTTP error. `retry_after` is written as it is (seconds or an HTTP-date).

    `code` is the code of Chat Completions, the type of Messages, the status of generateContent. `phrase` is the
    reason phrase of the status line.
    """

    status: int
    retry_after: float | str | None = None
    message: str = "scripted error"
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    phrase: str | None = None


@dataclass(frozen=True)
class CutAfter:
    """The first `chunks` events of `of`, then the TCP connection is torn down (0: right after the headers).

    `delay` seconds before that: a client library may drop what it has not handed on when the reset comes.
    """

    chunks: int
    of: Say | CallTools | LengthInToolCall = Say("This will be cut somewhere in the middle of it.", chunks=10)
    delay: float = 0.05


@dataclass(frozen=True)
class Drop:
    """The connection is torn down before anything is answered."""


@dataclass(frozen=True)
class NoHttp:
    """These bytes instead of an HTTP response, then the connection is closed."""

    data: bytes = b"SSH-2.0-OpenSSH_9.9\r\n"


@dataclass(frozen=True)
class CloseKeepAlive:
    """Answer `of`; the next request on the same connection finds it reset.

    This is what a client sees whose request crosses the server's close of an idle connection on the
    wire, made certain: the reset comes when that request arrives, however long it takes.
    """

    of: Say | CallTools = Say("ok")


@dataclass(frozen=True)
class NoUsage:
    """`of` without a usage chunk."""

    of: Say | CallTools | LengthInToolCall = Say("ok")


@dataclass(frozen=True)
class Malformed:
    """Garbage for data, after `after` good events."""

    data: str = "{this is no json"
    after: int = 0


@dataclass(frozen=True)
class Hang:
    """Nothing more, for ever: before the headers, or after `after` events of text."""

    after: int | None = None


@dataclass(frozen=True)
class Slow:
    """`seconds` before the first byte of `of`."""

    seconds: float
    of: Any = Say("ok")


@dataclass(frozen=True)
class ErrorInStream:
    """Status 200, `after` events of text, then an error object where a chunk should be."""

    after: int = 0
    message: str = "the engine is overloaded"
    code: str | int | None = "server_error"
    type: str | None = "server_error"


@dataclass(frozen=True)
class Raw:
    """These bytes as the body, with this content type."""

    body: bytes
    content_type: str = "text/event-stream"


Answer = Say | CallTools | LengthInToolCall
Step = (
    Say
    | CallTools
    | LengthInToolCall
    | Status
    | CutAfter
    | Drop
    | NoHttp
    | CloseKeepAlive
    | NoUsage
    | Malformed
    | Hang
    | Slow
    | ErrorInStream
    | Raw
)
Script = Sequence[Any] | Callable[[dict[str, Any]], Any]


def content_filter(text: str = "I was going to") -> Say:
    """An answer that the provider's filter stopped."""
    return Say(text, finish="content_filter")


Frame = tuple[str | None, str]
"""A server-sent event: its name, if it has one, and its data."""
