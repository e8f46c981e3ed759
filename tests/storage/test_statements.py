"""The statements themselves: built once, bound, for both databases, naming the tenant."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from typing import Any, cast

import pytest
from sqlalchemy import Update, create_engine
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Dialect
from sqlalchemy.schema import CreateTable
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.dml import UpdateBase
from sqlalchemy.sql.selectable import Select

from corral.storage import tables
from corral.storage.repositories import _base, governance, runs, sessions, settings, usage


def statements() -> dict[str, UpdateBase | Select[Any] | _base.Upsert]:
    found: dict[str, UpdateBase | Select[Any] | _base.Upsert] = {}
    for module in (governance, runs, sessions, settings, usage):
        for name, value in vars(module).items():
            values = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
            for number, each in enumerate(values):
                if isinstance(each, UpdateBase | Select | _base.Upsert):
                    found[f"{module.__name__.rpartition('.')[2]}.{name}.{number}"] = each
    return found


STATEMENTS = statements()
DIALECTS: list[Dialect] = [sqlite.dialect(), postgresql.dialect()]  # type: ignore[no-untyped-call]
ACROSS_TENANTS = {
    "governance._DUE",
    "runs._UNFINISHED",
    "runs._RENEW",
    "settings._BY_HASH",
    "settings._META",
    "settings._SET_META",
}


@pytest.mark.parametrize("name", STATEMENTS)
@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.name)
def test_a_statement_compiles_for_either_database_and_names_the_tenant(name: str, dialect: Dialect) -> None:
    statement = STATEMENTS[name]
    if isinstance(statement, _base.Upsert):
        statement = statement.statement(dialect.name)
    sql = str(statement.compile(dialect=dialect))
    if name.rpartition(".")[0] not in ACROSS_TENANTS:
        assert re.search(r"tenant_id (=|>) [:?%]|INSERT INTO \w+ \(.*\btenant_id\b", sql), sql


def test_the_statements_were_found() -> None:
    assert len(STATEMENTS) > 45


# All of a small partial index, whatever the history.
SCANS = {
    "governance._DUE": "approvals_pending",
    "runs._UNFINISHED": "runs_unfinished",
    "runs._RENEW": "runs_unfinished",
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_sqlite_finds_rows_by_an_index_and_reads_no_whole_table(name: str, database: sqlite3.Connection) -> None:
    statement = STATEMENTS[name]
    if isinstance(statement, _base.Upsert):
        statement = statement.statement("sqlite")
    if isinstance(statement, Update) and not statement._values:
        names = tables.metadata.tables[str(statement.table)].c.keys()
        statement = _base.changing(statement, frozenset({names[-1]}))
    compiled = statement.compile(dialect=DIALECTS[0])
    assert isinstance(compiled, SQLCompiler)
    sql = re.sub(r"\(__\[POSTCOMPILE_\w+\]\)", "(?)", str(compiled))
    plan = [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {sql}", [1] * len(compiled.positiontup or ()))]
    expected = SCANS.get(name.rpartition(".")[0])
    # Constant rows are those that a statement brings along.
    scans = [step for step in plan if step.startswith("SCAN") and not re.search("SUBQUERY|CONSTANT ROW", step)]
    assert all(expected is not None and f"USING INDEX {expected}" in step for step in scans), plan
    assert expected is None or scans, plan


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("_OWN.0", "sessions_own (tenant_id=? AND workspace_id=? AND owner_user_id=? AND (created_at,id)<(?,?))"),
        (
            "_OWN.1",
            "sessions_own_of_agent (tenant_id=? AND workspace_id=? AND owner_user_id=? AND agent_id=? "
            "AND (created_at,id)<(?,?))",
        ),
        ("_SHARED.0", "sessions_shared (tenant_id=? AND workspace_id=? AND (created_at,id)<(?,?))"),
        (
            "_SHARED.1",
            "sessions_shared_of_agent (tenant_id=? AND workspace_id=? AND agent_id=? AND (created_at,id)<(?,?))",
        ),
    ],
)
def test_a_page_of_sessions_is_read_in_order_and_passes_over_nobody_elses(
    name: str, index: str, database: sqlite3.Connection
) -> None:
    statement = STATEMENTS[f"sessions.{name}"]
    assert isinstance(statement, Select)
    [step] = plan_of(statement, database)
    assert step == f"SEARCH sessions USING INDEX {index}"


HOURS = "tenant_id=? AND workspace_id=? AND hour>? AND hour<?"
FINISHED = "tenant_id=? AND workspace_id=? AND finished_at>? AND finished_at<?"
RESOLVED = FINISHED.replace("finished_at", "resolved_at")
BY_WAIT = "approval_facts_by_wait (tenant_id=? AND workspace_id=?)"


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        (
            sessions._AFTER,
            "journal USING INDEX sqlite_autoindex_journal_1 (tenant_id=? AND session_id=? AND version>?)",
        ),
        (
            sessions._BEFORE,
            "journal USING INDEX sqlite_autoindex_journal_1 (tenant_id=? AND session_id=? AND version<?)",
        ),
        *((each, f"run_hours USING PRIMARY KEY ({HOURS})") for each in usage._HOUR_SUMS.values()),
        *((each, f"run_facts USING PRIMARY KEY ({FINISHED})") for each in usage._FACT_SUMS.values()),
        *((each, f"approval_facts USING PRIMARY KEY ({RESOLVED})") for each in usage._DECISIONS.values()),
        # Without `USE TEMP B-TREE FOR ORDER BY`.
        *((each, f"approval_facts USING COVERING INDEX {BY_WAIT}") for each in usage._WAIT_OF_MANY.values()),
    ],
)
def test_a_page_of_a_journal_and_the_sums_of_a_period_are_read_from_where_they_begin_to_where_they_end(
    statement: Select[Any], expected: str, database: sqlite3.Connection
) -> None:
    assert plan_of(statement, database) == [f"SEARCH {expected}"]


@pytest.mark.parametrize("statement", usage._WAIT.values())
def test_the_waits_of_a_period_are_sorted_and_those_of_other_times_not_read(
    statement: Select[Any], database: sqlite3.Connection
) -> None:
    search, sort = plan_of(statement, database)
    assert search == f"SEARCH approval_facts USING PRIMARY KEY ({RESOLVED})"
    assert sort == "USE TEMP B-TREE FOR ORDER BY"


def test_the_end_of_a_run_reads_the_keys_that_wait_for_it_and_no_others(database: sqlite3.Connection) -> None:
    statement = STATEMENTS["settings._IN_PROGRESS_OF_RUN.0"]
    assert isinstance(statement, Select)
    assert "USING INDEX idempotency_run (tenant_id=? AND run_id=?)" in plan_of(statement, database)[0]


def plan_of(statement: Select[Any], database: sqlite3.Connection) -> list[str]:
    compiled = statement.compile(dialect=DIALECTS[0])
    assert isinstance(compiled, SQLCompiler)
    return [row[3] for row in database.execute(f"EXPLAIN QUERY PLAN {compiled}", [1] * len(compiled.positiontup or ()))]


AUDIT_INDEX = {
    "run_id": "audit_log_run (tenant_id=? AND run_id=? AND id",
    "session_id": "audit_log_session (tenant_id=? AND session_id=? AND id",
    "actor": "audit_log_actor (tenant_id=? AND actor=? AND id",
    "action": "audit_log_action (tenant_id=? AND action=? AND id",
    "actor+action": "audit_log_actor_action (tenant_id=? AND actor=? AND action=? AND id",
}


@pytest.mark.parametrize("names", governance._PAGES, ids=lambda names: "+".join(names) or "none")
def test_a_page_of_the_audit_log_is_read_in_order_by_its_most_selective_filters_index(
    names: tuple[str, ...], database: sqlite3.Connection
) -> None:
    pair = "+".join(names) if names == ("actor", "action") else ""
    expected = AUDIT_INDEX[pair or names[0]] if names else "sqlite_autoindex_audit_log_1 (tenant_id=? AND id"
    [step] = plan_of(governance._PAGES[names], database)
    assert step.startswith(f"SEARCH audit_log USING INDEX {expected}>? AND id<?)")


def test_a_page_of_the_audit_log_may_have_any_of_its_filters() -> None:
    assert len(governance._PAGES) == 2 ** len([name for name in AUDIT_INDEX if "+" not in name])


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        (governance._IDS_FROM, "COVERING INDEX audit_log_time (tenant_id=? AND created_at>?)"),
        (governance._IDS_TO, "COVERING INDEX audit_log_time (tenant_id=? AND created_at<?)"),
        (governance._HEAD, "INDEX sqlite_autoindex_audit_log_1 (tenant_id=? AND id<?)"),
        (governance._SCAN, "INDEX sqlite_autoindex_audit_log_1 (tenant_id=? AND id>?)"),
        (governance._APPROVALS_OF_RUN, "INDEX approvals_of_run (tenant_id=? AND run_id=?)"),
        (governance._GRANTS, "INDEX grants_newest (tenant_id=? AND workspace_id=?)"),
    ],
)
def test_what_governance_reads_in_order_is_not_sorted(
    statement: Select[Any], expected: str, database: sqlite3.Connection
) -> None:
    [step] = plan_of(statement, database)
    assert f"USING {expected}" in step


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        (
            governance._APPROVAL_PAGE,
            "approvals_newest (tenant_id=? AND workspace_id=? AND status=? AND (created_at,id)<(?,?))",
        ),
        (
            governance._APPROVAL_PAGE_OF_SESSION,
            "approvals_of_session (tenant_id=? AND session_id=? AND status=? AND (created_at,id)<(?,?))",
        ),
    ],
)
def test_a_page_of_approvals_is_read_in_order_and_not_sorted(
    statement: Select[Any], expected: str, database: sqlite3.Connection
) -> None:
    plan = plan_of(statement, database)
    assert f"USING INDEX {expected}" in " ".join(plan)
    assert not any("TEMP B-TREE" in step for step in plan)


@pytest.fixture(scope="module", params=[False, True], ids=["forwards", "backwards"])
def database(request: pytest.FixtureRequest) -> Iterator[sqlite3.Connection]:
    """An empty database with the tables; their indexes made in one order, then in the other.

    Where two fit a statement equally well, SQLite chooses by that order, and it differs between databases:
    SQLAlchemy keeps a table's indexes in a set, and a migration adds its own at the end.
    """
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        for table in tables.metadata.sorted_tables:
            connection.execute(CreateTable(table))
            for index in sorted(table.indexes, key=lambda each: str(each.name), reverse=request.param):
                index.create(connection)
        yield cast(sqlite3.Connection, connection.connection.dbapi_connection)
    engine.dispose()
