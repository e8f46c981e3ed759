"""One key, one effect: claims, answers and replays of side-effect methods."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from msgspec import Struct

from corral.clock import Clock
from corral.governance.caller import Caller
from corral.protocol.canonical import canonical_hash
from corral.protocol.errors import IdempotencyConflict
from corral.protocol.methods import Method, SideEffectParams
from corral.protocol.types import Wire
from corral.storage.api import Store
from corral.storage.repositories import Transaction
from corral.storage.rows import IdempotencyKey, IdempotencyRow

RETENTION_MS = 48 * 3600 * 1000
"""How long an answer is kept; the contract asks for at least 24 hours."""

# What does not count when two calls are compared: the key itself, how long the caller is
# ready to wait, and the two fields that say who and where (they are part of the key).
_NOT_COMPARED = frozenset({"idempotencyKey", "waitMs", "workspaceId", "tenantId"})


class Performed(Struct, kw_only=True, frozen=True):
    """`payload` is the answer's JSON text, or None while an effect that outlives its transaction
    goes on; `replayed` says that this call did nothing: an earlier one with the key had."""

    payload: bytes | None
    replayed: bool


class Ongoing(Struct, kw_only=True, frozen=True):
    """What a unit of work returns whose effect ends with a run: its key stays claimed until then."""

    run_id: str


class Idempotency:
    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def perform(
        self,
        caller: Caller,
        method: Method,
        params: SideEffectParams,
        work: Callable[[Transaction], Wire | Ongoing],
        on_commit: Callable[[Performed], None],
    ) -> Performed:
        """Carry `work` out once for the key in `params`, or find what it answered before.

        The claim, the effect and the answer are one transaction. `on_commit` runs on the event
        loop after the commit and before any event of it is published. A `work` that raises
        leaves no trace, so that the key may be tried again.

        Raises IdempotencyConflict if the key was used with other parameters, and what `work` raises.
        """
        key = self._key(caller, method, params)
        wanted = _params_hash(params)
        now = self._clock.now_ms()

        def unit(tx: Transaction) -> Performed:
            standing = tx.idempotency.get(key)
            if standing is not None and standing.state == "done" and standing.expires_at <= now:
                tx.idempotency.delete(key)
                standing = None
            if standing is not None:
                if standing.params_hash != wanted:
                    raise IdempotencyConflict(
                        "$.params.idempotencyKey was used before with other parameters: "
                        "send the same parameters, or a new key"
                    )
                return Performed(payload=standing.result, replayed=True)
            result = work(tx)
            ongoing = isinstance(result, Ongoing)
            payload = None if ongoing else msgspec.json.encode(result)
            tx.idempotency.insert(
                IdempotencyRow(
                    key=key,
                    params_hash=wanted,
                    state="in_progress" if ongoing else "done",
                    result=payload,
                    run_id=result.run_id if isinstance(result, Ongoing) else None,
                    created_at=now,
                    expires_at=now + RETENTION_MS,
                )
            )
            return Performed(payload=payload, replayed=False)

        return await self._store.write(unit, on_commit)

    def _key(self, caller: Caller, method: Method, params: SideEffectParams) -> IdempotencyKey:
        return IdempotencyKey(
            tenant_id=caller.tenant_id,
            actor=caller.principal.subject,
            method=method.name,
            scope=_scope(caller, method, params),
            key=params.idempotency_key,
        )


def finish_ongoing(tx: Transaction, tenant_id: str, run_id: str, result: Wire) -> None:
    """Write the answer of every call whose effect ended with this run, in the run's last transaction."""
    rows = tx.idempotency.in_progress_of_run(tenant_id, run_id)
    if rows:
        payload = msgspec.json.encode(result)
        for row in rows:
            tx.idempotency.finish(row.key, payload)


def _scope(caller: Caller, method: Method, params: SideEffectParams) -> str:
    if method.scope is not None:
        value = msgspec.to_builtins(params).get(method.scope)
        if value is not None:
            return f"{method.scope}:{value}"
    return f"workspaceId:{caller.workspace_id}"


def _params_hash(params: SideEffectParams) -> str:
    known = msgspec.to_builtins(params)
    return canonical_hash({name: value for name, value in known.items() if name not in _NOT_COMPARED})
