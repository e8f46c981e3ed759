"""An interrupted call of a tool whose effect is `ask`: a person is asked whether to run it again.

What came of the first start is unknown, and no process may decide that it did nothing. So the call
gets its result, `interrupted`, like any other; beside it there is a new call, with an id of its
own and `retryOf`, that needs an approval, whatever policy and grants say of it. The model knows
nothing of that call: what comes of it is told as the result of the one that it made, of which a
request shows the last (`models/transcript.py`).
"""

from __future__ import annotations

from corral.core.calls import interrupted, retry_row
from corral.core.ending import record_call, record_result
from corral.core.judge import args_hash, binding_of, current, question
from corral.core.state import Deps, policy_of
from corral.executor.api import CallContext
from corral.models.api import ToolMessage
from corral.storage.repositories import Transaction
from corral.storage.rows import RunRow, ToolRunRow


def record_interrupted(
    tx: Transaction, deps: Deps, run: RunRow, context: CallContext, row: ToolRunRow, edited: bool
) -> tuple[ToolMessage, bool]:
    """Give a call whose end nobody saw its result; and, where the tool wants it, ask about a retry.

    Returns the result as the model sees it, which the retry's takes the place of, and whether a person is
    asked. What policy denies by now is not put before anybody.
    """
    now = deps.clock.now_ms()
    binding = _binding(tx, deps, run, context, row)
    outcome = interrupted(row, asked=binding is not None)
    message = record_result(tx, deps.audit, run, row, outcome, now, edited=edited)
    if binding is None:
        return message, False
    step = tx.tool_runs.of_run(run.tenant_id, run.id, step=row.step)
    position = 1 + max(call.position for call in step)
    retry = retry_row(row, deps.ids.new("tc"), position, now)
    record_call(tx, deps.audit, run, retry, "default")
    deps.approvals.require(tx, run, retry, binding, now)
    return message, True


def _binding(tx: Transaction, deps: Deps, run: RunRow, context: CallContext, row: ToolRunRow) -> str | None:
    """What the approval of a retry is bound to; None if there is to be none."""
    spec = deps.executor.spec(row.tool_name)
    if spec is None or spec.effect != "ask" or row.args_hash != args_hash(row.tool_name, row.args):
        return None
    policy = policy_of(tx, run)
    if policy.decide(question(context, run, row.tool_name, spec.risk, row.args)).decision == "deny":
        return None
    return binding_of(spec, row.args, current(context, policy), policy)
