"""How a run ends: one unit of work, in which the session is idle again and every answer is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import UNSET, Struct

from corral.core.calls import call_event, interrupted, result_event, result_message
from corral.core.journal import apply_mode, run_usage
from corral.core.state import Deps
from corral.core.transcript import flush_state
from corral.executor.api import ToolOutcome
from corral.governance.audit import Audit, Outcome
from corral.governance.budgets import release
from corral.governance.idempotency import finish_ongoing
from corral.governance.metrics import run_fact
from corral.models.api import ToolMessage
from corral.protocol.errors import ErrorCode
from corral.protocol.events import AgentCompleted, AgentFailed
from corral.protocol.methods import AgentAbortResult
from corral.protocol.types import RunStatus, SessionStatus, Wire
from corral.storage.events import append, append_changing
from corral.storage.repositories import Transaction
from corral.storage.rows import MessageRow, RunRow, ToolRunRow

_AUDIT_OUTCOME: dict[str, Outcome] = {"success": "ok", "failed": "failed", "interrupted": "failed", "denied": "denied"}


class Ending(Struct, kw_only=True, frozen=True):
    """What a run comes to. `output` for a completed one, `code` and `message` for the others."""

    status: RunStatus
    output: str = ""
    code: str = ""
    message: str = ""
    retryable: bool = False
    leftover: list[str] = []


def completed(output: str) -> Ending:
    return Ending(status=RunStatus.COMPLETED, output=output)


def failed(code: str, message: str, *, retryable: bool = False) -> Ending:
    return Ending(status=RunStatus.FAILED, code=code, message=message, retryable=retryable)


def aborted(leftover: list[str]) -> Ending:
    return Ending(status=RunStatus.ABORTED, code=ErrorCode.ABORTED, message="the run was aborted", leftover=leftover)


def end_run(
    tx: Transaction,
    deps: Deps,
    run: RunRow,
    ending: Ending,
    now_ms: int,
    settled: Mapping[str, Any] | None = None,
) -> AgentAbortResult:
    """End a run that is not terminal, in the caller's transaction, whose lease check has passed.

    What waits for a person is cancelled and calls without a result get `interrupted`; then
    comes the terminal event, the last that carries the run's id; what was reserved of budgets is
    let go, the run is counted; the session is idle, a queued
    mode is applied, and calls of `agent.abort` that waited have their answer, which is also
    returned.

    `settled`: the columns of the run that its last step changes, where this same transaction has
    settled that step; they are set here.
    """
    calls = tx.tool_runs.of_run(run.tenant_id, run.id)
    if calls:
        # An approval is of one of them.
        deps.approvals.cancel_of_run(tx, run, now_ms)
    if settled is None:
        release(tx, run)
    for call in calls:
        if call.state != "finished":
            record_result(tx, deps.audit, run, call, interrupted(call, now_ms), now_ms)
    changes: dict[str, Any] = {**(settled or {}), "status": str(ending.status), "finished_at": now_ms}
    event: Wire
    if ending.status is RunStatus.COMPLETED:
        changes["output"] = ending.output
        event = AgentCompleted(
            session_id=run.session_id,
            run_id=run.id,
            output=ending.output,
            usage=run_usage(run),
            steps=run.steps,
        )
    else:
        changes["error"] = {"code": ending.code, "message": ending.message, "retryable": ending.retryable}
        event = AgentFailed(
            session_id=run.session_id,
            run_id=run.id,
            code=ending.code,
            message=ending.message,
            retryable=ending.retryable,
        )
    idle = {"status": str(SessionStatus.IDLE), "active_run_id": None}
    _entry, session = append_changing(tx, run.tenant_id, event, now_ms, idle)
    tx.runs.update(run.tenant_id, run.id, lease_expires_at=None, waiting_since=None, **changes)
    tx.metrics.add(run_fact(run, str(ending.status), ending.code, calls, now_ms))
    _record_end(tx, deps.audit, run, ending)
    if session.memory_flush_state == "pending":
        session.memory_flush_state = flush_state(tx, session)
        tx.sessions.update(run.tenant_id, run.session_id, memory_flush_state=session.memory_flush_state)
    if session.queued_runtime_mode is not None:
        apply_mode(tx, session, session.queued_runtime_mode, now_ms)
    answer = AgentAbortResult(
        run_id=run.id, status=str(ending.status), leftover=list(ending.leftover) if ending.leftover else UNSET
    )
    finish_ongoing(tx, run.tenant_id, run.id, answer)
    return answer


def _record_end(tx: Transaction, audit: Audit, run: RunRow, ending: Ending) -> None:
    audit.record_in(
        tx,
        run,
        "run.ended",
        "run",
        run.id,
        outcome="ok" if ending.status is RunStatus.COMPLETED else "failed",
        metadata={
            "status": str(ending.status),
            "code": ending.code,
            "model": run.model,
            "steps": run.steps,
            "inputTokens": run.input_tokens,
            "outputTokens": run.output_tokens,
            "costUsd": run.cost_usd,
        },
    )
    if ending.code in (ErrorCode.BUDGET_EXCEEDED, ErrorCode.LIMIT_REACHED):
        audit.record_in(
            tx,
            run,
            "budget.stop",
            "run",
            run.id,
            outcome="denied",
            metadata={"code": ending.code, "message": ending.message},
            by_system=True,
        )


def record_result(
    tx: Transaction,
    audit: Audit,
    run: RunRow,
    call: ToolRunRow,
    outcome: ToolOutcome,
    now_ms: int,
    *,
    edited: bool = False,
) -> ToolMessage:
    """Journal one call's result and put it into the transcript, the tool run and the audit.

    Returns the result as the model sees it. That of a retry is another one of the call that the model
    made, as the model made no retry: it is shown the last.
    """
    entry = append(tx, run.tenant_id, result_event(call, outcome), now_ms)
    message = result_message(call, outcome, edited=edited, answers=made_by_model(tx, call).id)
    tx.messages.insert(
        MessageRow(
            tenant_id=run.tenant_id,
            session_id=run.session_id,
            version=entry.version,
            run_id=run.id,
            role="tool",
            content=message,
            created_at=now_ms,
        )
    )
    if outcome.full is not None:
        tx.outputs.insert(run.tenant_id, run.session_id, call.id, outcome.full)
    tx.tool_runs.update(
        run.tenant_id,
        call.id,
        state="finished",
        status=outcome.status,
        duration_ms=outcome.duration_ms,
        truncated=outcome.truncated,
        finished_at=now_ms,
    )
    audit.record_in(
        tx,
        run,
        "tool.result",
        "tool",
        call.id,
        outcome=_AUDIT_OUTCOME[outcome.status],
        metadata={
            "toolName": call.tool_name,
            "argsHash": call.args_hash,
            "status": outcome.status,
            "code": outcome.error.code if outcome.error is not None else None,
            "durationMs": outcome.duration_ms,
            "outputBytes": len(outcome.full) if outcome.full is not None else len(outcome.output.encode()),
        },
    )
    return message


def made_by_model(tx: Transaction, call: ToolRunRow) -> ToolRunRow:
    """The call that `call` is the retry, or the retry's retry, of; itself if it is none."""
    while call.retry_of is not None:
        before = tx.tool_runs.get(call.tenant_id, call.retry_of)
        if before is None:
            return call
        call = before
    return call


def record_call(tx: Transaction, audit: Audit, run: RunRow, row: ToolRunRow, layer: str) -> None:
    """Journal a call with the decision on it, and put it into the tool runs and the audit."""
    append(tx, run.tenant_id, call_event(row), row.created_at)
    tx.tool_runs.insert(row)
    audit.record_in(
        tx,
        run,
        "tool.call",
        "tool",
        row.id,
        outcome="denied" if row.decision == "deny" else "ok",
        metadata={
            "toolName": row.tool_name,
            **audit.about_call(row.args, row.args_hash),
            "decision": row.decision,
            "reason": row.reason,
            "ruleId": row.rule_id,
            "layer": layer,
            **({"retryOf": row.retry_of} if row.retry_of is not None else {}),
        },
    )
