"""Indexes for lists that are narrowed: sessions of who sees few of many, or of one agent; records of one
actor and one action.

What is here is frozen: a released revision is never edited, the next one changes what it made.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision: str | None = "0004"

SHARED = sa.text("visibility = 'workspace'")


def upgrade() -> None:
    where = ["tenant_id", "workspace_id"]
    order = ["created_at", "id"]
    op.create_index("sessions_own", "sessions", [*where, "owner_user_id", *order])
    op.create_index("sessions_own_of_agent", "sessions", [*where, "owner_user_id", "agent_id", *order])
    for name, columns in (("sessions_shared", []), ("sessions_shared_of_agent", ["agent_id"])):
        op.create_index(name, "sessions", [*where, *columns, *order], sqlite_where=SHARED, postgresql_where=SHARED)
    op.drop_index("sessions_newest", "sessions")
    op.create_index("audit_log_actor_action", "audit_log", ["tenant_id", "actor", "action", "id"])
