"""The `corral` command as a person calls it: a process with its two outputs."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import pty
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from corral.cli import main
from tests.support.gateway import clean_environment

TIMEOUT = 60.0


class Command:
    """A running command; `out` and `err` grow as it writes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.out = ""
        self.err = ""
        self._changed = asyncio.Event()
        assert process.stdout is not None
        assert process.stderr is not None
        self._readers = [
            asyncio.create_task(self._read(process.stdout, "out")),
            asyncio.create_task(self._read(process.stderr, "err")),
        ]

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something that depends on its output holds."""
        async with asyncio.timeout(TIMEOUT):
            while not holds():
                self._changed.clear()
                if all(reader.done() for reader in self._readers):
                    raise AssertionError(f"it ended first:\n{self.out}\n{self.err}")
                await self._changed.wait()

    async def ended(self) -> int:
        """Its exit code, with all of its output read."""
        async with asyncio.timeout(TIMEOUT):
            await asyncio.gather(*self._readers)
            return await self.process.wait()

    async def _read(self, stream: asyncio.StreamReader, name: str) -> None:
        while data := await stream.read(65536):
            setattr(self, name, getattr(self, name) + data.decode())
            self._changed.set()
        self._changed.set()


@asynccontextmanager
async def corral(
    *arguments: str, data_dir: Path | None = None, env: Mapping[str, str] | None = None, stdin: str = ""
) -> AsyncIterator[Command]:
    """Start `corral ARGUMENTS`; it is killed at the end if it still runs."""
    extra = dict(env or {})
    if data_dir is not None:
        extra["CORRAL_DATA_DIR"] = str(data_dir)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "corral",
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=clean_environment(extra),
    )
    assert process.stdin is not None
    process.stdin.write(stdin.encode())
    process.stdin.close()
    command = Command(process)
    try:
        yield command
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await command.ended()


async def call(
    *arguments: str, data_dir: Path | None = None, env: Mapping[str, str] | None = None, stdin: str = ""
) -> tuple[int, str, str]:
    """Run `corral ARGUMENTS` to its end: exit code, standard output, standard error."""
    async with corral(*arguments, data_dir=data_dir, env=env, stdin=stdin) as command:
        code = await command.ended()
        return code, command.out, command.err


def call_here(*arguments: str, data_dir: Path) -> tuple[int, str, str]:
    """The same in this process, which spares its start; for commands that need no event loop of their own."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main([*arguments, "--data-dir", str(data_dir)])
    assert isinstance(ended.value.code, int)
    return ended.value.code, out.getvalue(), err.getvalue()


async def on_a_terminal(*arguments: str, data_dir: Path, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run `corral ARGUMENTS` with a terminal for all three streams: exit code and what it shows."""
    leader, follower = pty.openpty()
    environment = clean_environment({"CORRAL_DATA_DIR": str(data_dir), "TERM": "xterm", **(env or {})})
    if not env or "NO_COLOR" not in env:
        del environment["NO_COLOR"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "corral", *arguments, stdin=follower, stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    shown = bytearray()
    try:
        async with asyncio.timeout(TIMEOUT):
            while data := await asyncio.to_thread(_read, leader):
                shown += data
            return await process.wait(), shown.decode()
    finally:
        os.close(leader)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # the terminal's other side has closed
        return b""
