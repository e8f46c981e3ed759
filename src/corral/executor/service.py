"""The tool executor: checks, one driver for each runtime mode, one error model, one result."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from msgspec import structs

from corral.clock import Clock, SystemClock
from corral.executor import catalogue
from corral.executor.api import Call, CallContext, Failure, ToolOutcome, ToolSpec
from corral.executor.catalogue import Arguments
from corral.executor.http import Fetcher
from corral.executor.local import LocalDriver
from corral.executor.memory import Memory
from corral.executor.output import Result, bounded
from corral.protocol.errors import CorralError, ErrorCode, SandboxUnavailable
from corral.protocol.types import RuntimeMode

log = logging.getLogger(__name__)

_LARGE = 256 * 1024
MEMORY_TOOLS = frozenset({"memory.read", "memory.append", "memory.search"})


class Driver(Protocol):
    """Runs calls in one runtime mode. `LocalDriver` says what each method does."""

    @property
    def memory(self) -> Memory: ...

    async def ready(self, context: CallContext) -> None: ...

    async def execute(self, args: Arguments, context: CallContext) -> Result: ...

    def leftover(self, run_id: str) -> list[str]: ...

    async def end_leftovers(self) -> None: ...

    async def close(self) -> None: ...


class Executor:
    """The `ToolExecutor` of the gateway."""

    def __init__(
        self,
        *,
        clock: Clock | None = None,
        data_dir: Path | None = None,
        environ: Mapping[str, str] | None = None,
        allowed_private: frozenset[tuple[str, int]] = frozenset(),
        sandbox_path: str | None = None,
        ask_again: Collection[str] = (),
        mark: str | None = None,
        memory: bool = True,
    ) -> None:
        """`data_dir` is Corral's own directory, which no tool sees even where it lies inside a session's
        folder. `allowed_private` are (host, port) that http.request may reach although their addresses
        are private: from server settings only. `sandbox_path` is where bubblewrap is looked for, like PATH.
        `ask_again` names tools whose interrupted calls a person is asked about: their effect is `ask`. Raises
        ValueError for a name that is none of a tool's, or of one that is simply run again. `mark` is what the
        processes of one data directory have in common (`leftovers.mark_for`), over the lives of its gateways.
        Without `memory` there are no memory tools.
        """
        self._clock = clock or SystemClock()
        self._left_out = frozenset() if memory else MEMORY_TOOLS
        self._specs = {spec.name: _asking(spec) if spec.name in ask_again else spec for spec in catalogue.SPECS}
        if unknown := sorted(set(ask_again) - set(self._specs)):
            raise ValueError(f"{unknown[0]} is no tool; the tools are {', '.join(self._specs)}")
        hidden = () if data_dir is None else (data_dir.resolve(),)
        self._drivers: dict[RuntimeMode, Driver] = {
            "local": LocalDriver(
                environ=os.environ if environ is None else environ,
                hidden=hidden,
                fetcher=Fetcher(allowed_private=allowed_private),
                mark=mark,
                sandbox_path=sandbox_path,
                clock=self._clock,
            )
        }

    def specs(self) -> list[ToolSpec]:
        return [spec for name, spec in self._specs.items() if name not in self._left_out]

    def spec(self, tool_name: str) -> ToolSpec | None:
        return None if tool_name in self._left_out else self._specs.get(tool_name)

    def check(self, tool_name: str, args: dict[str, Any]) -> str | None:
        if tool_name in self._left_out:
            return f"there is no tool {tool_name!r}: the server is set up without memory"
        return catalogue.problem(tool_name, args)

    async def ready(self, context: CallContext) -> None:
        await self._driver(context).ready(context)

    async def execute(self, call: Call, context: CallContext) -> ToolOutcome:
        begin = self._clock.monotonic()
        result = await self._run(call, context)
        if len(result.text) > _LARGE:
            output, truncated, full = await asyncio.to_thread(bounded, result.text)
        else:
            output, truncated, full = bounded(result.text)
        return ToolOutcome(
            status="failed" if result.failure else "success",
            output=output,
            duration_ms=max(0, round((self._clock.monotonic() - begin) * 1000)),
            error=result.failure,
            truncated=truncated,
            full=full,
        )

    async def notes(self, context: CallContext, characters: int) -> str:
        return await self._driver(context).memory.notes(context, characters)

    def may_have_notes(self, context: CallContext) -> bool:
        return self._driver(context).memory.may_have_notes(context)

    async def takes_notes(self, context: CallContext) -> bool:
        return await self._driver(context).memory.writable(context)

    def leftover(self, run_id: str) -> list[str]:
        return [entry for driver in self._drivers.values() for entry in driver.leftover(run_id)]

    async def end_leftovers(self) -> None:
        for driver in self._drivers.values():
            await driver.end_leftovers()

    async def close(self) -> None:
        for driver in self._drivers.values():
            await driver.close()

    def _driver(self, context: CallContext) -> Driver:
        """The driver of the run's mode, and never another's: a call that has none does not run."""
        driver = self._drivers.get(context.runtime_mode)
        if driver is None:
            raise SandboxUnavailable(
                f"no sandbox host for runtime mode `{context.runtime_mode}` is set up here; nothing was run. "
                "Switch the session to runtime mode `local` to run on this machine"
            )
        return driver

    async def _run(self, call: Call, context: CallContext) -> Result:
        """The call's result; the one place where a tool's exception becomes an error of the protocol."""
        try:
            args = catalogue.parse(call.tool_name, call.args)
        except KeyError:
            return _failed(ErrorCode.TOOL_EXEC_FAILED, f"there is no tool {call.tool_name[:128]!r}")
        except ValueError as error:
            return _failed(ErrorCode.TOOL_EXEC_FAILED, str(error))
        try:
            return await self._driver(context).execute(args, context)
        except CorralError as error:
            return _failed(error.code, error.message)
        except Exception:
            log.exception("tool %s failed", call.tool_name, extra={"action": "tool.error", "tool_call_id": call.id})
            return _failed(ErrorCode.INTERNAL_ERROR, "the tool failed inside the server; its log says why")


def _asking(spec: ToolSpec) -> ToolSpec:
    if spec.repeatable:
        raise ValueError(f"{spec.name} only reads: it is run again after a crash, and nobody need be asked")
    return structs.replace(spec, effect="ask")


def _failed(code: ErrorCode, message: str) -> Result:
    return Result(text=f"{message}\n", failure=Failure(code=code, message=message))
