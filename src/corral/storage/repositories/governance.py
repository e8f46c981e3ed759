"""Approvals, grants and the audit log."""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import msgspec
from msgspec import Struct
from sqlalchemy import ColumnElement, Select, bindparam, delete, exists, func, insert, or_, select, tuple_, type_coerce
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.types import Text

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
from corral.storage.rows import ApprovalRow, AuditRow, GrantRow

_APPROVAL = Shape(ApprovalRow, t.approvals)
_GRANT = Shape(GrantRow, t.grants)

_a = t.approvals.c
_g = t.grants.c
_l = t.audit_log.c
_s = t.sessions.c

# After every (created_at, id) that there can be: a page from the newest on.
_NEWEST = (2**63 - 1, "")
_MAX_ID = 2**63 - 1

_INSERT_APPROVAL = insert(t.approvals)
_GET_APPROVAL = _APPROVAL.select().where(is_(_a.tenant_id), is_(_a.id))
_UPDATE_APPROVAL = update_of(t.approvals, is_(_a.tenant_id), is_(_a.id))
_UPDATE_APPROVAL_FROM = _UPDATE_APPROVAL.where(is_(_a.status))
_APPROVALS_OF_RUN = _APPROVAL.select().where(is_(_a.tenant_id), is_(_a.run_id)).order_by(_a.created_at, _a.id)
_PENDING_OF_RUN = _APPROVALS_OF_RUN.where(t.PENDING)
_APPROVALS_SEEN = (
    _APPROVAL.select()
    .join(t.sessions, (_s.tenant_id == _a.tenant_id) & (_s.id == _a.session_id))
    .where(
        is_(_a.tenant_id),
        is_(_a.status),
        or_(_s.owner_user_id == bound("user_id", _s.owner_user_id), _s.visibility == "workspace"),
        tuple_(_a.created_at, _a.id) < tuple_(bound("before_at", _a.created_at), bound("before_id", _a.id)),
    )
    .order_by(_a.created_at.desc(), _a.id.desc())
    .limit(bindparam("b_limit"))
)
_APPROVAL_PAGE = _APPROVALS_SEEN.where(is_(_a.workspace_id))
# The workspace is the session's, and asked of the session: of two indexes that fit equally well SQLite takes the one
# that was made last or first, as it happens, and that of the workspace reads past everybody else's approvals.
_APPROVAL_PAGE_OF_SESSION = _APPROVALS_SEEN.where(is_(_a.session_id), is_(_s.workspace_id))
_DUE = (
    _APPROVAL.select()
    .where(t.PENDING, _a.expires_at <= bound("now", _a.expires_at))
    .order_by(_a.expires_at, _a.tenant_id, _a.id)
    .limit(bindparam("b_limit"))
)


