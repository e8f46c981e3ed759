"""SQL lives here: one small class for each kind of row, over one connection in one transaction.

Every statement names the tenant. The classes give and take the structs of `rows`; they know
nothing of what a status means. Statements are built once, when a module is imported; values are
always bound. The same statements serve SQLite and PostgreSQL.
"""

from __future__ import annotations

from functools import cached_property

from sqlalchemy import Connection

from corral.storage.repositories._fast import Statements
from corral.storage.repositories.governance import Approvals, Audit, Grants
from corral.storage.repositories.runs import Messages, Outputs, Runs, ToolRuns
from corral.storage.repositories.sessions import Journal, Sessions
from corral.storage.repositories.settings import Agents, Idempotency, Meta, Policies, Tenants, Tokens
from corral.storage.repositories.usage import Metrics, Usage
from corral.storage.rows import JournalEntry

__all__ = [
    "Agents",
    "Approvals",
    "Audit",
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


class Transaction:
    """The repositories of one transaction, and the entries that it has appended so far.

    Made anew for each attempt, so that nothing of one that was rolled back is left in the next; the
    repositories are made when they are asked for, as most units need two or three.
    """

    def __init__(self, connection: Connection) -> None:
        self.appended: list[JournalEntry] = []
        self._statements = Statements(connection)

    @cached_property
    def sessions(self) -> Sessions:
        return Sessions(self._statements)

    @cached_property
    def journal(self) -> Journal:
        return Journal(self._statements, self.appended)

    @cached_property
    def runs(self) -> Runs:
        return Runs(self._statements)

    @cached_property
    def messages(self) -> Messages:
        return Messages(self._statements)

    @cached_property
    def tool_runs(self) -> ToolRuns:
        return ToolRuns(self._statements)

    @cached_property
    def outputs(self) -> Outputs:
        return Outputs(self._statements)

    @cached_property
    def agents(self) -> Agents:
        return Agents(self._statements)

    @cached_property
    def policies(self) -> Policies:
        return Policies(self._statements)

    @cached_property
    def approvals(self) -> Approvals:
        return Approvals(self._statements)

    @cached_property
    def grants(self) -> Grants:
        return Grants(self._statements)

    @cached_property
    def audit(self) -> Audit:
        return Audit(self._statements)

    @cached_property
    def idempotency(self) -> Idempotency:
        return Idempotency(self._statements)

    @cached_property
    def tenants(self) -> Tenants:
        return Tenants(self._statements)

    @cached_property
    def tokens(self) -> Tokens:
        return Tokens(self._statements)

    @cached_property
    def meta(self) -> Meta:
        return Meta(self._statements)

    @cached_property
    def usage(self) -> Usage:
        return Usage(self._statements)

    @cached_property
    def metrics(self) -> Metrics:
        return Metrics(self._statements)
