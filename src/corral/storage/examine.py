"""A look at a database from outside, beside the gateway that may have it open: nothing is changed."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

from msgspec import Struct

from corral.storage.schema import HEAD


class Examined(Struct, kw_only=True, frozen=True):
    """`schema` is None where the file has none that Corral made; `problems` are for a person."""

    schema: str | None
    expected: str
    problems: list[str]


def examine(path: Path) -> Examined:
    """Schema version and SQLite's `quick_check`, on a connection that can only read. Reads the whole file.

    A database that was closed in order has no log. Read as an immutable file it gets none: an ordinary
    reader would leave an empty log and its index behind. If a gateway opens it meanwhile, what was read
    may be half of the old and half of the new, so then it is read again as a database in use.
    """
    log = path.with_name(f"{path.name}-wal")
    if not log.exists():
        examined = _examine(path, "mode=ro&immutable=1")
        if not log.exists():
            return examined
    return _examine(path, "mode=ro")


def _examine(path: Path, how: str) -> Examined:
    schema = None
    try:
        with closing(sqlite3.connect(f"file:{quote(str(path))}?{how}", uri=True, timeout=5.0)) as connection:
            found = [str(row[0]) for row in connection.execute("PRAGMA quick_check")]
            schema = _schema(connection)
    except sqlite3.Error as error:
        found = [str(error)]
    return Examined(schema=schema, expected=HEAD, problems=[] if found == ["ok"] else found)


def _schema(connection: sqlite3.Connection) -> str | None:
    table = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone()
    row = connection.execute("SELECT version_num FROM alembic_version").fetchone() if table else None
    return None if row is None else str(row[0])
