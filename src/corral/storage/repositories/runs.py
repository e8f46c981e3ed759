"""Runs with their leases, the transcript, tool calls and their whole outputs."""

from __future__ import annotations

from typing import Any

from sqlalchemy import bindparam, case, delete, func, insert, or_, select, tuple_, update

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
from corral.storage.rows import MessageRow, RunRow, ToolRunRow

_RUN = Shape(RunRow, t.runs)
_MESSAGE = Shape(MessageRow, t.messages)
_TOOL_RUN = Shape(ToolRunRow, t.tool_runs)

_r = t.runs.c
_m = t.messages.c
_c = t.tool_runs.c
_o = t.outputs.c

_INSERT_RUN = insert(t.runs)
_GET_RUN = _RUN.select().where(is_(_r.tenant_id), is_(_r.id))
_GET_LEASE = select(_r.lease_epoch, _r.status).where(is_(_r.tenant_id), is_(_r.id))
_UPDATE_RUN = update_of(t.runs, is_(_r.tenant_id), is_(_r.id))
_UPDATE_RUN_FENCED = _UPDATE_RUN.where(_r.lease_epoch == bound("epoch", _r.lease_epoch))
_UNFINISHED = (
    _RUN.select()
    .where(
        t.NOT_TERMINAL,
        tuple_(_r.created_at, _r.id) > tuple_(bound("after_at", _r.created_at), bound("after_id", _r.id)),
    )
    .order_by(_r.created_at, _r.id)
    .limit(bindparam("b_limit"))
)
_TAKE = (
    update(t.runs)
    .where(is_(_r.tenant_id), is_(_r.id), t.NOT_TERMINAL)
    .values(
        lease_owner=bindparam("v_owner"),
        lease_epoch=_r.lease_epoch + 1,
        lease_expires_at=bindparam("v_expires_at"),
    )
    .returning(_r.lease_epoch)
)
_CLAIM = {
    True: _TAKE,
    False: _TAKE.where(
        or_(
            _r.lease_owner.is_(None),
            _r.lease_expires_at.is_(None),
            _r.lease_expires_at <= bound("now", _r.lease_expires_at),
        )
    ),
}
_RENEW = (
    update(t.runs)
    .where(
        t.NOT_TERMINAL,
        _r.lease_owner == bound("owner", _r.lease_owner),
        _r.lease_expires_at > bound("now", _r.lease_expires_at),
    )
    .values(lease_expires_at=bindparam("v_expires_at"))
)


class Runs(Repository):
    """Run rows and who owns them."""

    def insert(self, row: RunRow) -> None:
        """Raises IntegrityError if the tenant has a run with this id."""
        self._connection.execute(_INSERT_RUN, _RUN.values(row))

    def get(self, tenant_id: str, run_id: str) -> RunRow | None:
        return _RUN.one(self._connection.execute(_GET_RUN, {"b_tenant_id": tenant_id, "b_id": run_id}))

    def lease(self, tenant_id: str, run_id: str) -> tuple[int, str] | None:
        """The run's lease_epoch and status: what a fence looks at, without the rest of the row."""
        row = self._connection.execute(_GET_LEASE, {"b_tenant_id": tenant_id, "b_id": run_id}).one_or_none()
        return None if row is None else (row[0], row[1])

    def update(self, tenant_id: str, run_id: str, *, epoch: int | None = None, **changes: Any) -> bool:
        """Set columns; with `epoch` only if the row's lease_epoch still is that. Says if it did.

        Raises TypeError for a name that is no such column, or without any change.
        """
        if not changes:
            raise TypeError("nothing to update")
        values = check_changes(t.runs, changes) | {"b_tenant_id": tenant_id, "b_id": run_id}
        statement = _UPDATE_RUN
        if epoch is not None:
            statement = _UPDATE_RUN_FENCED
            values["b_epoch"] = epoch
        return self._connection.execute(changing(statement, frozenset(changes)), values).rowcount == 1

    def unfinished(self, limit: int, after: tuple[int, str] | None = None) -> list[RunRow]:
        """Runs of every tenant that are not terminal, by (`created_at`, `id`) ascending.

        The only statement without a tenant besides `claim`'s callers': recovery serves them all.
        """
        after_at, after_id = after or (-1, "")
        values = {"b_after_at": after_at, "b_after_id": after_id, "b_limit": limit}
        return _RUN.all(self._connection.execute(_UNFINISHED, values))

    def claim(
        self, tenant_id: str, run_id: str, *, owner: str, now_ms: int, expires_at: int, steal: bool
    ) -> int | None:
        """Take the lease if it is free, expired, or (`steal`) whosever it is; the new epoch, or None.

        Never claims a terminal run.
        """
        values: dict[str, Any] = {
            "b_tenant_id": tenant_id,
            "b_id": run_id,
            "v_owner": owner,
            "v_expires_at": expires_at,
        }
        if not steal:
            values["b_now"] = now_ms
        epoch: int | None = self._connection.execute(_CLAIM[steal], values).scalar_one_or_none()
        return epoch

    def renew(self, owner: str, *, now_ms: int, expires_at: int) -> int:
        """Extend every unexpired lease of `owner` on runs that are not terminal; how many."""
        values = {"b_owner": owner, "b_now": now_ms, "v_expires_at": expires_at}
        return self._connection.execute(_RENEW, values).rowcount