class Approvals(Repository):
    """Calls that wait for a person, and those that did."""

    def insert(self, row: ApprovalRow) -> None:
        """Raises IntegrityError if the tenant has an approval with this id, or no such session."""
        self._connection.execute(_INSERT_APPROVAL, _APPROVAL.values(row))

    def get(self, tenant_id: str, approval_id: str) -> ApprovalRow | None:
        values = {"b_tenant_id": tenant_id, "b_id": approval_id}
        return _APPROVAL.one(self._connection.execute(_GET_APPROVAL, values))

    def update(self, tenant_id: str, approval_id: str, *, expected_status: str | None = None, **changes: Any) -> bool:
        """Set the named columns, only if the status is `expected_status` where that is given.

        Says whether a row was changed; of several who expect the same status, one changes it.
        Raises TypeError for a name that is no column to change.
        """
        values = check_changes(t.approvals, changes) | {"b_tenant_id": tenant_id, "b_id": approval_id}
        if expected_status is None:
            statement = _UPDATE_APPROVAL
        else:
            statement = _UPDATE_APPROVAL_FROM
            values["b_status"] = expected_status
        return self._connection.execute(changing(statement, frozenset(changes)), values).rowcount > 0

    def of_run(self, tenant_id: str, run_id: str) -> list[ApprovalRow]:
        """By (`created_at`, `id`)."""
        values = {"b_tenant_id": tenant_id, "b_run_id": run_id}
        return _APPROVAL.all(self._connection.execute(_APPROVALS_OF_RUN, values))

    def pending_of_run(self, tenant_id: str, run_id: str) -> list[ApprovalRow]:
        """By (`created_at`, `id`)."""
        values = {"b_tenant_id": tenant_id, "b_run_id": run_id}
        return _APPROVAL.all(self._connection.execute(_PENDING_OF_RUN, values))

    def page(
        self,
        tenant_id: str,
        workspace_id: str,
        *,
        status: str,
        session_id: str | None,
        user_id: str,
        limit: int,
        before: tuple[int, str] | None,
    ) -> list[ApprovalRow]:
        """Approvals of sessions that `user_id` may see (own, or `visibility` workspace), newest first.

        Order: (`created_at`, `id`) descending; `before` is such a pair, exclusive.
        """
        before_at, before_id = before or _NEWEST
        values = {
            "b_tenant_id": tenant_id,
            "b_workspace_id": workspace_id,
            "b_status": status,
            "b_user_id": user_id,
            "b_before_at": before_at,
            "b_before_id": before_id,
            "b_limit": limit,
        }
        if session_id is None:
            return _APPROVAL.all(self._connection.execute(_APPROVAL_PAGE, values))
        return _APPROVAL.all(
            self._connection.execute(_APPROVAL_PAGE_OF_SESSION, {**values, "b_session_id": session_id})
        )

    def due(self, now_ms: int, limit: int) -> list[ApprovalRow]:
        """Pending ones of every tenant with `expires_at` <= `now_ms`, the first to expire first."""
        return _APPROVAL.all(self._connection.execute(_DUE, {"b_now": now_ms, "b_limit": limit}))


_INSERT_GRANT = insert(t.grants)
_GET_GRANT = _GRANT.select().where(is_(_g.tenant_id), is_(_g.id))
_GRANTS = _GRANT.select().where(is_(_g.tenant_id), is_(_g.workspace_id)).order_by(_g.created_at.desc(), _g.id.desc())
_FIND_GRANT = (
    _GRANT.select()
    .where(
        is_(_g.tenant_id),
        is_(_g.workspace_id),
        is_(_g.tool_name),
        is_(_g.binding),
        or_(_g.session_id.is_(None), is_(_g.session_id)),
        _g.revoked_at.is_(None),
        _g.expires_at > bound("now", _g.expires_at),
    )
    .order_by(_g.session_id.is_(None), _g.created_at, _g.id)
    .limit(1)
)
# Somebody may hold tokens under several subjects; a subject is one user's for ever.
_their, _own = t.tokens.alias("their"), t.tokens.alias("own")
_FIND_GRANT_OF_ANOTHER = _FIND_GRANT.where(
    _g.created_by != bound("maker", _g.created_by),
    ~exists().where(
        _their.c.tenant_id == bound("tenant_id", _their.c.tenant_id),
        _their.c.subject == _g.created_by,
        _own.c.tenant_id == _their.c.tenant_id,
        _own.c.user_id == _their.c.user_id,
        _own.c.subject == bound("maker", _own.c.subject),
    ),
)
_UPDATE_GRANT = update_of(t.grants, is_(_g.tenant_id), is_(_g.id))
_USE_GRANT = _UPDATE_GRANT.values(uses=_g.uses + 1)


