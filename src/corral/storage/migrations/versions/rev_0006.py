"""What people decided, for metrics, apart from the approvals, which go with their session.

What is here is frozen: a released revision is never edited, the next one changes what it made.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision: str | None = "0005"


def upgrade() -> None:
    op.create_table(
        "approval_facts",
        sa.Column("tenant_id", sa.Text(), nullable=False),
        sa.Column("workspace_id", sa.Text(), nullable=False),
        sa.Column("resolved_at", sa.BigInteger(), nullable=False),
        sa.Column("approval_id", sa.Text(), nullable=False),
        sa.Column("agent_id", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("wait_ms", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("tenant_id", "workspace_id", "resolved_at", "approval_id", name="approval_facts_pkey"),
        sqlite_with_rowid=False,
    )
    # In the order of the key, for which the index that goes is used a last time.
    op.execute(
        "INSERT INTO approval_facts "
        "SELECT a.tenant_id, a.workspace_id, a.resolved_at, a.id, coalesce(r.agent_id, ''), a.status, "
        "CASE WHEN a.resolved_at > a.created_at THEN a.resolved_at - a.created_at ELSE 0 END "
        "FROM approvals AS a LEFT JOIN runs AS r ON r.tenant_id = a.tenant_id AND r.id = a.run_id "
        "WHERE a.resolved_at IS NOT NULL AND a.status IN ('approved', 'rejected') "
        "ORDER BY a.tenant_id, a.workspace_id, a.resolved_at, a.id"
    )
    op.drop_index("approvals_resolved", "approvals")
    op.create_index(
        "approval_facts_by_wait",
        "approval_facts",
        ["tenant_id", "workspace_id", "wait_ms", "resolved_at", "agent_id"],
    )
