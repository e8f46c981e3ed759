"""Journals without gap or repeat; runs that end once; sessions and runs that say what their journals say."""

from __future__ import annotations

from collections.abc import Iterator
from math import isclose

import msgspec

from corral.core.sessions import cut_preview, cut_title, input_text
from corral.protocol.events import EVENTS, TRANSIENT_EVENTS
from tests.support.invariants.snapshot import ENDINGS, TERMINAL, Entry, Row, Snapshot


def integrity(store: Snapshot) -> Iterator[str]:
    """The database is whole."""
    yield from store.faults


def versions(store: Snapshot) -> Iterator[str]:
    """A journal counts 1, 2, 3, … to its session's stateVersion, in the order of the feed."""
    for (tenant, session), entries in store.journals.items():
        row = store.sessions.get((tenant, session))
        if row is None:
            yield f"session {session} has {len(entries)} events in the journal and no row"
            continue
        for due, entry in enumerate(entries, 1):
            if entry.version != due:
                yield f"session {session} has version {entry.version} in the journal where {due} is due"
                break
        if row["state_version"] != entries[-1].version:
            end = entries[-1].version
            yield f"session {session} says stateVersion {row['state_version']}, its journal ends at {end}"
        if row["updated_at"] != entries[-1].at:
            yield f"session {session} was updated at {row['updated_at']}, its last event is of {entries[-1].at}"
        if entries[0].event != "session.updated" or entries[0].payload.get("reason") != "created":
            yield f"session {session} does not begin with its making but with {entries[0].event}"
    for (tenant, session), row in store.sessions.items():
        if row["state_version"] and (tenant, session) not in store.journals:
            yield f"session {session} says stateVersion {row['state_version']} and has no journal"


def payloads(store: Snapshot) -> Iterator[str]:
    """A payload is what the protocol says of its event, and speaks of the session and run whose row it is in."""
    for entry in store.entries():
        kind = EVENTS.get(entry.event)
        if kind is None or entry.event in TRANSIENT_EVENTS:
            yield f"{entry} is no durable event of the protocol"
            continue
        try:
            msgspec.json.decode(entry.raw, type=kind)
        except msgspec.ValidationError as error:
            yield f"{entry} does not hold what the protocol says: {error}"
        if entry.payload.get("sessionId") != entry.session:
            yield f"{entry} speaks of session {entry.payload.get('sessionId')}"
        # A compaction is its session's, and journalled for the run that needed it.
        if entry.payload.get("runId") != entry.run and entry.event != "session.compacted":
            yield f"{entry} speaks of run {entry.payload.get('runId')} and is journalled for {entry.run}"


def turns(store: Snapshot) -> Iterator[str]:
    """A session runs one run at a time; each ends once, and nothing carries its id after that."""
    for key, session in store.sessions.items():
        current: str | None = None
        accepted: set[str] = set()
        for entry in store.journals.get(key, []):
            if entry.event == "agent.accepted" and entry.run is not None:
                if current is not None:
                    yield f"run {entry.run} was accepted in session {entry.session} while run {current} was on"
                if entry.run in accepted:
                    yield f"run {entry.run} was accepted twice"
                accepted.add(entry.run)
                current = entry.run
            elif entry.run is not None and entry.run != current:
                late = "had ended" if entry.run in accepted else "was never accepted"
                yield f"{entry} carries the id of run {entry.run}, which {late}"
            if entry.event in ENDINGS and entry.run == current:
                current = None
        yield from _standing(store, session, current)


def _standing(store: Snapshot, session: Row, current: str | None) -> Iterator[str]:
    """That the session's row names the run that is on, and has its state."""
    name = f"session {session['id']}"
    if session["active_run_id"] != current:
        yield f"{name} has run {session['active_run_id']} on; by its journal that is {current}"
    run = store.runs.get((session["tenant_id"], current)) if current is not None else None
    due = "idle"
    if current is not None:
        due = "waiting_approval" if run is not None and run["status"] == "waiting_approval" else "running"
    if session["status"] != due:
        yield f"{name} is {session['status']} where {due} is due (run {current})"
    if store.settled and current is not None:
        yield f"{name} still has run {current} on, though all has settled"


def run_rows(store: Snapshot) -> Iterator[str]:
    """A run's row says what the journal says of the run."""
    accepted = {(entry.tenant, entry.run) for entry in store.entries() if entry.event == "agent.accepted"}
    for tenant, run_id in accepted:
        if run_id is not None and (tenant, run_id) not in store.runs:
            yield f"run {run_id} was accepted and has no row"
    for key, run in store.runs.items():
        entries = store.entries_of_run.get(key, [])
        if not entries or entries[0].event != "agent.accepted":
            yield f"run {run['id']} has a row and no agent.accepted in the journal"
            continue
        yield from (f"run {run['id']} {problem}" for problem in _run(run, entries))


