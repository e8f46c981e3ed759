"""Every decision and effect has its audit record; one key had one effect; nothing crosses a tenant."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import msgspec

from corral.governance.chain import GENESIS, ChainCheck
from tests.support.invariants.snapshot import ENDINGS, TERMINAL, Entry, Row, Snapshot


def chains(store: Snapshot) -> Iterator[str]:
    """Each tenant's chain of records verifies, from the first that retention has left."""
    tenants: dict[str, list[Row]] = defaultdict(list)
    for row in store.tables["audit_log"]:
        tenants[row["tenant_id"]].append(row)
    for tenant, rows in tenants.items():
        rows.sort(key=lambda row: int(row["id"]))
        chain = ChainCheck(tenant)
        # How a purged chain may begin is signed outside the store; here its word is taken.
        chain.base_id = chain.head_id = rows[0]["id"] - 1
        chain.head_hash = rows[0]["prev_hash"] if rows[0]["id"] > 1 else GENESIS
        for row in rows:
            if not chain.feed(_record(row)):
                break
        if chain.finding is not None:
            yield f"the audit chain of {tenant} is broken at record {chain.finding.at}: {chain.finding.reason}"


def _record(row: Row) -> Row:
    """A record under its names on the wire, as the chain's hashes cover it."""
    return {
        "tenantId": row["tenant_id"],
        "id": row["id"],
        "action": row["action"],
        "actor": row["actor"],
        "actorType": row["actor_type"],
        "resourceType": row["resource_type"],
        "resourceId": row["resource_id"],
        "outcome": row["outcome"],
        "metadata": msgspec.json.decode(row["metadata"]),
        "traceId": row["trace_id"],
        "createdAt": row["created_at"],
        "prevHash": row["prev_hash"],
        "hash": row["hash"],
    }


def _due(store: Snapshot, entry: Entry) -> tuple[str, str, dict[str, Any]] | None:
    """(action, resource, what the metadata must say) of the record that goes with an event."""
    told = entry.payload
    if entry.event == "agent.accepted":
        return "agent.run", str(entry.run), {"mode": told["runtimeMode"]}
    if entry.event in ENDINGS:
        run = store.runs.get((entry.tenant, str(entry.run)), {})
        return "run.ended", str(entry.run), {"status": run.get("status"), "code": told.get("code", "")}
    if entry.event == "agent.tool_call":
        return "tool.call", told["toolCallId"], {"toolName": told["toolName"], "decision": told["decision"]}
    if entry.event == "agent.tool_result":
        return "tool.result", told["toolCallId"], {"toolName": told["toolName"], "status": told["status"]}
    if entry.event == "approval.required":
        return "approval.required", told["approvalId"], {"argsHash": told["argsHash"]}
    if entry.event == "approval.resolved":
        return "approval.resolved", told["approvalId"], {"argsHash": told["argsHash"], "status": told["status"]}
    return None


_OF_RUNS = frozenset({"agent.run", "run.ended", "tool.call", "tool.result", "approval.required", "approval.resolved"})


def audited(store: Snapshot) -> Iterator[str]:
    """What the journal tells of a run has its record, that says the same; and no record tells of more."""
    journalled: Counter[tuple[str, str, str]] = Counter()
    for entry in store.entries():
        due = _due(store, entry)
        if due is None or entry.tenant not in store.whole_audits:
            continue
        action, resource, says = due
        journalled[entry.tenant, action, resource] += 1
        found = store.audit.get((entry.tenant, action, resource), [])
        if len(found) != 1:
            yield f"{entry} has {len(found)} audit records {action} of {resource}"
        for record in found:
            wrong = {name: record["metadata"].get(name) for name in says if record["metadata"].get(name) != says[name]}
            if wrong:
                yield f"audit record {record['id']} ({action} of {resource}) says {wrong} where {says} is due"
    for (tenant, action, resource), records in store.audit.items():
        if action not in _OF_RUNS or (tenant, action, resource) in journalled:
            continue
        if (tenant, records[0]["run_id"]) in store.runs:
            yield f"audit record {records[0]['id']} tells of {action} of {resource}, which is not in the journal"


def sessions_audited(store: Snapshot) -> Iterator[str]:
    """Sessions were made, changed, deleted and given modes as often as the audit says."""
    for (tenant, session), entries in store.journals.items():
        if tenant not in store.whole_audits:
            continue
        made, gone, changed, modes, runs = (
            len(store.audit.get((tenant, action, session), ()))
            for action in ("session.create", "session.delete", "session.update", "runtime.setMode", "agent.run")
        )
        if made - gone != 1:
            yield f"session {session} is there and has {made} audit records of its making and {gone} of its end"
        if gone:
            continue
        updated = sum(entry.payload.get("reason") in ("renamed", "visibility") for entry in entries)
        if updated != changed:
            yield f"session {session} was changed {updated} times by its journal and {changed} times by the audit"
        applied = sum(entry.event == "runtime.mode_changed" for entry in entries)
        runs = sum(entry.event == "agent.accepted" for entry in entries)
        if applied > modes + runs:
            yield f"session {session} changed its mode {applied} times, {modes + runs} are audited"
    for (tenant, action, session), records in store.audit.items():
        if action == "session.create" and tenant in store.whole_audits and (tenant, session) not in store.sessions:
            gone = len(store.audit.get((tenant, "session.delete", session), ()))
            if len(records) != gone:
                yield f"session {session} is not there, was made {len(records)} times and deleted {gone} times"


