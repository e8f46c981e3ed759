"""The schema: two ways to make it, one result; and which databases are refused."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, PrimaryKeyConstraint, UniqueConstraint

from corral.storage import migrations, schema, tables
from corral.storage._sqlite_connections import dispose, driver, make_engine, open_writer
from corral.storage.sqlite import SqliteStore
from tests.storage.make import FixedClock


def made_by(path: Path, make: Callable[[Connection], object]) -> list[tuple[str, ...]]:
    connection = open_writer(make_engine(path))
    driver(connection).control("BEGIN IMMEDIATE")
    make(connection)
    driver(connection).control("COMMIT")
    rows = driver(connection).control("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name")
    found = rows.fetchall()
    dispose(connection)
    return [(*row[:3], *_parts(row[3])) for row in found]


def _parts(sql: str | None) -> list[str]:
    """The parts of a statement in some order: a column that was added later stands at the end."""
    return sorted(filter(None, (part.strip(" ()\t") for part in re.split(r"[,\n]", sql or ""))))


def test_the_metadata_and_the_migrations_make_the_same_schema(tmp_path: Path) -> None:
    fresh = made_by(tmp_path / "fresh.db", schema.prepare)
    migrated = made_by(tmp_path / "migrated.db", migrations.upgrade)
    assert [row[1] for row in fresh] == [row[1] for row in migrated]
    assert fresh == migrated


def test_alembic_finds_no_difference_between_the_migrations_and_the_metadata(tmp_path: Path) -> None:
    differences: list[object] = []

    def make(connection: Connection) -> None:
        migrations.upgrade(connection)
        differences.extend(compare_metadata(MigrationContext.configure(connection), tables.metadata))

    made_by(tmp_path / "corral.db", make)
    assert differences == []


def test_head_is_the_newest_revision_and_revisions_are_numbered_in_order() -> None:
    scripts = ScriptDirectory.from_config(migrations.config())
    assert scripts.get_heads() == [schema.HEAD]
    revisions = [revision.revision for revision in scripts.walk_revisions()][::-1]
    assert revisions == sorted(set(revisions))
    assert all(re.fullmatch(r"\d{4}", revision) for revision in revisions)
    assert revisions[0] == "0001"


def test_every_key_and_index_begins_with_the_tenant() -> None:
    exceptions = {"journal_pkey", "tokens_token_hash_key", "store_meta_pkey"}
    found = set()
    for table in tables.metadata.tables.values():
        keys = [each for each in table.constraints if isinstance(each, PrimaryKeyConstraint | UniqueConstraint)]
        columns = [(each.name, each.columns.keys()) for each in keys]
        columns += [(each.name, each.columns.keys()) for each in table.indexes]
        found |= {name for name, names in columns if names[0] != "tenant_id"}
    assert found == exceptions
    without_tenant = {name for name, table in tables.metadata.tables.items() if "tenant_id" not in table.c}
    assert without_tenant == {"store_meta"}


def stamp(path: Path, version: str) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (version,))
    connection.close()


async def test_a_database_of_a_newer_corral_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "corral.db"
    await (await SqliteStore.open(path, FixedClock())).close()
    stamp(path, "0999")
    before = path.read_bytes()
    with pytest.raises(schema.SchemaRefused, match=r"newer Corral .*0999.* upgrade Corral"):
        await SqliteStore.open(path, FixedClock())
    assert path.read_bytes() == before


async def test_a_database_that_is_not_ours_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "corral.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE precious (x)")
    connection.close()
    with pytest.raises(schema.SchemaRefused, match="another data directory"):
        await SqliteStore.open(path, FixedClock())
    with sqlite3.connect(path) as connection:
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master")]
    connection.close()
    assert names == ["precious"]


async def test_an_older_database_is_migrated_and_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A revision of the test's own stands for the next one."""
    path = tmp_path / "corral.db"
    await (await SqliteStore.open(path, FixedClock())).close()
    newer = tmp_path / "newer"
    (newer / "versions").mkdir(parents=True)
    here = Path(migrations.__file__).parent
    (newer / "env.py").write_text((here / "env.py").read_text())
    head = int(schema.HEAD)
    for revision in (here / "versions").glob("rev_*.py"):
        (newer / "versions" / revision.name).write_text(revision.read_text())
    (newer / f"versions/rev_{head + 1:04d}.py").write_text(
        f"from alembic import op\nrevision = '{head + 1:04d}'\ndown_revision = '{schema.HEAD}'\n"
        "def upgrade():\n    op.execute(\"INSERT INTO store_meta VALUES ('migrated', 'yes')\")\n"
    )
    monkeypatch.setattr(migrations, "__file__", str(newer / "__init__.py"))
    monkeypatch.setattr(schema, "HEAD", f"{head + 1:04d}")
    for _ in range(2):
        store = await SqliteStore.open(path, FixedClock())
        try:
            assert await store.read(lambda tx: tx.meta.get("migrated")) == "yes"
        finally:
            await store.close()


async def test_migrations_that_do_not_reach_the_head_are_refused_and_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "corral.db"
    await (await SqliteStore.open(path, FixedClock())).close()
    with monkeypatch.context() as patch:
        patch.setattr(schema, "HEAD", "0998")
        with pytest.raises(schema.SchemaRefused, match="0998"):
            await SqliteStore.open(path, FixedClock())
    await (await SqliteStore.open(path, FixedClock())).close()
