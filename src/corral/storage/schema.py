"""Which schema a database has, and how it gets the one that this program knows."""

from __future__ import annotations

from sqlalchemy import Column, Connection, MetaData, PrimaryKeyConstraint, String, Table, inspect, select

from corral.storage.tables import metadata

HEAD = "0006"
"""The newest revision under `migrations/versions`; revisions are numbers of four digits."""

# As Alembic itself makes it, so that it finds what was stamped without it.
_version = Table(
    "alembic_version",
    MetaData(),
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)


class SchemaRefused(Exception):
    """The database is not one that this program may touch; the message says why, for a person."""


def prepare(connection: Connection) -> bool:
    """Bring the database to `HEAD`, within the transaction that is open on `connection`.

    Says whether something that was there has been migrated. A fresh database gets its tables from
    the metadata. Alembic, which takes a quarter of a second to import, is loaded only where there
    is something to migrate. Raises SchemaRefused.
    """
    tables = set(inspect(connection).get_table_names())
    if not tables:
        metadata.create_all(connection, checkfirst=False)
        _version.create(connection)
        connection.execute(_version.insert(), {"version_num": HEAD})
        return False
    stamped = _stamped(connection) if _version.name in tables else None
    if stamped is None:
        raise SchemaRefused("the database holds tables that Corral did not make; name another data directory")
    if stamped > HEAD:
        raise SchemaRefused(
            f"the database was written by a newer Corral (schema {stamped}, this one knows {HEAD}); upgrade Corral"
        )
    if stamped == HEAD:
        return False
    from corral.storage.migrations import upgrade

    upgrade(connection)
    if _stamped(connection) != HEAD:
        raise SchemaRefused(f"the migrations of this Corral do not lead to its schema {HEAD}; install it anew")
    return True


def _stamped(connection: Connection) -> str | None:
    return connection.execute(select(_version.c.version_num)).scalar_one_or_none()
