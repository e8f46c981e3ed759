"""Events as bytes, made once for all who get them."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from corral.bus.api import Delta
from corral.gateway.cursors import FeedCursors
from corral.gateway.frames import EventFrame, delta_frame, entry_frame, with_cursor
from corral.protocol.events import TERMINAL_EVENTS
from corral.storage.rows import JournalEntry

# What "without output texts" means on a workspace's feed: the words of models and the outputs
# of tools are emptied, all else (who, what, when, arguments, usage, errors) stays.
_OUTPUT_TEXTS = {
    "agent.message": "text",
    "agent.tool_result": "output",
    "agent.completed": "output",
    "session.compacted": "summary",
}


class SessionFacts(Struct, rename="camel"):
    """Who may see a session, as a `session.updated` tells."""

    owner_user_id: str
    visibility: str


class _SessionUpdated(Struct):
    session: SessionFacts
    reason: str


class _Message(Struct, rename="camel"):
    message_id: str


class Facts(Struct, kw_only=True):
    """What a feed must know of an entry beside its bytes."""

    ended_message: str | None = None
    session: SessionFacts | None = None
    deleted: bool = False
    run_began: bool = False
    run_ended: bool = False


_updated = msgspec.json.Decoder(_SessionUpdated)
_message = msgspec.json.Decoder(_Message)


class EventCache:
    """The frames of the latest entry and the latest delta.

    One event goes to all its listeners in turn, so remembering one is enough. It is told by
    identity: a session deleted and made again may have another event under the same version.
    """

    def __init__(self, cursors: FeedCursors) -> None:
        self._cursors = cursors
        self._entry: JournalEntry | None = None
        self._facts: Facts | None = None
        self._full: EventFrame | None = None
        self._with_cursor: EventFrame | None = None
        self._trimmed: EventFrame | None = None
        self._delta: tuple[Delta, int, EventFrame] | None = None

    def facts(self, entry: JournalEntry) -> Facts:
        self._turn_to(entry)
        if self._facts is None:
            self._facts = _facts(entry)
        return self._facts

    def full(self, entry: JournalEntry) -> EventFrame:
        """The event as its session's subscribers get it."""
        self._turn_to(entry)
        if self._full is None:
            self._full = entry_frame(entry)
        return self._full

    def with_cursor(self, entry: JournalEntry) -> EventFrame:
        """The same with `feedCursor`, for one who follows both the session and the feed."""
        self._turn_to(entry)
        if self._with_cursor is None:
            payload = with_cursor(entry.payload, self.cursor(entry))
            self._with_cursor = EventFrame(entry.event, payload, entry.version)
        return self._with_cursor

    def trimmed(self, entry: JournalEntry) -> EventFrame:
        """The event as the workspace's feed gives it: with `feedCursor`, without output texts."""
        field = _OUTPUT_TEXTS.get(entry.event)
        if field is None:
            return self.with_cursor(entry)
        self._turn_to(entry)
        if self._trimmed is None:
            content = msgspec.json.decode(entry.payload)
            content[field] = ""
            payload = with_cursor(msgspec.json.encode(content), self.cursor(entry))
            self._trimmed = EventFrame(entry.event, payload, entry.version)
        return self._trimmed

    def delta(self, delta: Delta, version: int) -> EventFrame:
        if self._delta is None or self._delta[0] is not delta or self._delta[1] != version:
            self._delta = (delta, version, delta_frame(delta, delta.text, version))
        return self._delta[2]

    def cursor(self, entry: JournalEntry) -> str:
        return self._cursors.write(entry.tenant_id, entry.workspace_id, entry.feed_id)

    def _turn_to(self, entry: JournalEntry) -> None:
        if self._entry is not entry:
            self._entry = entry
            self._facts = self._full = self._with_cursor = self._trimmed = None


def _facts(entry: JournalEntry) -> Facts:
    if entry.event == "agent.message":
        return Facts(ended_message=_message.decode(entry.payload).message_id)
    if entry.event == "session.updated":
        told = _updated.decode(entry.payload)
        return Facts(session=told.session, deleted=told.reason == "deleted")
    return Facts(run_began=entry.event == "agent.accepted", run_ended=entry.event in TERMINAL_EVENTS)
