"""A real gateway in a process of its own, started, killed and started again by tests."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from corral import faults
from corral.config import load_settings, read_endpoint, read_token
from tests.support.invariants import Inspection

START_TIMEOUT = 60.0


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without what would configure Corral or a model, and with `extra`."""
    dropped = ("CORRAL_", "OPENAI_", "ANTHROPIC_", "OTEL_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return {**environment, "NO_COLOR": "1", **(extra or {})}


class Gateway:
    """`corral serve --port 0` on `data_dir`. As a context manager it is ended by SIGTERM at the end,
    and all invariants are seen to hold then; `unchecked` is the reason for a store that was damaged on purpose."""

    def __init__(
        self,
        data_dir: Path,
        env: Mapping[str, str] | None = None,
        *arguments: str,
        unchecked: str | None = None,
        program: Sequence[str] = ("-m", "corral", "serve"),
    ) -> None:
        self.data_dir = data_dir
        self._env = clean_environment(env)
        self._arguments = arguments
        self.unchecked = unchecked
        self._program = program
        self._process: asyncio.subprocess.Process | None = None
        self.url = ""
        self.first_line = ""

    @property
    def process(self) -> asyncio.subprocess.Process:
        assert self._process is not None
        return self._process

    @property
    def log(self) -> str:
        """All that it has written to standard error, over all its starts."""
        return (self.data_dir.parent / "gateway.log").read_text()

    async def spawn(self, port: int = 0, *, fault: str | None = None) -> asyncio.subprocess.Process:
        """The process, without waiting until it listens. `fault`: where it shall end by itself; see `corral.faults`."""
        env = self._env if fault is None else {**self._env, faults.VARIABLE: fault}
        arguments = [*self._program, "--port", str(port), "--data-dir", str(self.data_dir), *self._arguments]
        with (self.data_dir.parent / "gateway.log").open("ab") as log:
            return await asyncio.create_subprocess_exec(
                sys.executable, *arguments, stdout=asyncio.subprocess.PIPE, stderr=log, env=env
            )

    async def start(self, port: int = 0, *, fault: str | None = None) -> Gateway:
        self._process = await self.spawn(port, fault=fault)
        assert self._process.stdout is not None
        async with asyncio.timeout(START_TIMEOUT):
            self.first_line = (await self._process.stdout.readline()).decode()
        assert self.first_line.startswith("listening on "), self.log
        self.url = self.first_line.removeprefix("listening on ").strip()
        return self

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    async def stop(self) -> int:
        """SIGTERM; its exit code."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(60):
            return await self.process.wait()

    def inspect(self) -> None:
        """Raises Broken unless the store keeps the invariants."""
        look = Inspection(self.data_dir / "corral.db")
        look.store()
        look.report()

    def token(self) -> str:
        return read_token(load_settings({"data_dir": self.data_dir}, {}))

    def address(self) -> tuple[str, str]:
        """(URL, token) of the gateway that runs now."""
        endpoint = read_endpoint(self.data_dir)
        assert endpoint is not None
        return endpoint.url, self.token()

    async def __aenter__(self) -> Gateway:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.returncode is None:
            try:
                await self.stop()
            finally:
                await self.kill()
        if error is None and self.unchecked is None and (self.data_dir / "corral.db").exists():
            self.inspect()
