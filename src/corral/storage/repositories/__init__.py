"""SQL lives here: one small class for each kind of row, over one connection in one transaction.

Every statement names the tenant. The classes give and take the structs of `rows`; they know
nothing of what a status means. Statements are built once, when a module is imported; values are
always bound. The same statements serve SQLite and PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

from sqlalchemy import Connection

from corral.storage.repositories._fast import Statements
from corral.storage.repositories.governance import Approvals, Audit, AuditHead, Grants
from corral.storage.repositories.runs import Messages, Outputs, Runs, ToolRuns
from corral.storage.repositories.sessions import Journal, Sessions
from corral.storage.repositories.settings import Agents, Idempotency, Meta, Policies, Tenants, Tokens
from corral.storage.repositories.usage import Metrics, Usage
from corral.storage.rows import JournalEntry

__all__ = [
    "Agents",
    "Approvals",
    "Audit",
    "AuditHead",
    "Grants",
    "Idempotency",
    "Journal",
    "Messages",
    "Meta",
    "Metrics",
    "Outputs",
    "Policies",
    "Runs",
    "Sessions",
    "Tenants",
    "Tokens",
    "ToolRuns",
    "Transaction",
    "Usage",
]


R = TypeVar("R")


class _lazily(Generic[R]):
    """`functools.cached_property` without the lock that in Python 3.11 all threads share for each of them."""

    def __init__(self, make: Callable[[Any], R]) -> None:
        self._make = make
        self._name = make.__name__
        self.__doc__ = make.__doc__

    @overload
    def __get__(self, instance: None, owner: type) -> _lazily[R]: ...

    @overload
    def __get__(self, instance: Transaction, owner: type) -> R: ...

    def __get__(self, instance: Transaction | None, owner: type) -> _lazily[R] | R:
        if instance is None:
            return self
        # Found there the next time, before this is asked.
        made = instance.__dict__[self._name] = self._make(instance)
        return made


class Transaction:
    """The repositories of one transaction, and the entries that it has appended so far.

    Made anew for each attempt, so that nothing of one that was rolled back is left in the next; the
    repositories are made when they are asked for, as most units need two or three. `heads` is what units
    that share one transaction know of the ends of audit chains.
    """

    def __init__(self, connection: Connection, heads: dict[str, AuditHead] | None = None) -> None:
        self.appended: list[JournalEntry] = []
        self._statements = Statements(connection)
        self._heads: dict[str, AuditHead] = {} if heads is None else heads

    @_lazily
    def sessions(self) -> Sessions:
        return Sessions(self._statements)

    @_lazily
    def journal(self) -> Journal:
        return Journal(self._statements, self.appended)

    @_lazily
    def runs(self) -> Runs:
        return Runs(self._statements)

    @_lazily
    def messages(self) -> Messages:
        return Messages(self._statements)

    @_lazily
    def tool_runs(self) -> ToolRuns:
        return ToolRuns(self._statements)

    @_lazily
    def outputs(self) -> Outputs:
        return Outputs(self._statements)

    @_lazily
    def agents(self) -> Agents:
        return Agents(self._statements)

    @_lazily
    def policies(self) -> Policies:
        return Policies(self._statements)

    @_lazily
    def approvals(self) -> Approvals:
        return Approvals(self._statements)

    @_lazily
    def grants(self) -> Grants:
        return Grants(self._statements)

    @_lazily
    def audit(self) -> Audit:
        return Audit(self._statements, self._heads)

    @_lazily
    def idempotency(self) -> Idempotency:
        return Idempotency(self._statements)

    @_lazily
    def tenants(self) -> Tenants:
        return Tenants(self._statements)

    @_lazily
    def tokens(self) -> Tokens:
        return Tokens(self._statements)

    @_lazily
    def meta(self) -> Meta:
        return Meta(self._statements)

    @_lazily
    def usage(self) -> Usage:
        return Usage(self._statements)

    @_lazily
    def metrics(self) -> Metrics:
        return Metrics(self._statements)
