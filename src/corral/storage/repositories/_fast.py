"""Statements on the bare cursor.

SQLAlchemy says what a statement is, in SQL of either database; carrying it out through
SQLAlchemy costs some 75 µs on top of the driver's own 10 to 30, and a turn of an agent has
twenty of them. Here a statement is compiled once and then run on the driver's cursor, with
SQLAlchemy's own conversions of what goes in and comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sqlalchemy import Connection, Dialect, Executable, exc
from sqlalchemy.sql.compiler import SQLCompiler

_Convert = Callable[[Any], Any]


class Rows:
    """What a statement gave: tuples, converted; and how many rows it changed."""

    __slots__ = ("_rows", "rowcount")

    def __init__(self, rows: list[Any], rowcount: int) -> None:
        self._rows = rows
        self.rowcount = rowcount

    def __iter__(self) -> Iterator[Any]:
        return iter(self._rows)

    def all(self) -> list[Any]:
        return self._rows

    def one_or_none(self) -> Any:
        """The one row, or None. Raises ValueError if there are more."""
        if len(self._rows) > 1:
            raise ValueError("more than one row where one was asked for")
        return self._rows[0] if self._rows else None

    def one(self) -> Any:
        """The one row. Raises ValueError if there is none, or more."""
        (row,) = self._rows
        return row

    def scalar_one(self) -> Any:
        return self.one()[0]

    def scalar_one_or_none(self) -> Any:
        row = self.one_or_none()
        return None if row is None else row[0]

    def scalars(self) -> Iterator[Any]:
        return (row[0] for row in self._rows)


class _Compiled:
    """A statement for one kind of database, with the names of the values that it is run with."""

    __slots__ = ("constants", "into", "order", "out", "statement", "text", "unasked")

    def __init__(self, statement: Executable, names: list[str], dialect: Dialect) -> None:
        self.statement = statement  # kept alive: it is found by its identity
        sql: Any = statement.compile(dialect=dialect, column_keys=names)  # type: ignore[attr-defined]
        # A list (`IN`) is another statement for each length of it: there are none here.
        if not isinstance(sql, SQLCompiler) or sql.post_compile_params or sql.prefetch:
            raise TypeError(f"not a statement that runs on the bare cursor: {sql}")
        self.text = str(sql)
        # sqlite3 asks for the last row's id after each `execute`, letting go of the interpreter's lock for it,
        # and after no `executemany`, which serves a statement that gives no rows as well.
        self.unasked = dialect.name == "sqlite" and _gives_no_rows(sql)
        self.order = sql.positiontup
        self.constants = dict(sql.params)
        self.into = {
            name: convert
            for bind, name in sql.bind_names.items()
            if (convert := bind.type.dialect_impl(dialect).bind_processor(dialect)) is not None
        }
        out = [column.type.dialect_impl(dialect).result_processor(dialect, None) for column in sql._result_columns]
        self.out = [(place, convert) for place, convert in enumerate(out) if convert is not None]

    def values(self, given: Mapping[str, Any]) -> Any:
        values = {**self.constants, **given}
        for name, convert in self.into.items():
            values[name] = convert(values[name])
        return values if self.order is None else [values[name] for name in self.order]

    def converted(self, row: Any) -> Any:
        cells = list(row)
        for place, convert in self.out:
            cells[place] = convert(cells[place])
        return cells


def _gives_no_rows(sql: SQLCompiler) -> bool:
    return (sql.isinsert or sql.isupdate or sql.isdelete) and not sql.effective_returning


_compiled: dict[tuple[str, int, tuple[str, ...]], _Compiled] = {}


class Statements:
    """One connection in one transaction, to run statements on."""

    __slots__ = ("_connection", "_cursor", "_dialect", "_name")

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._dialect = connection.dialect
        self._name = connection.dialect.name
        # The driver's own connection: the pool's proxy would cost as much again.
        self._cursor: Callable[[], Any] = connection.connection.dbapi_connection.cursor  # type: ignore[union-attr]

    @property
    def dialect_name(self) -> str:
        return self._name

    def execute(self, statement: Executable, values: Mapping[str, Any]) -> Rows:
        """Run a statement that was built once, at import. Raises DBAPIError as SQLAlchemy itself does."""
        key = (self._name, id(statement), tuple(values))
        compiled = _compiled.get(key)
        if compiled is None:
            compiled = _compiled[key] = _Compiled(statement, list(values), self._dialect)
        cursor = self._cursor()
        try:
            if compiled.unasked:
                cursor.executemany(compiled.text, (compiled.values(values),))
                return Rows([], cursor.rowcount)
            cursor.execute(compiled.text, compiled.values(values))
            # A cursor without a description gives no rows; asking it for some is an error in some drivers.
            rows = cursor.fetchall() if cursor.description is not None else []
            if compiled.out:
                rows = [compiled.converted(row) for row in rows]
            return Rows(rows, cursor.rowcount)
        except self._dialect.loaded_dbapi.Error as error:
            kind = getattr(exc, type(error).__name__, exc.DBAPIError)
            raise kind(None, None, error, hide_parameters=True) from error
        finally:
            cursor.close()
