"""One model message's tool calls: what can be wrong with them, and what their rows, events and results say."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET, Struct

from corral.core.judge import args_hash
from corral.executor.api import Failure, ToolExecutor, ToolOutcome, ToolSpec
from corral.governance.policy import Verdict
from corral.models.api import ToolCall, ToolMessage
from corral.protocol.canonical import canonical_json
from corral.protocol.errors import ErrorCode
from corral.protocol.events import AgentToolCall, AgentToolResult, ToolError
from corral.protocol.types import ApprovalStatus
from corral.storage.rows import ApprovalRow, RunRow, ToolRunRow


class Candidate(Struct, kw_only=True, frozen=True):
    """A call as the model made it. `problem` says why it cannot be run, whatever policy says."""

    call: ToolCall
    spec: ToolSpec | None
    problem: str | None


def candidate(call: ToolCall, executor: ToolExecutor, allowed: Sequence[str] | None) -> Candidate:
    """The call with what is wrong with it, in words that the model can act on."""
    spec = executor.spec(call.name)
    return Candidate(call=call, spec=spec, problem=_problem(call, spec, executor, allowed))


def _problem(
    call: ToolCall, spec: ToolSpec | None, executor: ToolExecutor, allowed: Sequence[str] | None
) -> str | None:
    if allowed is not None and call.name not in allowed:
        return f"there is no tool {call.name!r} for this agent; its tools are {', '.join(allowed) or 'none'}"
    if spec is None:
        return executor.check(call.name, {}) or "there is no such tool"
    if call.args is None:
        return call.problem or "the arguments are no JSON object"
    return executor.check(call.name, call.args)


CANNOT_RUN = Verdict(decision="deny", reason="the call cannot be run as it was made", layer="default")


def broken(problem: str) -> ToolOutcome:
    """The outcome of a call that cannot be run as it was made."""
    return _outcome("failed", ErrorCode.TOOL_EXEC_FAILED, problem)


def refused(tool_name: str, reason: str) -> ToolOutcome:
    """What the model and the person are told of a call that policy denies."""
    message = f"{tool_name} was not run: policy denies it ({reason}). Do not try it again in another form."
    return _outcome("denied", ErrorCode.POLICY_DENIED, message)


def not_approved(approval: ApprovalRow) -> ToolOutcome:
    """What they are told of a call that a person was asked about and that did not get a yes."""
    if approval.status == ApprovalStatus.REJECTED:
        message = f"{approval.tool_name} was not run: a person rejected it."
        if approval.comment:
            message += f" They said: {approval.comment}"
    else:
        message = f"{approval.tool_name} was not run: nobody approved it in time."
    return _outcome("denied", ErrorCode.APPROVAL_REQUIRED, message)


def changed_since() -> ToolOutcome:
    """For an approved call that is no longer what was approved."""
    message = (
        "The call was not run: what a person approved (the arguments, the folder, the sandbox or the tool) "
        "has changed since. Ask again if it is still wanted."
    )
    return _outcome("denied", ErrorCode.APPROVAL_REQUIRED, message)


_UNKNOWN = "The call was started and then interrupted: it may have taken effect wholly, partly or not at all."


def interrupted(row: ToolRunRow, now_ms: int | None = None, *, asked: bool = False) -> ToolOutcome:
    """The outcome of a call whose end nobody saw. `asked`: a person is asked whether to run it again.

    It has run for as long as is known: 0 if that is nothing. `now_ms` is for one that this process has just stopped.
    """
    if row.state == "started":
        rest = "not repeated unless a person approves that" if asked else "not repeated"
        message = f"{_UNKNOWN} It is {rest}; check the state before going on."
    elif row.repeatable:
        message = "The call was interrupted before its result; it changes nothing."
    else:
        message = "The call was not started: the run was interrupted before it."
    ran = row.duration_ms or 0
    if row.state == "started" and row.duration_ms is None and row.started_at is not None and now_ms is not None:
        ran = max(0, now_ms - row.started_at)
    return _outcome("interrupted", ErrorCode.TOOL_EXEC_FAILED, message, ran)


def _outcome(status: str, code: ErrorCode, message: str, duration_ms: int = 0) -> ToolOutcome:
    return ToolOutcome(
        status=status,  # type: ignore[arg-type]
        output=message,
        duration_ms=duration_ms,
        error=Failure(code=code, message=message),
    )


def tool_run_row(run: RunRow, position: int, each: Candidate, verdict: Verdict, now_ms: int) -> ToolRunRow:
    args = each.call.args or {}
    return ToolRunRow(
        tenant_id=run.tenant_id,
        id=each.call.id,
        run_id=run.id,
        session_id=run.session_id,
        step=run.steps,
        position=position,
        tool_name=each.call.name,
        args=args,
        args_hash=args_hash(each.call.name, args),
        risk=each.spec.risk if each.spec is not None else "high",
        repeatable=each.spec.repeatable if each.spec is not None else False,
        decision=verdict.decision,
        reason=verdict.reason,
        rule_id=verdict.rule_id,
        created_at=now_ms,
    )


def retry_row(row: ToolRunRow, call_id: str, position: int, now_ms: int) -> ToolRunRow:
    """The call that does an interrupted one again, if a person approves it; `position` is a free one of its step."""
    return ToolRunRow(
        tenant_id=row.tenant_id,
        id=call_id,
        run_id=row.run_id,
        session_id=row.session_id,
        step=row.step,
        position=position,
        tool_name=row.tool_name,
        args=row.args,
        args_hash=row.args_hash,
        risk=row.risk,
        repeatable=False,
        decision="approval-required",
        reason=f"run again: {row.id} was interrupted and may have taken effect already",
        created_at=now_ms,
        retry_of=row.id,
    )


def call_event(row: ToolRunRow) -> AgentToolCall:
    return AgentToolCall(
        session_id=row.session_id,
        run_id=row.run_id,
        tool_call_id=row.id,
        tool_name=row.tool_name,
        args=row.args,
        decision=row.decision,  # type: ignore[arg-type]
        reason=row.reason if row.reason is not None else UNSET,
        rule_id=row.rule_id if row.rule_id is not None else UNSET,
        retry_of=row.retry_of if row.retry_of is not None else UNSET,
    )


def result_event(row: ToolRunRow, outcome: ToolOutcome) -> AgentToolResult:
    error = outcome.error
    return AgentToolResult(
        session_id=row.session_id,
        run_id=row.run_id,
        tool_call_id=row.id,
        tool_name=row.tool_name,
        status=outcome.status,
        output=outcome.output,
        error=ToolError(code=error.code, message=error.message) if error is not None else UNSET,
        duration_ms=outcome.duration_ms,
        truncated=outcome.truncated,
    )


def result_message(
    row: ToolRunRow, outcome: ToolOutcome, *, edited: bool = False, answers: str | None = None
) -> ToolMessage:
    """The result as the model sees it: the output, and what went wrong where that is not said by it.

    `edited` says that a person changed the arguments: then the model is told which were run.
    `answers` is the call that the model made, where that is another: `row` was to do it again.
    """
    text = outcome.output
    if outcome.error is not None and outcome.error.message not in text:
        text = f"{text}\n{outcome.error.message}".lstrip("\n")
    if edited and outcome.status != "denied":
        text = f"[A person changed the arguments to {canonical_json(row.args).decode()}]\n{text}"
    if answers is not None and answers != row.id:
        text = f"{_UNKNOWN} A person was asked whether to run it again. What came of that:\n{text}"
    return ToolMessage(
        tool_call_id=answers or row.id, name=row.tool_name, output=text, is_error=outcome.status != "success"
    )
