"""The second half of a step: run the calls that may run, journal each result, wait for people."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from msgspec import Struct

from corral import faults
from corral.core.again import record_interrupted
from corral.core.calls import changed_since, interrupted, not_approved, refused
from corral.core.ending import made_by_model, record_result
from corral.core.judge import args_hash, binding_of, current, question
from corral.core.state import Deps, Fence, LeaseLost, Loaded, open_calls_of, park, policy_of
from corral.core.traces import tool_span
from corral.executor.api import Call, CallContext, ToolOutcome
from corral.governance.policy import EffectivePolicy
from corral.models.api import AssistantMessage, ToolMessage
from corral.protocol.errors import ErrorCode
from corral.protocol.types import ApprovalStatus
from corral.storage.repositories import Transaction
from corral.storage.rows import ApprovalRow, RunRow, ToolRunRow
from corral.tracing import Stopwatch


class Cleared(Struct, kw_only=True, frozen=True):
    """A call that may start, under this policy."""

    policy: EffectivePolicy


class Unknown(Struct, frozen=True):
    """A call that a process which died had started: nobody knows what came of it."""


_Clearance = Cleared | Unknown | ToolOutcome


class ToolStep:
    """Runs the calls of one run's last message."""

    def __init__(self, deps: Deps, fence: Fence) -> None:
        self._deps = deps
        self._fence = fence
        self.running = 0

    async def take(self, state: Loaded, context: CallContext, *, fresh: bool) -> bool:
        """Run the next of the open calls that need not wait; the ones before them have been run.

        A row of repeatable calls runs together, any other alone. What waits for a person holds
        nothing else up. Where nothing is left to do but wait, the run is parked. Says whether it is.
        `fresh` says that the decisions were made a moment ago by this process.
        """
        ready = [call for call in state.open_calls if not _waits(state.approvals.get(call.id))]
        if not ready:
            return await self._park(state)
        group = ready[:1]
        if ready[0].repeatable:
            group = ready[: next((index for index, call in enumerate(ready) if not call.repeatable), len(ready))]
            if not (fresh and ready[0].position == 0 and all(call.decision == "allow" for call in group)):
                group = await self._cleared_of(state, context, group)
            await self._run_together(state, context, group)
            return False
        call = group[0]
        faults.reached("tool.decided", call.tool_name, call.session_id)
        cleared = await self._fence.commit(self._unit_of_start(state, context, call))
        if isinstance(cleared, ToolOutcome):
            await self._record(state, call, cleared)
        elif isinstance(cleared, Unknown):
            return await self._interrupted(state, context, call)
        else:
            # The policy that let the call start is also the one that says how it runs.
            await self._run_call(state, current(context, cleared.policy), call)
        return False

    # ---- may it start

    def _clear(self, tx: Transaction, state: Loaded, context: CallContext, call: ToolRunRow) -> _Clearance:
        """What the decision on a call, the approval, and policy as it is now say together."""
        row = tx.tool_runs.get(call.tenant_id, call.id)
        if row is None or row.state == "finished":
            raise LeaseLost
        if row.state == "started":
            # Started by a process that died: what came of it is unknown, and it is never started again.
            return Unknown()
        spec = self._deps.executor.spec(row.tool_name)
        if spec is None or row.args_hash != args_hash(row.tool_name, call.args):
            return changed_since()
        policy = policy_of(tx, state.run)
        verdict = policy.decide(question(context, state.run, row.tool_name, spec.risk, row.args))
        if verdict.decision == "deny":
            return refused(row.tool_name, verdict.reason)
        if row.decision == "approval-required":
            approval = tx.approvals.get(row.tenant_id, state.approvals[row.id].id)
            if approval is None or approval.status != ApprovalStatus.APPROVED:
                return not_approved(approval or state.approvals[row.id])
            if approval.binding != binding_of(spec, row.args, context, policy) or approval.args_hash != row.args_hash:
                return changed_since()
        elif row.decision != "allow":
            return refused(row.tool_name, row.reason or "it was denied")
        elif verdict.decision != "allow" and not self._still_granted(tx, state, context, row, policy):
            return refused(row.tool_name, f"policy has changed since the decision: {verdict.reason}")
        return Cleared(policy=policy)

    def _still_granted(
        self, tx: Transaction, state: Loaded, context: CallContext, row: ToolRunRow, policy: EffectivePolicy
    ) -> bool:
        """Whether a grant covers a call that policy alone would ask a person for."""
        spec = self._deps.executor.spec(row.tool_name)
        if spec is None:
            return False
        run, now = state.run, self._deps.clock.now_ms()
        binding = binding_of(spec, row.args, context, policy)
        standing = self._deps.approvals.standing
        return standing(tx, run, row.tool_name, binding, now, four_eyes=policy.four_eyes) is not None

    def _unit_of_start(self, state: Loaded, context: CallContext, call: ToolRunRow):  # type: ignore[no-untyped-def]
        now = self._deps.clock.now_ms()

        def unit(tx: Transaction) -> _Clearance:
            """Record that the call starts now; committed before the tool runs."""
            cleared = self._clear(tx, state, context, call)
            if isinstance(cleared, Cleared):
                tx.tool_runs.update(call.tenant_id, call.id, state="started", started_at=now)
            return cleared

        return unit

    async def _cleared_of(self, state: Loaded, context: CallContext, group: Sequence[ToolRunRow]) -> list[ToolRunRow]:
        """Those of some repeatable calls that may start; the others get their results."""
        verdicts = await self._deps.store.read(lambda tx: [self._clear(tx, state, context, call) for call in group])
        for call, cleared in zip(group, verdicts, strict=True):
            if isinstance(cleared, Unknown):
                # Only by a gateway to which this tool was not repeatable: its start was recorded.
                await self._record(state, call, interrupted(call))
            elif isinstance(cleared, ToolOutcome):
                await self._record(state, call, cleared)
        return [call for call, cleared in zip(group, verdicts, strict=True) if isinstance(cleared, Cleared)]

    # ---- running

    async def _run_together(self, state: Loaded, context: CallContext, group: Sequence[ToolRunRow]) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                for call in group:
                    tasks.create_task(self._run_call(state, context, call))
        except BaseExceptionGroup as errors:
            # All of a group fail for one reason (the lease, the store); the first tells it.
            raise errors.exceptions[0] from errors

    async def _run_call(self, state: Loaded, context: CallContext, row: ToolRunRow) -> None:
        self.running += 1
        try:
            call = Call(id=row.id, tool_name=row.tool_name, args=row.args)
            faults.reached("tool.recorded", row.tool_name, row.session_id)
            outcome = await self._execute(state, call, context, row)
            faults.reached("tool.end", row.tool_name, row.session_id)
            await self._record(state, row, outcome)
        finally:
            self.running -= 1

    async def _execute(self, state: Loaded, call: Call, context: CallContext, row: ToolRunRow) -> ToolOutcome:
        """Run the tool; told as a span however it ends."""
        record = self._deps.record
        if record is None:
            return await self._deps.executor.execute(call, context)
        watch, outcome = Stopwatch(self._deps.clock.now_ms, self._deps.clock.monotonic), None
        try:
            outcome = await self._deps.executor.execute(call, context)
        finally:
            record(tool_span(state.run, row, watch, outcome, "" if outcome is not None else str(ErrorCode.ABORTED)))
        return outcome

    async def _record(self, state: Loaded, row: ToolRunRow, outcome: ToolOutcome) -> None:
        now = self._deps.clock.now_ms()

        def unit(tx: Transaction) -> ToolMessage:
            edited = _edited(state, made_by_model(tx, row).id, row)
            return record_result(tx, self._deps.audit, state.run, row, outcome, now, edited=edited)

        message = await self._fence.commit(unit)
        if row.id not in (state.flush or ()):
            state.messages.append(message)
        state.open_calls = [call for call in state.open_calls if call.id != row.id]

    async def _interrupted(self, state: Loaded, context: CallContext, row: ToolRunRow) -> bool:
        """Record the result of a call whose end nobody saw, and the question about a retry where there is one.

        Says whether the run is parked, for all that is left waits for people.
        """
        now = self._deps.clock.now_ms()

        def unit(tx: Transaction) -> tuple[ToolMessage, bool, _Open | None]:
            edited = _edited(state, made_by_model(tx, row).id, row)
            message, asked = record_interrupted(tx, self._deps, state.run, context, row, edited)
            # Parked in this commit, so that who hears of the question never finds the run still running.
            return message, asked, _parked_or_open(tx, state.run, now) if asked else None

        message, asked, still_open = await self._fence.commit(unit)
        if row.id not in (state.flush or ()):
            state.messages.append(message)
        if asked:
            return self._is_parked(state, still_open)
        state.open_calls = [call for call in state.open_calls if call.id != row.id]
        return False

    # ---- waiting

    async def _park(self, state: Loaded) -> bool:
        """Leave the run waiting for people, owned by nobody; unless one of them has decided meanwhile."""
        now = self._deps.clock.now_ms()
        return self._is_parked(state, await self._fence.commit(lambda tx: _parked_or_open(tx, state.run, now)))

    def _is_parked(self, state: Loaded, still_open: _Open | None) -> bool:
        if still_open is None:
            return True
        state.open_calls, state.approvals = still_open
        return False


_Open = tuple[list[ToolRunRow], dict[str, ApprovalRow]]
"""A run's calls without a result, and its approvals by tool call."""


def _parked_or_open(tx: Transaction, run: RunRow, now_ms: int) -> _Open | None:
    """Park the run if all its open calls wait for people (then None); else what is to be done."""
    calls, approvals = open_calls_of(tx, run)
    if any(not _waits(approvals.get(call.id)) for call in calls):
        return calls, approvals
    faults.reached("run.parking", run.session_id)
    park(tx, run, now_ms)
    return None


def _waits(approval: ApprovalRow | None) -> bool:
    return approval is not None and approval.status == ApprovalStatus.PENDING


def _edited(state: Loaded, call_id: str, row: ToolRunRow) -> bool:
    """Whether a person changed the arguments that the model sent with that call."""
    for message in reversed(state.messages):
        if isinstance(message, AssistantMessage):
            return any(call.id == call_id and (call.args or {}) != row.args for call in message.tool_calls)
    return False
