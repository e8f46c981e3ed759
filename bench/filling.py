"""Fills a data directory with a store of so many rows, as a gateway would have left them.

In proportion: 100,000 sessions, one of them with a journal of 1,000,000 events, 100,000 runs and approvals, and
1,000,000 audit records whose chain verifies.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Table

from corral.clock import SystemClock, rfc3339
from corral.governance.chain import GENESIS, record_hash
from corral.governance.metrics import bucket_of
from corral.storage import tables as t
from corral.storage._sqlite_connections import dispose, driver, make_engine, open_writer
from corral.storage.repositories import Transaction
from corral.storage.rows import ApprovalFact, RunFact
from corral.storage.sqlite import SqliteStore

TENANT, WORKSPACE, OWNER = "t_default", "w_default", "u_owner"
MEMBER, MEMBER_TOKEN = "u_member", "the-members-own-token-0123456789"
"""Has one session in a thousand, and sees no other's."""

LONG, SPAN_MS = "s-long", 90 * 86_400_000
"""The session with the long journal; the time over which everything is spread."""


@dataclass(frozen=True)
class Size:
    """How many rows of what."""

    sessions: int
    events: int
    records: int

    @classmethod
    def of(cls, share: float) -> Size:
        return cls(int(100_000 * share), int(1_000_000 * share), int(1_000_000 * share))


async def fill(data_dir: Path, size: Size) -> None:
    """Make a data directory whose store has so many rows, as a gateway would have left them."""
    path = data_dir / "corral.db"
    await asyncio.to_thread(data_dir.mkdir, mode=0o700)
    store = await SqliteStore.open(path, SystemClock())
    await store.close()
    await asyncio.to_thread(_fill, path, size)
    await asyncio.to_thread(_add_member, path)


def _fill(path: Path, size: Size) -> None:
    begin = time.time_ns() // 1_000_000 - SPAN_MS
    connection = open_writer(make_engine(path))
    raw = driver(connection)
    raw.control("PRAGMA synchronous = OFF")
    raw.control("PRAGMA cache_size = -1000000")  # KiB: indexes are filled out of their order
    raw.control("BEGIN IMMEDIATE")
    for table, rows in (
        (t.sessions, _sessions(size, begin)),
        (t.journal, _journal(size, begin)),
        (t.runs, _runs(size, begin)),
        (t.approvals, _approvals(size, begin)),
        (t.audit_log, _records(size, begin)),
    ):
        _insert(raw, table, rows)
    transaction = Transaction(connection)
    transaction.tenants.ensure(TENANT, WORKSPACE, MEMBER, now_ms=begin)
    for number in range(size.sessions):
        transaction.metrics.add(_fact(number, size, begin))
    for row in _approvals(size, begin):
        if row["resolved_at"] is not None:
            transaction.metrics.decided(_decision(row))
    raw.control("COMMIT")
    raw.control("PRAGMA wal_checkpoint(TRUNCATE)")
    dispose(connection)


def _insert(raw: sqlite3.Connection, table: Table, rows: Iterator[dict[str, Any]]) -> None:
    first = next(rows)
    names = list(first)
    marks = ", ".join("?" * len(names))
    cursor = sqlite3.Connection.cursor(raw)
    cursor.executemany(
        f"INSERT INTO {table.name} ({', '.join(names)}) VALUES ({marks})",
        ([row[name] for name in names] for row in itertools.chain([first], rows)),
    )


def _at(number: int, count: int, begin: int) -> int:
    return begin + number * SPAN_MS // max(count, 1)


def session_name(number: int) -> str:
    """The id of a session that is not the long one."""
    return f"s-{number:06d}"


def _sessions(size: Size, begin: int) -> Iterator[dict[str, Any]]:
    for number in range(size.sessions):
        at = _at(number, size.sessions, begin)
        yield {
            "tenant_id": TENANT,
            "id": LONG if number == 0 else session_name(number),
            "workspace_id": WORKSPACE,
            # The member's sessions, and the rare agent's, are old: what comes before them is passed over.
            "agent_id": "a_rare" if number < size.sessions // 1000 + 2 else f"a_{number % 3}",
            "owner_user_id": MEMBER if 0 < number < size.sessions // 1000 + 2 else OWNER,
            "session_key": f"workspace:{WORKSPACE}/agent:a_default/main",
            "visibility": "private",
            "title": f"Session {number}",
            "preview": "what was said first",
            "runtime_mode": "local",
            "queued_runtime_mode": None,
            "sync_state": "local_only",
            "status": "idle",
            "active_run_id": None,
            "state_version": size.events if number == 0 else 2,
            "context_usage": 0.1,
            "compaction_count": 0,
            "memory_flush_state": "idle",
            "root": None,
            "created_at": at,
            "updated_at": at,
        }


def _journal(size: Size, begin: int) -> Iterator[dict[str, Any]]:
    usage = {"inputTokens": 100, "outputTokens": 10, "costUsd": None}
    said = {"messageId": "m_1", "role": "assistant", "text": "x" * 100, "usage": usage}
    payload = json.dumps({"sessionId": LONG, "runId": "run-x", **said}).encode()
    for version in range(1, size.events + 1):
        yield _entry(LONG, version, "agent.message", payload, _at(version, size.events, begin))
    for number in range(1, size.sessions):
        at = _at(number, size.sessions, begin)
        accepted = json.dumps({"sessionId": session_name(number), "runId": f"run-{number:06d}", "input": "go"}).encode()
        yield _entry(session_name(number), 1, "agent.accepted", accepted, at, f"run-{number:06d}")
        yield _entry(session_name(number), 2, "agent.completed", accepted, at, f"run-{number:06d}")


