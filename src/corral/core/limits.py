"""What one run may use up: steps, tokens, time and money, the caller's limits and policy's together."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, Struct

from corral.governance.budgets import LEAST_ANSWER, LONGEST_ANSWER, Call, call_cost, limits_cost
from corral.governance.policy import DEFAULT_MAX_STEPS, EffectivePolicy
from corral.models.api import ModelInfo, ModelRequest, Models
from corral.models.tokens import request_tokens
from corral.protocol.errors import BudgetExceeded, LimitReached
from corral.protocol.ready import look_through
from corral.protocol.types import RunLimits
from corral.storage.rows import RunRow

look_through(RunLimits)

# Above this the budget is no bound worth sending: models have output limits of their own.
_MOST_OUTPUT = LONGEST_ANSWER


class Limits(Struct, kw_only=True, frozen=True):
    """The tightest of what the caller asked for and what policy allows. None is no limit."""

    max_steps: int
    max_tokens: int | None
    max_cost_usd: float | None
    timeout_ms: int
    by_price: bool
    """Whether money is limited, for the run or for the day, so that only models with a known price may answer."""

    def seconds_left(self, run: RunRow, now_ms: int) -> float:
        """Seconds of the run's time that are left; time spent waiting for people or down is not its own."""
        started = run.started_at if run.started_at is not None else now_ms
        return max(0.0, (self.timeout_ms - (now_ms - started - run.waited_ms)) / 1000)

    def check_step(self, run: RunRow) -> None:
        """Raise LimitReached or BudgetExceeded if the run may not call a model again."""
        if run.steps >= self.max_steps:
            raise LimitReached(f"the run has used up its {self.max_steps} steps")
        if self.max_tokens is not None and run.input_tokens + run.output_tokens >= self.max_tokens:
            raise LimitReached(f"the run has used up its {self.max_tokens} tokens")
        if self.max_cost_usd is not None and (run.cost_usd is None or run.cost_usd >= self.max_cost_usd):
            raise BudgetExceeded(f"the run has used up its {self.max_cost_usd} US dollars")

    def check_optional(self, run: RunRow, call: Call) -> None:
        """Raise LimitReached or BudgetExceeded if a call that the run can do without could use up what is left."""
        tokens = run.input_tokens + run.output_tokens + call.input_tokens + call.output_tokens
        if self.max_tokens is not None and tokens >= self.max_tokens:
            raise LimitReached(f"what is left of the run's {self.max_tokens} tokens does not pay for it")
        cost = (run.cost_usd or 0.0) + (call_cost(call, call.output_tokens) or 0.0)
        if self.max_cost_usd is not None and cost >= self.max_cost_usd:
            raise BudgetExceeded(f"what is left of the run's {self.max_cost_usd} US dollars does not pay for it")

    def affordable(self, chain: Sequence[str], models: Models) -> list[str]:
        """The models of the chain that a run under these limits may use; never empty.

        Under a cost limit a model without a known price is refused.
        """
        if not self.by_price:
            return list(chain)
        priced = [model for model in chain if is_priced(models.info(model))]
        if not priced:
            raise BudgetExceeded(f"the price of {chain[0]} is not known, so a run under a cost limit may not use it")
        return priced

    def output_tokens(self, run: RunRow, request: ModelRequest, info: ModelInfo) -> int | None:
        """How long the answer may be for what is left of the budget; None if that is no bound.

        Raises BudgetExceeded if the request alone would cost more than is left.
        """
        if self.max_cost_usd is None or info.input_usd_per_million is None or not info.output_usd_per_million:
            return None
        left = self.max_cost_usd - (run.cost_usd or 0.0) - request_tokens(request) * info.input_usd_per_million / 1e6
        tokens = int(left / info.output_usd_per_million * 1e6)
        if tokens < LEAST_ANSWER:
            raise BudgetExceeded(f"what is left of the run's {self.max_cost_usd} US dollars does not pay for a step")
        return tokens if tokens < _MOST_OUTPUT else None


def is_priced(info: ModelInfo) -> bool:
    return info.input_usd_per_million is not None and info.output_usd_per_million is not None


def call_of(request: ModelRequest, chain: Sequence[str], models: Models) -> Call:
    """What a call may use up, whichever model of the chain answers."""
    infos = [models.info(model) for model in chain]
    inputs = [info.input_usd_per_million for info in infos if info.input_usd_per_million is not None]
    outputs = [info.output_usd_per_million for info in infos if info.output_usd_per_million is not None]
    known = all(is_priced(info) for info in infos)
    most = LONGEST_ANSWER if request.max_output_tokens is None else min(LONGEST_ANSWER, request.max_output_tokens)
    return Call(
        input_tokens=request_tokens(request),
        output_tokens=most,
        input_usd_per_million=max(inputs) if known else None,
        output_usd_per_million=max(outputs) if known else None,
    )


def limits_of(run: RunRow, policy: EffectivePolicy, default_timeout_ms: int) -> Limits:
    """The limits that hold for a run now."""
    asked = msgspec.convert(run.limits, RunLimits)
    asked_steps = None if asked.max_steps is UNSET else asked.max_steps
    asked_cost = None if asked.max_cost_usd is UNSET else asked.max_cost_usd
    asked_time = default_timeout_ms if asked.timeout_ms is UNSET else asked.timeout_ms
    steps = [each for each in (asked_steps, policy.max_steps) if each is not None]
    costs = [each for each in (asked_cost, policy.max_cost_usd) if each is not None]
    return Limits(
        max_steps=min(steps, default=DEFAULT_MAX_STEPS),
        max_tokens=policy.max_tokens,
        max_cost_usd=min(costs, default=None),
        timeout_ms=asked_time,
        by_price=bool(costs) or limits_cost(policy),
    )
