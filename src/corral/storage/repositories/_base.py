"""What the repositories share: one connection, and rows to structs and back."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Any, Generic, TypeVar

from msgspec import Struct
from msgspec.structs import asdict
from sqlalchemy import (
    ColumnElement,
    Insert,
    Select,
    Table,
    Update,
    bindparam,
    select,
    update,
)
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.sql.dml import UpdateBase

from corral.storage.repositories._fast import Rows, Statements

R = TypeVar("R", bound=Struct)
U = TypeVar("U", bound=UpdateBase)


class Shape(Generic[R]):
    """How the rows of `table` are written in and read out as structs of `row_type`.

    The fields of the struct are names of columns of the table.
    """

    def __init__(self, row_type: type[R], table: Table) -> None:
        self._row_type = row_type
        self._fields = row_type.__struct_fields__
        self.table = table
        self.columns = [table.c[field] for field in self._fields]

    def select(self) -> Select[Any]:
        """A query for whole rows, in the order in which `one` and `all` take them."""
        return select(*self.columns)

    def make(self, row: Any) -> R:
        return self._row_type(**dict(zip(self._fields, row, strict=True)))

    def one(self, result: Rows) -> R | None:
        row = result.one_or_none()
        return None if row is None else self.make(row)

    def all(self, result: Rows) -> list[R]:
        return [self.make(row) for row in result]

    def values(self, row: R) -> dict[str, Any]:
        # asdict is shallow: what a JSON column holds stays what it is.
        return asdict(row)


def is_(column: ColumnElement[Any], name: str | None = None) -> ColumnElement[bool]:
    """`column` equals the value bound as `b_<column>`: SQLAlchemy keeps the bare names for itself."""
    key = name or getattr(column, "key", None)
    return column == bindparam(f"b_{key}", type_=column.type)


def bound(name: str, column: ColumnElement[Any]) -> Any:
    """A parameter `b_<name>` of the type of `column`."""
    return bindparam(f"b_{name}", type_=column.type)


@lru_cache(maxsize=512)
def changing(statement: U, names: frozenset[str]) -> U:
    """`statement` setting the columns `names` from parameters of the same names, built once for each set."""
    return statement.values({name: bindparam(f"v_{name}") for name in names})  # type: ignore[no-any-return, attr-defined]


def check_changes(table: Table, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters for `changing`. Raises TypeError for a name that is no column that may change."""
    changeable = _changeable(table)
    for name in changes:
        if name not in changeable:
            raise TypeError(f"{table.name} has no column {name!r} to update")
    return {f"v_{name}": value for name, value in changes.items()}


@cache
def _changeable(table: Table) -> frozenset[str]:
    """What may be updated. Each update asks, and SQLAlchemy's own collections are slow to answer."""
    return frozenset(column.key for column in table.c if not column.primary_key)


def update_of(table: Table, *where: ColumnElement[bool]) -> Update:
    return update(table).where(*where)


class Upsert:
    """Insert a row; where its key is taken, replace that row or (without `replace`) leave it.

    SQLAlchemy has a construct of its own for each database, alike but not the same; PostgreSQL's
    is imported where it is used, since that takes a tenth of a second.
    """

    def __init__(self, table: Table, *, replace: bool) -> None:
        self._table = table
        self._replace = replace
        self._statements = {"sqlite": self._build(sqlite_insert(table))}

    def execute(self, connection: Statements, values: dict[str, Any]) -> Rows:
        return connection.execute(self.statement(connection.dialect_name), values)

    def statement(self, dialect: str) -> Insert:
        """The statement for the dialect of this name, `sqlite` or `postgresql`."""
        if dialect not in self._statements:
            from sqlalchemy.dialects.postgresql import insert as postgresql_insert

            self._statements[dialect] = self._build(postgresql_insert(self._table))
        return self._statements[dialect]

    def _build(self, insert: Any) -> Insert:
        key = list(self._table.primary_key.columns)
        if self._replace:
            changed = {c.key: insert.excluded[c.key] for c in self._table.c if not c.primary_key}
            built: Insert = insert.on_conflict_do_update(index_elements=key, set_=changed)
        else:
            built = insert.on_conflict_do_nothing(index_elements=key)
        return built


class Repository:
    """One kind of row over one connection in one transaction."""

    def __init__(self, connection: Statements) -> None:
        self._connection = connection
