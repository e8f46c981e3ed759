"""What is written and told when somebody connects."""

from __future__ import annotations

import logging
from typing import Any

from corral.governance.approvals import Approvals
from corral.governance.audit import Audit, Outcome
from corral.governance.caller import Caller
from corral.protocol.types import Approval
from corral.storage.api import Store, StoreUnavailable
from corral.storage.repositories import Transaction

log = logging.getLogger(__name__)


class Welcome:
    """Audits a connection and finds what waits for its principal."""

    def __init__(self, store: Store, audit: Audit, approvals: Approvals) -> None:
        self._store = store
        self._audit = audit
        self._approvals = approvals

    async def admitted(self, caller: Caller, metadata: dict[str, Any]) -> list[Approval]:
        """Record the connection; the pending approvals that the caller may see."""
        await self._record(caller, "ok", metadata)
        return await self._store.read(lambda tx: self._approvals.pending(tx, caller))

    async def refused(self, caller: Caller, metadata: dict[str, Any]) -> None:
        """Record that a known principal was not let in."""
        await self._record(caller, "denied", metadata)

    async def _record(self, caller: Caller, outcome: Outcome, metadata: dict[str, Any]) -> None:
        def unit(tx: Transaction) -> None:
            self._audit.record_by(
                tx, caller, "connect", "workspace", caller.workspace_id, outcome=outcome, metadata=metadata
            )

        try:
            await self._store.write(unit)
        except StoreUnavailable:
            # A connection changes nothing by itself, and on a full disk people must still be able to look.
            log.warning("connection not audited", extra={"action": "connect.not_audited"})
