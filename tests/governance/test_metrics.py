"""`metrics.summary` against a recount from the journals, and what its figures mean at their edges."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from msgspec import UNSET

from corral.clock import rfc3339
from corral.core.ending import Ending, aborted, completed, end_run, failed
from corral.governance import metrics
from corral.governance.caller import Caller
from corral.governance.metrics import bucket_middle, bucket_of
from corral.protocol.errors import InvalidRequest
from corral.protocol.events import AgentAccepted, AgentMessage, AgentToolCall, AgentToolResult
from corral.protocol.methods import MetricsParams
from corral.protocol.types import Metrics, Usage
from corral.storage.events import append
from corral.storage.repositories import Transaction, usage
from tests.storage.make import approval, decision, run, session, tool_run
from tests.support.callers import caller_of
from tests.support.house import House, house
from tests.support.model_server import CallTools, Say

T, W = "t_default", "w_default"
HOUR = 3_600_000
BEGIN = 1_700_000_000_000 // HOUR * HOUR
AGENT = {"agentId": "a_default"}
CODES = ["MODEL_UNAVAILABLE", "LIMIT_REACHED", "INTERNAL_ERROR"]


def who(workspace_id: str = W, tenant_id: str = T) -> Caller:
    return caller_of("u_1", tenant=tenant_id, workspace=workspace_id)


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[House]:
    unchecked = "the rows that are to be counted are written by hand, without what else belongs to them"
    async with house(tmp_path / "data", unchecked=unchecked) as home:
        yield home


async def summary(home: House, of: Any = None, **params: Any) -> Metrics:
    methods = metrics.MetricsMethods(home.server._clock)
    given = {"from_" if name == "from_" else name: value for name, value in params.items()}
    result = await home.server.store.read(lambda tx: methods.summary(tx, of or who(), MetricsParams(**given)))
    return result.metrics


def make_run(tx: Transaction, deps: Any, rng: random.Random, number: int, **given: Any) -> None:
    """A run that is journalled from its acceptance to its end, with random calls, usage, times and outcome."""
    ended = given.get("ended", BEGIN + rng.randrange(100 * HOUR))
    if number % 10 == 0:
        ended = ended // HOUR * HOUR - number % 20 // 10
    began = ended - int(10 ** rng.uniform(0, 6))
    where: dict[str, Any] = {"tenant_id": T, "workspace_id": given.get("workspace_id", W)}
    agent, names = rng.choice(["a_default", "a_2"]), {"session_id": f"s_{number}", "run_id": f"run_{number}"}
    tx.sessions.insert(session(f"s_{number}", agent_id=agent, active_run_id=f"run_{number}", **where))
    append(tx, T, AgentAccepted(**names, runtime_mode="local", input="go"), began)
    usage = Usage(input_tokens=rng.randrange(5000), output_tokens=rng.randrange(900), cost_usd=rng.choice([None, 0.25]))
    row = run(f"run_{number}", session_id=f"s_{number}", agent_id=agent, created_at=began, status="running", **where)
    row.steps, row.cost_usd = 1, usage.cost_usd
    row.input_tokens, row.output_tokens = usage.input_tokens, usage.output_tokens
    tx.runs.insert(row)
    append(tx, T, AgentMessage(**names, message_id="m", role="assistant", text="", usage=usage), began)
    for position in range(rng.randrange(4)):
        call = f"tc_{number}_{position}"
        status = rng.choice(["success", "failed", "denied", "interrupted", None])
        asked = AgentToolCall(**names, tool_call_id=call, tool_name="file.list", args={}, decision="allow")
        append(tx, T, asked, began)
        state = {"state": "finished", "status": status} if status else {"state": "started"}
        tx.tool_runs.insert(
            tool_run(call, T, run_id=f"run_{number}", session_id=f"s_{number}", position=position, **state)
        )
        if status:
            told: dict[str, Any] = {**names, "tool_call_id": call, "tool_name": "file.list", "status": status}
            result = AgentToolResult(**told, output="", truncated=False, duration_ms=1)
            append(tx, T, result, began)
    ending: Ending = rng.choice([completed("done"), completed("done"), aborted([]), failed(rng.choice(CODES), "why")])
    end_run(tx, deps, row, given.get("ending", ending), ended)


def recount(home_entries: list[Any], from_ms: int, to_ms: int, agent_id: str | None) -> dict[str, Any]:
    """The figures out of nothing but journal entries, given as (agent, run, event, payload, time)."""
    by_run: dict[str, list[Any]] = {}
    for agent, run_id, event, payload, at in home_entries:
        if agent_id in (None, agent):
            by_run.setdefault(run_id, []).append((event, payload, at))
    ended = []
    for events in by_run.values():
        name, payload, at = events[-1]
        if name in ("agent.completed", "agent.failed") and from_ms <= at < to_ms:
            ended.append((name, payload, at - events[0][2], events))
    failures = Counter(p["code"] for name, p, _, _ in ended if name == "agent.failed" and p["code"] != "ABORTED")
    done = sum(name == "agent.completed" for name, *_ in ended)
    usages = [p["usage"] for _, _, _, events in ended for name, p, _ in events if name == "agent.message"]
    calls = [name for *_, events in ended for name, _, _ in events if name == "agent.tool_call"]
    bad = [
        p
        for *_, events in ended
        for name, p, _ in events
        if name == "agent.tool_result" and p["status"] in ("failed", "interrupted")
    ]
    latencies = sorted(latency for _, _, latency, _ in ended)
    costs = [usage["costUsd"] for usage in usages if usage["costUsd"] is not None]
    percentiles = {
        f"p{n}_latency_ms": latencies[ceil(n / 100 * len(latencies)) - 1] if latencies else None for n in (50, 95, 99)
    }
    return {
        "runs_total": len(ended),
        "runs_completed": done,
        "runs_failed": sum(failures.values()),
        "runs_aborted": len(ended) - done - sum(failures.values()),
        "success_rate": done / len(ended) if ended else None,
        "failure_reasons": dict(failures),
        "tool_calls_total": len(calls),
        "tool_failures": len(bad),
        "input_tokens": sum(usage["inputTokens"] for usage in usages),
        "output_tokens": sum(usage["outputTokens"] for usage in usages),
        "cost_usd": sum(costs) if costs or not ended else None,
        **percentiles,
    }


async def entries_of(home: House) -> list[Any]:
    def query(tx: Transaction) -> list[Any]:
        agents = {
            row.id: row.agent_id
            for row in tx.sessions.page(T, W, user_id="u_1", agent_id=None, limit=5000, before=None)
        }
        return [
            (agents[e.session_id], e.run_id, e.event, json.loads(e.payload), e.created_at)
            for e in tx.journal.feed_after(T, W, 0, user_id="u_1", limit=100_000)
            if e.run_id is not None
        ]

    return await home.server.store.read(query)


@pytest.mark.parametrize("seed", [1, 2])
async def test_the_figures_are_those_of_a_recount_from_the_journals(home: House, seed: int) -> None:
    rng = random.Random(seed)
    deps = home.server.core._deps

    def fill(tx: Transaction) -> None:
        for number in range(300):
            make_run(tx, deps, rng, number)
        make_run(tx, deps, rng, 1000, workspace_id="w_other")

    await home.server.store.write(fill)
    entries = await entries_of(home)
    periods = [(BEGIN - HOUR, BEGIN + 110 * HOUR), (BEGIN, BEGIN + HOUR), (BEGIN + 1, BEGIN + HOUR - 1)]
    periods += [(BEGIN, BEGIN), (BEGIN + HOUR // 2, BEGIN + 3 * HOUR // 2)]
    for _ in range(20):
        a, b = sorted(BEGIN + rng.randrange(100 * HOUR) for _ in range(2))
        periods.append((a, b))
    for from_ms, to_ms in periods:
        for agent_id in (None, "a_2"):
            found = await summary(home, from_=rfc3339(from_ms), to=rfc3339(to_ms), agent_id=agent_id or UNSET)
            expected = recount(entries, from_ms, to_ms, agent_id)
            assert {name: getattr(found, name) for name in expected} == expected, (from_ms, to_ms, agent_id)
            assert (found.from_, found.to) == (rfc3339(from_ms), rfc3339(to_ms))


async def test_percentiles_of_many_runs_are_within_what_is_stated(home: House, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, deps = random.Random(3), home.server.core._deps

    def fill(tx: Transaction) -> None:
        for number in range(300):
            make_run(tx, deps, rng, number)

    await home.server.store.write(fill)
    period = {"from_": rfc3339(BEGIN + HOUR // 3), "to": rfc3339(BEGIN + 95 * HOUR + 7)}
    exact = await summary(home, **period)

    def both(tx: Transaction) -> tuple[Counter[int], Counter[int]]:
        period = metrics._Period(tx, who(), None, BEGIN + HOUR // 3, BEGIN + 95 * HOUR + 7)
        latencies = tx.metrics.latencies(T, W, None, BEGIN + HOUR // 3, BEGIN + 95 * HOUR + 7)
        return period.buckets(), Counter(bucket_of(latency) for latency in latencies)

    kept, counted = await home.server.store.read(both)
    assert kept == counted
    monkeypatch.setattr(metrics, "EXACT_UP_TO", 0)
    rough = await summary(home, **period)
    for name in ("p50_latency_ms", "p95_latency_ms", "p99_latency_ms"):
        assert getattr(rough, name) == pytest.approx(getattr(exact, name), rel=1 / 32)


def test_a_bucket_is_narrow_and_its_middle_is_near_everything_in_it() -> None:
    rng = random.Random(4)
    before = -1
    for millis in [*range(5000), *(int(10 ** rng.uniform(4, 12)) for _ in range(5000))]:
        bucket = bucket_of(millis)
        assert abs(bucket_middle(bucket) - millis) <= millis / 32
        if millis < 5000:
            assert bucket - before in (0, 1)
            before = bucket


async def test_a_deleted_session_leaves_its_runs_and_what_people_decided_in_it_counted(tmp_path: Path) -> None:
    def writes(request: dict[str, Any]) -> Any:
        answered = request["messages"][-1]["role"] == "tool"
        return Say("done") if answered else CallTools([("file_write", {"path": "a", "content": "b"})])

    async with house(tmp_path / "data", script=writes) as home, await home.wire() as wire:
        for decision in ("approve", "reject", "reject"):
            run = await wire.effect("agent.run", input="write", sessionId="s_1")
            asked = (await wire.event("approval.required", runId=run["runId"]))["payload"]
            await wire.effect("approval.resolve", approvalId=asked["approvalId"], decision=decision)
            await wire.event("agent.completed", runId=run["runId"])
        period = {"from": "2020-01-01T00:00:00Z", "to": "2100-01-01T00:00:00Z"}
        before = [(await wire.request("metrics.summary", {**period, **more}))["metrics"] for more in ({}, AGENT)]
        for figures in before:
            assert (figures["runsTotal"], figures["approvalsApproved"], figures["approvalsRejected"]) == (3, 1, 2)
            assert figures["approvalWaitP50Ms"] is not None
        await wire.effect("sessions.delete", sessionId="s_1")
        after = [(await wire.request("metrics.summary", {**period, **more}))["metrics"] for more in ({}, AGENT)]
        assert after == before


async def test_approvals_count_by_when_people_decided_and_pending_ones_are_those_of_now(home: House) -> None:
    def fill(tx: Transaction) -> None:
        for number, (status, wait) in enumerate(
            [("approved", 100), ("approved", 300), ("rejected", 200), ("expired", 9), ("cancelled", 9), ("pending", 0)]
        ):
            names: dict[str, Any] = {"session_id": f"s_{number}", "run_id": f"run_{number}", "workspace_id": W}
            agent = "a_2" if number in (0, 5) else "a_default"
            tx.sessions.insert(session(f"s_{number}", T, workspace_id=W))
            tx.runs.insert(run(f"run_{number}", T, session_id=f"s_{number}", workspace_id=W, agent_id=agent))
            resolved = None if status == "pending" else BEGIN + wait
            tx.approvals.insert(
                approval(f"ap_{number}", T, status=status, created_at=BEGIN, resolved_at=resolved, **names)
            )
            if status in ("approved", "rejected"):
                told: dict[str, Any] = {"status": status, "workspace_id": W, "agent_id": agent, "wait_ms": wait}
                tx.metrics.decided(decision(f"ap_{number}", T, resolved_at=BEGIN + wait, **told))

    await home.server.store.write(fill)

    def figures(found: Metrics) -> tuple[Any, ...]:
        return (
            found.approvals_pending,
            found.approvals_approved,
            found.approvals_rejected,
            found.approval_wait_p50_ms,
        )

    begin, end = rfc3339(BEGIN), rfc3339(BEGIN + HOUR)
    assert figures(await summary(home, from_=begin, to=end)) == (1, 2, 1, 200.0)
    assert figures(await summary(home, from_=begin, to=rfc3339(BEGIN + 200))) == (1, 1, 0, 100.0)
    assert figures(await summary(home, from_=begin, to=end, agent_id="a_2")) == (1, 1, 0, 100.0)
    assert figures(await summary(home)) == (1, 0, 0, None)
    assert figures(await summary(home, of=who("w_other"), from_=begin, to=end)) == (0, 0, 0, None)
    assert figures(await summary(home, of=who(tenant_id="t_other"), from_=begin, to=end)) == (0, 0, 0, None)


async def test_the_median_of_many_waits_is_that_of_few(home: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is looked for: put in order, or in the order in which the waits are kept."""
    rng = random.Random(6)

    def fill(tx: Transaction) -> None:
        for number in range(400):
            given: dict[str, Any] = {"status": rng.choice(["approved", "rejected"]), "wait_ms": rng.randrange(200)}
            given |= {"workspace_id": rng.choice([W, "w_other"]), "agent_id": rng.choice(["a_default", "a_2"])}
            tx.metrics.decided(decision(f"ap_{number}", T, resolved_at=BEGIN + rng.randrange(HOUR), **given))

    await home.server.store.write(fill)
    for number in range(20):
        a, b = sorted(BEGIN + rng.randrange(HOUR) for _ in range(2))
        agent = {"agent_id": "a_2"} if number % 2 else {}
        found = []
        for many in (0, 10_000):
            monkeypatch.setattr(usage, "_MANY", many)
            found.append(await summary(home, from_=rfc3339(a), to=rfc3339(b), **agent))
        assert found[0] == found[1]
        assert found[0].approval_wait_p50_ms is not None or found[0].approvals_approved == 0


