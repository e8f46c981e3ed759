"""The tool interface: a call and its context in, one result out, with one error model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol

from msgspec import Struct

from corral.protocol.types import BashMode, BashNetwork, Risk, RuntimeMode, ToolStatus

Effect = Literal["repeatable", "at_most_once", "ask"]


class ToolSpec(Struct, kw_only=True, frozen=True):
    """What a tool is. `parameters` is the JSON Schema of its arguments.

    `effect` says what becomes of a call whose end nobody saw, because the gateway died in it:
    `repeatable` (reads: twice is the same as once) is simply run again; `at_most_once` ends as
    `interrupted`; so does `ask`, and a person is asked whether to run it again as a new call.
    """

    name: str
    description: str
    parameters: dict[str, Any]
    risk: Risk
    effect: Effect

    @property
    def repeatable(self) -> bool:
        return self.effect == "repeatable"


class Call(Struct, kw_only=True, frozen=True):
    """`args` have been checked against the tool's schema by `ToolExecutor.check`."""

    id: str
    tool_name: str
    args: dict[str, Any]


class CallContext(Struct, kw_only=True, frozen=True):
    """Where and how a call runs; all of it comes from rows and policy, none from the model.

    `root` is the session's folder: an absolute path that exists. `timeout_ms` bounds the call
    whatever its own `timeoutMs` says.
    """

    tenant_id: str
    workspace_id: str
    session_id: str
    run_id: str
    root: Path
    runtime_mode: RuntimeMode
    bash_mode: BashMode
    bash_network: BashNetwork
    timeout_ms: int


class Failure(Struct, kw_only=True, frozen=True):
    """`code` is a protocol ErrorCode; `message` is for the model and the person."""

    code: str
    message: str


class ToolOutcome(Struct, kw_only=True, frozen=True):
    """What came of a call.

    `output` is what the model sees, at most `OUTPUT_LIMIT` characters: where more came, head
    and tail around a line that says how much is missing, `truncated` is set, and `full` is the
    whole in UTF-8 (itself bounded by `FULL_OUTPUT_LIMIT` bytes).
    """

    status: ToolStatus
    output: str
    duration_ms: int
    error: Failure | None = None
    truncated: bool = False
    full: bytes | None = None


OUTPUT_LIMIT = 16_000
FULL_OUTPUT_LIMIT = 8 * 1024 * 1024


class Facts(Struct, kw_only=True, frozen=True):
    """What policy rules may speak of, parsed from a call; absent where it makes no sense."""

    kind: Literal["shell", "argv", "path", "url", "none"] = "none"
    value: Any = None


class ToolExecutor(Protocol):
    """Runs tools. `corral.executor.service` implements it with one driver for each runtime mode."""

    def specs(self) -> list[ToolSpec]:
        """Every tool there is."""
        ...

    def spec(self, tool_name: str) -> ToolSpec | None: ...

    def check(self, tool_name: str, args: dict[str, Any]) -> str | None:
        """What is wrong with the arguments, in words that the model can act on; None if nothing is.

        An unknown tool is such a problem too; the words name the tools there are.
        """
        ...

    async def ready(self, context: CallContext) -> None:
        """Raise SandboxUnavailable if calls that need a sandbox could not run in this context."""
        ...

    async def execute(self, call: Call, context: CallContext) -> ToolOutcome:
        """Run one call to its end. Never raises for what the tool did; only for cancellation.

        When it is cancelled, the call's whole process tree is dead before CancelledError leaves.
        """
        ...

    async def notes(self, context: CallContext, characters: int) -> str:
        """What the folder's memory says, marked as data for the model; empty if there is nothing.

        At most so many characters of the files, with a line where something was left out.
        """
        ...

    def may_have_notes(self, context: CallContext) -> bool:
        """False if `notes` would find nothing, told by a look at two names on the disk. Blocks for that look."""
        ...

    async def takes_notes(self, context: CallContext) -> bool:
        """Whether `memory.append` could write in this context's folder, as far as is known beforehand."""
        ...

    def leftover(self, run_id: str) -> list[str]:
        """Processes of the run that are known to live on (`bashMode: host` only), as `pid: command`."""
        ...

    async def end_leftovers(self) -> None:
        """End what a gateway that died left running, before this one takes up a run. Once; then it is free."""
        ...

    async def close(self) -> None: ...
