"""The terminal on standard input: single keys, and quiet while something is shown."""

from __future__ import annotations

import asyncio
import os
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager


def is_interactive() -> bool:
    """Whether a person can be asked: standard input is a terminal, and so is where questions go."""
    return sys.stdin.isatty() and sys.stderr.isatty()


@contextmanager
def quiet() -> Iterator[None]:
    """Without echo: what is typed ahead waits for whoever reads next and does not mix with what is shown.

    Enter stays what it is (and is not made a newline), as the line editor tells the two apart.
    """
    with _without(termios.ECHO | termios.ICANON, termios.ICRNL):
        yield


class Keys:
    """Keys as they are pressed, without echo and without Enter. Ctrl-C stays a signal.

    What was typed before is thrown away: it was no answer to the question that is asked now.
    """

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno()

    async def next(self) -> str:
        """The next single key, "" at the end of input. Pasted text and arrow keys are no key: "?"."""
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_reader(self._fd, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(self._fd)
        try:
            data = os.read(self._fd, 1024)
        except OSError:  # the terminal has gone
            return ""
        if len(data) > 1:
            return "?"
        return data.decode("ascii", "replace") if data != b"\x04" else ""


@contextmanager
def keys() -> Iterator[Keys]:
    with _without(termios.ECHO | termios.ICANON):
        termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)
        yield Keys()


@contextmanager
def _without(local: int, into: int = 0) -> Iterator[None]:
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    changed = termios.tcgetattr(fd)
    changed[0] &= ~into
    changed[3] &= ~local
    termios.tcsetattr(fd, termios.TCSANOW, changed)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSANOW, before)
