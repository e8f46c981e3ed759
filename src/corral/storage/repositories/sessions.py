"""Sessions and their journal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import bindparam, delete, func, insert, or_, select, tuple_, update

from corral.storage import tables as t
from corral.storage.repositories._base import (
    Repository,
    Shape,
    bound,
    changing,
    check_changes,
    is_,
    update_of,
)
from corral.storage.repositories._fast import Statements
from corral.storage.rows import JournalEntry, SessionRow

_SESSION = Shape(SessionRow, t.sessions)
_ENTRY = Shape(JournalEntry, t.journal)

_s = t.sessions.c
_j = t.journal.c

# After every (created_at, id) that there can be: a page from the newest on.
_NEWEST = (2**63 - 1, "")
_MAX_VERSION = 2**63 - 1

_INSERT = insert(t.sessions)
_GET = _SESSION.select().where(is_(_s.tenant_id), is_(_s.id))
_UPDATE = update_of(t.sessions, is_(_s.tenant_id), is_(_s.id))
_VISIBLE = or_(_s.owner_user_id == bound("user_id", _s.owner_user_id), _s.visibility == "workspace")
_OLDER = (
    _SESSION.select()
    .where(
        is_(_s.tenant_id),
        is_(_s.workspace_id),
        tuple_(_s.created_at, _s.id) < tuple_(bound("before_at", _s.created_at), bound("before_id", _s.id)),
    )
    .order_by(_s.created_at.desc(), _s.id.desc())
    .limit(bindparam("b_limit"))
)
# Of all agents, and of one. The two lists may have sessions in common: what is one's own and shared as well.
_OWN = {False: _OLDER.where(_s.owner_user_id == bound("user_id", _s.owner_user_id))}
_OWN[True] = _OWN[False].where(is_(_s.agent_id))
_SHARED = {False: _OLDER.where(t.SHARED)}
_SHARED[True] = _SHARED[False].where(is_(_s.agent_id))

# Children before the session itself: they refer to it.
_DELETE = [
    delete(table).where(is_(table.c.tenant_id), is_(table.c.session_id))
    for table in (t.outputs, t.tool_runs, t.messages, t.approvals, t.grants, t.runs, t.journal)
]
_DELETE_SESSION = delete(t.sessions).where(is_(_s.tenant_id), _s.id == bound("session_id", _s.id))


class Sessions(Repository):
    """Session rows."""

    def insert(self, row: SessionRow) -> None:
        """Raises IntegrityError if the tenant has a session with this id."""
        self._connection.execute(_INSERT, _SESSION.values(row))

    def get(self, tenant_id: str, session_id: str) -> SessionRow | None:
        return _SESSION.one(self._connection.execute(_GET, {"b_tenant_id": tenant_id, "b_id": session_id}))

    def update(self, tenant_id: str, session_id: str, **changes: Any) -> None:
        """Set the named columns of one row; `updated_at` is among them if the caller says so.

        Does nothing if there is no such row. Raises TypeError for a name that is no such column.
        """
        values = check_changes(t.sessions, changes)
        if values:
            values |= {"b_tenant_id": tenant_id, "b_id": session_id}
            self._connection.execute(changing(_UPDATE, frozenset(changes)), values)

    def delete(self, tenant_id: str, session_id: str) -> None:
        """Delete the session with its journal, runs, messages, tool runs, outputs, approvals and own grants.

        Grants of the whole workspace stay, as does all that was audited.
        """
        values = {"b_tenant_id": tenant_id, "b_session_id": session_id}
        for statement in _DELETE:
            self._connection.execute(statement, values)
        self._connection.execute(_DELETE_SESSION, values)

    def page(
        self,
        tenant_id: str,
        workspace_id: str,
        *,
        user_id: str,
        agent_id: str | None,
        limit: int,
        before: tuple[int, str] | None,
    ) -> list[SessionRow]:
        """Sessions that `user_id` may see (own, or `visibility` workspace), newest first.

        Order: (`created_at`, `id`) descending; `before` is such a pair, exclusive.
        """
        before_at, before_id = before or _NEWEST
        values: dict[str, Any] = {
            "b_tenant_id": tenant_id,
            "b_workspace_id": workspace_id,
            "b_before_at": before_at,
            "b_before_id": before_id,
            "b_limit": limit,
        }
        if agent_id is not None:
            values["b_agent_id"] = agent_id
        of_agent = agent_id is not None
        own = _SESSION.all(self._connection.execute(_OWN[of_agent], {**values, "b_user_id": user_id}))
        shared = _SESSION.all(self._connection.execute(_SHARED[of_agent], values))
        rows = {row.id: row for row in (*own, *shared)}
        return sorted(rows.values(), key=lambda row: (row.created_at, row.id), reverse=True)[:limit]


_COUNT_UP = (
    update(t.sessions)
    .where(is_(_s.tenant_id), is_(_s.id))
    .values(state_version=_s.state_version + 1, updated_at=bindparam("v_now"))
)
_NEXT_VERSION = _COUNT_UP.returning(_s.state_version, _s.workspace_id)
_NEXT_VERSION_CHANGED = _COUNT_UP.returning(*_SESSION.columns)
_APPEND = (
    insert(t.journal).values({c.key: bindparam(f"v_{c.key}") for c in _j if c is not _j.feed_id}).returning(_j.feed_id)
)
_OF_SESSION = _ENTRY.select().where(is_(_j.tenant_id), is_(_j.session_id))
_AFTER = _OF_SESSION.where(_j.version > bound("version", _j.version)).order_by(_j.version).limit(bindparam("b_limit"))
_BEFORE = (
    _OF_SESSION.where(_j.version < bound("version", _j.version)).order_by(_j.version.desc()).limit(bindparam("b_limit"))
)
_FEED_AFTER = (
    _ENTRY.select()
    .join(t.sessions, (_s.tenant_id == _j.tenant_id) & (_s.id == _j.session_id))
    .where(is_(_j.tenant_id), is_(_j.workspace_id), _j.feed_id > bound("feed_id", _j.feed_id), _VISIBLE)
    .order_by(_j.feed_id)
    .limit(bindparam("b_limit"))
)
_FEED_HEAD = select(func.coalesce(func.max(_j.feed_id), 0)).where(is_(_j.tenant_id), is_(_j.workspace_id))
_OF_RUN = _OF_SESSION.where(is_(_j.run_id), t.HAS_RUN).order_by(_j.version)


class Journal(Repository):
    """The durable events of all sessions."""

    def __init__(self, connection: Statements, appended: list[JournalEntry]) -> None:
        super().__init__(connection)
        self._appended = appended

    def append(
        self, tenant_id: str, session_id: str, event: str, payload: bytes, *, run_id: str | None, now_ms: int
    ) -> JournalEntry:
        """Append at the session's next version: raises its `state_version` and sets `updated_at`.

        The entry is also added to the transaction's `appended`. Raises KeyError if there is no
        such session.
        """
        # The update takes the row's lock where there are several writers, so no two get one version.
        values: dict[str, Any] = {"b_tenant_id": tenant_id, "b_id": session_id, "v_now": now_ms}
        head = self._connection.execute(_NEXT_VERSION, values).one_or_none()
        if head is None:
            raise KeyError(session_id)
        version, workspace_id = head
        return self._insert(tenant_id, workspace_id, session_id, version, event, payload, run_id, now_ms)

    def append_changing(
        self,
        tenant_id: str,
        session_id: str,
        event: str,
        payload: bytes,
        *,
        run_id: str | None,
        now_ms: int,
        changes: Mapping[str, Any],
    ) -> tuple[JournalEntry, SessionRow]:
        """`append`, and with the same statement that counts the version up `Sessions.update`; the session after it.

        Raises KeyError if there is no such session, TypeError for a name that is no column to change.
        """
        values = check_changes(t.sessions, changes) | {"b_tenant_id": tenant_id, "b_id": session_id, "v_now": now_ms}
        statement = changing(_NEXT_VERSION_CHANGED, frozenset(changes))
        session = _SESSION.one(self._connection.execute(statement, values))
        if session is None:
            raise KeyError(session_id)
        entry = self._insert(
            tenant_id, session.workspace_id, session_id, session.state_version, event, payload, run_id, now_ms
        )
        return entry, session

    def _insert(
        self,
        tenant_id: str,
        workspace_id: str,
        session_id: str,
        version: int,
        event: str,
        payload: bytes,
        run_id: str | None,
        now_ms: int,
    ) -> JournalEntry:
        feed_id = self._connection.execute(
            _APPEND,
            {
                "v_tenant_id": tenant_id,
                "v_workspace_id": workspace_id,
                "v_session_id": session_id,
                "v_version": version,
                "v_event": event,
                "v_run_id": run_id,
                "v_payload": payload,
                "v_created_at": now_ms,
            },
        ).scalar_one()
        entry = JournalEntry(
            tenant_id=tenant_id,
            workspace_id=workspace_id,
            session_id=session_id,
            version=version,
            feed_id=feed_id,
            event=event,
            run_id=run_id,
            payload=payload,
            created_at=now_ms,
        )
        self._appended.append(entry)
        return entry

    def after(self, tenant_id: str, session_id: str, version: int, limit: int) -> list[JournalEntry]:
        """The first `limit` entries with a version greater than `version`, ascending."""
        values = {"b_tenant_id": tenant_id, "b_session_id": session_id, "b_version": version, "b_limit": limit}
        return _ENTRY.all(self._connection.execute(_AFTER, values))

    def before(self, tenant_id: str, session_id: str, version: int | None, limit: int) -> list[JournalEntry]:
        """The last `limit` entries with a version less than `version` (None: the end), ascending."""
        end = _MAX_VERSION if version is None else version
        values = {"b_tenant_id": tenant_id, "b_session_id": session_id, "b_version": end, "b_limit": limit}
        return _ENTRY.all(self._connection.execute(_BEFORE, values))[::-1]

    def feed_after(
        self, tenant_id: str, workspace_id: str, feed_id: int, *, user_id: str, limit: int
    ) -> list[JournalEntry]:
        """Entries of the workspace's sessions that `user_id` may see, `feed_id` ascending."""
        values = {
            "b_tenant_id": tenant_id,
            "b_workspace_id": workspace_id,
            "b_feed_id": feed_id,
            "b_user_id": user_id,
            "b_limit": limit,
        }
        return _ENTRY.all(self._connection.execute(_FEED_AFTER, values))

    def feed_head(self, tenant_id: str, workspace_id: str) -> int:
        """The greatest feed_id of the workspace, 0 if there is none."""
        values = {"b_tenant_id": tenant_id, "b_workspace_id": workspace_id}
        head: int = self._connection.execute(_FEED_HEAD, values).scalar_one()
        return head

    def of_run(self, tenant_id: str, session_id: str, run_id: str) -> list[JournalEntry]:
        """All entries that carry the run's id, ascending."""
        values = {"b_tenant_id": tenant_id, "b_session_id": session_id, "b_run_id": run_id}
        return _ENTRY.all(self._connection.execute(_OF_RUN, values))
