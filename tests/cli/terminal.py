"""The `corral` command at a terminal: keys go in, what it shows comes out."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from tests.support.gateway import clean_environment

TIMEOUT = 60.0
CTRL_C, CTRL_D, ENTER, ALT_ENTER, UP = "\x03", "\x04", "\r", "\x1b\r", "\x1b[A"

_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[()][A-Z0-9]|[=>78])")


class Terminal:
    """A command with a terminal of its own. `raw` is all that it wrote, `shown` the same without escapes."""

    def __init__(self, process: asyncio.subprocess.Process, leader: int) -> None:
        self.process = process
        self.raw = ""
        self._leader = leader
        self._changed = asyncio.Event()
        self._reader = asyncio.create_task(self._read())

    @property
    def shown(self) -> str:
        return _ESCAPES.sub("", self.raw)

    def press(self, keys: str) -> None:
        os.write(self._leader, keys.encode())

    async def until(self, text: str, times: int = 1) -> None:
        """Wait until it has shown `text` so many times."""
        await self.holds(lambda: self.shown.count(text) >= times)

    async def ready(self, prompts: int = 1) -> None:
        """Wait until the chat waits for the n-th message: the line editor has the terminal then."""
        await self.holds(lambda: self.raw.count("\x1b[?2004h") >= prompts)

    async def holds(self, condition: Callable[[], bool]) -> None:
        try:
            async with asyncio.timeout(TIMEOUT):
                while not condition():
                    self._changed.clear()
                    if self._reader.done():
                        raise AssertionError(f"it ended first:\n{self.shown}")
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"it never came:\n{self.shown}") from None

    async def ended(self) -> int:
        try:
            async with asyncio.timeout(TIMEOUT):
                await self._reader
                return await self.process.wait()
        except TimeoutError:
            raise AssertionError(f"it never ended:\n{self.shown}") from None

    async def interrupted(self) -> int:
        """Press Ctrl-C where a line is asked for; the exit code.

        Again if need be: Python does not hear a signal that comes just before it waits for a line.
        """
        async with asyncio.timeout(TIMEOUT):
            while not self._reader.done():
                self.press(CTRL_C)
                await asyncio.wait([self._reader], timeout=10)
        return await self.ended()

    async def _read(self) -> None:
        while data := await asyncio.to_thread(_read, self._leader):
            self.raw += data.decode("utf-8", "replace")
            self._changed.set()
        self._changed.set()


@asynccontextmanager
async def at_a_terminal(
    *arguments: str, data_dir: Path, columns: int = 100, env: Mapping[str, str] | None = None
) -> AsyncIterator[Terminal]:
    """Start `corral ARGUMENTS` with a controlling terminal; it is killed at the end if it still runs."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    extra = {"CORRAL_DATA_DIR": str(data_dir), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **(env or {})}
    environment = clean_environment(extra)
    for name in ("COLUMNS", "LINES"):
        environment.pop(name, None)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "corral",
        *arguments,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(follower)
    terminal = Terminal(process, leader)
    try:
        yield terminal
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await terminal.ended()
        os.close(leader)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # the terminal's other side has closed
        return b""
