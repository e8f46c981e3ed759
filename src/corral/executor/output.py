"""Bounded output: what is kept of a tool's output, and what of that the model sees."""

from __future__ import annotations

from msgspec import Struct

from corral.executor.api import FULL_OUTPUT_LIMIT, OUTPUT_LIMIT, Failure

_TAIL_BYTES = 64 * 1024
_MARK_ROOM = 512


class Result(Struct, kw_only=True, frozen=True):
    """What a tool gives back: its text, not yet cut, and what went wrong, if it ran all the same."""

    text: str
    failure: Failure | None = None


class Budget:
    """How many bytes the streams of one call may keep between them."""

    def __init__(self, limit: int = FULL_OUTPUT_LIMIT) -> None:
        # Room for the ends of two streams and the lines that say what is missing.
        self.left = max(0, limit - 2 * _TAIL_BYTES - _MARK_ROOM)


class Capture:
    """One stream: its beginning as far as the budget goes, and its last bytes."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._head = bytearray()
        self._tail = bytearray()
        self._dropped = 0

    @property
    def overflowed(self) -> bool:
        return self._dropped > 0 or bool(self._tail)

    def feed(self, data: bytes) -> None:
        """Take `data` in; memory stays bounded however much comes."""
        taken = 0
        if not self._tail:
            taken = min(len(data), self._budget.left)
            self._head += data[:taken]
            self._budget.left -= taken
        if taken < len(data):
            self._tail += data[taken:]
            if len(self._tail) > 2 * _TAIL_BYTES:
                excess = len(self._tail) - _TAIL_BYTES
                self._dropped += excess
                del self._tail[:excess]

    def text(self) -> str:
        """What was kept, invalid UTF-8 replaced; a line in the middle says how much was not."""
        if not self.overflowed:
            return self._head.decode("utf-8", "replace")
        excess = max(0, len(self._tail) - _TAIL_BYTES)
        tail = bytes(self._tail[excess:])
        dropped = self._dropped + excess
        if not dropped:
            return bytes(self._head + tail).decode("utf-8", "replace")
        mark = f"\n[... {dropped} bytes were not kept ...]\n"
        return self._head.decode("utf-8", "replace") + mark + tail.decode("utf-8", "replace")


def bounded(text: str, limit: int = OUTPUT_LIMIT) -> tuple[str, bool, bytes | None]:
    """`text` as the model sees it, whether that is less than all of it, and then the whole.

    The whole is at most `FULL_OUTPUT_LIMIT` bytes of UTF-8.
    """
    # Half of a surrogate pair, as a JSON escape may carry it, has no UTF-8.
    if len(text) <= limit:
        return text.encode("utf-8", "replace").decode("utf-8"), False, None
    full = text.encode("utf-8", "replace")
    note = "tools.output has the whole"
    if len(full) > FULL_OUTPUT_LIMIT:
        full = full[:FULL_OUTPUT_LIMIT].decode("utf-8", "ignore").encode()
        note = f"tools.output has the first {len(full)} bytes"
    room = limit - 120
    head, tail = text[: room * 2 // 3], text[-(room - room * 2 // 3) :]
    missing = len(text.encode("utf-8", "replace")) - len((head + tail).encode("utf-8", "replace"))
    shown = f"{head}\n[... {missing} bytes are missing here; {note} ...]\n{tail}"
    return shown.encode("utf-8", "replace").decode("utf-8"), True, full


def joined(stdout: str, stderr: str, exit_status: int | None) -> str:
    """Standard output, then standard error, then the exit status if it is not 0."""
    text = stdout
    for part in (stderr, f"exit status {exit_status}\n" if exit_status else ""):
        if part:
            if text and not text.endswith("\n"):
                text += "\n"
            text += part
    return text
