"""Daily budgets (`limits.perDay`): reserved before a model is called, settled when its message is journalled.

A day is one of UTC, and a step counts on the day on which it was begun. Each layer of policy has a
counter of its own over everything below it: a tenant's over all its workspaces, a workspace's over
all its agents. What is used is counted for all three, limited or not, so that a limit that is set
later in the day knows. A reservation is made only where a layer has a limit.

What a call may use up is set aside in one transaction: a step, the request's estimated tokens,
and the longest answer that it may give, which the model is told. Runs that do so at the same time see each
other's reservations, so that together they stay within the limit as far as the estimate of the request
is right. A call that fails, or dies with its process, is let go and not counted: what a provider charges
for such a one is not known here. A step of a model without a known price counts no money; where a
layer limits money, such a model is refused.

A session has a budget of its own (`limits.sessionPerDay`), the tightest that a layer gives it. It runs one
run at a time, so nothing is reserved: its runs that were begun today are added up before each call.
"""

from __future__ import annotations

from msgspec import Struct

from corral.governance.policy import EffectivePolicy, scope_key
from corral.protocol.errors import BudgetExceeded
from corral.protocol.types import DayLimits, PolicyLayer
from corral.storage.repositories import Transaction
from corral.storage.rows import RunRow, UsageRow

DAY_MS = 86_400_000

LONGEST_ANSWER = 8_192
"""Tokens of output that are set aside for a call where nothing tighter holds."""

LEAST_ANSWER = 16
"""Below this an answer is not worth having: a call that cannot afford it is not made."""

_LAYERS: tuple[PolicyLayer, ...] = ("tenant", "workspace", "agent")


class Call(Struct, kw_only=True, frozen=True):
    """What a call of a model may use up: its request's tokens (estimated), its answer's at most, and their prices.

    Prices are US dollars a million tokens, the dearest of the models that may answer; None: not known.
    """

    input_tokens: int
    output_tokens: int
    input_usd_per_million: float | None
    output_usd_per_million: float | None


def day_of(now_ms: int) -> int:
    """The day (since the epoch, UTC) that a step begun now counts on."""
    return now_ms // DAY_MS


def limits_days(policy: EffectivePolicy) -> bool:
    """Whether a call has to be reserved: a layer limits what a day, or a session in a day, may use up."""
    return bool(policy.day_limits()) or policy.session_limits() != DayLimits()


def limits_cost(policy: EffectivePolicy) -> bool:
    """Whether any layer limits what a day may cost, so that a model without a known price is refused."""
    return any(limits.cost_usd is not None for limits in (*policy.day_limits().values(), policy.session_limits()))


def reserve(tx: Transaction, run: RunRow, policy: EffectivePolicy, call: Call, day: int) -> int:
    """Set aside what the call may use up in every layer with a limit; how many tokens its answer may have.

    In a transaction that holds the run's lease. Raises BudgetExceeded if a layer's rest of the
    day does not allow the call; then nothing is reserved.
    """
    tx.usage.release(run.tenant_id, run.id)
    limited = policy.day_limits()
    scopes = {
        layer: scope_key(run.tenant_id, run.workspace_id, layer, run.agent_id) for layer in _LAYERS if layer in limited
    }
    output = _session_room(tx, run, policy.session_limits(), call, day)
    for layer, scope in scopes.items():
        taken = tx.usage.taken(run.tenant_id, scope, day)
        output = min(output, _room(layer, limited[layer], taken, call))
    tokens, cost = call.input_tokens + output, call_cost(call, output) or 0.0
    for scope in scopes.values():
        tx.usage.reserve(run.tenant_id, run.id, UsageRow(scope=scope, day=day, steps=1, tokens=tokens, cost_usd=cost))
    return output


def _session_room(tx: Transaction, run: RunRow, limits: DayLimits, call: Call, day: int) -> int:
    """How long the answer may be for what the run's session has used up today."""
    if limits == DayLimits():
        return call.output_tokens
    return _room("session", limits, tx.usage.of_session(run.tenant_id, run.session_id, day), call)


def _room(layer: str, limits: DayLimits, taken: UsageRow, call: Call) -> int:
    """How long the answer may be under one layer's limits. Raises BudgetExceeded if there is no room for any."""
    room = call.output_tokens
    if limits.steps is not None and taken.steps >= limits.steps:
        raise BudgetExceeded(f"the {layer}'s {limits.steps} steps for today (UTC) are used up or reserved")
    if limits.tokens is not None:
        room = min(room, limits.tokens - taken.tokens - call.input_tokens)
        if room < LEAST_ANSWER:
            raise BudgetExceeded(
                f"what is left of the {layer}'s {limits.tokens} tokens for today (UTC) is not enough for a step"
            )
    if limits.cost_usd is not None:
        if call.input_usd_per_million is None or call.output_usd_per_million is None:
            raise BudgetExceeded(f"the {layer} has a budget in US dollars, and the model's price is not known")
        left = limits.cost_usd - taken.cost_usd - call.input_tokens * call.input_usd_per_million / 1e6
        if call.output_usd_per_million > 0:
            room = min(room, int(left / call.output_usd_per_million * 1e6))
        if left < 0 or room < LEAST_ANSWER:
            raise BudgetExceeded(
                f"what is left of the {layer}'s {limits.cost_usd} US dollars for today (UTC) does not pay for a step"
            )
    return room


def call_cost(call: Call, output_tokens: int) -> float | None:
    """US dollars that a call with such an answer costs at most; None where a price is not known."""
    if call.input_usd_per_million is None or call.output_usd_per_million is None:
        return None
    return (call.input_tokens * call.input_usd_per_million + output_tokens * call.output_usd_per_million) / 1e6


def settle(tx: Transaction, run: RunRow, day: int, tokens: int, cost_usd: float | None, *, steps: int = 1) -> None:
    """Count a step that was made, in the transaction of its message, and let its reservation go.

    `steps` is 0 for a call that is paid for and makes no step: a compaction's.
    """
    scopes = [scope_key(run.tenant_id, run.workspace_id, layer, run.agent_id) for layer in _LAYERS]
    used = [UsageRow(scope=scope, day=day, steps=steps, tokens=tokens, cost_usd=cost_usd or 0.0) for scope in scopes]
    tx.usage.add(run.tenant_id, *used)
    tx.usage.release(run.tenant_id, run.id)


def release(tx: Transaction, run: RunRow) -> None:
    """Let go of what is reserved for the run: its call failed, or its process died with it."""
    tx.usage.release(run.tenant_id, run.id)
