"""Migrations of the schema, run by Alembic. Imported only where there is something to migrate.

A new revision is a file `versions/rev_NNNN.py`; revisions only go forward. It runs within one
transaction on SQLite as on PostgreSQL: all of it is done or nothing.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection


def config(connection: Connection | None = None) -> Config:
    """Alembic's settings, made here instead of read from a file."""
    made = Config()
    made.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    made.set_main_option("path_separator", "os")
    made.attributes["connection"] = connection
    return made


def upgrade(connection: Connection, revision: str = "head") -> None:
    """Migrate to `revision` within the transaction that is open on `connection`."""
    command.upgrade(config(connection), revision)
