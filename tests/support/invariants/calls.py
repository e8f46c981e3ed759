"""Each call has one result, after it and its approval; none started without a decision for exactly its arguments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec

from corral.core.judge import args_hash
from tests.support.invariants.snapshot import TERMINAL, Entry, Key, Row, Snapshot


class Call:
    """What the journal says of one call."""

    def __init__(self, made: Entry) -> None:
        self.made = made
        self.required: list[Entry] = []
        self.resolved: list[Entry] = []
        self.results: list[Entry] = []

    def __str__(self) -> str:
        return f"call {self.made.payload['toolCallId']} ({self.made.payload['toolName']}) of run {self.made.run}"


class Calls(NamedTuple):
    calls: dict[Key, Call]
    problems: list[str]


def calls_of(store: Snapshot) -> Calls:
    """Walk every journal once, in its order."""
    found: Calls | None = store.calls
    if found is None:
        found = store.calls = Calls({}, [])
        for entries in store.journals.values():
            _walk(entries, found)
    return found


def _walk(entries: list[Entry], found: Calls) -> None:
    waiting: list[Call] = []
    for entry in entries:
        if entry.event == "agent.message":
            found.problems.extend(
                f"run {entry.run} went on to its next step at version {entry.version} without a result of {call}"
                for call in waiting
                if call.made.run == entry.run and not call.results
            )
            waiting = []
        call_id = entry.payload.get("toolCallId")
        if call_id is None:
            continue
        if entry.event == "agent.tool_call":
            if (entry.tenant, call_id) in found.calls:
                found.problems.append(f"call {call_id} was journalled twice")
            call = found.calls[entry.tenant, call_id] = Call(entry)
            waiting.append(call)
            continue
        standing = found.calls.get((entry.tenant, call_id))
        if standing is None:
            found.problems.append(f"{entry} is about call {call_id}, which was not journalled before it")
            continue
        kinds = {"approval.required": standing.required, "approval.resolved": standing.resolved}
        kinds["agent.tool_result"] = standing.results
        if entry.event in kinds:
            kinds[entry.event].append(entry)
        if standing.made.run != entry.run:
            found.problems.append(f"{entry} carries run {entry.run} and is about {standing}")


def results(store: Snapshot) -> Iterator[str]:
    """One result for each call, after it and after its approval, and before the next step."""
    calls, problems = calls_of(store)
    yield from problems
    for call in calls.values():
        run = store.runs.get((call.made.tenant, call.made.run or ""))
        ended = run is None or run["status"] in TERMINAL
        if len(call.results) > 1 or (ended and not call.results):
            yield f"{call} has {len(call.results)} results"
        asked = call.made.payload["decision"] == "approval-required"
        if len(call.required) != int(asked):
            yield f"{call} was decided {call.made.payload['decision']} and has {len(call.required)} approval.required"
        if len(call.resolved) > len(call.required) or (asked and call.results and not call.resolved):
            yield f"{call} has {len(call.resolved)} approval.resolved for {len(call.required)} approval.required"
        order = [entry.version for entry in (*call.required, *call.resolved, *call.results)]
        if order != sorted(order):
            yield f"{call} has its question, its answer and its result out of order, at {order}"


def tool_rows(store: Snapshot) -> Iterator[str]:
    """The row of a call says what the journal says of it."""
    calls, _ = calls_of(store)
    for key in calls.keys() - store.tool_runs.keys():
        yield f"{calls[key]} has no row"
    for key, row in store.tool_runs.items():
        call = calls.get(key)
        if call is None:
            yield f"call {row['id']} of run {row['run_id']} has a row and was not journalled"
            continue
        yield from (f"{call} {problem}" for problem in _row(call, row))


def _row(call: Call, row: Row) -> Iterator[str]:
    made = call.made.payload
    if (row["run_id"], row["session_id"]) != (call.made.run, call.made.session):
        yield f"has a row for run {row['run_id']} of session {row['session_id']}"
    for column, name in (("tool_name", "toolName"), ("decision", "decision"), ("rule_id", "ruleId")):
        if row[column] != made.get(name):
            yield f"has {column} {row[column]} and was journalled with {made.get(name)}"
    args = msgspec.json.decode(row["args"])
    edited = call.resolved[-1].payload["args"] if call.resolved else made["args"]
    if args != edited:
        yield "has other arguments in its row than were journalled and approved"
    if row["args_hash"] != args_hash(row["tool_name"], args):
        yield "has a hash that is not that of its arguments"
    if (row["state"] == "finished") != bool(call.results) or (row["finished_at"] is not None) != bool(call.results):
        yield f"is {row['state']} and has {len(call.results)} results"
    if call.results:
        told = call.results[-1].payload
        for column, name in (("status", "status"), ("tool_name", "toolName"), ("duration_ms", "durationMs")):
            if row[column] != told[name]:
                yield f"has {column} {row[column]}, its result {told[name]}"


def clearances(store: Snapshot) -> Iterator[str]:
    """No tool started without a journalled decision for exactly these arguments."""
    calls, _ = calls_of(store)
    of_call = {(row["tenant_id"], row["tool_call_id"]): row for row in store.tables["approvals"]}
    for key, row in store.tool_runs.items():
        if key not in calls:
            continue
        call, approval = calls[key], of_call.get(key)
        started = row["started_at"] is not None
        ran = started or row["status"] == "success"
        # A call of an unknown tool or with wrong arguments fails without having been run.
        ran = ran or (row["status"] == "failed" and row["decision"] != "deny")
        if ran and (problem := _not_cleared(call, row, approval)):
            yield f"{call} was run though {problem}"
        if row["repeatable"]:
            continue
        if ran and not started:
            yield f"{call} has the result {row['status']} and no record of its start"
        if started and row["state"] == "finished" and row["status"] not in ("success", "failed", "interrupted"):
            yield f"{call} was started and has the result {row['status']}"
        if started and row["state"] == "decided":
            yield f"{call} has a start and is in the state decided"


def _not_cleared(call: Call, row: Row, approval: Row | None) -> str | None:
    decision = call.made.payload["decision"]
    if decision == "allow":
        same = row["args_hash"] == args_hash(call.made.payload["toolName"], call.made.payload["args"])
        return None if same else "it was allowed with other arguments"
    if decision == "deny":
        return "it was denied"
    if approval is None or approval["status"] != "approved" or not call.resolved:
        return f"its approval is {approval['status'] if approval else 'missing'}"
    told = call.resolved[-1].payload
    if (
        told["status"] != "approved"
        or told["argsHash"] != row["args_hash"]
        or approval["args_hash"] != row["args_hash"]
    ):
        return "it was approved with other arguments"
    return None


def check_marks(store: Snapshot, tenant: str, marks: Mapping[str, int]) -> Iterator[str]:
    """A tool left one mark at most for each call, and only for a call that it was started for."""
    calls, _ = calls_of(store)
    for call_id, times in marks.items():
        row = store.tool_runs.get((tenant, call_id))
        call = calls.get((tenant, call_id))
        if row is None or call is None:
            yield f"a tool left a mark for call {call_id}, which is not in the journal"
            continue
        if times > 1 and not row["repeatable"]:
            yield f"{call} was started {times} times"
        if row["started_at"] is None:
            yield f"{call} left a mark, and no start of it is recorded"
        if row["status"] == "denied":
            yield f"{call} left a mark and was denied"


def approval_rows(store: Snapshot) -> Iterator[str]:
    """An approval is what the journal says, decided once; none is left of a run that has ended."""
    calls, _ = calls_of(store)
    told: dict[Key, tuple[list[Entry], list[Entry]]] = {}
    for call in calls.values():
        for place, entries in enumerate((call.required, call.resolved)):
            for entry in entries:
                told.setdefault((entry.tenant, entry.payload["approvalId"]), ([], []))[place].append(entry)
    for _, approval_id in told.keys() - store.approvals.keys():
        yield f"approval {approval_id} was journalled and has no row"
    for key, row in store.approvals.items():
        required, resolved = told.get(key, ([], []))
        yield from (f"approval {row['id']} {problem}" for problem in _approval(store, row, required, resolved))


def _approval(store: Snapshot, row: Row, required: list[Entry], resolved: list[Entry]) -> Iterator[str]:
    pending = row["status"] == "pending"
    if len(required) != 1 or len(resolved) != int(not pending):
        yield f"is {row['status']} and was required {len(required)} and resolved {len(resolved)} times in the journal"
        return
    last = (resolved or required)[0].payload
    same = {"id": "approvalId", "run_id": "runId", "session_id": "sessionId", "tool_call_id": "toolCallId"}
    same |= {"args_hash": "argsHash", "status": "status", "resolved_by": "resolvedBy", "comment": "comment"}
    for column, name in same.items():
        if row[column] != last.get(name):
            yield f"has {column} {row[column]} and was journalled with {last.get(name)}"
    if msgspec.json.decode(row["args"]) != last["args"]:
        yield "has other arguments than were journalled"
    run = store.runs.get((row["tenant_id"], row["run_id"]))
    if pending and (run is None or run["status"] in TERMINAL):
        yield f"is pending, and its run {row['run_id']} has ended"


def grants(store: Snapshot) -> Iterator[str]:
    """A grant comes of an approval that was approved, and has the uses that the journal shows."""
    used: Counter[Key] = Counter()
    for entry in store.entries():
        reason = entry.payload.get("reason")
        if entry.event == "agent.tool_call" and isinstance(reason, str) and reason.startswith("grant "):
            used[entry.tenant, reason.removeprefix("grant ").split(":")[0]] += 1
    rows = {(row["tenant_id"], row["id"]): row for row in store.tables["grants"]}
    for _, grant_id in used.keys() - rows.keys():
        yield f"grant {grant_id} let a call run and is not there"
    for key, row in rows.items():
        of_session = row["session_id"] is not None
        if row["uses"] < used[key] or (of_session and row["uses"] != used[key]):
            yield f"grant {row['id']} has {row['uses']} uses, the journal {used[key]}"
        approval = store.approvals.get((row["tenant_id"], row["approval_id"]))
        if of_session and (approval is None or approval["status"] != "approved"):
            yield f"grant {row['id']} comes of approval {row['approval_id']}, which nobody approved"


call_rules = (results, tool_rows, clearances, approval_rows, grants)