_INSERT_MESSAGE = insert(t.messages)
_TRANSCRIPT = (
    _MESSAGE.select()
    .where(is_(_m.tenant_id), is_(_m.session_id), _m.version > bound("version", _m.version))
    .order_by(_m.version)
)
_GET_MESSAGE = _MESSAGE.select().where(is_(_m.tenant_id), is_(_m.session_id), is_(_m.version))
_LATEST = (
    _MESSAGE.select().where(is_(_m.tenant_id), is_(_m.session_id), is_(_m.role)).order_by(_m.version.desc()).limit(1)
)


class Messages(Repository):
    """What the model sees of a session."""

    def insert(self, row: MessageRow) -> None:
        self._connection.execute(_INSERT_MESSAGE, _MESSAGE.values(row))

    def of_session(self, tenant_id: str, session_id: str, *, after_version: int = 0) -> list[MessageRow]:
        """The transcript after a version, by version ascending."""
        values = {"b_tenant_id": tenant_id, "b_session_id": session_id, "b_version": after_version}
        return _MESSAGE.all(self._connection.execute(_TRANSCRIPT, values))

    def get(self, tenant_id: str, session_id: str, version: int) -> MessageRow | None:
        values = {"b_tenant_id": tenant_id, "b_session_id": session_id, "b_version": version}
        return _MESSAGE.one(self._connection.execute(_GET_MESSAGE, values))

    def latest(self, tenant_id: str, session_id: str, role: str) -> MessageRow | None:
        """The newest entry of a role. Read backwards from the end: quick where there is one not long ago."""
        values = {"b_tenant_id": tenant_id, "b_session_id": session_id, "b_role": role}
        return _MESSAGE.one(self._connection.execute(_LATEST, values))


_INSERT_TOOL_RUN = insert(t.tool_runs)
_GET_TOOL_RUN = _TOOL_RUN.select().where(is_(_c.tenant_id), is_(_c.id))
_UPDATE_TOOL_RUN = update_of(t.tool_runs, is_(_c.tenant_id), is_(_c.id))
_LASTED = bound("at", _c.started_at) - _c.started_at
_STOPPED = update_of(
    t.tool_runs, is_(_c.tenant_id), is_(_c.run_id), is_(_c.state), _c.duration_ms.is_(None), _c.started_at.is_not(None)
).values(duration_ms=case((_LASTED > 0, _LASTED), else_=0))
_TOOLS_OF_RUN = _TOOL_RUN.select().where(is_(_c.tenant_id), is_(_c.run_id)).order_by(_c.step, _c.position)
_TOOLS_OF_STEP = _TOOLS_OF_RUN.where(is_(_c.step))