class Grants(Repository):
    """What approvals were told to remember."""

    def insert(self, row: GrantRow) -> None:
        """Raises IntegrityError if the tenant has a grant with this id, or no such session."""
        self._connection.execute(_INSERT_GRANT, _GRANT.values(row))

    def get(self, tenant_id: str, grant_id: str) -> GrantRow | None:
        return _GRANT.one(self._connection.execute(_GET_GRANT, {"b_tenant_id": tenant_id, "b_id": grant_id}))

    def list(self, tenant_id: str, workspace_id: str) -> builtins.list[GrantRow]:
        """All of a workspace, revoked and expired ones too, newest first."""
        values = {"b_tenant_id": tenant_id, "b_workspace_id": workspace_id}
        return _GRANT.all(self._connection.execute(_GRANTS, values))

    def find(
        self,
        tenant_id: str,
        workspace_id: str,
        session_id: str,
        tool_name: str,
        binding: str,
        now_ms: int,
        *,
        not_by: str | None = None,
    ) -> GrantRow | None:
        """A grant for exactly this tool and binding that holds in the session: its own before the workspace's.

        Revoked ones and those with `expires_at` <= `now_ms` do not hold, nor those that the person
        whose subject is `not_by` has made, under whatever subject.
        """
        values = {
            "b_tenant_id": tenant_id,
            "b_workspace_id": workspace_id,
            "b_session_id": session_id,
            "b_tool_name": tool_name,
            "b_binding": binding,
            "b_now": now_ms,
        }
        if not_by is None:
            return _GRANT.one(self._connection.execute(_FIND_GRANT, values))
        return _GRANT.one(self._connection.execute(_FIND_GRANT_OF_ANOTHER, {**values, "b_maker": not_by}))

    def use(self, tenant_id: str, grant_id: str) -> None:
        """Count one use."""
        self._connection.execute(_USE_GRANT, {"b_tenant_id": tenant_id, "b_id": grant_id})

    def update(self, tenant_id: str, grant_id: str, **changes: Any) -> bool:
        """Set the named columns; whether there is such a row. Raises TypeError for what is no column to change."""
        values = check_changes(t.grants, changes) | {"b_tenant_id": tenant_id, "b_id": grant_id}
        return self._connection.execute(changing(_UPDATE_GRANT, frozenset(changes)), values).rowcount > 0


class AuditHead(Struct, kw_only=True, frozen=True):
    """The last record of a tenant's chain."""

    id: int
    hash: str


class StoredAudit(Struct, kw_only=True, frozen=True):
    """A record exactly as it stands in the table, whatever somebody has made of it.

    `fields` are the values of the columns by name, of whatever type they have, `metadata` as its
    text. None if the record cannot be read at all.
    """

    id: Any
    fields: dict[str, Any] | None


_COLUMNS = tuple(AuditRow.__struct_fields__)
# Without the type of JSON columns, which decodes: what is in the table may be no JSON any more.
_AS_STORED = [type_coerce(_l[name], Text()) if name == "metadata" else _l[name] for name in _COLUMNS]

# The metadata comes as its canonical text, which is what was hashed, and is not encoded again.
_APPEND = insert(t.audit_log).values(
    {name: bindparam(f"v_{name}", type_=Text() if name == "metadata" else None) for name in _COLUMNS}
)
# The bound keeps out what somebody has put in the place of an id, text or a number too large to go on from.
_HEAD = select(_l.id, _l.hash).where(is_(_l.tenant_id), _l.id <= 2**53).order_by(_l.id.desc()).limit(1)
_AFTER = select(*_AS_STORED).where(is_(_l.tenant_id), _l.id > bound("id", _l.id)).order_by(_l.id)
_SCAN = _AFTER.limit(bindparam("b_limit"))
_SCAN_IDS = (
    select(_l.id).where(is_(_l.tenant_id), _l.id > bound("id", _l.id)).order_by(_l.id).limit(bindparam("b_limit"))
)
_SCAN_NUMBERS = _SCAN_IDS.where(_l.id <= 2**63 - 1)
_GET_RECORD = select(*_AS_STORED).where(is_(_l.tenant_id), is_(_l.id))
_NEXT_TENANT = select(func.min(_l.tenant_id)).where(_l.tenant_id > bound("tenant_id", _l.tenant_id))
_COUNT = select(func.count()).select_from(t.audit_log).where(is_(_l.tenant_id))
_DELETE_THROUGH = delete(t.audit_log).where(
    is_(_l.tenant_id),
    _l.id <= bound("id", _l.id),
)

# The clock may have been set back, so the order of times is not quite that of ids: the bounds
# that times give to ids are taken from so many records that lie next to the time.
_WINDOW = 1000
_IDS_FROM = (
    select(_l.id)
    .where(is_(_l.tenant_id), _l.created_at >= bound("from", _l.created_at))
    .order_by(_l.created_at, _l.id)
    .limit(_WINDOW)
)
_IDS_TO = (
    select(_l.id)
    .where(is_(_l.tenant_id), _l.created_at < bound("to", _l.created_at))
    .order_by(_l.created_at.desc(), _l.id.desc())
    .limit(_WINDOW)
)

