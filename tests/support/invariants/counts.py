"""What is counted agrees with a recount from the journal."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from math import isclose

import msgspec

from corral.governance.metrics import bucket_of
from tests.support.invariants.calls import calls_of
from tests.support.invariants.snapshot import TERMINAL, Row, Snapshot

_HOUR_MS, _DAY_MS = 3_600_000, 86_400_000
_SUMS = ("completed", "failed", "aborted", "tool_calls", "tool_failures", "input_tokens", "output_tokens", "priced")


def facts(store: Snapshot) -> Iterator[str]:
    """A run that has ended is counted once, with what its journal says; nothing else is counted."""
    rows = {(row["tenant_id"], row["run_id"]): row for row in store.tables["run_facts"]}
    if len(rows) != len(store.tables["run_facts"]):
        yield "a run is counted twice in run_facts"
    made: Counter[tuple[str, str]] = Counter()
    failed: Counter[tuple[str, str]] = Counter()
    for (tenant, _), call in calls_of(store).calls.items():
        made[tenant, str(call.made.run)] += 1
        failed[tenant, str(call.made.run)] += any(
            entry.payload["status"] in ("failed", "interrupted") for entry in call.results
        )
    for key, run in store.runs.items():
        fact = rows.pop(key, None)
        if run["status"] not in TERMINAL:
            if fact is not None:
                yield f"run {run['id']} is {run['status']} and counted in run_facts"
            continue
        if fact is None:
            yield f"run {run['id']} is {run['status']} and not counted in run_facts"
            continue
        for name, due in _fact(run, made[key], failed[key]).items():
            if fact[name] != due:
                yield f"run {run['id']} is counted with {name} {fact[name]}, its journal makes it {due}"
    for tenant, run_id in rows:
        if tenant in store.whole_audits and (tenant, "run.ended", run_id) not in store.audit:
            yield f"run_facts counts run {run_id}, whose end nobody recorded"


def _fact(run: Row, calls: int, failures: int) -> Row:
    latency = max(0, run["finished_at"] - run["created_at"])
    error = msgspec.json.decode(run["error"]) if run["error"] is not None else {}
    return {
        "workspace_id": run["workspace_id"],
        "agent_id": run["agent_id"],
        "finished_at": run["finished_at"],
        "status": run["status"],
        "code": error.get("code", "") if run["status"] == "failed" else "",
        "latency_ms": latency,
        "bucket": bucket_of(latency),
        "tool_calls": calls,
        "tool_failures": failures,
        "input_tokens": run["input_tokens"],
        "output_tokens": run["output_tokens"],
        "cost_usd": run["cost_usd"],
    }


def decisions(store: Snapshot) -> Iterator[str]:
    """What a person decided is counted once, as it was decided, and stays counted when the session is gone."""
    rows = {(row["tenant_id"], row["approval_id"]): row for row in store.tables["approval_facts"]}
    if len(rows) != len(store.tables["approval_facts"]):
        yield "a decision is counted twice in approval_facts"
    for (tenant, approval_id), row in store.approvals.items():
        fact = rows.pop((tenant, approval_id), None)
        if row["status"] not in ("approved", "rejected"):
            if fact is not None:
                yield f"approval {approval_id} is {row['status']} and counted in approval_facts"
            continue
        if fact is None:
            yield f"approval {approval_id} is {row['status']} and not counted in approval_facts"
            continue
        due = {name: row[name] for name in ("workspace_id", "resolved_at", "status")}
        due["agent_id"] = store.runs[tenant, row["run_id"]]["agent_id"]
        due["wait_ms"] = max(0, row["resolved_at"] - row["created_at"])
        for name, value in due.items():
            if fact[name] != value:
                yield f"approval {approval_id} is counted with {name} {fact[name]}, it was {value}"
    for (tenant, approval_id), row in rows.items():
        records = store.audit.get((tenant, "approval.resolved", approval_id), [])
        told = [record["metadata"]["status"] for record in records]
        if tenant in store.whole_audits and told != [row["status"]]:
            yield f"approval_facts counts approval {approval_id} as {row['status']}, which nobody recorded"


def hours(store: Snapshot) -> Iterator[str]:
    """The sums by the hour are those of the facts."""
    due: Counter[tuple[object, ...]] = Counter()
    counts: Counter[tuple[object, ...]] = Counter()
    cost: dict[tuple[object, ...], float] = defaultdict(float)
    for row in store.tables["run_facts"]:
        place = (row["tenant_id"], row["workspace_id"], row["agent_id"])
        hour, day = row["finished_at"] // _HOUR_MS, row["finished_at"] // _DAY_MS
        cost[(*place, hour)] += row["cost_usd"] or 0
        for name in ("tool_calls", "tool_failures", "input_tokens", "output_tokens"):
            due[(*place, hour, name)] += row[name]
        due[(*place, hour, row["status"])] += 1
        due[(*place, hour, "priced")] += row["cost_usd"] is not None
        counts[(*place, "latency", hour, str(row["bucket"]))] += 1
        counts[(*place, "latency-day", day, str(row["bucket"]))] += 1
        if row["status"] == "failed":
            counts[(*place, "failure", hour, row["code"])] += 1
    for row in store.tables["run_hours"]:
        place = (row["tenant_id"], row["workspace_id"], row["agent_id"])
        for name in _SUMS:
            recounted = due.pop((*place, row["hour"], name), 0)
            if row[name] != recounted:
                yield f"hour {row['hour']} of {place} counts {row[name]} {name}, the runs are {recounted}"
        spent = cost[(*place, row["hour"])]
        if not isclose(row["cost_usd"], spent, abs_tol=1e-9):
            yield f"hour {row['hour']} of {place} counts {row['cost_usd']} cost_usd, the runs are {spent}"
    yield from (f"{place} is not in the hours: {count}" for place, count in due.items() if count)
    for row in store.tables["run_hour_counts"]:
        counted = (row["tenant_id"], row["workspace_id"], row["agent_id"], row["kind"], row["hour"], row["name"])
        recounted = counts.pop(counted, 0)
        if row["count"] != recounted:
            yield f"{counted} counts {row['count']}, the runs are {recounted}"
    yield from (f"{place} is not in the counts of hours: {count}" for place, count in counts.items() if count)


def reservations(store: Snapshot) -> Iterator[str]:
    """Nothing is set aside for a run that has ended."""
    for row in store.tables["reservations"]:
        run = store.runs.get((row["tenant_id"], row["run_id"]))
        if run is None or run["status"] in TERMINAL:
            yield f"the budget {row['scope']} has something set aside for run {row['run_id']}, which has ended"


count_rules = (facts, decisions, hours, reservations)
