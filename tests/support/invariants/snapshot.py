"""All rows of a store as they were at one instant."""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

Row = dict[str, Any]
Key = tuple[str, str]
"""(tenant, id)"""

TERMINAL = frozenset({"completed", "failed", "aborted"})
ENDINGS = frozenset({"agent.completed", "agent.failed"})

_TABLES = (
    "sessions",
    "runs",
    "messages",
    "tool_runs",
    "approvals",
    "grants",
    "idempotency",
    "policies",
    "agents",
    "tokens",
    "audit_log",
    "run_facts",
    "approval_facts",
    "run_hours",
    "run_hour_counts",
    "reservations",
    "workspaces",
)


class Entry(NamedTuple):
    """One durable event as the journal has it; `raw` is its payload's text."""

    tenant: str
    workspace: str
    session: str
    version: int
    feed: int
    event: str
    run: str | None
    raw: bytes
    payload: Row
    at: int

    def __str__(self) -> str:
        return f"{self.event} at version {self.version} of session {self.session}"


class Cursor(Protocol):
    """What the DB-API says of a cursor, as far as it is used here."""

    @property
    def description(self) -> Sequence[Sequence[Any]]: ...

    def execute(self, operation: str, /) -> Any: ...

    def fetchall(self) -> Sequence[Sequence[Any]]: ...


class Database(Protocol):
    """A DB-API connection to a store, in a transaction that sees one snapshot; any backend's."""

    def cursor(self) -> Any: ...


class Snapshot:
    """The rows by table, and the journal by session. `settled`: nothing is under way.

    `database`: SQLite's file, which is examined too; or a connection, of which only rows are read.
    """

    def __init__(self, database: Path | Database, *, settled: bool = False) -> None:
        self.settled = settled
        self.journals: dict[Key, list[Entry]] = defaultdict(list)
        self.faults: list[str] = []
        self.calls: Any = None
        """What `calls_of` found, for whoever asks next."""
        self.outputs: list[tuple[str, str, str]] = []
        self.tables: dict[str, list[Row]] = {name: [] for name in _TABLES}
        if isinstance(database, Path):
            self._read_file(database)
        else:
            self._read(database)

    def _read_file(self, database: Path) -> None:
        with closing(_open(database)) as connection:
            try:
                connection.execute("BEGIN")
                found = [str(row[0]) for row in connection.execute("PRAGMA quick_check(3)")]
                self.faults += [f"SQLite says: {text}" for text in found if text != "ok"]
                if self.faults:
                    return
                for table, _row, parent, _ in connection.execute("PRAGMA foreign_key_check"):
                    self.faults.append(f"a row of {table} refers to no row of {parent}")
                self._read(connection)
            except (sqlite3.DatabaseError, msgspec.DecodeError) as error:
                self.faults.append(f"SQLite says: {error}")

    def _read(self, database: Database) -> None:
        cursor: Cursor = database.cursor()
        for table in _TABLES:
            self.tables[table] = _rows(cursor, f"SELECT * FROM {table}")
        for row in _rows(cursor, "SELECT * FROM journal ORDER BY feed_id"):
            raw = row["payload"] if isinstance(row["payload"], bytes) else str(row["payload"]).encode()
            entry = Entry(
                row["tenant_id"],
                row["workspace_id"],
                row["session_id"],
                row["version"],
                row["feed_id"],
                row["event"],
                row["run_id"],
                raw,
                msgspec.json.decode(raw),
                row["created_at"],
            )
            self.journals[entry.tenant, entry.session].append(entry)
        for row in _rows(cursor, "SELECT tenant_id, tool_call_id, session_id FROM outputs"):
            self.outputs.append((row["tenant_id"], row["tool_call_id"], row["session_id"]))

    # ---- by id

    @cached_property
    def sessions(self) -> dict[Key, Row]:
        return self._by_id("sessions")

    @cached_property
    def runs(self) -> dict[Key, Row]:
        return self._by_id("runs")

    @cached_property
    def tool_runs(self) -> dict[Key, Row]:
        return self._by_id("tool_runs")

    @cached_property
    def approvals(self) -> dict[Key, Row]:
        return self._by_id("approvals")

    def _by_id(self, table: str) -> dict[Key, Row]:
        return {(row["tenant_id"], row["id"]): row for row in self.tables[table]}

    @cached_property
    def entries_of_run(self) -> dict[Key, list[Entry]]:
        """What carries each run's id, in the journal's order."""
        found: dict[Key, list[Entry]] = defaultdict(list)
        for entry in self.entries():
            if entry.run is not None:
                found[entry.tenant, entry.run].append(entry)
        return found

    def entries(self) -> Iterator[Entry]:
        for entries in self.journals.values():
            yield from entries

    # ---- the audit

    @cached_property
    def audit(self) -> dict[tuple[str, str, str], list[Row]]:
        """Records by (tenant, action, resource's id), their metadata decoded."""
        found: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
        for row in sorted(self.tables["audit_log"], key=lambda row: int(row["id"])):
            told = {**row, "metadata": msgspec.json.decode(row["metadata"])}
            found[row["tenant_id"], row["action"], row["resource_id"]].append(told)
        return found

    @cached_property
    def whole_audits(self) -> frozenset[str]:
        """The tenants of whose records retention has taken none."""
        return frozenset(row["tenant_id"] for row in self.tables["audit_log"] if row["id"] == 1)

    def was_deleted(self, tenant: str, session: str) -> bool:
        """Whether a session of that id was deleted at some time."""
        return (tenant, "session.delete", session) in self.audit or tenant not in self.whole_audits


def _open(database: Path) -> sqlite3.Connection:
    # Where nobody has the database open there is no log, and reading must not make one.
    there = database.with_name(database.name + "-wal").exists()
    mode = "mode=ro" if there else "mode=ro&immutable=1"
    return sqlite3.connect(f"{database.absolute().as_uri()}?{mode}", uri=True, isolation_level=None, timeout=30)


def _rows(cursor: Cursor, select: str) -> list[Row]:
    cursor.execute(select)
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
