"""The processes that take part: started, spoken to, and all of them ended whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.gateway import clean_environment

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 60.0
END_SECONDS = 15.0


class ChildFailed(Exception):
    """A process ended or kept silent where it should have said something; the text has the end of its log."""


class Child:
    """A process whose standard output is read line by line; its standard error goes to a file."""

    def __init__(self, process: asyncio.subprocess.Process, name: str, log: Path) -> None:
        self._process = process
        self._name = name
        self._log = log
        self.started = time.perf_counter()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def line(self, seconds: float = START_SECONDS) -> str:
        """Its next line. Raises ChildFailed if there is none in time."""
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(seconds):
                line = await self._process.stdout.readline()
        except TimeoutError:
            raise ChildFailed(f"{self._name} said nothing for {seconds:g} s\n{self._end_of_log()}") from None
        if not line:
            raise ChildFailed(f"{self._name} has ended\n{self._end_of_log()}")
        return line.decode().strip()

    async def ask(self, patience: float = START_SECONDS, /, **message: Any) -> dict[str, Any]:
        """Send a message as a line of JSON, return the one that comes back."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        await self._process.stdin.drain()
        answer: dict[str, Any] = json.loads(await self.line(patience))
        if "error" in answer:
            raise ChildFailed(f"{self._name}: {answer['error']}\n{self._end_of_log()}")
        return answer

    async def end(self) -> None:
        """SIGTERM, then SIGKILL for one that does not go. Returns when it has gone."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
        try:
            async with asyncio.timeout(END_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()

    def kill(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def _end_of_log(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]


class Children:
    """Starts processes of this Python; leaving the block ends those that still run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: list[Child] = []

    async def start(self, name: str, arguments: Sequence[str], env: Mapping[str, str] | None = None) -> Child:
        """Start `python ARGUMENTS` in the repository's folder."""
        log = self._folder / f"{name}.log"
        with log.open("ab") as errors:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env=clean_environment(env),
            )
        child = Child(process, name, log)
        self._running.append(child)
        return child

    async def end(self, *children: Child) -> None:
        """End these now."""
        await asyncio.gather(*(child.end() for child in children))
        self._running = [child for child in self._running if child not in children]

    async def __aenter__(self) -> Children:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.end(*self._running)
        finally:
            # A second Ctrl-C ends the waiting, but leaves nobody behind.
            for child in self._running:
                child.kill()


@dataclass(frozen=True)
class Served:
    """A server that listens: `http://HOST:PORT`."""

    child: Child
    url: str

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@dataclass(frozen=True)
class Corral(Served):
    """`corral serve`, with its access token."""

    token: str


async def start_model(children: Children) -> Served:
    """The scripted model server."""
    arguments = ["-m", "tests.support.model_server", "--script", str(ROOT / "bench" / "script.py")]
    child = await children.start("model", arguments)
    return Served(child, f"http://127.0.0.1:{int(await child.line())}")


async def start_bare(children: Children) -> Served:
    """The bare aiohttp server (`bench.bare`)."""
    child = await children.start("bare", ["-m", "bench.bare"])
    return Served(child, (await child.line()).removeprefix("listening on "))


async def start_corral(
    children: Children, data_dir: Path, model: Served | None = None, extra: Mapping[str, str] | None = None
) -> Corral:
    """A gateway over `data_dir`, whose runs talk to `model`; `extra` adds to its environment."""
    # All that is measured comes from one principal, and is more than the limit for one.
    limit = {"CORRAL_REQUESTS_PER_SECOND": "1000000"}
    env = {**limit, **(extra or {}), "CORRAL_TOKEN": secrets.token_hex(16), "CORRAL_LOG_LEVEL": "warning"}
    if model is not None:
        env |= {"CORRAL_MODEL": "openai-chat:bench", "OPENAI_BASE_URL": f"{model.url}/v1", "OPENAI_API_KEY": "k"}
    arguments = ["-m", "corral", "serve", "--port", "0", "--data-dir", str(data_dir)]
    child = await children.start(f"corral-{os.path.basename(data_dir)}", arguments, env)
    return Corral(child, (await child.line()).removeprefix("listening on "), env["CORRAL_TOKEN"])
