"""All models behind one door: which provider, how often, and what next when it does not answer."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing

from msgspec import Struct

from corral.clock import Clock, SystemClock
from corral.ids import Ids
from corral.models import catalogue, prices
from corral.models.api import Finished, ModelEvent, ModelInfo, ModelRequest, Restarted, TextDelta, Usage
from corral.models.http import HttpClient, Timeouts
from corral.models.provider import Answer, Provider, ProviderError, Remedy
from corral.protocol.errors import InvalidRequest, ModelUnavailable

DEFAULT_CONTEXT_WINDOW = 128_000
_DAY_MS = 86_400_000
_PRICES_KEPT = 1000

log = logging.getLogger(__name__)


class RetryPolicy(Struct, kw_only=True, frozen=True):
    """Seconds. The pause before attempt n + 1 is `base * 2 ** (n - 1)`, at most `cap`, times 0.5 to 1.5 by chance.

    A longer `Retry-After` is honoured up to `retry_after_cap`; beyond that the model counts as out.
    """

    attempts: int = 3
    base: float = 0.5
    cap: float = 20
    retry_after_cap: float = 60


class Tried(Struct, kw_only=True):
    """What became of one model of the chain."""

    model: str
    reason: str
    attempts: int
    remedy: Remedy


class ModelRouter:
    """Implements `corral.models.api.Models`.

    `env` is where base URLs and keys come from (the process's environment, given by whoever
    builds this). `known` tells of models that the price data does not know, or knows wrongly, by
    their whole name. Safe for concurrent use on one event loop.
    """

    def __init__(
        self,
        env: Mapping[str, str],
        *,
        known: Mapping[str, ModelInfo] | None = None,
        timeouts: Timeouts | None = None,
        retry: RetryPolicy | None = None,
        clock: Clock | None = None,
        ids: Ids | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._env = dict(env)
        self._known = dict(known or {})
        self._retry = retry or RetryPolicy()
        self._clock = clock or SystemClock()
        self._ids = ids or Ids(self._clock)
        self._sleep = sleep
        self._chance = chance
        self._timeouts = timeouts or Timeouts()
        self._http = HttpClient(self._timeouts, self._clock.now_ms)
        self._providers: dict[str, Provider] = {}
        self._price_cache: dict[tuple[str, int], prices.Listed | None] = {}

    def __repr__(self) -> str:
        return f"ModelRouter({sorted(self._providers)})"

    # -- what is known beforehand

    def info(self, model: str) -> ModelInfo:
        """Window and prices of `provider:name`. Raises InvalidRequest for a provider there is none of.

        The first call of a day for a model with public prices reads them from a file: 3 to 30 ms (see
        `corral.models.prices`).
        """
        target = catalogue.parse(model)
        if model in self._known:
            return self._known[model]
        listed = self._listed(target)
        if target.kind.free:
            prices_known: tuple[float | None, float | None] = (0.0, 0.0)
        elif listed and listed.input_rates and listed.output_rates:
            prices_known = (listed.input_rates[0].usd, listed.output_rates[0].usd)
        else:
            prices_known = (None, None)
        return ModelInfo(
            model=model,
            context_window=(listed and listed.context_window) or DEFAULT_CONTEXT_WINDOW,
            input_usd_per_million=prices_known[0],
            output_usd_per_million=prices_known[1],
        )

    def _listed(self, target: catalogue.Target) -> prices.Listed | None:
        """The price list's entry, read once a day and model: prices have dates."""
        now_ms = self._clock.now_ms()
        key = (target.model, now_ms // _DAY_MS)
        if key not in self._price_cache:
            if len(self._price_cache) >= _PRICES_KEPT:
                self._price_cache.clear()
            list_id = catalogue.price_list(target.kind, self._env)
            self._price_cache[key] = prices.find(list_id, target.name, now_ms) if list_id else None
        return self._price_cache[key]

    def _usage(self, target: catalogue.Target, answer: Answer) -> Usage:
        cost: float | None
        listed = None if target.model in self._known or target.kind.free else self._listed(target)
        if listed is not None:
            cost = listed.cost_usd(
                answer.input_tokens, answer.output_tokens, answer.cache_read_tokens, answer.cache_write_tokens
            )
        else:
            info = self.info(target.model)
            rates = info.input_usd_per_million, info.output_usd_per_million
            cost = None
            if rates[0] is not None and rates[1] is not None:
                cost = (answer.input_tokens * rates[0] + answer.output_tokens * rates[1]) / 1_000_000
        return Usage(
            input_tokens=answer.input_tokens,
            output_tokens=answer.output_tokens,
            cost_usd=cost,
            cache_read_tokens=answer.cache_read_tokens,
            cache_write_tokens=answer.cache_write_tokens,
        )

    # -- calling

    async def stream(self, request: ModelRequest, chain: Sequence[str]) -> AsyncGenerator[ModelEvent, None]:
        """See `Models.stream`. Whoever stops iterating before the end closes the iterator (`contextlib.aclosing`)."""
        targets = [catalogue.parse(model) for model in dict.fromkeys(chain)]
        if not targets:
            raise InvalidRequest("no model is set; set CORRAL_MODEL")
        tried: list[Tried] = []
        streamed = False
        too_small = 0  # the largest window that the request proved to be too long for
        for target in targets:
            if too_small and self.info(target.model).context_window <= too_small:
                continue
            attempt = 0
            while True:
                attempt += 1
                if streamed:
                    streamed = False
                    yield Restarted(model=target.model, reason=tried[-1].reason)
                try:
                    async with aclosing(self._attempt(target, request)) as events:
                        async for event in events:
                            streamed = streamed or isinstance(event, TextDelta)
                            yield event
                    return
                except ProviderError as error:
                    failure = error
                self._note(tried, target, attempt, failure)
                if failure.remedy is Remedy.GIVE_UP:
                    raise _refused(tried[-1])
                if failure.remedy is Remedy.LONGER:
                    too_small = max(too_small, self.info(target.model).context_window)
                pause = self._pause(attempt, failure)
                if pause is None:
                    break
                await self._sleep(pause)
        if all(one.remedy is Remedy.LONGER for one in tried):
            raise _refused(tried[-1])
        raise _all_out(tried)

    async def _attempt(
        self, target: catalogue.Target, request: ModelRequest
    ) -> AsyncGenerator[TextDelta | Finished, None]:
        async with aclosing(self._provider(target).stream(target.name, request)) as events:
            async for event in events:
                if isinstance(event, TextDelta):
                    yield event
                    continue
                yield Finished(
                    model=target.model,
                    message=event.message,
                    usage=self._usage(target, event),
                    stop=event.stop,
                )
                return
        raise ProviderError("the answer had no end", Remedy.RETRY)

    def _provider(self, target: catalogue.Target) -> Provider:
        """The provider, made on first use. Raises ProviderError where its settings do not allow that."""
        name = target.kind.name
        if name not in self._providers:
            self._providers[name] = catalogue.build(
                target.kind, self._env, self._http, self._timeouts, lambda: self._ids.new("tc")
            )
        return self._providers[name]

    def _note(self, tried: list[Tried], target: catalogue.Target, attempt: int, failure: ProviderError) -> None:
        if attempt == 1:
            tried.append(Tried(model=target.model, reason="", attempts=0, remedy=failure.remedy))
        last = tried[-1]
        last.reason, last.attempts, last.remedy = failure.reason, attempt, failure.remedy
        log.warning(
            "%s, attempt %d: %s",
            target.model,
            attempt,
            failure.reason,
            extra={"action": "model.failed", "model": target.model, "attempt": attempt},
        )

    def _pause(self, attempt: int, failure: ProviderError) -> float | None:
        """Seconds until the next attempt at the same model; None: there is none."""
        policy = self._retry
        if failure.remedy is not Remedy.RETRY or attempt >= policy.attempts:
            return None
        asked = failure.retry_after or 0.0
        if asked > policy.retry_after_cap:
            return None
        pause = min(policy.cap, policy.base * 2.0 ** (attempt - 1)) * (0.5 + self._chance())
        # Chance also above what was asked: whoever was told the same time does not come back all at once.
        return max(pause, asked * (1 + 0.1 * self._chance()))

    async def close(self) -> None:
        """Close every connection. Streams that are on break off."""
        await self._http.close()


def _refused(one: Tried) -> InvalidRequest:
    return InvalidRequest(f"{one.model} does not take this request: {one.reason}")


def _all_out(tried: list[Tried]) -> ModelUnavailable:
    told = [f"{one.model}: {one.reason}" + (f" ({one.attempts} attempts)" if one.attempts > 1 else "") for one in tried]
    details = [{"model": one.model, "reason": one.reason, "attempts": one.attempts} for one in tried]
    return ModelUnavailable(
        f"no model answered; tried {'; '.join(told)}",
        details={"tried": details},
        retryable=any(one.remedy is Remedy.RETRY for one in tried),
    )
