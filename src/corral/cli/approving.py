"""Calls that need a person: shown exactly as they are, and decided by a key where that may be.

What is approved must be what was read. So nothing of a call is cut, whatever a terminal would act
on or would not show is written as an escape, and each line of a value is marked as one, so that no
value can draw the end of the question.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

from corral.cli.columns import cells
from corral.cli.show import Transcript, width
from corral.cli.terminal import is_interactive, keys
from corral.client import Corral, GatewayUnreachable
from corral.protocol.errors import CorralError
from corral.protocol.methods import METHODS
from corral.protocol.types import Approval

LONG = 40
"""Lines of a call that are shown at once; the rest must have been looked at before it can be approved."""


class Approver:
    """Asks for the approvals of the runs that are watched, one at a time. Close it at the end."""

    def __init__(self, corral: Corral, show: Transcript, *, asks: bool, silent: bool = False, flags: str = "") -> None:
        """`asks` False only tells how to decide elsewhere; `flags` is what a command there needs.
        A silent one does neither."""
        self._silent = silent
        self._corral = corral
        self._show = show
        self._asks = asks and is_interactive()
        self._flags = flags
        self._waiting: dict[str, Approval] = {}
        self._task: asyncio.Task[None] | None = None
        show.asked = self._asks and self._may()

    def required(self, approval: Approval) -> None:
        """A call waits. The same one may be told twice."""
        if self._silent or approval.approval_id in self._waiting:
            return
        self._waiting[approval.approval_id] = approval
        if not self._asks or not self._may():
            self._tell(approval)
        elif self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._ask_all())

    def resolved(self, approval: Approval) -> None:
        """A call waits no longer, whoever has decided."""
        self._waiting.pop(approval.approval_id, None)
        if self._task is not None and self._asked == approval.approval_id and not self._deciding:
            self._task.cancel()
            self._task = asyncio.get_running_loop().create_task(self._ask_all(self._task))

    async def close(self) -> None:
        """Ask no longer."""
        self._waiting.clear()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    # ---- asking

    _asked = ""
    _deciding = False

    async def _ask_all(self, before: asyncio.Task[None] | None = None) -> None:
        if before is not None:
            await asyncio.wait([before])  # it gives the terminal back first
        while self._waiting:
            approval = next(iter(self._waiting.values()))
            self._asked, self._deciding = approval.approval_id, False
            try:
                await self._ask(approval)
            finally:
                self._asked = ""

    async def _ask(self, approval: Approval) -> None:
        lines = list(call_lines(approval, width()))
        hidden = len(lines) > LONG
        self._print(lines[:LONG])
        with keys() as pressed:
            while True:
                self._prompt(len(lines) - LONG if hidden else 0)
                try:
                    key = (await pressed.next()).lower()
                except asyncio.CancelledError:
                    self._show.answered("")
                    raise
                if key == "v" and hidden:
                    self._show.answered(key)
                    self._print(lines[LONG:])
                    hidden = False
                elif key == "":
                    self._show.answered("")
                    self._tell(approval)
                    self._waiting.pop(approval.approval_id, None)
                    return
                elif key == "r" or (key in ("a", "s") and not hidden):
                    self._show.answered(key)
                    break
                else:
                    self._show.rewind()
        self._deciding = True
        await self._decide(approval, key)

    async def _decide(self, approval: Approval, key: str) -> None:
        """Send the decision. What came of it is told by the run's next events, unless it was refused."""
        rest = {"remember": "session"} if key == "s" else {}
        decision = "reject" if key == "r" else "approve"
        self._waiting.pop(approval.approval_id, None)
        try:
            await self._corral.request("approval.resolve", approvalId=approval.approval_id, decision=decision, **rest)
        except CorralError as error:
            self._show.note(f"not {'rejected' if key == 'r' else 'approved'}: {error.message}")
            self._tell(approval)
        except GatewayUnreachable as error:
            self._show.note(f"not decided: {error}")

    def _prompt(self, more: int) -> None:
        if more:
            self._show.ask(f"{more} more lines: v shows them (needed to approve) · r reject ")
        elif width() < 76:
            self._show.ask("a approve · r reject · s approve for session ")
        else:
            self._show.ask("a approve · r reject · s approve, and this same call again in this session ")

    # ---- telling

    def _print(self, lines: list[str]) -> None:
        for line in lines:
            self._show.say(line)

    def _tell(self, approval: Approval) -> None:
        """How to decide it elsewhere."""
        command = f"corral approvals approve {approval.approval_id}{self._flags}"
        if self._asks and not self._may():
            self._show.note("you may not decide this; somebody with the role can:")
        else:
            self._show.note("waiting for somebody to decide this, in another terminal:")
        self._show.say(f"  {command}   (or reject)" if len(command) + 14 < width() else f"  {command}")

    def _may(self) -> bool:
        return bool(METHODS["approval.resolve"].roles & set(self._corral.hello.principal.roles))


def call_lines(approval: Approval, columns: int) -> Iterator[str]:
    """The whole call, in lines of at most `columns` cells where that is wide enough to be readable."""
    reason = f": {exact(approval.reason)}" if approval.reason else ""
    yield from _wrapped(f"{exact(approval.tool_name)} ({approval.risk} risk){reason}", columns, "? ", "  ")
    for name, value in approval.args.items():
        yield from _argument(exact(name), value, columns)
    if not approval.args:
        yield "  without arguments"


def _argument(name: str, value: Any, columns: int) -> Iterator[str]:
    if not isinstance(value, str):
        yield from _wrapped(f"{name} = {exact(json.dumps(value, ensure_ascii=False))}", columns, "  ", "  │ ")
    elif "\n" not in value and cells(value) + len(name) + 8 <= columns:
        yield f"  {name}: {exact(value)}"
    else:
        lines = value.split("\n")
        yield f"  {name}:" + (f" ({len(lines)} lines)" if len(lines) > 1 else "")
        for line in lines:
            yield from _wrapped(exact(line), columns, "  │ ", "  ┊ ")


def exact(text: str) -> str:
    """`text` with everything that does not show as itself written as an escape, the backslash too."""
    return "".join(_escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    if letter.isprintable() and letter != "\\":
        return letter
    if letter == "\\":
        return "\\\\"
    code = ord(letter)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _wrapped(text: str, columns: int, first: str, rest: str) -> Iterator[str]:
    room = max(20, columns - max(len(first), len(rest)) - 1)
    line, used, lead = "", 0, first
    for letter in text:
        wide = cells(letter)
        if used + wide > room:
            yield lead + line
            line, used, lead = "", 0, rest
        line += letter
        used += wide
    yield lead + line