def _run(run: Row, entries: list[Entry]) -> Iterator[str]:
    first = entries[0]
    if (run["session_id"], run["accepted_version"]) != (first.session, first.version):
        at = f"{first.version} of {first.session}"
        yield f"says that it was accepted at version {run['accepted_version']}; that was at {at}"
    if msgspec.json.decode(run["input"]) != first.payload["input"]:
        yield "has another input than its agent.accepted"
    if run["runtime_mode"] != first.payload["runtimeMode"]:
        yield f"has the mode {run['runtime_mode']} and was accepted with {first.payload['runtimeMode']}"
    resumed = [entry.payload["attempt"] for entry in entries if entry.event == "agent.resumed"]
    started = run["attempts"] - len(resumed)
    if started not in (0, 1) or resumed != list(range(2, len(resumed) + 2)):
        yield f"has {run['attempts']} attempts and was resumed with the attempts {resumed}"
    messages = sum(entry.event == "agent.message" for entry in entries)
    if run["steps"] != messages:
        yield f"has {run['steps']} steps and {messages} messages"
    yield from _usage(run, [entry.payload["usage"] for entry in entries if entry.event in _PAID])
    yield from _ending(run, entries)


_PAID = ("agent.message", "agent.usage", "session.compacted")
"""The events of what a run pays for: together they are its usage."""


def _usage(run: Row, usages: list[Row]) -> Iterator[str]:
    for column, name in (("input_tokens", "inputTokens"), ("output_tokens", "outputTokens")):
        due = sum(usage[name] for usage in usages)
        if run[column] != due:
            yield f"has {run[column]} {name}, its events {due}"
    costs = [usage["costUsd"] for usage in usages]
    cost = None if None in costs else sum(costs)
    if (cost is None) != (run["cost_usd"] is None) or not isclose(cost or 0, run["cost_usd"] or 0, abs_tol=1e-9):
        yield f"has the cost {run['cost_usd']}, its events {cost}"


def _ending(run: Row, entries: list[Entry]) -> Iterator[str]:
    endings = [entry for entry in entries if entry.event in ENDINGS]
    terminal = run["status"] in TERMINAL
    if (run["finished_at"] is not None) != terminal:
        yield f"is {run['status']} and finished at {run['finished_at']}"
    if terminal and run["lease_expires_at"] is not None:
        yield f"is {run['status']} and still has a lease"
    if len(endings) != int(terminal):
        yield f"is {run['status']} and has {len(endings)} terminal events"
        return
    if not terminal:
        return
    told = endings[0].payload
    if endings[0].event == "agent.completed":
        due = "completed"
        if run["output"] != told["output"] or run["steps"] != told["steps"]:
            yield "has another output or number of steps than its agent.completed"
        usage = {"inputTokens": run["input_tokens"], "outputTokens": run["output_tokens"], "costUsd": run["cost_usd"]}
        if told["usage"] != usage:
            yield f"has used {usage}, its agent.completed says {told['usage']}"
    else:
        due = "aborted" if told["code"] == "ABORTED" else "failed"
        error = msgspec.json.decode(run["error"]) if run["error"] is not None else {}
        if error != {name: told[name] for name in ("code", "message", "retryable")}:
            yield f"has the error {error}, its agent.failed {told['code']}"
    if run["status"] != due:
        yield f"is {run['status']}, its last event says {due}"
    if run["finished_at"] != endings[0].at:
        yield f"finished at {run['finished_at']}, its last event is of {endings[0].at}"


_ROLES = {"agent.accepted": "user", "agent.message": "assistant", "agent.tool_result": "tool"}


def transcripts(store: Snapshot) -> Iterator[str]:
    """What the model sees of a session is what the journal shows of it."""
    rows = {(row["tenant_id"], row["session_id"], row["version"]): row for row in store.tables["messages"]}
    for entry in store.entries():
        role = _ROLES.get(entry.event)
        row = rows.pop((entry.tenant, entry.session, entry.version), None)
        if role is None and row is not None and entry.event != "session.compacted":
            yield f"the transcript has a message for {entry}"
        if row is not None and (role, row["role"]) == ("assistant", "flush"):
            role = "flush"  # a silent step's
        if role is not None and (row is None or (row["role"], row["run_id"]) != (role, entry.run)):
            yield f"the transcript has no {role} message of run {entry.run} for {entry}"
    for (_, session, version), row in rows.items():
        if (version, row["role"]) == (0, "notes"):
            continue  # what the session began with, from files
        yield f"the transcript of session {session} has a message at version {version}, which the journal has not"


def session_rows(store: Snapshot) -> Iterator[str]:
    """A session's row is what its journal makes of it."""
    for key, session in store.sessions.items():
        entries = store.journals.get(key, [])
        if not entries:
            continue
        for column, due in _recounted(entries).items():
            if session[column] != due:
                yield f"session {session['id']} has {column} {session[column]!r}; its journal makes it {due!r}"


def _recounted(entries: list[Entry]) -> Row:
    """The columns of a session's row that follow from its journal."""
    row: Row = {"compaction_count": 0}
    for entry in entries:
        told = entry.payload
        if entry.event == "session.updated":
            told = told["session"]
            row |= {
                "title": told["title"],
                "visibility": told["visibility"],
                "runtime_mode": told["runtimeMode"],
                "queued_runtime_mode": told.get("queuedRuntimeMode"),
                "owner_user_id": told["ownerUserId"],
                "workspace_id": told["workspaceId"],
            }
        elif entry.event == "runtime.mode_changed":
            row |= {"runtime_mode": told["runtimeMode"], "queued_runtime_mode": None}
        elif entry.event == "agent.accepted":
            text = input_text(told["input"])
            row |= {"title": row.get("title") or cut_title(text), "preview": cut_preview(text)}
        elif entry.event == "session.compacted":
            row["compaction_count"] += 1
    return row


run_rules = (integrity, versions, payloads, turns, run_rows, transcripts, session_rows)
