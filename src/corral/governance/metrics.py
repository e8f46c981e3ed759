"""`metrics.summary`: what came of the runs of a workspace, computed from what is kept when each one ends.

Whole hours (for latencies also days) of the period come out of sums that are kept by the hour, what is
left at its two ends run by run, so that a million runs do not have to be looked at one by one
(docs/decisions/0006-metrics.md). What the figures mean:

- A run belongs to the period in which it ended, `from` <= end < `to`. By default that is the last 24 hours.
- `successRate` is completed / all that ended; null if none did. `failureReasons` counts failed runs by code.
- A latency is the time from `agent.accepted` to the terminal event, waiting for people included.
  Percentiles (nearest rank) are exact up to 10,000 runs in the period, beyond that within 3.2 %.
- `toolCallsTotal` are the calls of those runs, `toolFailures` those that failed or were interrupted.
- `costUsd` adds up the runs whose cost is known; null if there were runs and it is known of none.
- Approvals count by when people decided; `approvalsPending` is what waits now, whatever the period. The wait's median
  is exact.
- What was counted stays counted when its session is deleted, runs and decisions alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import ceil

from msgspec import UNSET

from corral.clock import Clock, rfc3339
from corral.governance.caller import Caller
from corral.governance.times import read_time
from corral.protocol.errors import InvalidRequest
from corral.protocol.methods import MetricsParams, MetricsResult
from corral.protocol.types import Metrics
from corral.storage.repositories import Transaction
from corral.storage.rows import RunFact, RunRow, RunSums, ToolRunRow

DEFAULT_PERIOD_MS = 24 * 3_600_000
EXACT_UP_TO = 10_000
_HOUR_MS = 3_600_000


def bucket_of(millis: int) -> int:
    """The bucket of the histogram: each millisecond its own up to 31, then 16 of equal width to each doubling."""
    shift = max(0, millis.bit_length() - 5)
    return shift * 16 + (millis >> shift)


def bucket_middle(bucket: int) -> float:
    """The middle of a bucket in milliseconds: within 1/32 of everything that is in it."""
    shift = max(0, bucket // 16 - 1)
    first = (bucket - shift * 16) << shift
    return first + ((1 << shift) - 1) / 2


def run_fact(run: RunRow, status: str, code: str, calls: Sequence[ToolRunRow], now_ms: int) -> RunFact:
    """What is kept of a run that ends now. `calls` as they stood before the end: those still open get interrupted."""
    latency = max(0, now_ms - run.created_at)
    failures = sum(call.state != "finished" or call.status in ("failed", "interrupted") for call in calls)
    return RunFact(
        tenant_id=run.tenant_id,
        workspace_id=run.workspace_id,
        agent_id=run.agent_id,
        run_id=run.id,
        finished_at=now_ms,
        status=status,
        code=code if status == "failed" else "",
        latency_ms=latency,
        bucket=bucket_of(latency),
        tool_calls=len(calls),
        tool_failures=failures,
        input_tokens=run.input_tokens,
        output_tokens=run.output_tokens,
        cost_usd=run.cost_usd,
    )


class MetricsMethods:
    """`metrics.summary`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def summary(self, tx: Transaction, caller: Caller, params: MetricsParams) -> MetricsResult:
        """The figures of the caller's workspace, of one agent with `agentId`.

        Raises InvalidRequest for a `from` or `to` that is no RFC 3339 time, or a period that ends before it begins.
        """
        from_ms, to_ms = self._period(params)
        period = _Period(tx, caller, None if params.agent_id is UNSET else params.agent_id, from_ms, to_ms)
        sums, failures = period.sums(), period.failures()
        runs = sums.completed + sums.failed + sums.aborted
        p50, p95, p99 = period.percentiles(runs, (0.5, 0.95, 0.99))
        approved, rejected = period.decisions()
        return MetricsResult(
            metrics=Metrics(
                runs_total=runs,
                runs_completed=sums.completed,
                runs_failed=sums.failed,
                runs_aborted=sums.aborted,
                success_rate=sums.completed / runs if runs else None,
                failure_reasons=dict(sorted(failures.items())),
                p50_latency_ms=p50,
                p95_latency_ms=p95,
                p99_latency_ms=p99,
                tool_calls_total=sums.tool_calls,
                tool_failures=sums.tool_failures,
                approvals_pending=period.pending(),
                approvals_approved=approved,
                approvals_rejected=rejected,
                approval_wait_p50_ms=period.wait(approved + rejected, 0.5),
                input_tokens=sums.input_tokens,
                output_tokens=sums.output_tokens,
                cost_usd=sums.cost_usd if sums.priced or not runs else None,
                from_=rfc3339(from_ms),
                to=rfc3339(to_ms),
            )
        )

    def _period(self, params: MetricsParams) -> tuple[int, int]:
        # By default up to what ends in this very millisecond.
        to_ms = read_time("to", params.to) if params.to is not UNSET else self._clock.now_ms() + 1
        from_ms = read_time("from", params.from_) if params.from_ is not UNSET else max(0, to_ms - DEFAULT_PERIOD_MS)
        if from_ms > to_ms:
            end = "$.params.to" if params.to is not UNSET else "the present time"
            raise InvalidRequest(f"$.params.from lies after {end}: the period would end before it begins")
        return from_ms, to_ms


