"""Which interrupted call a tool call, and the question about it, is the retry of.

What is here is frozen: a released revision is never edited, the next one changes what it made.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision: str | None = "0003"


def upgrade() -> None:
    for table in ("tool_runs", "approvals"):
        op.add_column(table, sa.Column("retry_of", sa.Text()))
