"""What the rest of Corral asks of a store, whatever is behind it.

One unit of work is one function that runs in one transaction: events, projections and the
idempotency record together. It is committed, then its events are handed to the listeners.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

from corral.protocol.errors import Unavailable
from corral.storage.repositories import Transaction
from corral.storage.rows import JournalEntry

T = TypeVar("T")

Work = Callable[[Transaction], T]
Listener = Callable[[Sequence[JournalEntry]], None]


class StoreUnavailable(Unavailable):
    """The store cannot write or read now (disk full, read-only, closed); nothing was written."""


class Store(ABC):
    """A journal with its projections. All methods are called on the event loop's thread."""

    @abstractmethod
    async def write(self, work: Work[T], on_commit: Callable[[T], None] | None = None) -> T:
        """Run `work` in one transaction, commit durably, return what it returned.

        `work` runs off the event loop, may run more than once (a group is run again where one of
        its units fails, or its commit) and so touches nothing but its transaction. An exception
        from it rolls this unit back, this unit alone, and is raised here.

        After the commit, on the event loop and in commit order for all units: `on_commit(result)`
        is called, then the listeners get the unit's journal entries, then this returns.
        So what `on_commit` sends precedes every event of the unit. If the caller is
        cancelled while it waits, the unit is carried out all the same, `on_commit` included.

        Raises StoreUnavailable when it cannot be written.
        """

    @abstractmethod
    async def read(self, query: Work[T]) -> T:
        """Run `query` on a consistent snapshot of what is committed. It must not write."""

    @abstractmethod
    def add_listener(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` with each unit's entries after its commit; returns how to remove it.

        A listener must not block and must not raise.
        """

    @property
    @abstractmethod
    def waiting(self) -> int:
        """How many units of work wait for their commit."""

    @abstractmethod
    async def check_writable(self) -> bool:
        """Whether a durable write goes through now; for readiness. Writes one small row."""

    @abstractmethod
    async def close(self) -> None:
        """Finish what is queued, then release everything. Later calls raise StoreUnavailable."""