class _Period:
    """The runs of one workspace (and agent) that ended in one period: whole hours, and the pieces at its ends."""

    def __init__(self, tx: Transaction, caller: Caller, agent_id: str | None, from_ms: int, to_ms: int) -> None:
        self._metrics = tx.metrics
        self._of = (caller.tenant_id, caller.workspace_id, agent_id)
        self._from, self._to = from_ms, to_ms
        first, last = -(-from_ms // _HOUR_MS), to_ms // _HOUR_MS
        self._hours = (first, last) if first < last else None
        self._pieces = [(from_ms, to_ms)]
        if self._hours is not None:
            self._pieces = [(from_ms, first * _HOUR_MS), (last * _HOUR_MS, to_ms)]

    def sums(self) -> RunSums:
        parts = [self._metrics.facts(*self._of, *piece) for piece in self._pieces]
        if self._hours is not None:
            parts.append(self._metrics.hours(*self._of, *self._hours))
        return RunSums(
            **{name: sum(getattr(part, name) for part in parts) for name in RunSums.__struct_fields__},
        )

    def failures(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for piece in self._pieces:
            found.update(self._metrics.fact_failures(*self._of, *piece))
        if self._hours is not None:
            found.update(self._metrics.hour_counts(*self._of, *self._hours, "failure"))
        return found

    def percentiles(self, runs: int, shares: Sequence[float]) -> list[float | None]:
        """Latencies that these shares of the runs were not slower than."""
        if runs <= EXACT_UP_TO:
            latencies = self._metrics.latencies(*self._of, self._from, self._to)
            return [nearest_rank(latencies, share) for share in shares]
        buckets = self.buckets()
        return [_of_histogram(buckets, share) for share in shares]

    def buckets(self) -> Counter[int]:
        """How many runs by bucket of latency."""
        buckets: Counter[int] = Counter()
        for piece in self._pieces:
            buckets.update(self._metrics.fact_buckets(*self._of, *piece))
        if self._hours is not None:
            for kind, span in _spans(*self._hours):
                counts = self._metrics.hour_counts(*self._of, *span, kind)
                buckets.update({int(name): count for name, count in counts.items()})
        return buckets

    def decisions(self) -> tuple[int, int]:
        return self._metrics.decisions(*self._of, self._from, self._to)

    def wait(self, decisions: int, share: float) -> float | None:
        """How long this share of so many decisions was not waited for longer than."""
        if not decisions:
            return None
        wait = self._metrics.wait(*self._of, self._from, self._to, ceil(share * decisions))
        return None if wait is None else float(wait)

    def pending(self) -> int:
        return self._metrics.pending(*self._of)


def _spans(first: int, last: int) -> list[tuple[str, tuple[int, int]]]:
    """Hours from `first` to `last` (excluded) as whole days, and the hours that are left on both sides."""
    from_day, to_day = -(-first // 24), last // 24
    if from_day >= to_day:
        return [("latency", (first, last))]
    return [("latency", (first, from_day * 24)), ("latency-day", (from_day, to_day)), ("latency", (to_day * 24, last))]


def nearest_rank(ascending: Sequence[int], share: float) -> float | None:
    """The least value that `share` of all are not greater than; None of nothing."""
    return float(ascending[ceil(share * len(ascending)) - 1]) if ascending else None


def _of_histogram(buckets: Mapping[int, int], share: float) -> float | None:
    rank = ceil(share * sum(buckets.values()))
    for bucket in sorted(buckets):
        rank -= buckets[bucket]
        if rank <= 0:
            return bucket_middle(bucket)
    return None
