"""What is set rather than run: tenants, tokens, agents, policies; and the answers kept for repeats."""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import structs
from sqlalchemy import Row, bindparam, delete, func, insert, or_, select, tuple_, update

from corral.storage import tables as t
from corral.storage.repositories._base import Repository, Shape, Upsert, bound, is_
from corral.storage.rows import AgentRow, IdempotencyKey, IdempotencyRow, PolicyRow, TokenRow

_AGENT = Shape(AgentRow, t.agents)
_POLICY = Shape(PolicyRow, t.policies)
_TOKEN = Shape(TokenRow, t.tokens)

_a = t.agents.c
_p = t.policies.c
_i = t.idempotency.c
_k = t.tokens.c

_UPSERT_AGENT = Upsert(t.agents, replace=True)
_AGENTS = _AGENT.select().where(is_(_a.tenant_id), is_(_a.workspace_id)).order_by(_a.id)
_GET_AGENT = _AGENTS.where(is_(_a.id))


class Agents(Repository):
    """Agents of a workspace."""

    def upsert(self, row: AgentRow) -> None:
        """Insert the row, or replace the one with the same key by it."""
        _UPSERT_AGENT.execute(self._connection, _AGENT.values(row))

    def get(self, tenant_id: str, workspace_id: str, agent_id: str) -> AgentRow | None:
        values = {"b_tenant_id": tenant_id, "b_workspace_id": workspace_id, "b_id": agent_id}
        return _AGENT.one(self._connection.execute(_GET_AGENT, values))

    def list(self, tenant_id: str, workspace_id: str) -> builtins.list[AgentRow]:
        """By id."""
        values = {"b_tenant_id": tenant_id, "b_workspace_id": workspace_id}
        return _AGENT.all(self._connection.execute(_AGENTS, values))


_UPSERT_POLICY = Upsert(t.policies, replace=True)
_GET_POLICY = _POLICY.select().where(is_(_p.tenant_id), is_(_p.scope_key))
# As many as a policy has layers: each step of a run reads them all.
_PLACES = 3
_GET_POLICIES = _POLICY.select().where(
    is_(_p.tenant_id), or_(*(is_(_p.scope_key, f"scope_key_{place}") for place in range(_PLACES)))
)


class Policies(Repository):
    """The documents of the policy's layers."""

    def get(self, tenant_id: str, scope_key: str) -> PolicyRow | None:
        values = {"b_tenant_id": tenant_id, "b_scope_key": scope_key}
        return _POLICY.one(self._connection.execute(_GET_POLICY, values))

    def get_many(self, tenant_id: str, scope_keys: Sequence[str]) -> Mapping[str, PolicyRow]:
        """Those that there are, by scope key."""
        found: dict[str, PolicyRow] = {}
        for start in range(0, len(scope_keys), _PLACES):
            keys = scope_keys[start : start + _PLACES]
            # Fewer keys than places: one of them twice changes nothing.
            places = {f"b_scope_key_{place}": keys[min(place, len(keys) - 1)] for place in range(_PLACES)}
            rows = _POLICY.all(self._connection.execute(_GET_POLICIES, {"b_tenant_id": tenant_id, **places}))
            found.update((row.scope_key, row) for row in rows)
        return found

    def upsert(self, row: PolicyRow) -> None:
        """Insert the row, or replace the one with the same key by it."""
        _UPSERT_POLICY.execute(self._connection, _POLICY.values(row))


_KEY = tuple(IdempotencyKey.__struct_fields__)
_REST = tuple(name for name in IdempotencyRow.__struct_fields__ if name != "key")
_OF_KEY = [is_(_i[name]) for name in _KEY]
_KEY_COLUMNS = [_i[name] for name in _KEY]
_ROW_COLUMNS = [*_KEY_COLUMNS, *(_i[name] for name in _REST)]

_GET_KEY = select(*_ROW_COLUMNS).where(*_OF_KEY)
_INSERT_KEY = insert(t.idempotency)
_FINISH_KEY = update(t.idempotency).where(*_OF_KEY).values(state="done", result=bindparam("v_result"))
_DELETE_KEY = delete(t.idempotency).where(*_OF_KEY)
_IN_PROGRESS_OF_RUN = select(*_ROW_COLUMNS).where(
    is_(_i.tenant_id), is_(_i.run_id), t.HAS_RUN, _i.state == "in_progress"
)
_NEXT_TENANT = select(func.min(_i.tenant_id)).where(t.DONE, _i.tenant_id > bound("tenant_id", _i.tenant_id))
_PURGE = delete(t.idempotency).where(
    tuple_(*_KEY_COLUMNS).in_(
        select(*_KEY_COLUMNS)
        .where(is_(_i.tenant_id), t.DONE, _i.expires_at <= bound("now", _i.expires_at))
        .order_by(_i.expires_at)
        .limit(bindparam("b_limit"))
    )
)


def _key_values(key: IdempotencyKey) -> dict[str, Any]:
    return {f"b_{name}": getattr(key, name) for name in _KEY}


