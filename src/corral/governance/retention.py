"""What is let go when its time is over."""

from __future__ import annotations

import logging

from corral.clock import Clock, rfc3339
from corral.governance.anchors import AnchorError
from corral.governance.keeper import AuditKeeper
from corral.ids import Ids
from corral.storage.api import Store, StoreUnavailable
from corral.storage.repositories import Transaction

log = logging.getLogger(__name__)

_AT_ONCE = 500
_DAY_MS = 86_400_000


class Retention:
    """Lets go of what is kept no longer: answers that have expired, and by age what settings name (None: never).

    Deltas are never kept; journals, transcripts and metrics go with nobody but their session.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        keeper: AuditKeeper,
        *,
        audit_keep_days: int | None,
        tool_output_keep_days: int | None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._keeper = keeper
        self._audit_keep_days = audit_keep_days
        self._tool_output_keep_days = tool_output_keep_days

    async def purge(self) -> dict[str, int]:
        """Let go of what has had its time, and report it; how much of what. What cannot be purged now is logged."""
        purged = {}
        try:
            purged["idempotency"] = await purge_expired(self._store, self._clock)
            if self._tool_output_keep_days is not None:
                purged["toolOutput"] = await purge_outputs(self._store, self._clock, self._tool_output_keep_days)
            if self._audit_keep_days is not None:
                purged["audit"] = await purge_audit(self._store, self._clock, self._keeper, self._audit_keep_days)
        except (StoreUnavailable, AnchorError, OSError) as error:
            log.warning("not everything purged: %s", error, extra={"action": "purge.failed"})
        if any(purged.values()):
            log.info("purged: %s", purged, extra={"action": "purge.done", "purged": purged})
        return purged


async def purge_outputs(store: Store, clock: Clock, keep_days: int) -> int:
    """Forget whole outputs of calls made more than so many days ago; how many. Events keep their head and tail.

    Raises StoreUnavailable.
    """
    # Ids begin with the time at which they were made, so the key itself is in the order of age.
    oldest = Ids(_Before(clock, keep_days), lambda size: bytes(size)).new("tc")
    purged = 0
    for tenant_id in await store.read(lambda tx: tx.audit.tenants()):
        count = _AT_ONCE
        while count == _AT_ONCE:
            count = await store.write(lambda tx, of=tenant_id: tx.outputs.purge(of, oldest, _AT_ONCE))  # type: ignore[misc]
            purged += count
    return purged


async def purge_audit(store: Store, clock: Clock, keeper: AuditKeeper, keep_days: int) -> int:
    """Forget records more than so many days old; how many. Raises StoreUnavailable, OSError, AnchorError."""
    before = rfc3339(_Before(clock, keep_days).now_ms())

    def due(tx: Transaction) -> bool:
        # The keeper follows whole chains before it deletes: not without a reason.
        return any(_older(tx, tenant, before) for tenant in tx.audit.tenants())

    return await keeper.purge(keep_days * _DAY_MS) if await store.read(due) else 0


def _older(tx: Transaction, tenant_id: str, before: str) -> bool:
    none = dict.fromkeys(("from_", "action", "actor", "session_id", "run_id", "before_id"))
    return bool(tx.audit.page(tenant_id, to=before, limit=1, **none))


class _Before:
    """A clock that is so many days behind another."""

    def __init__(self, clock: Clock, days: int) -> None:
        self._clock = clock
        self._days = days

    def now_ms(self) -> int:
        return max(0, self._clock.now_ms() - self._days * _DAY_MS)

    def monotonic(self) -> float:
        return self._clock.monotonic()


async def purge_expired(store: Store, clock: Clock) -> int:
    """Forget the answers to idempotency keys that have expired; how many. Never one in progress.

    In units small enough to keep no other writer waiting. Raises StoreUnavailable.
    """

    def work(tx: Transaction) -> int:
        return tx.idempotency.purge(clock.now_ms(), _AT_ONCE)

    purged = 0
    while True:
        count = await store.write(work)
        purged += count
        if count < _AT_ONCE:
            break
    return purged
