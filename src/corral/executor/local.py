"""The local driver: tools on this machine, commands in the bubblewrap sandbox unless policy says `host`."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from corral.clock import Clock, SystemClock
from corral.executor import catalogue
from corral.executor.api import CallContext, Failure
from corral.executor.catalogue import Arguments
from corral.executor.files import Files
from corral.executor.http import Fetcher
from corral.executor.leftovers import VARIABLE
from corral.executor.memory import Memory
from corral.executor.output import Result, joined
from corral.executor.processes import Ended, LauncherLost, Prepared, Processes, Program
from corral.executor.ready import ReadySandboxes
from corral.executor.sandbox import GIT, LIMITS, SEARCH_PATH, Sandbox
from corral.protocol.errors import ErrorCode, LimitReached, SandboxUnavailable, ToolExecFailed

log = logging.getLogger(__name__)

_HOST_ENV = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TERM", "TMPDIR")
_REMEMBERED_RUNS = 1000
"""Runs whose leftover processes are remembered."""


class LocalDriver:
    """Runs the calls of runs in runtime mode `local`."""

    def __init__(
        self,
        *,
        environ: Mapping[str, str],
        hidden: tuple[Path, ...],
        fetcher: Fetcher,
        mark: str | None = None,
        sandbox_path: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`hidden` are folders that no tool may see even inside a session's folder (the data
        directory); `mark` tells this data directory's processes from all others (`leftovers.py`);
        `sandbox_path` is where bubblewrap is looked for, by default the gateway's PATH."""
        self._processes = Processes(mark)
        self._sandbox = Sandbox(self._processes, environ=environ, hidden=hidden, search_path=sandbox_path)
        self._ready = ReadySandboxes(self._processes, self._sandbox)
        self._host_env = {name: value for name, value in environ.items() if name in _HOST_ENV or name.startswith("LC_")}
        self._host_env.setdefault("PATH", SEARCH_PATH)
        self._host_env |= GIT
        # Threads of its own: a slow disk must not use up those that the rest of the gateway shares.
        self._threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="corral-tool")
        self._files = Files(self._threads, self._processes, hidden)
        clock = clock or SystemClock()
        self.memory = Memory(self._files, lambda: datetime.fromtimestamp(clock.now_ms() / 1000, UTC).date())
        self._fetcher = fetcher
        self._leftover: dict[str, list[str]] = {}
        self._tools: dict[type[Arguments], Callable[[Any, CallContext], Awaitable[Result]]] = {
            catalogue.BashExec: self._bash,
            catalogue.ProcessExec: self._process,
            catalogue.FileRead: self._files.read,
            catalogue.FileList: self._files.list,
            catalogue.FileSearch: self._files.search,
            catalogue.FileWrite: self._files.write,
            catalogue.FileEdit: self._files.edit,
            catalogue.HttpRequest: self._fetcher.request,
            catalogue.MemoryRead: self.memory.read,
            catalogue.MemoryAppend: self.memory.append,
            catalogue.MemorySearch: self.memory.search,
        }

    async def ready(self, context: CallContext) -> None:
        """Raise SandboxUnavailable if commands could not run the way that policy wants."""
        if context.bash_mode != "host":
            await self._sandbox.require()

    async def execute(self, args: Arguments, context: CallContext) -> Result:
        """Run one call. Raises CorralError for what went wrong, TimeoutError when time is up."""
        tool = self._tools[type(args)]
        if isinstance(args, (catalogue.BashExec, catalogue.ProcessExec)):
            return await tool(args, context)  # has its own time-out, to keep what was printed until then
        try:
            async with asyncio.timeout(context.timeout_ms / 1000):
                return await tool(args, context)
        except TimeoutError as error:
            raise timed_out(context.timeout_ms) from error

    def leftover(self, run_id: str) -> list[str]:
        """Processes of the run that could not be killed and are still there."""
        alive = [entry for entry in self._leftover.get(run_id, []) if _alive(entry)]
        if not alive:
            self._leftover.pop(run_id, None)
        return alive

    async def end_leftovers(self) -> None:
        """End what a gateway that died on this data directory left running."""
        await self._processes.end_leftovers()

    async def close(self) -> None:
        await self._ready.close()
        await self._processes.close()
        await self._fetcher.close()
        await asyncio.to_thread(self._threads.shutdown)

    async def _bash(self, args: catalogue.BashExec, context: CallContext) -> Result:
        path = self._host_env["PATH"] if context.bash_mode == "host" else SEARCH_PATH
        # Without start-up files: what the workspace or a home folder holds must not run unasked. `--` ends
        # the options, so that a text beginning with a dash is a command like any other.
        bash = shutil.which("bash", path=path) is not None
        shell = [*(["bash", "--noprofile", "--norc"] if bash else ["sh"]), "-c", "--"]
        if not bash or context.bash_mode == "host":
            return await self._run([*shell, args.command], args.timeout_ms, context)
        prepared = self._ready.take(shell, args.command, context)
        if prepared is None:
            result = await self._run([*shell, args.command], args.timeout_ms, context)
        else:
            result = await self._in_prepared(prepared, [*shell, args.command], args.timeout_ms, context)
        # Once a session has run a command it is likely to run another.
        self._ready.prepare(shell, context)
        return result

    async def _in_prepared(
        self, prepared: Prepared, argv: list[str], wanted_ms: int | None, context: CallContext
    ) -> Result:
        """Like `_run`, in a sandbox that waits for the last of `argv`."""
        timeout_ms = _timeout_ms(wanted_ms, context)
        try:
            ended = await self._processes.run_prepared(prepared, argv[-1], timeout_ms / 1000)
        except LauncherLost as error:
            raise self._lost(error, context) from error
        if not ended.given:
            # It ended before it had the command: nothing was run, and it is as if there had been no sandbox ready.
            return await self._run(argv, wanted_ms, context)
        return self._result(ended, prepared.program, timeout_ms)

    async def _process(self, args: catalogue.ProcessExec, context: CallContext) -> Result:
        return await self._run(args.argv, args.timeout_ms, context)

    async def _run(self, argv: list[str], wanted_ms: int | None, context: CallContext) -> Result:
        """The one path of every command: into the sandbox, or onto the host if and only if policy says so."""
        timeout_ms = _timeout_ms(wanted_ms, context)
        if context.bash_mode == "host":
            program = Program(
                argv=argv,
                env={**self._host_env, "PWD": str(context.root), VARIABLE: self._processes.mark},
                cwd=str(context.root),
                limits={"CORE": LIMITS["CORE"]},
            )
        else:
            program = await self._sandbox.program(argv, context.root, context.bash_network)
        try:
            ended = await self._processes.run(program, timeout_ms / 1000)
        except LauncherLost as error:
            raise self._lost(error, context) from error
        self._remember(context.run_id, ended.leftover)
        return self._result(ended, program, timeout_ms)

    def _lost(self, error: LauncherLost, context: CallContext) -> ToolExecFailed:
        """What a call fails with whose supervisor was lost: what it started may have had its effect."""
        log.error("a command's supervisor was lost", exc_info=error, extra={"action": "tool.lost"})
        if context.bash_mode == "host":
            self._remember(context.run_id, ["?: processes of a command whose supervisor was killed"])
        return ToolExecFailed(f"the command was cut off: {error}")

    def _result(self, ended: Ended, program: Program, timeout_ms: int) -> Result:
        if ended.errno is not None and program.sandbox:
            self._sandbox.distrust()
            log.error("the sandbox did not start: %s", os.strerror(ended.errno), extra={"action": "sandbox.failed"})
            raise SandboxUnavailable("the sandbox did not start; nothing was run")
        if ended.errno is not None:
            raise ToolExecFailed(f"cannot run {program.argv[0][:200]}: {os.strerror(ended.errno)}")
        if not ended.started and not ended.timed_out:
            said = ended.stderr.text()
            if said.startswith("bwrap: execvp "):
                # All of it is bubblewrap's own: no command was there to print anything.
                reason = said.strip().rpartition(": ")[2]
                raise ToolExecFailed(f"cannot run {program.argv[program.argv.index('--') + 1][:200]}: {reason}")
            self._sandbox.distrust()
            log.error(
                "the sandbox gave up: %s",
                said[:500].strip(),
                extra={"action": "sandbox.failed"},
            )
            raise SandboxUnavailable("the sandbox could not be set up; nothing was run")
        status = None if ended.timed_out else ended.exit_status
        text = joined(ended.stdout.text(), ended.stderr.text(), status)
        if ended.timed_out:
            late = timed_out(timeout_ms)
            text = joined(text, f"{late.message}\n", None)
            return Result(text=text, failure=Failure(code=late.code, message=late.message))
        if ended.exit_status:
            message = f"exit status {ended.exit_status}"
            return Result(text=text, failure=Failure(code=ErrorCode.TOOL_EXEC_FAILED, message=message))
        return Result(text=text)

    def _remember(self, run_id: str, leftover: list[str]) -> None:
        if leftover:
            self._leftover.setdefault(run_id, []).extend(leftover)
            while len(self._leftover) > _REMEMBERED_RUNS:
                self._leftover.pop(next(iter(self._leftover)))


def _timeout_ms(wanted_ms: int | None, context: CallContext) -> int:
    return min(wanted_ms or context.timeout_ms, context.timeout_ms)


def timed_out(timeout_ms: int) -> LimitReached:
    """The error of a call whose time was up."""
    return LimitReached(f"killed after {timeout_ms} ms: the call's time was up")


def _alive(entry: str) -> bool:
    pid = entry.partition(":")[0]
    return not pid.isdigit() or Path("/proc", pid).exists()
