"""Approvals, the grants that they were told to remember, and the audit log.

What is here is frozen: a released revision is never edited, the next one changes what it made.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision: str | None = "0001"

PENDING = sa.text("status = 'pending'")
HAS_RUN = sa.text("run_id IS NOT NULL")
HAS_SESSION = sa.text("session_id IS NOT NULL")


def upgrade() -> None:
    for create in (_approvals, _grants, _audit_log):
        create()


def _approvals() -> None:
    op.create_table(
        "approvals",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("workspace_id", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("tool_call_id", sa.Text(), nullable=False),
        sa.Column("tool_name", sa.Text(), nullable=False),
        sa.Column("args", sa.Text(), nullable=False),
        sa.Column("args_hash", sa.Text(), nullable=False),
        sa.Column("binding", sa.Text(), nullable=False),
        sa.Column("risk", sa.Text(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("rule_id", sa.Text()),
        sa.Column("requested_by", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("resolved_at", sa.BigInteger()),
        sa.Column("resolved_by", sa.Text()),
        sa.Column("comment", sa.Text()),
        sa.PrimaryKeyConstraint("tenant_id", "id", name="approvals_pkey"),
        sa.ForeignKeyConstraint(
            ["tenant_id", "session_id"], ["sessions.tenant_id", "sessions.id"], name="approvals_session_fkey"
        ),
    )
    op.create_index("approvals_newest", "approvals", ["tenant_id", "workspace_id", "status", "created_at", "id"])
    op.create_index("approvals_of_session", "approvals", ["tenant_id", "session_id", "status", "created_at", "id"])
    op.create_index("approvals_of_run", "approvals", ["tenant_id", "run_id", "created_at", "id"])
    op.create_index(
        "approvals_pending", "approvals", ["tenant_id", "expires_at"], sqlite_where=PENDING, postgresql_where=PENDING
    )


def _grants() -> None:
    op.create_table(
        "grants",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("workspace_id", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text()),
        sa.Column("tool_name", sa.Text(), nullable=False),
        sa.Column("binding", sa.Text(), nullable=False),
        sa.Column("matcher", sa.Text(), nullable=False),
        sa.Column("approval_id", sa.Text(), nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("uses", sa.BigInteger(), nullable=False),
        sa.Column("revoked_at", sa.BigInteger()),
        sa.Column("revoked_by", sa.Text()),
        sa.PrimaryKeyConstraint("tenant_id", "id", name="grants_pkey"),
        sa.ForeignKeyConstraint(
            ["tenant_id", "session_id"], ["sessions.tenant_id", "sessions.id"], name="grants_session_fkey"
        ),
    )
    op.create_index("grants_newest", "grants", ["tenant_id", "workspace_id", "created_at", "id"])
    op.create_index("grants_binding", "grants", ["tenant_id", "workspace_id", "tool_name", "binding"])
    op.create_index("grants_of_session", "grants", ["tenant_id", "session_id"])


def _audit_log() -> None:
    op.create_table(
        "audit_log",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("id", sa.BigInteger(), nullable=False),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("actor_type", sa.Text(), nullable=False),
        sa.Column("resource_type", sa.Text(), nullable=False),
        sa.Column("resource_id", sa.Text(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("metadata", sa.Text(), nullable=False),
        sa.Column("trace_id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Text(), nullable=False),
        sa.Column("prev_hash", sa.Text(), nullable=False),
        sa.Column("hash", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text()),
        sa.Column("run_id", sa.Text()),
        sa.PrimaryKeyConstraint("tenant_id", "id", name="audit_log_pkey"),
    )
    op.create_index("audit_log_action", "audit_log", ["tenant_id", "action", "id"])
    op.create_index("audit_log_actor", "audit_log", ["tenant_id", "actor", "id"])
    op.create_index(
        "audit_log_session",
        "audit_log",
        ["tenant_id", "session_id", "id"],
        sqlite_where=HAS_SESSION,
        postgresql_where=HAS_SESSION,
    )
    op.create_index(
        "audit_log_run", "audit_log", ["tenant_id", "run_id", "id"], sqlite_where=HAS_RUN, postgresql_where=HAS_RUN
    )
    op.create_index("audit_log_time", "audit_log", ["tenant_id", "created_at", "id"])
