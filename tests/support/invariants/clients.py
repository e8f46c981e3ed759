"""What clients saw and what they were promised, held against the store."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from corral.protocol.events import TRANSIENT_EVENTS
from corral.protocol.methods import METHODS
from tests.support.invariants.snapshot import TERMINAL, Entry, Row, Snapshot

_TRIMMED = {
    "agent.message": "text",
    "agent.tool_result": "output",
    "agent.completed": "output",
    "session.compacted": "summary",
}


class Promise(NamedTuple):
    """A request that was answered with `ok: true`: who asked for what, and what they were told."""

    tenant: str
    actor: str
    method: str
    params: Mapping[str, Any]
    payload: Mapping[str, Any]


class Seen:
    """What one client was sent: the frames of its connections, one after the other.

    `after`: sessions that it followed without a break, each with the version after which it
    began; of those it must have seen everything up to their ends. `feed`: it followed its workspace's
    feed without a break to the end, may see all sessions, and its tenant has no other workspace.
    `numbered`: events carry `seq` (they do on WebSockets).
    """

    def __init__(
        self,
        connections: Sequence[Sequence[Row]],
        *,
        tenant: str = "t_default",
        after: Mapping[str, int] | None = None,
        feed: bool = False,
        numbered: bool = True,
    ) -> None:
        self.connections = [[frame for frame in frames if frame["type"] == "event"] for frames in connections]
        self.tenant = tenant
        self.after = after or {}
        self.feed = feed
        self.numbered = numbered

    @property
    def durable(self) -> list[Row]:
        return [frame for frames in self.connections for frame in frames if frame["event"] not in TRANSIENT_EVENTS]


def check_client(store: Snapshot, seen: Seen) -> Iterator[str]:
    """What is wrong with what a client was sent."""
    if seen.numbered:
        for frames in seen.connections:
            numbers = [frame["seq"] for frame in frames]
            if numbers != list(range(1, len(numbers) + 1)):
                place = next(at for at, number in enumerate(numbers, 1) if at != number)
                yield f"was sent seq {numbers[place - 1]} where {place} was due"
    for frame in seen.durable:
        yield from _as_journalled(store, seen, frame)
    for session, after in seen.after.items():
        versions = [frame["stateVersion"] for frame in seen.durable if frame["payload"]["sessionId"] == session]
        due = list(range(after + 1, after + 1 + len(versions)))
        if versions != due:
            place = next(at for at, pair in enumerate(zip(versions, due, strict=True)) if pair[0] != pair[1])
            yield f"was sent version {versions[place]} of session {session} where {due[place]} was due"
            continue
        end = len(store.journals.get((seen.tenant, session), ()))
        if after + len(versions) != end and not store.was_deleted(seen.tenant, session):
            yield f"was sent session {session} to version {after + len(versions)} of {end}"
    if seen.feed:
        yield from _whole_feed(store, seen)
    for frames in seen.connections:
        yield from _deltas(store, seen, frames)


def _entry(store: Snapshot, seen: Seen, frame: Row) -> Entry | None:
    entries = store.journals.get((seen.tenant, frame["payload"]["sessionId"]), [])
    version = frame["stateVersion"]
    return entries[version - 1] if 0 < version <= len(entries) else None


def _as_journalled(store: Snapshot, seen: Seen, frame: Row) -> Iterator[str]:
    """That an event is in the journal as it was sent."""
    session = frame["payload"]["sessionId"]
    if store.was_deleted(seen.tenant, session):
        return
    name = f"was sent {frame['event']} at version {frame['stateVersion']} of session {session}"
    entry = _entry(store, seen, frame)
    if entry is None:
        yield f"{name}, which is not in the journal"
        return
    told, kept = dict(frame["payload"]), dict(entry.payload)
    field = _TRIMMED.get(entry.event)
    if told.pop("feedCursor", None) is not None and field is not None and told.get(field) == "":
        kept[field] = ""
    if entry.event != frame["event"] or told != kept:
        yield f"{name}, which is {entry.event} in the journal, or has another payload there"


def _whole_feed(store: Snapshot, seen: Seen) -> Iterator[str]:
    sent = [
        (frame["payload"]["sessionId"], frame["stateVersion"])
        for frame in seen.durable
        if not store.was_deleted(seen.tenant, frame["payload"]["sessionId"])
    ]
    entries = sorted((entry for entry in store.entries() if entry.tenant == seen.tenant), key=lambda entry: entry.feed)
    order = [(entry.session, entry.version) for entry in entries if not store.was_deleted(seen.tenant, entry.session)]
    if not sent:
        return
    if sent[0] not in order:
        yield f"was sent {sent[0]} first on the feed, which is not in the journal"
        return
    start = order.index(sent[0])
    due = order[start : start + len(sent)]
    if sent != due:
        place = next((at for at, pair in enumerate(zip(sent, due, strict=False)) if pair[0] != pair[1]), len(due))
        wanted = due[place] if place < len(due) else "nothing"
        yield f"was sent {sent[place]} on the feed where {wanted} was due"
    elif sent[-1] != order[-1]:
        yield f"was sent the feed to {sent[-1]}, and not to its end {order[-1]}"


def _deltas(store: Snapshot, seen: Seen, frames: Sequence[Row]) -> Iterator[str]:
    """That deltas are pieces of the messages that were journalled in the end."""
    texts: dict[str, str] = {
        entry.payload["messageId"]: entry.payload["text"]
        for session in {frame["payload"]["sessionId"] for frame in frames if frame["event"] in TRANSIENT_EVENTS}
        for entry in store.journals.get((seen.tenant, session), [])
        if entry.event == "agent.message"
    }
    for frame in frames:
        told = frame["payload"]
        text = texts.get(told.get("messageId", ""))
        if frame["event"] in TRANSIENT_EVENTS and text is not None:
            offset = told["offset"]
            if text[offset : offset + len(told["delta"])] != told["delta"]:
                yield f"was sent a delta at {offset} of message {told['messageId']} that is not its text there"


# ---- promises


def check_promises(store: Snapshot, promises: Iterable[Promise]) -> Iterator[str]:
    """What was answered `ok: true` and is not there, or was answered in two ways."""
    answers: dict[tuple[str, ...], Promise] = {}
    for promise in promises:
        method = METHODS.get(promise.method)
        if method is None or not method.side_effect:
            continue
        key = promise.params.get("idempotencyKey")
        name = f"{promise.method} with the key {key!r}"
        scope = str(promise.params.get(method.scope or "", ""))
        place = (promise.tenant, promise.actor, promise.method, scope, str(promise.params.get("workspaceId")), str(key))
        first = answers.setdefault(place, promise)
        if json.dumps(first.payload, sort_keys=True) != json.dumps(promise.payload, sort_keys=True):
            yield f"{name} was answered with {first.payload} and then with {promise.payload}"
        check = _KEPT.get(promise.method)
        if check is not None:
            yield from (f"{name} was answered ok, and {problem}" for problem in check(store, promise))


def _run(store: Snapshot, promise: Promise) -> Iterator[str]:
    run_id, session_id = promise.payload["runId"], promise.payload["sessionId"]
    run = store.runs.get((promise.tenant, run_id))
    if run is None:
        if not store.was_deleted(promise.tenant, session_id):
            yield f"run {run_id} is not there"
    elif run["session_id"] != session_id:
        yield f"run {run_id} is in session {run['session_id']} and not in {session_id}"


def _abort(store: Snapshot, promise: Promise) -> Iterator[str]:
    run = store.runs.get((promise.tenant, promise.payload["runId"]))
    if run is not None and (run["status"] != promise.payload["status"] or run["status"] not in TERMINAL):
        yield f"run {run['id']} is {run['status']} and not {promise.payload['status']}"


def _session(store: Snapshot, promise: Promise) -> Iterator[str]:
    told = promise.payload["session"]
    if store.was_deleted(promise.tenant, told["id"]):
        return
    entries = store.journals.get((promise.tenant, told["id"]), [])
    if len(entries) < told["stateVersion"]:
        yield f"session {told['id']} ends at version {len(entries)} and not at {told['stateVersion']} or later"
        return
    entry = entries[told["stateVersion"] - 1]
    if promise.method == "sessions.create" and entry.payload.get("session") != told:
        yield f"session {told['id']} was made in another way than was answered"
    if promise.method == "sessions.update" and entry.event == "session.updated" and entry.payload["session"] != told:
        yield f"session {told['id']} was changed in another way than was answered"


def _gone(store: Snapshot, promise: Promise) -> Iterator[str]:
    if not store.was_deleted(promise.tenant, promise.payload["sessionId"]):
        yield f"session {promise.payload['sessionId']} was not deleted"


def _mode(store: Snapshot, promise: Promise) -> Iterator[str]:
    told = promise.payload
    records = store.audit.get((promise.tenant, "runtime.setMode", told["sessionId"]), [])
    if not any(record["metadata"]["runtimeMode"] == told["runtimeMode"] for record in records):
        yield f"nothing is recorded of the mode {told['runtimeMode']} of session {told['sessionId']}"


def _resolve(store: Snapshot, promise: Promise) -> Iterator[str]:
    approval_id, status = promise.payload["approvalId"], promise.payload["status"]
    records = store.audit.get((promise.tenant, "approval.resolved", approval_id), [])
    row = store.approvals.get((promise.tenant, approval_id))
    if row is not None and row["status"] != status:
        yield f"approval {approval_id} is {row['status']} and not {status}"
    if promise.tenant in store.whole_audits and [record["metadata"]["status"] for record in records] != [status]:
        yield f"approval {approval_id} has no audit record of being {status}"


def _policy(store: Snapshot, promise: Promise) -> Iterator[str]:
    version, scope = promise.payload["version"], promise.payload["policy"]["scopeKey"]
    row = next(
        (r for r in store.tables["policies"] if (r["tenant_id"], r["scope_key"]) == (promise.tenant, scope)), None
    )
    if row is None or row["version"] < version:
        yield f"the policy {scope} is at version {row['version'] if row else 0} and not at {version} or later"


def _agent(store: Snapshot, promise: Promise) -> Iterator[str]:
    agent_id = promise.payload["agent"]["id"]
    if not any((row["tenant_id"], row["id"]) == (promise.tenant, agent_id) for row in store.tables["agents"]):
        yield f"agent {agent_id} is not there"


def _revoked(store: Snapshot, promise: Promise) -> Iterator[str]:
    grant_id = promise.payload["grant"]["grantId"]
    row = next((r for r in store.tables["grants"] if (r["tenant_id"], r["id"]) == (promise.tenant, grant_id)), None)
    if row is not None and row["revoked_at"] is None:
        yield f"grant {grant_id} was not revoked"


_KEPT = {
    "agent.run": _run,
    "agent.abort": _abort,
    "sessions.create": _session,
    "sessions.update": _session,
    "sessions.delete": _gone,
    "runtime.setMode": _mode,
    "approval.resolve": _resolve,
    "policy.update": _policy,
    "agents.upsert": _agent,
    "grants.revoke": _revoked,
}