# The filters of a page, the most selective first: that one's index is used.
_FILTERS = ("run_id", "session_id", "actor", "action")


def _page(names: tuple[str, ...]) -> Select[Any]:
    """The page with these filters. The index is chosen here: without statistics a planner can
    only guess, and `action` alone may leave it half the table to read."""
    conditions: list[ColumnElement[bool]] = []
    for number, name in enumerate(names):
        column = _l[name]
        # The one pair that has an index of its own.
        indexed = number == 0 or (names[0], name) == ("actor", "action")
        conditions.append(is_(column) if indexed else is_(column + "", name))
    return (
        select(*_AS_STORED)
        .where(
            is_(_l.tenant_id),
            *conditions,
            _l.id > bound("after_id", _l.id),
            _l.id < bound("before_id", _l.id),
            _l.created_at + "" >= bound("from", _l.created_at),
            _l.created_at + "" < bound("to", _l.created_at),
        )
        .order_by(_l.id.desc())
        .limit(bindparam("b_limit"))
    )


_PAGES: Mapping[tuple[str, ...], Select[Any]] = {
    names: _page(names) for size in range(len(_FILTERS) + 1) for names in combinations(_FILTERS, size)
}

_FIRST_TIME, _LAST_TIME = "", "~"
"""Before and after every time that there can be."""


