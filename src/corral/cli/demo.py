"""`corral demo`: a scripted tour on a temporary data directory, with real gateways that are really killed."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import click
from msgspec import UNSET

from corral.cli import FAILED, OK
from corral.cli.columns import cells, fold, width
from corral.cli.show import Transcript, visible
from corral.client import Corral, Event, GatewayUnreachable
from corral.config import Settings, load_settings, read_endpoint, read_token
from corral.protocol.errors import CorralError
from corral.protocol.events import TERMINAL_EVENTS, AgentCompleted, AgentResumed, AgentToolCall, AgentToolResult

START_TIMEOUT = 20.0
STEP_TIMEOUT = 60.0


@click.command()
@click.option("--fast", is_flag=True, help="Without the pauses for reading.")
def command(fast: bool) -> int:
    """A tour: a run that survives the death of its gateway.

    It uses a temporary data directory, a gateway of its own and the built-in demo model, so it needs
    no key and touches nothing else. It takes about half a minute.

    Exit codes: 0 everything happened as told (what this machine cannot show is said),
    1 something did not.
    """
    with tempfile.TemporaryDirectory(prefix="corral-demo-") as folder:
        try:
            return asyncio.run(_Tour(Path(folder), fast).go())
        except (_Broken, CorralError, GatewayUnreachable, TimeoutError) as error:
            print(f"corral demo: {str(error) or 'something took too long'}", file=sys.stderr)
            return FAILED


class _Broken(Exception):
    """Something that the tour promises did not happen."""


class _Tour:
    def __init__(self, folder: Path, fast: bool) -> None:
        self._settings = load_settings({"data_dir": folder / "data"}, {})
        self._fast = fast
        self._show = Transcript(sys.stdout, sys.stdout)
        self._gateway = _Gateway(self._settings)
        self._sandbox = False

    async def go(self) -> int:
        try:
            await self._tell("1. A gateway starts on a temporary data directory.")
            self._print(f"   {await self._gateway.start()} (process {self._gateway.pid})")
            async with self._client() as corral:
                await self._work(corral)
                await self._killed(corral)
        finally:
            await self._gateway.kill()
        await self._tell(
            "Everything happened as told." if self._sandbox else "What could be shown here happened as told."
        )
        self._print('   The same on your own machine: `corral serve`, and in a second terminal `corral run "list"`.')
        return OK

    # ---- the chapters

    async def _work(self, corral: Corral) -> None:
        await self._tell(
            "2. Nothing runs that policy does not allow. For this tour it allows writing files and running\n"
            "   commands in the sandbox. An agent writes a file, lists the folder, and counts the file's words."
        )
        tools = {"file.write": "allow", "bash.exec": "allow"}
        await corral.request("policy.update", layer="workspace", patch={"tools": tools, "bashMode": "sandbox"})
        text = "write: notes.txt :: Written by an agent.\nlist\nrun: wc -w notes.txt"
        results = await self._watch(corral.run(text, session_id="tour"))
        by_tool = {result.tool_name: result for result in results}
        for name in ("file.write", "file.list"):
            _expect(name in by_tool and by_tool[name].status == "success", f"{name} did not succeed")
        _expect("notes.txt" in by_tool["file.list"].output, "the file that was written is not in the folder")
        shell = by_tool.get("bash.exec")
        _expect(shell is not None, "the command was not called")
        assert shell is not None
        self._sandbox = shell.status == "success"
        if self._sandbox:
            _expect(shell.output.split()[:1] == ["4"], f"the command counted wrongly: {shell.output!r}")
            return
        code = shell.error.code if shell.error is not UNSET else shell.status
        _expect(code == "SANDBOX_UNAVAILABLE", f"the command failed: {shell.output}")
        await self._tell(
            "   This machine has no sandbox (bubblewrap), so the command was refused, never run outside it.\n"
            "   Skipped below: the command that is killed half-way. Debian, Ubuntu: apt-get install bubblewrap."
        )

    async def _killed(self, corral: Corral) -> None:
        if self._sandbox:
            await self._tell(
                "3. Now a command that writes a line and then takes long. In the middle of it the gateway is\n"
                "   killed with SIGKILL and started again."
            )
            text = "run: echo done >> ledger.txt; sleep 30\nread: ledger.txt"
        else:
            await self._tell(
                "3. Now a run of many steps. In the middle of it the gateway is killed with SIGKILL and started again."
            )
            text = "\n".join(["list"] * 30)
        struck = asyncio.Event()
        before = await self._listing(corral)
        results = await self._watch(corral.run(text, session_id="tour"), self._strike(struck))
        _expect(struck.is_set(), "the run ended before the gateway was killed")
        if self._sandbox:
            by_tool = {result.tool_name: result for result in results}
            _expect(by_tool["bash.exec"].status == "interrupted", "the command was not reported as interrupted")
            lines = by_tool["file.read"].output.count("done")
            _expect(lines == 1, f"the command ran {lines} times")
            await self._tell(
                "   The command had begun, so it was not begun again: its file has one line. The model was told."
            )
        else:
            _expect(len(results) == 30, f"{len(results)} results for 30 calls")
            await self._tell(
                "   Every step has one result; reading steps may be repeated, and the journal has each once."
            )
        versions = [item["id"] for item in await self._listing(corral)]
        _expect(versions == list(range(1, len(versions) + 1)), "the session's journal has a gap or a repeat")
        _expect(len(versions) > len(before), "the session's journal did not grow")
        self._print(f"   The session's journal: {len(versions)} events, none lost, none twice, across both gateways.")

    def _strike(self, struck: asyncio.Event) -> Callable[[Event], Any]:
        """What kills the gateway, at the event that says the time has come, and starts it again."""

        async def on_event(event: Event) -> None:
            due = AgentToolCall if self._sandbox else AgentToolResult
            if struck.is_set() or not isinstance(event.payload, due):
                return
            struck.set()
            if self._sandbox:
                await _until(lambda: any(self._settings.data_dir.rglob("ledger.txt")), "the command did not begin")
            self._show.note(f"kill -9 {self._gateway.pid}")
            await self._gateway.kill()
            await self._pause(1.0)
            url = await self._gateway.start()
            self._show.note(f"started again at {url} (process {self._gateway.pid})")

        return on_event

    # ---- helpers

    async def _watch(
        self, events: AsyncIterator[Event], on_event: Callable[[Event], Any] | None = None
    ) -> list[AgentToolResult]:
        """Show a run to its end; its results. With `on_event`, the run must have been taken up again."""
        results: list[AgentToolResult] = []
        resumed = False
        async with asyncio.timeout(STEP_TIMEOUT):
            async for event in events:
                self._show.event(event)
                resumed = resumed or isinstance(event.payload, AgentResumed)
                if isinstance(event.payload, AgentToolResult):
                    results.append(event.payload)
                if event.event in TERMINAL_EVENTS:
                    _expect(isinstance(event.payload, AgentCompleted), "the run failed")
                if on_event is not None:
                    await on_event(event)
        _expect(on_event is None or resumed, "the run was not taken up again")
        await self._pause(1.0)
        return results

    async def _listing(self, corral: Corral) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = []
        while True:
            after = items[-1]["id"] if items else 0
            page = await corral.request("sessions.history", sessionId="tour", afterId=after, limit=500)
            items += page["items"]
            if "nextCursor" not in page:
                return items

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[Corral]:
        url, token = self._address()
        async with Corral(url, token, address=self._address, on_state=self._on_state, name="corral-demo") as corral:
            yield corral

    def _address(self) -> tuple[str, str]:
        endpoint = read_endpoint(self._settings.data_dir)
        if endpoint is None:
            raise GatewayUnreachable("the gateway has not said where it listens")
        return endpoint.url, read_token(self._settings)

    def _on_state(self, state: str, reason: str) -> None:
        self._show.note(
            f"the client: {reason}" if state == "lost" else "the client: connected again, going on where it was"
        )

    async def _tell(self, text: str) -> None:
        self._print("")
        self._print(text)
        await self._pause(1.5)

    def _print(self, text: str) -> None:
        lines = visible(text).split("\n")
        if sys.stdout.isatty() and max(map(cells, lines)) > width():
            lines = fold(" ".join([lines[0], *(line.strip() for line in lines[1:])]), width(), "   ")
        print("\n".join(lines), flush=True)

    async def _pause(self, seconds: float) -> None:
        if not self._fast:
            await asyncio.sleep(seconds)


class _Gateway:
    """A gateway in a process of its own, on a free port."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> str:
        """Start one and wait until it listens; its URL."""
        data_dir = self._settings.data_dir
        data_dir.mkdir(mode=0o700, exist_ok=True)
        # The tour's own settings: nothing that was set for a real gateway reaches this one.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("CORRAL_")}
        arguments = ["-m", "corral", "serve", "--port", "0", "--data-dir", str(data_dir), "--model", "demo"]
        with (data_dir / "gateway.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, *arguments, stdout=asyncio.subprocess.PIPE, stderr=log, env=environment
            )
        assert self._process.stdout is not None
        async with asyncio.timeout(START_TIMEOUT):
            line = (await self._process.stdout.readline()).decode()
        if not line.startswith("listening on "):
            raise _Broken(f"the gateway did not start:\n{(data_dir / 'gateway.log').read_text()[-2000:]}")
        return line.removeprefix("listening on ").strip()

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _Broken(otherwise)


async def _until(holds: Callable[[], bool], otherwise: str) -> None:
    try:
        async with asyncio.timeout(STEP_TIMEOUT):
            while not holds():  # noqa: ASYNC110 - what another process does sets no event here
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise _Broken(otherwise) from None
