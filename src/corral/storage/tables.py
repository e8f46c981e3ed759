"""The tables, for SQLite and PostgreSQL alike.

`tenant_id` comes first in every key and every index, with three exceptions that need to be
global: the journal's `feed_id` (one order for all events of the store), the hash of a token
(the look-up that finds a tenant), and `store_meta`, which holds no tenant's data.

A change here needs a revision under `migrations/versions` that makes the same change, and
`HEAD` in `schema.py` raised to it; a test compares the two.
"""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Float,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.types import TypeDecorator

from corral.protocol.types import RunStatus


class JsonText(TypeDecorator[Any]):
    """A JSON value kept as its text; None is SQL NULL."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:  # noqa: ARG002
        return None if value is None else msgspec.json.encode(value).decode()

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:  # noqa: ARG002
        return None if value is None else msgspec.json.decode(value)


# SQLite makes only an INTEGER PRIMARY KEY grow by itself.
FeedId = BigInteger().with_variant(Integer(), "sqlite")

# The very same text stands in the partial index and in the queries, or SQLite would not use it.
NOT_TERMINAL = text("status NOT IN ({})".format(", ".join(f"'{s}'" for s in RunStatus if s.terminal)))
DONE = text("state = 'done'")
HAS_RUN = text("run_id IS NOT NULL")
HAS_SESSION = text("session_id IS NOT NULL")
PENDING = text("status = 'pending'")
SHARED = text("visibility = 'workspace'")

# A partial index keeps its condition in `info` as well, for a store on PostgreSQL to take from there:
# an argument for that dialect here would load it, a twentieth of the time that a start takes.
metadata = MetaData()


def _of_session(table: str) -> ForeignKeyConstraint:
    return ForeignKeyConstraint(
        ["tenant_id", "session_id"], ["sessions.tenant_id", "sessions.id"], name=f"{table}_session_fkey"
    )


store_meta = Table(
    "store_meta",
    metadata,
    Column("name", Text, nullable=False),
    Column("value", Text, nullable=False),
    PrimaryKeyConstraint("name", name="store_meta_pkey"),
)

tenants = Table(
    "tenants",
    metadata,
    Column("tenant_id", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("tenant_id", name="tenants_pkey"),
    sqlite_with_rowid=False,
)

workspaces = Table(
    "workspaces",
    metadata,
    Column("tenant_id", Text, nullable=False),
    Column("id", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("tenant_id", "id", name="workspaces_pkey"),
    sqlite_with_rowid=False,
)

users = Table(
    "users",
    metadata,
    Column("tenant_id", Text, nullable=False),
    Column("id", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("tenant_id", "id", name="users_pkey"),
    sqlite_with_rowid=False,
)

tokens = Table(
    "tokens",
    metadata,
    Column("tenant_id", Text, nullable=False),
    Column("id", Text, nullable=False),
    Column("token_hash", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("user_id", Text, nullable=False),
    Column("display_name", Text),
    Column("workspace_ids", JsonText, nullable=False),
    Column("roles", JsonText, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("revoked_at", BigInteger),
    PrimaryKeyConstraint("tenant_id", "id", name="tokens_pkey"),
    UniqueConstraint("token_hash", name="tokens_token_hash_key"),
    sqlite_with_rowid=False,
)

agents = Table(
    "agents",
    metadata,
    Column("tenant_id", Text, nullable=False),
    Column("workspace_id", Text, nullable=False),
    Column("id", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("system_prompt", Text, nullable=False),
    Column("model", Text),
    Column("tools", JsonText),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("tenant_id", "workspace_id", "id", name="agents_pkey"),
)

policies = Table(
    "policies",
    metadata,
    Column("tenant_id", Text, nullable=False),
    Column("scope_key", Text, nullable=False),
    Column("layer", Text, nullable=False),
    Column("workspace_id", Text, nullable=False),
    Column("agent_id", Text),
    Column("document", JsonText, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("tenant_id", "scope_key", name="policies_pkey"),
)

sessions = Table(
    "sessions",
    metadata,
    Column("tenant_id", Text, nullable=False),
    Column("id", Text, nullable=False),
    Column("workspace_id", Text, nullable=False),
    Column("agent_id", Text, nullable=False),
    Column("owner_user_id", Text, nullable=False),
    Column("session_key", Text, nullable=False),
    Column("visibility", Text, nullable=False),
    Column("title", Text, nullable=False),
    Column("preview", Text, nullable=False),
    Column("runtime_mode", Text, nullable=False),
    Column("queued_runtime_mode", Text),
    Column("sync_state", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("active_run_id", Text),
    Column("state_version", BigInteger, nullable=False),
    Column("context_usage", Float, nullable=False),
    Column("compaction_count", Integer, nullable=False),
    Column("memory_flush_state", Text, nullable=False),
    Column("root", Text),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("tenant_id", "id", name="sessions_pkey"),
    # Own ones and those that all may see are two lists, each read from its newest: in one list of all, somebody
    # who sees few of them would pass over everybody else's.
    Index("sessions_own", "tenant_id", "workspace_id", "owner_user_id", "created_at", "id"),
    Index("sessions_own_of_agent", "tenant_id", "workspace_id", "owner_user_id", "agent_id", "created_at", "id"),
    Index(
        "sessions_shared",
        "tenant_id",
        "workspace_id",
        "created_at",
        "id",
        sqlite_where=SHARED,
        info={"where": SHARED},
    ),
    Index(
        "sessions_shared_of_agent",
        "tenant_id",
        "workspace_id",
        "agent_id",
        "created_at",
        "id",
        sqlite_where=SHARED,
        info={"where": SHARED},
    ),
    # Every event updates its session's row: without a rowid that is one tree to search, not two.
    sqlite_with_rowid=False,
)

journal = Table(
    "journal",
    metadata,
    Column("feed_id", FeedId, autoincrement=True, nullable=False),
    Column("tenant_id", Text, nullable=False),
    Column("workspace_id", Text, nullable=False),
    Column("session_id", Text, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("event", Text, nullable=False),
    Column("run_id", Text),
    Column("payload", LargeBinary, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("feed_id", name="journal_pkey"),
    UniqueConstraint("tenant_id", "session_id", "version", name="journal_version_key"),
    _of_session("journal"),
    Index("journal_feed", "tenant_id", "workspace_id", "feed_id"),
    Index(
        "journal_run",
        "tenant_id",
        "session_id",
        "run_id",
        "version",
        sqlite_where=HAS_RUN,
        info={"where": HAS_RUN},
    ),
    # Without it SQLite gives the id of the newest row away again once its session is deleted,
    # and a feed that had seen that row would miss the new one.
    sqlite_autoincrement=True,
)

runs = Table(
    "runs",
    metadata,
    Column("tenant_id", Text, nullable=False),
    Column("id", Text, nullable=False),
    Column("session_id", Text, nullable=False),
    Column("workspace_id", Text, nullable=False),
    Column("agent_id", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("runtime_mode", Text, nullable=False),
    Column("input", JsonText),
    Column("output", Text),
    Column("error", JsonText),
    Column("model", Text, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("cost_usd", Float),
    Column("attempts", Integer, nullable=False),
    Column("stalls", Integer, nullable=False),
    Column("waited_ms", BigInteger, nullable=False),
    Column("limits", JsonText, nullable=False),
    Column("accepted_version", BigInteger, nullable=False),
    Column("trace_id", Text, nullable=False),
    Column("lease_owner", Text),
    Column("lease_epoch", BigInteger, nullable=False),
    Column("lease_expires_at", BigInteger),
    Column("abort_requested_at", BigInteger),
    Column("created_at", BigInteger, nullable=False),
    Column("started_at", BigInteger),
    Column("finished_at", BigInteger),
    Column("waiting_since", BigInteger),
    PrimaryKeyConstraint("tenant_id", "id", name="runs_pkey"),
    _of_session("runs"),
    Index("runs_of_session", "tenant_id", "session_id", "created_at"),
    # Small whatever the history: what recovery and the renewal of leases read.
    Index(
        "runs_unfinished",
        "tenant_id",
        "created_at",
        "id",
        sqlite_where=NOT_TERMINAL,
        info={"where": NOT_TERMINAL},
    ),
)

messages = Table(
    "messages",
    metadata,
    Column("tenant_id", Text, nullable=False),
    Column("session_id", Text, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("run_id", Text, nullable=False),
    Column("role", Text, nullable=False),
    Column("content", JsonText),
    Column("created_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("tenant_id", "session_id", "version", name="messages_pkey"),
    _of_session("messages"),
)

tool_runs = Table(
    "tool_runs",
    metadata,
    Column("tenant_id", Text, nullable=False),
    Column("id", Text, nullable=False),
    Column("run_id", Text, nullable=False),
    Column("session_id", Text, nullable=False),
    Column("step", Integer, nullable=False),
    Column("position", Integer, nullable=False),
    Column("tool_name", Text, nullable=False),
    Column("args", JsonText, nullable=False),
    Column("args_hash", Text, nullable=False),
    Column("risk", Text, nullable=False),
    Column("repeatable", Boolean, nullable=False),
    Column("decision", Text, nullable=False),
    Column("reason", Text),
    Column("rule_id", Text),
    Column("state", Text, nullable=False),
    Column("status", Text),
    Column("duration_ms", BigInteger),
    Column("truncated", Boolean, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("started_at", BigInteger),
    Column("finished_at", BigInteger),
    Column("retry_of", Text),
    PrimaryKeyConstraint("tenant_id", "id", name="tool_runs_pkey"),
    UniqueConstraint("tenant_id", "run_id", "step", "position", name="tool_runs_place_key"),
    _of_session("tool_runs"),
    Index("tool_runs_of_session", "tenant_id", "session_id"),
)

outputs = Table(
    "outputs",
    metadata,
    Column("tenant_id", Text, nullable=False),
    Column("tool_call_id", Text, nullable=False),
    Column("session_id", Text, nullable=False),
    Column("data", LargeBinary, nullable=False),
    PrimaryKeyConstraint("tenant_id", "tool_call_id", name="outputs_pkey"),
    _of_session("outputs"),
    Index("outputs_of_session", "tenant_id", "session_id"),
)

idempotency = Table(
    "idempotency",
    metadata,
    Column("tenant_id", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("method", Text, nullable=False),
    Column("scope", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("params_hash", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("result", LargeBinary),
    Column("run_id", Text),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    PrimaryKeyConstraint("tenant_id", "actor", "method", "scope", "key", name="idempotency_pkey"),
    Index("idempotency_run", "tenant_id", "run_id", sqlite_where=HAS_RUN, info={"where": HAS_RUN}),
    Index("idempotency_expiry", "tenant_id", "expires_at", sqlite_where=DONE, info={"where": DONE}),
    # With row ids: without them SQLite takes the primary key for every look-up, and a run's end would
    # read all keys that the tenant ever used.
)

approvals = Table(
    "approvals",
    metadata,
    Column("tenant_id", Text, nullable=False),
    Column("id", Text, nullable=False),
    Column("workspace_id", Text, nullable=False),
    Column("session_id", Text, nullable=False),
    Column("run_id", Text, nullable=False),
    Column("tool_call_id", Text, nullable=False),
    Column("tool_name", Text, nullable=False),
    Column("args", JsonText, nullable=False),
    Column("args_hash", Text, nullable=False),
    Column("binding", Text, nullable=False),
    Column("risk", Text, nullable=False),
    Column("reason", Text, nullable=False),
    Column("rule_id", Text),
    Column("requested_by", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("resolved_at", BigInteger),
    Column("resolved_by", Text),
    Column("comment", Text),
    Column("retry_of", Text),
    PrimaryKeyConstraint("tenant_id", "id", name="approvals_pkey"),
    _of_session("approvals"),
    Index("approvals_newest", "tenant_id", "workspace_id", "status", "created_at", "id"),
    Index("approvals_of_session", "tenant_id", "session_id", "status", "created_at", "id"),
    Index("approvals_of_run", "tenant_id", "run_id", "created_at", "id"),
    # Small whatever the history: what the task that lets them expire reads.
    Index("approvals_pending", "tenant_id", "expires_at", sqlite_where=PENDING, info={"where": PENDING}),
)

grants = Table(
    "grants",
    metadata,
    Column("tenant_id", Text, nullable=False),
    Column("id", Text, nullable=False),
    Column("workspace_id", Text, nullable=False),
    Column("session_id", Text),
    Column("tool_name", Text, nullable=False),
    Column("binding", Text, nullable=False),
    Column("matcher", Text, nullable=False),
    Column("approval_id", Text, nullable=False),
    Column("created_by", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("uses", BigInteger, nullable=False),
    Column("revoked_at", BigInteger),
    Column("revoked_by", Text),
    PrimaryKeyConstraint("tenant_id", "id", name="grants_pkey"),
    _of_session("grants"),
    Index("grants_newest", "tenant_id", "workspace_id", "created_at", "id"),
    Index("grants_binding", "tenant_id", "workspace_id", "tool_name", "binding"),
    Index("grants_of_session", "tenant_id", "session_id"),
)

# No reference to a session: what was recorded stays when the session is deleted.
audit_log = Table(
    "audit_log",
    metadata,
    Column("tenant_id", Text, nullable=False),
    Column("id", BigInteger, nullable=False),
    Column("action", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("actor_type", Text, nullable=False),
    Column("resource_type", Text, nullable=False),
    Column("resource_id", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("metadata", JsonText, nullable=False),
    Column("trace_id", Text, nullable=False),
    Column("created_at", Text, nullable=False),
    Column("prev_hash", Text, nullable=False),
    Column("hash", Text, nullable=False),
    Column("session_id", Text),
    Column("run_id", Text),
    PrimaryKeyConstraint("tenant_id", "id", name="audit_log_pkey"),
    Index("audit_log_action", "tenant_id", "action", "id"),
    Index("audit_log_actor", "tenant_id", "actor", "id"),
    # Where one person works, all is theirs, and an action may be rare among it.
    Index("audit_log_actor_action", "tenant_id", "actor", "action", "id"),
    Index("audit_log_session", "tenant_id", "session_id", "id", sqlite_where=HAS_SESSION, info={"where": HAS_SESSION}),
    Index("audit_log_run", "tenant_id", "run_id", "id", sqlite_where=HAS_RUN, info={"where": HAS_RUN}),
    Index("audit_log_time", "tenant_id", "created_at", "id"),
)

# What was used up on each day (days since the epoch, UTC) within each scope of policy.
usage_days = Table(
    "usage_days",
    metadata,
    Column("tenant_id", Text, nullable=False),
    Column("scope", Text, nullable=False),
    Column("day", Integer, nullable=False),
    Column("steps", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("cost_usd", Float, nullable=False),
    PrimaryKeyConstraint("tenant_id", "scope", "day", name="usage_days_pkey"),
    sqlite_with_rowid=False,
)

# What model calls that are under way may use up: one row for each run and scope with a limit.
reservations = Table(
    "reservations",
    metadata,
    Column("tenant_id", Text, nullable=False),
    Column("run_id", Text, nullable=False),
    Column("scope", Text, nullable=False),
    Column("day", Integer, nullable=False),
    Column("steps", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("cost_usd", Float, nullable=False),
    PrimaryKeyConstraint("tenant_id", "run_id", "scope", name="reservations_pkey"),
    Index("reservations_of_scope", "tenant_id", "scope", "day"),
    sqlite_with_rowid=False,
)

# Metrics refer to no session: what happened stays counted when the session is deleted.
run_facts = Table(
    "run_facts",
    metadata,
    Column("tenant_id", Text, nullable=False),
    Column("workspace_id", Text, nullable=False),
    Column("finished_at", BigInteger, nullable=False),
    Column("run_id", Text, nullable=False),
    Column("agent_id", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("code", Text, nullable=False),
    Column("latency_ms", BigInteger, nullable=False),
    Column("bucket", Integer, nullable=False),
    Column("tool_calls", Integer, nullable=False),
    Column("tool_failures", Integer, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("cost_usd", Float),
    PrimaryKeyConstraint("tenant_id", "workspace_id", "finished_at", "run_id", name="run_facts_pkey"),
    sqlite_with_rowid=False,
)

# What people decided, one narrow row for each decision: expired and cancelled approvals are none.
approval_facts = Table(
    "approval_facts",
    metadata,
    Column("tenant_id", Text, nullable=False),
    Column("workspace_id", Text, nullable=False),
    Column("resolved_at", BigInteger, nullable=False),
    Column("approval_id", Text, nullable=False),
    Column("agent_id", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("wait_ms", BigInteger, nullable=False),
    PrimaryKeyConstraint("tenant_id", "workspace_id", "resolved_at", "approval_id", name="approval_facts_pkey"),
    # For the median of a great many, which need not be put in order then.
    Index("approval_facts_by_wait", "tenant_id", "workspace_id", "wait_ms", "resolved_at", "agent_id"),
    sqlite_with_rowid=False,
)

run_hours = Table(
    "run_hours",
    metadata,
    Column("tenant_id", Text, nullable=False),
    Column("workspace_id", Text, nullable=False),
    Column("hour", Integer, nullable=False),
    Column("agent_id", Text, nullable=False),
    Column("completed", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    Column("aborted", BigInteger, nullable=False),
    Column("tool_calls", BigInteger, nullable=False),
    Column("tool_failures", BigInteger, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("cost_usd", Float, nullable=False),
    Column("priced", BigInteger, nullable=False),
    PrimaryKeyConstraint("tenant_id", "workspace_id", "hour", "agent_id", name="run_hours_pkey"),
    sqlite_with_rowid=False,
)

# `name` is the number of a latency bucket (`kind` latency) or a code (`kind` failure). Of the kind
# latency-day, `hour` is the number of a day: buckets hardly repeat within an hour, so years need coarser sums.
run_hour_counts = Table(
    "run_hour_counts",
    metadata,
    Column("tenant_id", Text, nullable=False),
    Column("workspace_id", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("hour", Integer, nullable=False),
    Column("agent_id", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("count", BigInteger, nullable=False),
    PrimaryKeyConstraint("tenant_id", "workspace_id", "kind", "hour", "agent_id", "name", name="run_hour_counts_pkey"),
    sqlite_with_rowid=False,
)