class Audit(Repository):
    """The audit log. What a record says, and that the records make a chain, is governance's.

    `heads` are the chains' ends as this transaction has read or written them, by tenant: nobody else can
    move them before it ends.
    """

    def __init__(self, connection: Statements, heads: dict[str, AuditHead]) -> None:
        super().__init__(connection)
        self._heads = heads

    def append(self, row: AuditRow) -> None:
        """Raises the driver's own IntegrityError if the tenant has a record with this id."""
        values = {f"v_{name}": getattr(row, name) for name in _COLUMNS}
        values["v_metadata"] = msgspec.json.encode(row.metadata, order="sorted").decode()
        self._connection.execute(_APPEND, values)
        known = self._heads.get(row.tenant_id)
        if known is not None and known.id < row.id:
            self._heads[row.tenant_id] = AuditHead(id=row.id, hash=row.hash)

    def head(self, tenant_id: str) -> AuditHead | None:
        """The record with the greatest id."""
        head = self._heads.get(tenant_id)
        if head is None:
            row = self._connection.execute(_HEAD, {"b_tenant_id": tenant_id}).one_or_none()
            if row is not None:
                head = self._heads[tenant_id] = AuditHead(id=int(row[0]), hash=row[1])
        return head

    def get(self, tenant_id: str, record_id: int) -> AuditRow | None:
        row = self._connection.execute(_GET_RECORD, {"b_tenant_id": tenant_id, "b_id": record_id}).one_or_none()
        return None if row is None else _as_row(row)

    def page(
        self,
        tenant_id: str,
        *,
        from_: str | None,
        to: str | None,
        action: str | None,
        actor: str | None,
        session_id: str | None,
        run_id: str | None,
        limit: int,
        before_id: int | None,
    ) -> list[AuditRow]:
        """Records by id descending, those less than `before_id`.

        `from_` <= `created_at` < `to`, both in the form of `created_at` itself.
        """
        given = {"run_id": run_id, "session_id": session_id, "actor": actor, "action": action}
        values: dict[str, Any] = {f"b_{name}": value for name, value in given.items() if value is not None}
        after, before = self._bounds(tenant_id, from_, to)
        values |= {
            "b_tenant_id": tenant_id,
            "b_after_id": after,
            "b_before_id": before if before_id is None else min(before, before_id),
            "b_from": _FIRST_TIME if from_ is None else from_,
            "b_to": _LAST_TIME if to is None else to,
            "b_limit": limit,
        }
        names = tuple(name for name in _FILTERS if given[name] is not None)
        return [_as_row(row) for row in self._connection.execute(_PAGES[names], values)]

    def _bounds(self, tenant_id: str, from_: str | None, to: str | None) -> tuple[int, int]:
        """Two ids that all records of the period lie between."""
        after, before = 0, _MAX_ID
        if from_ is not None:
            found = self._connection.execute(_IDS_FROM, {"b_tenant_id": tenant_id, "b_from": from_}).scalars()
            after = min(found, default=_MAX_ID) - 1
        if to is not None:
            found = self._connection.execute(_IDS_TO, {"b_tenant_id": tenant_id, "b_to": to}).scalars()
            before = max(found, default=-1) + 1
        return after, before

    def last_before(self, tenant_id: str, created_at: str) -> int:
        """The greatest id up to which every record is older than `created_at`, less than the last id; 0 if none."""
        head = self.head(tenant_id)
        return 0 if head is None else max(0, min(self._bounds(tenant_id, created_at, None)[0], head.id - 1))

    def scan(self, tenant_id: str, after_id: Any, limit: int) -> list[StoredAudit]:
        """The first `limit` records with an id greater than `after_id`, ascending, as they stand in the table."""
        values = {"b_tenant_id": tenant_id, "b_id": after_id}
        try:
            rows = self._connection.execute(_SCAN, {**values, "b_limit": limit}).all()
        except DBAPIError:
            # Text that is none (a page that is damaged, or bytes put in by hand): find out which.
            return self._scan_one_by_one(tenant_id, {**values, "b_limit": limit}, limit)
        return [_as_stored(row) for row in rows]

    def _scan_one_by_one(self, tenant_id: str, values: dict[str, Any], limit: int) -> list[StoredAudit]:
        try:
            ids = list(self._connection.execute(_SCAN_IDS, values).scalars())
        except DBAPIError:
            # The text stands in the place of an id. It comes after all that are numbers.
            numbers = self._connection.execute(_SCAN_NUMBERS, values).scalars()
            found = [self._stored(tenant_id, each) for each in numbers]
            return found if len(found) == limit else [*found, StoredAudit(id=b"", fields=None)]
        return [self._stored(tenant_id, each) for each in ids]

    def _stored(self, tenant_id: str, record_id: Any) -> StoredAudit:
        try:
            row = self._connection.execute(_GET_RECORD, {"b_tenant_id": tenant_id, "b_id": record_id}).one()
        except DBAPIError:
            return StoredAudit(id=record_id, fields=None)
        return _as_stored(row)

    def tenants(self) -> list[str]:
        """Those that have records, by id."""
        found: list[str] = []
        while True:
            after = found[-1] if found else ""
            try:
                tenant = self._connection.execute(_NEXT_TENANT, {"b_tenant_id": after}).scalar_one()
            except OperationalError as error:
                if not _is_no_text(error):
                    raise
                return found  # bytes that are no text, put in by hand; they come after all that is
            if not isinstance(tenant, str):
                return found
            found.append(tenant)

    def count(self, tenant_id: str) -> int:
        count: int = self._connection.execute(_COUNT, {"b_tenant_id": tenant_id}).scalar_one()
        return count

    def delete_through(self, tenant_id: str, record_id: int) -> int:
        """Delete the records up to this id; how many. For retention, which notes where the chain then begins."""
        self._heads.pop(tenant_id, None)
        return self._connection.execute(_DELETE_THROUGH, {"b_tenant_id": tenant_id, "b_id": record_id}).rowcount


def _is_no_text(error: OperationalError) -> bool:
    """Whether a text could not be decoded. The driver says so itself: SQLite's own errors have a code."""
    return getattr(error.orig, "sqlite_errorcode", None) is None and "UTF-8" in str(error.orig)


def _as_stored(row: Any) -> StoredAudit:
    fields = dict(zip(_COLUMNS, row, strict=True))
    return StoredAudit(id=fields["id"], fields=fields)


def _as_row(row: Any) -> AuditRow:
    """The row; where somebody has made its metadata into what is no object, it says so, and is shown all the same."""
    fields = dict(zip(_COLUMNS, row, strict=True))
    try:
        fields["metadata"] = msgspec.json.decode(fields["metadata"], type=dict[str, Any])
    except msgspec.DecodeError:
        fields["metadata"] = {"unreadable": str(fields["metadata"])[:1000]}
    return AuditRow(**fields)