def settings_audited(store: Snapshot) -> Iterator[str]:
    """Each version of a policy has its record, as have a grant's making and its end."""
    for row in store.tables["policies"]:
        if row["tenant_id"] not in store.whole_audits:
            continue
        records = store.audit.get((row["tenant_id"], "policy.update", row["scope_key"]), [])
        told = [record["metadata"]["version"] for record in records]
        # The first document of a tenant and its workspace, version 1, is there from the start.
        if told != list(range(row["version"] - len(told) + 1, row["version"] + 1)) or row["version"] - len(told) > 1:
            yield f"the policy {row['scope_key']} is at version {row['version']}, audited are the versions {told}"
    for row in store.tables["grants"]:
        if row["tenant_id"] not in store.whole_audits:
            continue
        for action, due in (("grant.created", 1), ("grant.revoked", int(row["revoked_at"] is not None))):
            count = len(store.audit.get((row["tenant_id"], action, row["id"]), ()))
            if count != due:
                yield f"grant {row['id']} has {count} audit records {action} where {due} is due"


_MAKES = {"agent.run": "runId", "sessions.create": "session"}


def keys(store: Snapshot) -> Iterator[str]:
    """One key had one effect, which is there; a call that is still carried out has a run to end it."""
    owners: dict[tuple[str, str, str], Row] = {}
    for row in store.tables["idempotency"]:
        tenant, method = row["tenant_id"], row["method"]
        name = f"the key {row['key']!r} of {row['actor']} for {method}"
        if row["state"] == "in_progress":
            run = store.runs.get((tenant, row["run_id"] or ""))
            if row["result"] is not None or run is None or run["status"] in TERMINAL:
                yield f"{name} is in progress, and its run {row['run_id']} has ended"
            if store.settled:
                yield f"{name} is still in progress, though all has settled"
            continue
        if row["result"] is None:
            yield f"{name} is done and has no answer"
            continue
        answer = msgspec.json.decode(row["result"])
        made = answer.get(_MAKES.get(method, ""))
        if made is not None:
            made = made["id"] if isinstance(made, dict) else made
            other = owners.setdefault((tenant, method, made), row)
            if other is not row:
                yield f"{name} and the key {other['key']!r} have the same effect {made}"
        yield from (f"{name} was answered with {problem}" for problem in _effect(store, tenant, method, answer))


def _effect(store: Snapshot, tenant: str, method: str, answer: Row) -> Iterator[str]:
    if method in ("agent.run", "agent.abort"):
        run = store.runs.get((tenant, answer["runId"]))
        if run is None:
            if not _went(store, tenant, answer["runId"]):
                yield f"run {answer['runId']}, which is not there"
        elif method == "agent.abort" and run["status"] != answer["status"]:
            yield f"run {run['id']} as {answer['status']}, which is {run['status']}"
    elif method == "approval.resolve":
        row = store.approvals.get((tenant, answer["approvalId"]))
        if row is not None and row["status"] != answer["status"]:
            yield f"approval {row['id']} as {answer['status']}, which is {row['status']}"


def _went(store: Snapshot, tenant: str, run: str) -> bool:
    """Whether a run that is not there any more was there: its session was deleted."""
    records = store.audit.get((tenant, "agent.run", run), [])
    return tenant not in store.whole_audits or any(store.was_deleted(tenant, row["session_id"]) for row in records)


def tenants(store: Snapshot) -> Iterator[str]:
    """No row refers to another tenant's, or to another workspace's."""
    of_run: dict[str, set[str]] = defaultdict(set)
    for tenant, run_id in store.runs:
        of_run[run_id].add(tenant)
    for entry in store.entries():
        session = store.sessions.get((entry.tenant, entry.session))
        if session is not None and session["workspace_id"] != entry.workspace:
            yield f"{entry} is of workspace {entry.workspace}, its session of {session['workspace_id']}"
        if entry.event == "session.updated":
            told = entry.payload["session"]
            if (told["tenantId"], told["workspaceId"]) != (entry.tenant, entry.workspace):
                yield f"{entry} of tenant {entry.tenant} tells of one of {told['tenantId']}"
    for table in ("runs", "approvals", "tool_runs", "messages"):
        for row in store.tables[table]:
            session = store.sessions.get((row["tenant_id"], row["session_id"]))
            name = f"a row of {table} in tenant {row['tenant_id']}"
            if session is not None and row.get("workspace_id", session["workspace_id"]) != session["workspace_id"]:
                yield f"{name} is of workspace {row['workspace_id']}, its session of {session['workspace_id']}"
            run = store.runs.get((row["tenant_id"], str(row.get("run_id", row.get("id")))))
            if run is None or run["session_id"] != row["session_id"]:
                yield f"{name} refers to run {row.get('run_id')}, which session {row['session_id']} has not"
    for tenant, call_id, session_id in store.outputs:
        call = store.tool_runs.get((tenant, call_id))
        if call is None or call["session_id"] != session_id:
            yield f"an output in tenant {tenant} refers to call {call_id}, which session {session_id} has not"
    for row in store.tables["audit_log"]:
        if row["tenant_id"] not in of_run.get(row["run_id"], {row["tenant_id"]}):
            yield f"audit record {row['id']} of tenant {row['tenant_id']} tells of another tenant's run {row['run_id']}"


record_rules = (chains, audited, sessions_audited, settings_audited, keys, tenants)
