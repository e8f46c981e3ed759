"""Who hears of what happened: committed journal entries, and the live text of messages.

A listener is called on the event loop, must not block and must not raise. Delivery is at
least once and may skip: a listener that sees a version beyond the next one reads what is
missing from the store. The truth is in the store; the bus wakes and carries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from msgspec import Struct

from corral.storage.rows import JournalEntry


class Delta(Struct, kw_only=True, frozen=True):
    """A piece of a message that is being written; `version` is the session's last durable one."""

    tenant_id: str
    workspace_id: str
    session_id: str
    run_id: str
    message_id: str
    offset: int
    text: str
    version: int


Notice = JournalEntry | Delta
Listener = Callable[[Notice], None]
Unsubscribe = Callable[[], None]


class Bus(ABC):
    @abstractmethod
    def publish(self, entries: Sequence[JournalEntry]) -> None:
        """Tell the listeners of committed entries, in order. The store's listener."""

    @abstractmethod
    def publish_delta(self, delta: Delta) -> None:
        """Tell the session's listeners of live text. Offsets count code points."""

    @abstractmethod
    def live_message(self, tenant_id: str, session_id: str) -> Delta | None:
        """All text so far of the message being written in the session, as one Delta at offset 0."""

    @abstractmethod
    def on_session(self, tenant_id: str, session_id: str, listener: Listener) -> Unsubscribe:
        """Hear of one session's entries and deltas."""

    @abstractmethod
    def on_workspace(self, tenant_id: str, workspace_id: str, listener: Listener) -> Unsubscribe:
        """Hear of the entries (no deltas) of every session of a workspace."""