def _idempotency_row(row: Row[Any]) -> IdempotencyRow:
    split = len(_KEY)
    key = IdempotencyKey(**dict(zip(_KEY, row[:split], strict=True)))
    return IdempotencyRow(key=key, **dict(zip(_REST, row[split:], strict=True)))


class Idempotency(Repository):
    """Claimed keys and their answers."""

    def get(self, key: IdempotencyKey) -> IdempotencyRow | None:
        row = self._connection.execute(_GET_KEY, _key_values(key)).one_or_none()
        return None if row is None else _idempotency_row(row)

    def insert(self, row: IdempotencyRow) -> None:
        """Raises IntegrityError if the key is claimed."""
        values = {name: getattr(row.key, name) for name in _KEY} | {name: getattr(row, name) for name in _REST}
        self._connection.execute(_INSERT_KEY, values)

    def finish(self, key: IdempotencyKey, result: bytes) -> None:
        """Make the row done, with this answer."""
        self._connection.execute(_FINISH_KEY, {**_key_values(key), "v_result": result})

    def in_progress_of_run(self, tenant_id: str, run_id: str) -> list[IdempotencyRow]:
        """The oldest first."""
        values = {"b_tenant_id": tenant_id, "b_run_id": run_id}
        rows = [_idempotency_row(row) for row in self._connection.execute(_IN_PROGRESS_OF_RUN, values)]
        # There is one or none: putting that in order costs the database more than finding it.
        return sorted(rows, key=lambda row: (row.created_at, *structs.astuple(row.key)))

    def delete(self, key: IdempotencyKey) -> None:
        self._connection.execute(_DELETE_KEY, _key_values(key))

    def purge(self, now_ms: int, limit: int) -> int:
        """Delete up to `limit` rows that are done and expired; how many. Never one in progress."""
        # Tenant by tenant, as the index has it.
        purged, tenant = 0, ""
        while purged < limit:
            tenant = self._connection.execute(_NEXT_TENANT, {"b_tenant_id": tenant}).scalar_one()
            if tenant is None:
                break
            values = {"b_tenant_id": tenant, "b_now": now_ms, "b_limit": limit - purged}
            purged += self._connection.execute(_PURGE, values).rowcount
        return purged


_ENSURE_TENANT = Upsert(t.tenants, replace=False)
_ENSURE_WORKSPACE = Upsert(t.workspaces, replace=False)
_ENSURE_USER = Upsert(t.users, replace=False)
_WORKSPACE_IDS = select(t.workspaces.c.id).where(is_(t.workspaces.c.tenant_id)).order_by(t.workspaces.c.id)


class Tenants(Repository):
    """Tenants with their workspaces and users."""

    def ensure(self, tenant_id: str, workspace_id: str, user_id: str, *, now_ms: int) -> None:
        """Make the tenant, the workspace and the user if they are not there."""
        connection = self._connection
        _ENSURE_TENANT.execute(connection, {"tenant_id": tenant_id, "created_at": now_ms})
        _ENSURE_WORKSPACE.execute(connection, {"tenant_id": tenant_id, "id": workspace_id, "created_at": now_ms})
        _ENSURE_USER.execute(connection, {"tenant_id": tenant_id, "id": user_id, "created_at": now_ms})

    def workspace_ids(self, tenant_id: str) -> list[str]:
        """In order of the ids."""
        return list(self._connection.execute(_WORKSPACE_IDS, {"b_tenant_id": tenant_id}).scalars())


_UPSERT_TOKEN = Upsert(t.tokens, replace=True)
_BY_HASH = _TOKEN.select().where(is_(_k.token_hash))
_TOKENS = _TOKEN.select().where(is_(_k.tenant_id)).order_by(_k.created_at, _k.id)
_GET_TOKEN = _TOKENS.where(is_(_k.id))


class Tokens(Repository):
    """Access tokens, by the hash of their text."""

    def upsert(self, row: TokenRow) -> None:
        """Insert the row, or replace the one with the same key. Raises IntegrityError if the hash is another's."""
        _UPSERT_TOKEN.execute(self._connection, _TOKEN.values(row))

    def by_hash(self, token_hash: str) -> TokenRow | None:
        """The row with this hash; the only look-up that finds a tenant instead of being given one."""
        return _TOKEN.one(self._connection.execute(_BY_HASH, {"b_token_hash": token_hash}))

    def get(self, tenant_id: str, token_id: str) -> TokenRow | None:
        return _TOKEN.one(self._connection.execute(_GET_TOKEN, {"b_tenant_id": tenant_id, "b_id": token_id}))

    def list(self, tenant_id: str) -> builtins.list[TokenRow]:
        """The oldest first."""
        return _TOKEN.all(self._connection.execute(_TOKENS, {"b_tenant_id": tenant_id}))


_META = select(t.store_meta.c.value).where(is_(t.store_meta.c.name))
_SET_META = Upsert(t.store_meta, replace=True)


class Meta(Repository):
    """What the store notes about itself; no tenant's data."""

    def get(self, name: str) -> str | None:
        value: str | None = self._connection.execute(_META, {"b_name": name}).scalar_one_or_none()
        return value

    def set(self, name: str, value: str) -> None:
        _SET_META.execute(self._connection, {"name": name, "value": value})