def _entry(session: str, version: int, event: str, payload: bytes, at: int, run: str | None = None) -> dict[str, Any]:
    return {
        "tenant_id": TENANT,
        "workspace_id": WORKSPACE,
        "session_id": session,
        "version": version,
        "event": event,
        "run_id": run,
        "payload": payload,
        "created_at": at,
    }


def _runs(size: Size, begin: int) -> Iterator[dict[str, Any]]:
    for number in range(1, size.sessions):
        at = _at(number, size.sessions, begin)
        yield {
            "tenant_id": TENANT,
            "id": f"run-{number:06d}",
            "session_id": session_name(number),
            "workspace_id": WORKSPACE,
            "agent_id": f"a_{number % 3}",
            "actor": OWNER,
            "status": "completed",
            "runtime_mode": "local",
            "input": '"go"',
            "output": "done",
            "model": "demo",
            "steps": 1,
            "input_tokens": 100,
            "output_tokens": 10,
            "cost_usd": 0.001,
            "attempts": 1,
            "stalls": 0,
            "waited_ms": 0,
            "limits": "{}",
            "accepted_version": 1,
            "trace_id": "trace",
            "lease_epoch": 1,
            "created_at": at,
            "started_at": at,
            "finished_at": at + 1000,
        }


def _approvals(size: Size, begin: int) -> Iterator[dict[str, Any]]:
    for number in range(1, size.sessions):
        at = _at(number, size.sessions, begin)
        pending = number > size.sessions - 60
        yield {
            "tenant_id": TENANT,
            "id": f"ap-{number:06d}",
            "workspace_id": WORKSPACE,
            "session_id": session_name(number),
            "run_id": f"run-{number:06d}",
            "tool_call_id": f"tc-{number:06d}",
            "tool_name": "bash.exec",
            "args": '{"command":"ls"}',
            "args_hash": "h",
            "binding": "b",
            "risk": "high",
            "reason": "highRisk",
            "requested_by": OWNER,
            "status": "pending" if pending else "approved",
            "created_at": at,
            "expires_at": at + 10 * SPAN_MS,
            "resolved_at": None if pending else at + 5000,
            "resolved_by": None if pending else OWNER,
        }


def _records(size: Size, begin: int) -> Iterator[dict[str, Any]]:
    """A chain that verifies. Nearly all by the owner, as where one person works."""
    before = GENESIS
    for number in range(1, size.records + 1):
        session = number % (size.sessions - 1) + 1
        metadata = {"runId": f"run-{session:06d}", "sessionId": session_name(session), "toolName": "file.list"}
        rare = number in (7, 8, 9)
        record = {
            "tenantId": TENANT,
            "id": number,
            "action": "policy.update" if rare else ("tool.call", "tool.result", "run.ended")[number % 3],
            "actor": "u_rare" if number in (5, 6, 7) else OWNER,
            "actorType": "user",
            "resourceType": "tool",
            "resourceId": f"tc-{number}",
            "outcome": "ok",
            "metadata": metadata,
            "traceId": "trace",
            "createdAt": rfc3339(_at(number, size.records, begin)),
            "prevHash": before,
        }
        before = record_hash(record)
        yield {
            "tenant_id": TENANT,
            "id": number,
            "action": record["action"],
            "actor": record["actor"],
            "actor_type": "user",
            "resource_type": "tool",
            "resource_id": record["resourceId"],
            "outcome": "ok",
            "metadata": json.dumps(metadata, separators=(",", ":"), sort_keys=True),
            "trace_id": "trace",
            "created_at": record["createdAt"],
            "prev_hash": record["prevHash"],
            "hash": before,
            "session_id": metadata["sessionId"],
            "run_id": metadata["runId"],
        }


def _fact(number: int, size: Size, begin: int) -> RunFact:
    latency = 200 + number * 7919 % 5000
    return RunFact(
        tenant_id=TENANT,
        workspace_id=WORKSPACE,
        run_id=f"run-{number:06d}",
        agent_id=f"a_{number % 3}",
        status="completed",
        code="",
        latency_ms=latency,
        bucket=bucket_of(latency),
        tool_calls=1,
        tool_failures=0,
        input_tokens=100,
        output_tokens=10,
        cost_usd=0.001,
        finished_at=_at(number, size.sessions, begin) + 1000,
    )


def _decision(row: dict[str, Any]) -> ApprovalFact:
    names = ("tenant_id", "workspace_id", "status", "resolved_at")
    return ApprovalFact(
        **{name: row[name] for name in names},
        approval_id=row["id"],
        agent_id=f"a_{int(row['id'][3:]) % 3}",
        wait_ms=row["resolved_at"] - row["created_at"],
    )


def _add_member(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        digest = hashlib.sha256(MEMBER_TOKEN.encode()).hexdigest()
        row = (TENANT, "tok_member", digest, MEMBER, MEMBER, f'["{WORKSPACE}"]', '["member"]', 1)
        names = "tenant_id, id, token_hash, subject, user_id, workspace_ids, roles, created_at"
        database.execute(f"INSERT INTO tokens ({names}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        database.commit()
