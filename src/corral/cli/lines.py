"""What a person types into a chat: edited on a terminal, or read line by line from anything else."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from corral.config import Settings

HISTORY_LIMIT = 1024 * 1024
"""Bytes of history that are kept; past it the older half is let go at the next start."""


class Left(Exception):
    """The person wants to leave (Ctrl-D, or the end of the input)."""


class Reader(Protocol):
    async def read(self) -> str:
        """The next message. Raises Left; KeyboardInterrupt where Ctrl-C was pressed on an empty line."""
        ...

    def refresh(self) -> None:
        """What the status line says has changed."""
        ...


class Plain:
    """Lines of standard input; a backslash at the end of one continues on the next."""

    def __init__(self, prompt: str) -> None:
        self._prompt = prompt

    async def read(self) -> str:
        text = ""
        while True:
            if self._prompt:
                print(self._prompt, end="", file=sys.stderr, flush=True)
            line = await _line()
            if not line:
                if text:
                    return text
                raise Left
            line = line.removesuffix("\n")
            if not line.endswith("\\"):
                return text + line
            text += line[:-1] + "\n"

    def refresh(self) -> None:
        """There is no status line."""


async def _line() -> str:
    """A line of standard input, read by a thread that does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[str] = loop.create_future()

    def read() -> None:
        line = sys.stdin.readline()
        if not loop.is_closed():
            loop.call_soon_threadsafe(lambda: None if answer.done() else answer.set_result(line))

    threading.Thread(target=read, name="corral-stdin", daemon=True).start()
    return await answer


class Edited:
    """A line editor with history: Enter sends, Alt-Enter or Ctrl-J begins a new line."""

    def __init__(self, history: Path | None, status: Callable[[], str], words: Sequence[str]) -> None:
        # Here, as only a chat on a terminal needs it.
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
        from prompt_toolkit.styles import Style

        bindings = KeyBindings()

        @bindings.add("enter")
        def _send(event: KeyPressEvent) -> None:
            event.current_buffer.validate_and_handle()

        @bindings.add("escape", "enter")
        @bindings.add("c-j")
        def _new_line(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        self._session: PromptSession[str] = PromptSession(
            "› ",
            multiline=True,
            key_bindings=bindings,
            history=FileHistory(str(history)) if history is not None else InMemoryHistory(),
            completer=WordCompleter(list(words), sentence=True),
            complete_while_typing=False,
            prompt_continuation="  ",
            bottom_toolbar=status,
            style=Style.from_dict({"bottom-toolbar": "noreverse"}),
        )

    async def read(self) -> str:
        try:
            return await self._session.prompt_async(handle_sigint=False)
        except EOFError:
            raise Left from None

    def refresh(self) -> None:
        if self._session.app.is_running:
            self._session.app.invalidate()


def history_file(settings: Settings) -> Path | None:
    """Where what was typed is kept, readable by its owner alone; None if that cannot be had.

    In the data directory if there is one here, else (a gateway elsewhere) in the user's state folder.
    """
    folder = settings.data_dir
    try:
        if not folder.is_dir():
            import platformdirs

            folder = Path(platformdirs.user_state_dir("corral", appauthor=False))
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = folder / "chat_history"
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o600), "r+b") as file:
            os.fchmod(file.fileno(), 0o600)
            _shorten(path, file.fileno())
    except OSError:
        return None
    return path


def _shorten(path: Path, fd: int) -> None:
    if os.fstat(fd).st_size <= HISTORY_LIMIT:
        return
    kept = path.read_bytes()[-HISTORY_LIMIT // 2 :]
    begin = kept.find(b"\n# ")  # entries begin with their time
    os.ftruncate(fd, 0)
    os.pwrite(fd, kept[begin:] if begin >= 0 else b"", 0)
