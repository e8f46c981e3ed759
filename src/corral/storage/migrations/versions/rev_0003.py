"""Daily usage with what is reserved of it, and what metrics are computed from.

What is here is frozen: a released revision is never edited, the next one changes what it made.
"""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision: str | None = "0002"

RESOLVED = sa.text("resolved_at IS NOT NULL")


def upgrade() -> None:
    for create in (_usage_days, _reservations, _run_facts, _run_hours, _run_hour_counts):
        create()
    op.create_index(
        "approvals_resolved",
        "approvals",
        ["tenant_id", "workspace_id", "resolved_at", "status", "created_at", "run_id"],
        sqlite_where=RESOLVED,
        postgresql_where=RESOLVED,
    )
    _count_what_was()


def _usage_days() -> None:
    op.create_table(
        "usage_days",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("day", sa.Integer(), nullable=False),
        sa.Column("steps", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("cost_usd", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "scope", "day", name="usage_days_pkey"),
        sqlite_with_rowid=False,
    )


def _reservations() -> None:
    op.create_table(
        "reservations",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("day", sa.Integer(), nullable=False),
        sa.Column("steps", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("cost_usd", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "run_id", "scope", name="reservations_pkey"),
        sqlite_with_rowid=False,
    )
    op.create_index("reservations_of_scope", "reservations", ["tenant_id", "scope", "day"])


def _run_facts() -> None:
    op.create_table(
        "run_facts",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("workspace_id", sa.Text(), nullable=False),
        sa.Column("finished_at", sa.BigInteger(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("agent_id", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("latency_ms", sa.BigInteger(), nullable=False),
        sa.Column("bucket", sa.Integer(), nullable=False),
        sa.Column("tool_calls", sa.Integer(), nullable=False),
        sa.Column("tool_failures", sa.Integer(), nullable=False),
        sa.Column("input_tokens", sa.BigInteger(), nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cost_usd", sa.Float()),
        sa.PrimaryKeyConstraint("tenant_id", "workspace_id", "finished_at", "run_id", name="run_facts_pkey"),
        sqlite_with_rowid=False,
    )


def _run_hours() -> None:
    op.create_table(
        "run_hours",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("workspace_id", sa.Text(), nullable=False),
        sa.Column("hour", sa.Integer(), nullable=False),
        sa.Column("agent_id", sa.Text(), nullable=False),
        sa.Column("completed", sa.BigInteger(), nullable=False),
        sa.Column("failed", sa.BigInteger(), nullable=False),
        sa.Column("aborted", sa.BigInteger(), nullable=False),
        sa.Column("tool_calls", sa.BigInteger(), nullable=False),
        sa.Column("tool_failures", sa.BigInteger(), nullable=False),
        sa.Column("input_tokens", sa.BigInteger(), nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cost_usd", sa.Float(), nullable=False),
        sa.Column("priced", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "workspace_id", "hour", "agent_id", name="run_hours_pkey"),
        sqlite_with_rowid=False,
    )


def _run_hour_counts() -> None:
    op.create_table(
        "run_hour_counts",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("workspace_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("hour", sa.Integer(), nullable=False),
        sa.Column("agent_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint(
            "tenant_id", "workspace_id", "kind", "hour", "agent_id", "name", name="run_hour_counts_pkey"
        ),
        sqlite_with_rowid=False,
    )


# ---- runs that ended before


def _count_what_was() -> None:
    """The facts and the hours of the runs that have ended, and the days' usage by the end of each run."""
    connection = op.get_bind()
    calls = {
        (row.tenant_id, row.run_id): (row.calls, row.failures)
        for row in connection.execute(
            sa.text(
                "SELECT tenant_id, run_id, count(*) AS calls, "
                "sum(CASE WHEN status IN ('failed', 'interrupted') THEN 1 ELSE 0 END) AS failures "
                "FROM tool_runs GROUP BY tenant_id, run_id"
            )
        )
    }
    found = connection.execute(
        sa.text(
            "SELECT tenant_id, workspace_id, agent_id, id, status, error, created_at, finished_at, steps, "
            "input_tokens, output_tokens, cost_usd FROM runs WHERE finished_at IS NOT NULL"
        )
    )
    for row in found.all():
        _count(connection, row, *calls.get((row.tenant_id, row.id), (0, 0)))


def _count(connection: sa.Connection, row: Any, tool_calls: int, tool_failures: int) -> None:
    latency = max(0, row.finished_at - row.created_at)
    code = str(json.loads(row.error).get("code", "")) if row.error is not None and row.status == "failed" else ""
    where = {"tenant_id": row.tenant_id, "workspace_id": row.workspace_id, "agent_id": row.agent_id}
    sums = {
        "tool_calls": tool_calls,
        "tool_failures": tool_failures,
        "input_tokens": row.input_tokens,
        "output_tokens": row.output_tokens,
    }
    fact = {"finished_at": row.finished_at, "run_id": row.id, "status": row.status, "code": code}
    fact |= {"latency_ms": latency, "bucket": _bucket(latency), "cost_usd": row.cost_usd}
    connection.execute(_insert("run_facts", [*where, *sums, *fact]), {**where, **sums, **fact})
    hour = row.finished_at // 3_600_000
    ended = {name: int(row.status == name) for name in ("completed", "failed", "aborted")}
    cost = {"cost_usd": row.cost_usd or 0.0, "priced": int(row.cost_usd is not None)}
    _add(connection, "run_hours", {**where, "hour": hour}, {**ended, **sums, **cost})
    names = [("latency", str(_bucket(latency)))] + ([("failure", code)] if row.status == "failed" else [])
    day = {**where, "hour": row.finished_at // 86_400_000, "kind": "latency-day", "name": str(_bucket(latency))}
    _add(connection, "run_hour_counts", day, {"count": 1})
    for kind, name in names:
        _add(connection, "run_hour_counts", {**where, "hour": hour, "kind": kind, "name": name}, {"count": 1})
    used = {"steps": row.steps, "tokens": row.input_tokens + row.output_tokens, "cost_usd": row.cost_usd or 0.0}
    workspace = f"workspace:{row.workspace_id}"
    for scope in (f"tenant:{row.tenant_id}", workspace, f"{workspace}/agent:{row.agent_id}"):
        key = {"tenant_id": row.tenant_id, "scope": scope, "day": row.finished_at // 86_400_000}
        _add(connection, "usage_days", key, used)


def _insert(table: str, names: list[str]) -> sa.TextClause:
    # Names of tables and columns from this file alone.
    values = ", ".join(f":{name}" for name in names)
    return sa.text(f"INSERT INTO {table} ({', '.join(names)}) VALUES ({values})")  # noqa: S608


def _add(connection: sa.Connection, table: str, key: dict[str, Any], amounts: dict[str, Any]) -> None:
    sets = ", ".join(f"{name} = {table}.{name} + excluded.{name}" for name in amounts)
    insert = _insert(table, [*key, *amounts]).text
    statement = f"{insert} ON CONFLICT ({', '.join(key)}) DO UPDATE SET {sets}"
    connection.execute(sa.text(statement), {**key, **amounts})


def _bucket(millis: int) -> int:
    """As `corral.governance.metrics.bucket_of` was when this revision was made."""
    shift = max(0, millis.bit_length() - 5)
    return shift * 16 + (millis >> shift)