async def test_without_a_period_it_is_the_last_24_hours_up_to_what_ends_now(home: House) -> None:
    async with await home.wire() as wire:
        await wire.effect("agent.run", input="hello")
        await wire.frame(lambda frame: frame.get("event") == "agent.completed")
        found = (await wire.request("metrics.summary", {}))["metrics"]
        assert (found["runsTotal"], found["successRate"], found["approvalWaitP50Ms"]) == (1, 1.0, None)
        assert found["p50LatencyMs"] > 0
        later = await wire.request("metrics.summary", {"from": "2100-01-01T00:00:00Z", "to": "2100-01-02T00:00:00Z"})
        assert (later["metrics"]["runsTotal"], later["metrics"]["successRate"], later["metrics"]["costUsd"]) == (
            0,
            None,
            0,
        )


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"from_": "yesterday"}, "$.params.from is no RFC 3339"),
        ({"to": "2026-13-01T00:00:00Z"}, "$.params.to is no RFC 3339"),
        ({"from_": "2026-01-02T00:00:00Z", "to": "2026-01-01T00:00:00Z"}, "$.params.from lies after $.params.to"),
        ({"from_": "2999-01-02T00:00:00Z"}, "$.params.from lies after the present time"),
    ],
)
async def test_a_period_that_is_none_is_refused_with_the_field(home: House, params: dict[str, str], named: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await summary(home, **params)
    assert named in caught.value.message
