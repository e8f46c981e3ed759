"""Server-sent events out of arbitrary pieces of bytes (WHATWG HTML, section 9.2.6, as far as model servers use it)."""

from __future__ import annotations

MAX_EVENT_BYTES = 4 * 1024 * 1024


class EventTooLong(ValueError):
    """An event grew beyond the limit; the stream is of no use any more."""


class SseParser:
    """Feed it what the socket gives; it returns the data of the events completed by that.

    Lines end with LF, CRLF or CR. Bytes are only taken apart at line ends, so that a character
    cut in two by the network is whole again before anybody decodes it. Comments and the fields
    `id` and `retry` are dropped; `event` is dropped too, for the dialects that stand on this
    parser say in the data itself what it is.
    """

    def __init__(self, limit: int = MAX_EVENT_BYTES) -> None:
        self._limit = limit
        self._pieces: list[bytes] = []
        """The line begun so far; joined only when its end is here, so that a long line costs linear time."""
        self._line_size = 0
        self._data: list[bytes] = []
        self._data_size = 0

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of each event that `chunk` completes. Raises EventTooLong."""
        if b"\n" not in chunk and b"\r" not in chunk:
            self._keep(chunk)
            return []
        lines = b"".join([*self._pieces, chunk]).splitlines(keepends=True)
        self._pieces, self._line_size = [], 0
        # A CR at the very end may be half of a CRLF: that line waits for the next byte.
        if lines and not lines[-1].endswith(b"\n"):
            self._keep(lines.pop())
        return self._take(lines)

    def end(self) -> list[bytes]:
        """The stream has ended: what was complete but for its last line end."""
        rest = b"".join(self._pieces)
        self._pieces, self._line_size = [], 0
        return self._take([*rest.splitlines(), b""])

    def _keep(self, piece: bytes) -> None:
        self._line_size += len(piece)
        if self._line_size + self._data_size > self._limit:
            raise EventTooLong(f"an event of the stream is longer than {self._limit} bytes")
        if piece:
            self._pieces.append(piece)

    def _take(self, lines: list[bytes]) -> list[bytes]:
        events = []
        for line in lines:
            text = line.rstrip(b"\r\n")
            if not text:
                if self._data:
                    events.append(b"\n".join(self._data))
                    self._data, self._data_size = [], 0
            elif text.startswith(b"data"):
                name, _, value = text.partition(b":")
                if name != b"data":
                    continue
                self._data.append(value.removeprefix(b" "))
                self._data_size += len(value) + 1
                if self._data_size > self._limit:
                    raise EventTooLong(f"an event of the stream is longer than {self._limit} bytes")
        return events
