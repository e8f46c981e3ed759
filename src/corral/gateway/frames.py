"""Request frames in, response and event frames out, as bytes."""

from __future__ import annotations

import json
import re
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from corral.bus.api import Delta
from corral.protocol.errors import CorralError, InvalidRequest
from corral.protocol.events import TRANSIENT_EVENTS, AgentDelta
from corral.protocol.frames import INVALID_ID, ErrorBody, RequestId
from corral.storage.rows import JournalEntry

_NO_PARAMS = b"{}"


class RequestFrame(Struct, frozen=True):
    """A well-formed request; `params` is the JSON text of an object, not looked into yet."""

    id: str
    method: str
    params: bytes


class BadFrame(InvalidRequest):
    """What came is no request frame. `id` is the frame's own wherever it could be read.

    `counts` says that it was not a frame at all (not JSON, no object, another `type`): so
    many of those in a row close the connection.
    """

    def __init__(self, message: str, *, frame_id: str = INVALID_ID, counts: bool) -> None:
        super().__init__(message)
        self.frame_id = frame_id
        self.counts = counts


class _Envelope(Struct):
    type: Literal["req"]
    id: RequestId
    method: Annotated[str, Meta(min_length=1, max_length=128)]
    params: Raw = Raw(_NO_PARAMS)


class _Parts(Struct):
    type: Raw | UnsetType = UNSET
    id: Raw | UnsetType = UNSET
    method: Raw | UnsetType = UNSET
    params: Raw | UnsetType = UNSET


_envelope = msgspec.json.Decoder(_Envelope)
_parts = msgspec.json.Decoder(_Parts)
_id = msgspec.json.Decoder(RequestId)
_text = msgspec.json.Decoder(str)


def read_request(text: str | bytes) -> RequestFrame:
    """Decode one frame. Raises BadFrame, and nothing else, for anything that is none."""
    try:
        frame = _envelope.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        raise _diagnose(text) from None
    params = bytes(frame.params)
    if not params.startswith(b"{"):
        raise BadFrame("$.params must be an object", frame_id=frame.id, counts=False)
    return RequestFrame(frame.id, frame.method, params)


def _diagnose(text: str | bytes) -> BadFrame:
    """Why `text` is no request frame, with as much of it read as can be."""
    try:
        parts = _parts.decode(text)
    except RecursionError:
        return BadFrame("the frame is nested too deeply", frame_id=_id_before_depth(text), counts=False)
    except msgspec.ValidationError:
        return BadFrame("a frame must be one JSON object", counts=True)
    except (msgspec.DecodeError, UnicodeError):
        return _with_surrogates(text) or BadFrame("a frame must be JSON text", counts=True)
    frame_id = _read(_id, parts.id)
    known = frame_id if frame_id is not None else INVALID_ID
    if _read(_text, parts.type) != "req":
        return BadFrame('$.type must be "req"', frame_id=known, counts=True)
    if frame_id is None:
        return BadFrame("$.id must be a string of 1 to 128 characters", counts=False)
    return BadFrame("$.method must be a string of 1 to 128 characters", frame_id=known, counts=False)


def _with_surrogates(text: str | bytes) -> BadFrame | None:
    r"""JSON that escapes half a surrogate pair (`\ud800`): well-formed by its grammar, but text that cannot be kept."""
    try:
        frame = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    if not isinstance(frame, dict):
        return BadFrame("a frame must be one JSON object", counts=True)
    given = frame.get("id")
    if not isinstance(given, str) or not 1 <= len(given) <= 128 or _SURROGATE.search(given):
        given = INVALID_ID
    message = "the frame escapes half of a surrogate pair, which is no character"
    return BadFrame(message, frame_id=given, counts=frame.get("type") != "req")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _read(decoder: msgspec.json.Decoder[str], raw: Raw | UnsetType) -> str | None:
    if isinstance(raw, UnsetType):
        return None
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return None


_SURROGATE = re.compile("[\ud800-\udfff]")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]', re.DOTALL)
_VALUE = re.compile(r'\s*:\s*("(?:[^"\\]|\\.)*")', re.DOTALL)
_LOOKED_THROUGH = 8192


def _id_before_depth(text: str | bytes) -> str:
    """The id of a frame too deep for the decoder, if it stands near the front, where ids stand.

    Only the first few thousand characters are looked through: the rest is brackets.
    """
    head = text[:_LOOKED_THROUGH]
    if isinstance(head, bytes):
        head = head.decode("utf-8", "replace")
    depth = 0
    for token in _TOKEN.finditer(head):
        if token[0] in "{[":
            depth += 1
        elif token[0] in "}]":
            depth -= 1
        elif depth == 1 and token[0] == '"id"':
            value = _VALUE.match(head, token.end())
            if value is not None:
                return _read(_id, Raw(value[1].encode("utf-8", "replace"))) or INVALID_ID
    return INVALID_ID


# ---- out


def response_frame(frame_id: str, payload: bytes) -> bytes:
    """A response that carries `payload`, JSON text, as it is."""
    return b'{"type":"res","id":%b,"ok":true,"payload":%b}' % (msgspec.json.encode(frame_id), payload)


def error_frame(frame_id: str, error: CorralError, trace_id: str) -> bytes:
    """A response that carries an error."""
    body = ErrorBody(
        code=error.code.value,
        message=error.message,
        retryable=error.retryable,
        trace_id=trace_id,
        details=error.details if error.details is not None else UNSET,
    )
    return b'{"type":"res","id":%b,"ok":false,"error":%b}' % (msgspec.json.encode(frame_id), msgspec.json.encode(body))


class EventFrame:
    """An event as bytes around the place where each connection puts its own `seq`.

    Made once and shared by all who get it.
    """

    __slots__ = ("_head", "_tail", "event", "size", "version")

    def __init__(self, event: str, payload: bytes, version: int) -> None:
        self.event = event
        self.version = version
        self._head = b'{"type":"event","event":"%b","payload":%b' % (event.encode(), payload)
        self._tail = b',"stateVersion":%d}' % version
        self.size = len(self._head) + len(self._tail) + 16

    def numbered(self, seq: int) -> bytes:
        return b'%b,"seq":%d%b' % (self._head, seq, self._tail)

    def without_seq(self) -> bytes:
        return self._head + self._tail

    def as_stream(self) -> bytes:
        """The event as server-sent events have it. A transient one has no id: nothing can be resumed from it."""
        name = self.event.encode()
        # JSON has line breaks between its tokens at most, where a space is as good.
        data = self.without_seq().replace(b"\n", b" ").replace(b"\r", b" ")
        if self.event in TRANSIENT_EVENTS:
            return b"event: %b\ndata: %b\n\n" % (name, data)
        return b"event: %b\nid: %d\ndata: %b\n\n" % (name, self.version, data)


def entry_frame(entry: JournalEntry) -> EventFrame:
    """A journal entry in its full form."""
    return EventFrame(entry.event, entry.payload, entry.version)


def with_cursor(payload: bytes, cursor: str) -> bytes:
    """An event's payload, a JSON object that is not empty, with `feedCursor` added."""
    return b'%b,"feedCursor":"%b"}' % (payload.rstrip()[:-1], cursor.encode())


def delta_frame(delta: Delta, text: str, version: int) -> EventFrame:
    """`text` to be placed at `delta`'s offset; `version` is the last durable one before it."""
    payload = AgentDelta(
        session_id=delta.session_id,
        run_id=delta.run_id,
        message_id=delta.message_id,
        offset=delta.offset,
        delta=text,
    )
    return EventFrame("agent.delta", msgspec.json.encode(payload), version)
