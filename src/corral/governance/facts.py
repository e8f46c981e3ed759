"""The facts of one call: everything that policy judges it by.

Made before the decision and outside of any transaction, because paths are resolved on the disk;
deciding then touches nothing but these facts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec import Struct

from corral.executor.facts import facts as executor_facts
from corral.governance import shell
from corral.protocol.types import Risk
from corral.storage.rows import SessionRow

MAX_ITEMS = 4096
"""Items of one list or object that rules see."""
MAX_DEPTH = 8
"""How deep lists and objects may lie in each other to be seen by rules."""


class CallFacts(Struct, kw_only=True, frozen=True):
    """The facts of the contract's table; what makes no sense for a tool, or could not be parsed, is None.

    `tool` and `risk` alone make facts too: a rule that asks for more then fails, to the strict side.
    """

    tool: str
    risk: Risk
    args: dict[str, Any] | None = None
    session: dict[str, Any] | None = None
    actor: str | None = None
    shell: shell.ShellFacts | None = None
    argv: list[str] | None = None
    path: dict[str, Any] | None = None
    url: dict[str, Any] | None = None

    def value(self, name: str) -> Any:
        """One fact as rules see it. Raises KeyError where this call has no such fact."""
        if name == "shell" and self.shell is not None:
            return shell_value(self.shell.simple, self.shell.commands)
        found = getattr(self, name) if name in self.__struct_fields__ else None
        if found is None:
            raise KeyError(name)
        _check_size(found, MAX_DEPTH)
        return found

    def as_dict(self) -> dict[str, Any]:
        """All facts there are, in JSON types, for showing: nothing is left out for its length."""
        whole = {name: getattr(self, name) for name in self.__struct_fields__}
        if self.shell is not None:
            whole["shell"] = shell_value(self.shell.simple, self.shell.commands)
        return {name: value for name, value in whole.items() if value is not None}


def shell_value(simple: bool, commands: tuple[shell.Command, ...]) -> dict[str, Any]:
    """`shell` as the contract shows it: `{simple, commands: [{name, base, argv}]}`."""
    return {
        "simple": simple,
        "commands": [{"name": each.name, "base": each.base, "argv": list(each.argv)} for each in commands],
    }


def session_facts(session: SessionRow, runtime_mode: str | None = None) -> dict[str, Any]:
    """The fact `session`. `runtime_mode` is the run's, where it is not the session's present one."""
    return {"id": session.id, "agentId": session.agent_id, "runtimeMode": runtime_mode or session.runtime_mode}


def facts_for(
    tool_name: str,
    risk: Risk,
    args: dict[str, Any],
    *,
    session: dict[str, Any] | None,
    actor: str | None,
    root: Path | None,
) -> CallFacts:
    """The facts of a call whose arguments have passed `ToolExecutor.check`.

    `session` is `session_facts(row)`, `actor` the subject who started the run, `root` the session's
    folder (None: not known, so that there is no `path`). Reads links on the disk for file tools; for the
    rest it is pure. Never raises for what the arguments hold: what cannot be parsed is missing.
    """
    parsed: dict[str, Any] = {}
    if tool_name == "bash.exec":
        command = args.get("command")
        if isinstance(command, str):
            parsed["shell"] = shell.parse(command)
    elif root is not None or not tool_name.startswith("file."):
        found = executor_facts(tool_name, args, root or Path("/"))
        if found.kind != "none":
            parsed[found.kind] = found.value
    return CallFacts(tool=tool_name, risk=risk, args=args, session=session, actor=actor, **parsed)


def _check_size(value: Any, depth: int) -> None:
    """Raise KeyError for what rules are not given: then the fact is missing as a whole, never in parts.

    A part left out would be worse than none: `!has(args.x)` would be true of it.
    """
    if not isinstance(value, dict | list):
        return
    if depth <= 0 or len(value) > MAX_ITEMS:
        raise KeyError("too big for rules")
    for item in value.values() if isinstance(value, dict) else value:
        _check_size(item, depth - 1)
