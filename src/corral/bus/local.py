"""The bus inside one process."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from corral.bus.api import Bus, Delta, Listener, Notice, Unsubscribe
from corral.protocol.events import TERMINAL_EVENTS
from corral.storage.rows import JournalEntry

_Key = tuple[str, str]


class LocalBus(Bus):
    """Calls the listeners directly, in the order in which they came."""

    def __init__(self) -> None:
        self._sessions: dict[_Key, dict[Hashable, Listener]] = {}
        self._workspaces: dict[_Key, dict[Hashable, Listener]] = {}
        self._live: dict[_Key, _LiveText] = {}

    def publish(self, entries: Sequence[JournalEntry]) -> None:
        for entry in entries:
            key = (entry.tenant_id, entry.session_id)
            if entry.event == "agent.message" or entry.event in TERMINAL_EVENTS:
                self._live.pop(key, None)
            _tell(self._sessions.get(key), entry)
            _tell(self._workspaces.get((entry.tenant_id, entry.workspace_id)), entry)

    def publish_delta(self, delta: Delta) -> None:
        key = (delta.tenant_id, delta.session_id)
        live = self._live.get(key)
        if live is None or live.first.message_id != delta.message_id:
            live = self._live[key] = _LiveText(delta)
        live.pieces.append(delta.text)
        _tell(self._sessions.get(key), delta)

    def live_message(self, tenant_id: str, session_id: str) -> Delta | None:
        live = self._live.get((tenant_id, session_id))
        return live.whole() if live is not None else None

    def on_session(self, tenant_id: str, session_id: str, listener: Listener) -> Unsubscribe:
        return _add(self._sessions, (tenant_id, session_id), listener)

    def on_workspace(self, tenant_id: str, workspace_id: str, listener: Listener) -> Unsubscribe:
        return _add(self._workspaces, (tenant_id, workspace_id), listener)


class _LiveText:
    """The text so far of one message, kept in pieces and joined when somebody asks."""

    def __init__(self, first: Delta) -> None:
        self.first = first
        self.pieces: list[str] = []

    def whole(self) -> Delta:
        self.pieces = ["".join(self.pieces)]
        first = self.first
        return Delta(
            tenant_id=first.tenant_id,
            workspace_id=first.workspace_id,
            session_id=first.session_id,
            run_id=first.run_id,
            message_id=first.message_id,
            offset=0,
            text=self.pieces[0],
            version=first.version,
        )


def _tell(listeners: dict[Hashable, Listener] | None, notice: Notice) -> None:
    if listeners:
        # A copy: a listener may unsubscribe, itself or another, while it is told.
        for listener in list(listeners.values()):
            listener(notice)


def _add(table: dict[_Key, dict[Hashable, Listener]], key: _Key, listener: Listener) -> Unsubscribe:
    token = object()
    table.setdefault(key, {})[token] = listener

    def remove() -> None:
        listeners = table.get(key)
        if listeners is not None:
            listeners.pop(token, None)
            if not listeners:
                del table[key]

    return remove
