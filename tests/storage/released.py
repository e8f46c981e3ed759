"""A database of each schema that was ever the newest, with rows in every table that it had.

It is made as its owner came to it: by the migrations up to that revision, with rows put in after each; tables that
`ROWS` knows nothing of get rows that are made up. That the migrations still make what they made when they were
released is held by `released.json`, which has a digest for each of those revisions. With a release come those that
are not in it yet:

    python -m tests.storage.released

A digest that was committed stays as it is: it stands for the databases that people have.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from alembic.script import ScriptDirectory

from corral.governance.chain import GENESIS, record_hash
from corral.storage import migrations
from corral.storage._sqlite_connections import dispose, driver, make_engine, open_writer

DIGESTS = Path(__file__).with_name("released.json")
NOW = 1_780_000_000_000
TENANTS = ("t_default", "t_other")

Rows = dict[str, list[dict[str, Any]]]


def _first() -> Rows:
    rows: Rows = {"store_meta": [{"name": "clean", "value": "yes"}, {"name": "cursor_key", "value": "00" * 32}]}

    def add(table: str, **row: Any) -> None:
        rows.setdefault(table, []).append(row)

    for tenant in TENANTS:
        of = {"tenant_id": tenant}
        add("tenants", **of, created_at=NOW)
        add("workspaces", **of, id="w_default", created_at=NOW)
        add("users", **of, id="u_owner", created_at=NOW)
        person = {"subject": "u_owner", "user_id": "u_owner", "workspace_ids": '["w_default"]', "roles": '["member"]'}
        add("tokens", **of, id="tok_1", token_hash=f"hash of {tenant}", created_at=NOW, **person)
        agent = {"workspace_id": "w_default", "name": "Agent", "system_prompt": "Be “kind”.", "tools": '["file.read"]'}
        add("agents", **of, id="a_1", **agent, created_at=NOW, updated_at=NOW)
        scope = {"scope_key": "workspace:w_default", "layer": "workspace", "workspace_id": "w_default"}
        add("policies", **of, **scope, document='{"toolDefault":"deny"}', version=2, updated_at=NOW)
        for session in ("s_1", "s_2"):
            _add_session(add, of, session)
        add("outputs", **of, tool_call_id="tc_1", session_id="s_1", data=b"whole \x00 output")
        kept = {"actor": "u_owner", "method": "agent.run", "scope": "s_1", "key": "k", "params_hash": "h"}
        add("idempotency", **of, **kept, state="done", result=b"{}", run_id="run_1", created_at=NOW, expires_at=2 * NOW)
    return rows


def _add_session(add: Callable[..., None], of: dict[str, Any], session: str) -> None:
    where = {"workspace_id": "w_default", "agent_id": "a_default"}
    runs = _runs(session)
    add(
        "sessions",
        **of,
        **where,
        id=session,
        owner_user_id="u_owner",
        session_key="workspace:w_default/agent:a_default/main",
        visibility="private",
        title=f"Title of {session}",
        preview="…",
        runtime_mode="local",
        sync_state="local_only",
        status="idle",
        state_version=2 * len(runs),
        context_usage=0.5,
        compaction_count=0,
        memory_flush_state="idle",
        created_at=NOW,
        updated_at=NOW + 1,
    )
    for number, run in enumerate(runs):
        mine = {**of, "session_id": session, "run_id": run["id"]}
        add("runs", **of, **where, session_id=session, accepted_version=2 * number + 1, **run)
        end = "agent.completed" if run["status"] == "completed" else "agent.failed"
        for version, event in enumerate(("agent.accepted", end), start=2 * number + 1):
            said = {"runtimeMode": "local", "input": "hello"} if event == "agent.accepted" else {"output": "done"}
            payload = json.dumps({"sessionId": session, "runId": run["id"], **said}).encode()
            add(
                "journal",
                **mine,
                workspace_id="w_default",
                version=version,
                event=event,
                payload=payload,
                created_at=NOW,
            )
        content = '{"role":"user","content":[{"type":"text","text":"hello"}]}'
        add("messages", **mine, version=2 * number + 1, role="user", content=content, created_at=NOW)
    ran = {"session_id": session, "run_id": runs[0]["id"], "step": 1, "position": 0, "tool_name": "file.read"}
    judged = {"args": '{"path":"a"}', "args_hash": "h", "risk": "low", "repeatable": 1, "decision": "allow"}
    came = {"state": "finished", "status": "failed", "truncated": 0, "created_at": NOW}
    add("tool_runs", **of, **ran, **judged, **came, id=f"tc_{session[2:]}")


def _runs(session: str) -> list[dict[str, Any]]:
    """Two of the first session (one completed at a price, one failed), one that was aborted of the second."""
    common = {
        "actor": "u_owner",
        "runtime_mode": "local",
        "input": '"hello"',
        "model": "demo",
        "attempts": 1,
        "stalls": 0,
        "waited_ms": 0,
        "limits": "{}",
        "trace_id": "trace",
        "lease_epoch": 1,
        "created_at": NOW,
        "finished_at": NOW + 1500,
        "steps": 2,
        "input_tokens": 100,
        "output_tokens": 10,
    }
    if session == "s_2":
        return [
            {**common, "id": "run_3", "status": "aborted", "error": '{"code":"ABORTED","message":"","retryable":false}'}
        ]
    error = '{"code":"MODEL_UNAVAILABLE","message":"out","retryable":true}'
    return [
        {**common, "id": "run_1", "status": "completed", "output": "done", "cost_usd": 0.25},
        {**common, "id": "run_2", "status": "failed", "error": error},
    ]


def _second() -> Rows:
    rows: Rows = {"approvals": [], "grants": [], "audit_log": []}
    for tenant in TENANTS:
        asked = {"tenant_id": tenant, "workspace_id": "w_default", "session_id": "s_1", "run_id": "run_1"}
        call = {"tool_call_id": "tc_1", "tool_name": "bash.exec", "args": "{}", "args_hash": "h", "binding": "b"}
        why = {
            "risk": "high",
            "reason": "highRisk",
            "requested_by": "u_owner",
            "created_at": NOW,
            "expires_at": 2 * NOW,
        }
        rows["approvals"].append(
            {**asked, **call, **why, "id": "ap_1", "status": "approved", "resolved_at": NOW + 700, "resolved_by": "u"}
        )
        matcher = {"tool_name": "bash.exec", "binding": "b", "matcher": "exactly ls", "approval_id": "ap_1"}
        granted = {"created_by": "u_owner", "created_at": NOW, "expires_at": 2 * NOW, "uses": 3}
        rows["grants"].append({"tenant_id": tenant, "id": "g_1", "workspace_id": "w_default", **matcher, **granted})
        before = GENESIS
        for number in (1, 2, 3):
            record = _record(tenant, number, before)
            rows["audit_log"].append(record)
            before = record["hash"]
    return rows


def _record(tenant: str, number: int, before: str) -> dict[str, Any]:
    wire = {
        "tenantId": tenant,
        "id": number,
        "action": "connect",
        "actor": "u_owner",
        "actorType": "user",
        "resourceType": "connection",
        "resourceId": f"c_{number}",
        "outcome": "ok",
        "metadata": {},
        "traceId": "trace",
        "createdAt": f"2026-05-28T20:26:4{number}.000Z",
        "prevHash": before,
    }
    names = {"tenantId": "tenant_id", "actorType": "actor_type", "resourceType": "resource_type"}
    names |= {"resourceId": "resource_id", "traceId": "trace_id", "createdAt": "created_at", "prevHash": "prev_hash"}
    row = {names.get(name, name): value for name, value in wire.items()}
    return {**row, "metadata": "{}", "hash": record_hash(wire)}


def _third() -> Rows:
    held = {"scope": "workspace:w_default", "day": NOW // 86_400_000, "steps": 1, "tokens": 5, "cost_usd": 0.5}
    return {"reservations": [{"tenant_id": tenant, "run_id": "run_9", **held} for tenant in TENANTS]}


ROWS: dict[str, Callable[[], Rows]] = {"0001": _first, "0002": _second, "0003": _third}
"""What is put into the tables that came with a revision, once the rows of those before it were migrated to it."""


def revisions() -> list[str]:
    """All of them, the oldest first."""
    scripts = ScriptDirectory.from_config(migrations.config())
    return [script.revision for script in scripts.walk_revisions()][::-1]


def make(revision: str, path: Path) -> None:
    """Make the database of a revision at `path`."""
    for each in revisions():
        connection = open_writer(make_engine(path))
        driver(connection).control("BEGIN IMMEDIATE")
        migrations.upgrade(connection, each)
        driver(connection).control("COMMIT")
        dispose(connection)
        with closing(sqlite3.connect(path)) as database:
            for table, rows in ROWS.get(each, dict)().items():
                for row in rows:
                    _insert(database, table, row)
            for table in _empty(database):
                for tenant in TENANTS:
                    _insert(database, table, _made_up(database, table, tenant))
            database.commit()
        if each == revision:
            return


def _insert(database: sqlite3.Connection, table: str, row: dict[str, Any]) -> None:
    marks = ", ".join("?" * len(row))
    database.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", list(row.values()))


def _empty(database: sqlite3.Connection) -> list[str]:
    return [name for name in tables_of(database) if not database.execute(f"SELECT 1 FROM {name}").fetchone()]


def tables_of(database: sqlite3.Connection) -> list[str]:
    """The names of its tables, without those that are SQLite's or Alembic's."""
    names = [row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
    return [name for name in names if not name.startswith(("sqlite_", "alembic_"))]


def _made_up(database: sqlite3.Connection, table: str, tenant: str) -> dict[str, Any]:
    """What columns that may not be null have: the rows that they may refer to, else something of their type."""
    known = {"tenant_id": tenant, "workspace_id": "w_default", "session_id": "s_1", "run_id": "run_1"}
    known |= {"agent_id": "a_1", "tool_call_id": "tc_1", "user_id": "u_owner"}
    by_type = {"TEXT": "made up", "BLOB": b"made up", "BIGINT": 1, "INTEGER": 1, "FLOAT": 0.5, "BOOLEAN": 1}
    columns = database.execute(f"PRAGMA table_info({table})").fetchall()
    return {name: known.get(name, by_type.get(type_, 1)) for _, name, type_, required, *_ in columns if required}


def digest(path: Path) -> str:
    """Of the schema and every row, and of nothing that depends on how they are laid out."""
    with closing(sqlite3.connect(path)) as database:
        schema = database.execute("SELECT type, name, sql FROM sqlite_master ORDER BY type, name").fetchall()
        said = [repr((kind, name, re.sub(r"\s+", " ", sql or "").strip())) for kind, name, sql in schema]
        for table in tables_of(database):
            said += sorted(repr((table, row)) for row in database.execute(f"SELECT * FROM {table}"))
    return hashlib.sha256("\n".join(said).encode()).hexdigest()


def digests() -> dict[str, str]:
    """Those that were committed, by revision."""
    found: dict[str, str] = json.loads(DIGESTS.read_text())
    return found


def _main() -> None:
    known = digests()
    for revision in revisions():
        if revision not in known:
            with tempfile.TemporaryDirectory() as name:
                make(revision, Path(name) / "corral.db")
                known[revision] = digest(Path(name) / "corral.db")
    DIGESTS.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    _main()