class ToolRuns(Repository):
    """Tool calls: what was decided about them and how far they came."""

    def insert(self, row: ToolRunRow) -> None:
        """Raises IntegrityError if the id or the place in the run is taken."""
        self._connection.execute(_INSERT_TOOL_RUN, _TOOL_RUN.values(row))

    def get(self, tenant_id: str, tool_call_id: str) -> ToolRunRow | None:
        values = {"b_tenant_id": tenant_id, "b_id": tool_call_id}
        return _TOOL_RUN.one(self._connection.execute(_GET_TOOL_RUN, values))

    def update(self, tenant_id: str, tool_call_id: str, **changes: Any) -> None:
        """Set the named columns. Raises TypeError for a name that is no such column."""
        values = check_changes(t.tool_runs, changes)
        if values:
            values |= {"b_tenant_id": tenant_id, "b_id": tool_call_id}
            self._connection.execute(changing(_UPDATE_TOOL_RUN, frozenset(changes)), values)

    def stopped(self, tenant_id: str, run_id: str, at_ms: int) -> None:
        """Note of the run's calls that have a start and no result that they ran until `at_ms`, unless that is noted."""
        values = {"b_tenant_id": tenant_id, "b_run_id": run_id, "b_state": "started", "b_at": at_ms}
        self._connection.execute(_STOPPED, values)

    def of_run(self, tenant_id: str, run_id: str, *, step: int | None = None) -> list[ToolRunRow]:
        """By (`step`, `position`) ascending."""
        values: dict[str, Any] = {"b_tenant_id": tenant_id, "b_run_id": run_id}
        if step is None:
            return _TOOL_RUN.all(self._connection.execute(_TOOLS_OF_RUN, values))
        return _TOOL_RUN.all(self._connection.execute(_TOOLS_OF_STEP, {**values, "b_step": step}))


_INSERT_OUTPUT = insert(t.outputs)
_READ_OUTPUT = select(
    func.substr(_o.data, bindparam("b_start"), bindparam("b_limit"), type_=_o.data.type), func.length(_o.data)
).where(is_(_o.tenant_id), is_(_o.tool_call_id))
_OLD_OUTPUTS = (
    select(_o.tool_call_id)
    .where(is_(_o.tenant_id), _o.tool_call_id < bound("before_id", _o.tool_call_id))
    .order_by(_o.tool_call_id)
    .limit(bindparam("b_limit"))
)
_PURGE_OUTPUTS = delete(t.outputs).where(is_(_o.tenant_id), _o.tool_call_id.in_(_OLD_OUTPUTS))


class Outputs(Repository):
    """Whole outputs of tool calls whose event carries only head and tail."""

    def insert(self, tenant_id: str, session_id: str, tool_call_id: str, data: bytes) -> None:
        values = {"tenant_id": tenant_id, "session_id": session_id, "tool_call_id": tool_call_id, "data": data}
        self._connection.execute(_INSERT_OUTPUT, values)

    def read(self, tenant_id: str, tool_call_id: str, offset: int, limit: int) -> tuple[bytes, int] | None:
        """(bytes at `offset`, total number of bytes), or None if nothing is kept for the call.

        Raises ValueError for a negative offset or limit.
        """
        if offset < 0 or limit < 0:
            raise ValueError("offset and limit count from 0")
        # SQL counts from 1; both databases take 32 bits there, more than an output may have.
        values = {
            "b_tenant_id": tenant_id,
            "b_tool_call_id": tool_call_id,
            "b_start": min(offset, 2**31 - 2) + 1,
            "b_limit": min(limit, 2**31 - 1),
        }
        row = self._connection.execute(_READ_OUTPUT, values).one_or_none()
        return None if row is None else (row[0], row[1])

    def purge(self, tenant_id: str, before_id: str, limit: int) -> int:
        """Delete up to `limit` outputs of calls with an id less than `before_id`; how many."""
        values = {"b_tenant_id": tenant_id, "b_before_id": before_id, "b_limit": limit}
        return self._connection.execute(_PURGE_OUTPUTS, values).rowcount
