"""The audit log: a record of every decision and effect, in the transaction of what it records.

What the chain's hashes cover is written in `corral.governance.chain`. What is kept is redacted
first (`corral.governance.redaction`); of a tool's arguments their hash and a short preview.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

from msgspec import UNSET, UnsetType

from corral.clock import Clock, rfc3339
from corral.governance.caller import Caller
from corral.governance.chain import GENESIS, record_hash
from corral.governance.keeper import AuditKeeper
from corral.governance.redaction import Redactor
from corral.governance.times import read_time
from corral.protocol.canonical import canonical_hash
from corral.protocol.methods import AuditQueryParams, AuditQueryResult, AuditVerifyResult, Params
from corral.protocol.types import AuditRecord
from corral.storage.repositories import Transaction
from corral.storage.rows import AuditRow, RunRow

Outcome = Literal["ok", "denied", "failed"]

_PREVIEW_TEXT, _PREVIEW_TOTAL = 300, 1_500


class Audit:
    """Writes records. `secrets` are texts that no record holds: the access token, the keys of providers."""

    def __init__(self, clock: Clock, *, secrets: Iterable[str] = ()) -> None:
        self._clock = clock
        self._redactor = Redactor(secrets)
        self.changed: dict[str, float] = {}
        """Tenant -> when it last got a record, on the monotonic clock. A hint for the keeper: what is
        recorded may be rolled back. Threads set items, the keeper takes them out."""

    def record(
        self,
        tx: Transaction,
        *,
        tenant_id: str,
        action: str,
        actor: str,
        actor_type: str,
        resource_type: str,
        resource_id: str,
        outcome: Outcome = "ok",
        metadata: Mapping[str, Any] | None = None,
        trace_id: str,
        session_id: str | None = None,
        run_id: str | None = None,
    ) -> AuditRow:
        """Append a record to the tenant's chain, in the transaction of what it records.

        `actor` is the principal's subject, or what of the server acted, never a client's word.
        `metadata` may hold any JSON and Structs; it is redacted, and gets `sessionId` and `runId`.
        """
        text = self._redactor.text
        kept = self._redactor.value(metadata or {})
        session_id = text(session_id) if session_id is not None else None
        run_id = text(run_id) if run_id is not None else None
        for name, value in (("sessionId", session_id), ("runId", run_id)):
            kept.pop(name, None)
            if value is not None:
                kept[name] = value
        head = tx.audit.head(tenant_id)
        record: dict[str, Any] = {
            "tenantId": tenant_id,
            "id": head.id + 1 if head is not None else 1,
            "action": action,
            "actor": text(actor),
            "actorType": actor_type,
            "resourceType": resource_type,
            "resourceId": text(resource_id),
            "outcome": outcome,
            "metadata": kept,
            "traceId": text(trace_id),
            "createdAt": rfc3339(self._clock.now_ms()),
            "prevHash": head.hash if head is not None else GENESIS,
        }
        row = AuditRow(
            tenant_id=tenant_id,
            id=record["id"],
            action=action,
            actor=record["actor"],
            actor_type=actor_type,
            resource_type=resource_type,
            resource_id=record["resourceId"],
            outcome=outcome,
            metadata=kept,
            trace_id=record["traceId"],
            created_at=record["createdAt"],
            prev_hash=record["prevHash"],
            hash=record_hash(record),
            session_id=session_id,
            run_id=run_id,
        )
        tx.audit.append(row)
        self.changed[tenant_id] = self._clock.monotonic()
        return row

    def record_by(
        self,
        tx: Transaction,
        caller: Caller,
        action: str,
        resource_type: str,
        resource_id: str,
        *,
        outcome: Outcome = "ok",
        metadata: Mapping[str, Any] | None = None,
        session_id: str | None = None,
        run_id: str | None = None,
    ) -> AuditRow:
        """`record` for what a caller does, with the actor, tenant, workspace and trace that the gateway gave it.

        What is done to something that lies in another workspace than the call was made in has that in `metadata`.
        """
        return self.record(
            tx,
            tenant_id=caller.tenant_id,
            action=action,
            actor=caller.principal.subject,
            actor_type="user",
            resource_type=resource_type,
            resource_id=resource_id,
            outcome=outcome,
            metadata={"workspaceId": caller.workspace_id, **(metadata or {})},
            trace_id=caller.trace_id,
            session_id=session_id,
            run_id=run_id,
        )

    def record_in(
        self,
        tx: Transaction,
        run: RunRow,
        action: str,
        resource_type: str,
        resource_id: str,
        *,
        outcome: Outcome = "ok",
        metadata: Mapping[str, Any] | None = None,
        by_system: bool = False,
    ) -> AuditRow:
        """`record` for what happens in a run: done by who started it, or `by_system`."""
        return self.record(
            tx,
            tenant_id=run.tenant_id,
            action=action,
            actor="system" if by_system else run.actor,
            actor_type="system" if by_system else "user",
            resource_type=resource_type,
            resource_id=resource_id,
            outcome=outcome,
            metadata=metadata,
            trace_id=run.trace_id,
            session_id=run.session_id,
            run_id=run.id,
        )

    def about_call(self, args: Mapping[str, Any], args_hash: str | None = None) -> dict[str, Any]:
        """What may be kept of a call's arguments: `{argsHash, argsPreview}`, the preview redacted and short."""
        return {
            "argsHash": args_hash if args_hash is not None else canonical_hash(dict(args)),
            "argsPreview": self._redactor.value(args, max_text=_PREVIEW_TEXT, max_total=_PREVIEW_TOTAL),
        }

    def shown(self, text: str) -> str:
        """`text` as a record would keep it, to look records up by it."""
        return self._redactor.text(text)


class AuditMethods:
    """`audit.query` and `audit.verify`."""

    def __init__(self, audit: Audit, keeper: AuditKeeper) -> None:
        self._audit = audit
        self._keeper = keeper

    def query(self, tx: Transaction, caller: Caller, params: AuditQueryParams) -> AuditQueryResult:
        """Records of the caller's tenant, newest first; `from` <= `createdAt` < `to`.

        Raises InvalidRequest for a `from` or `to` that is no RFC 3339 time.
        """
        rows = tx.audit.page(
            caller.tenant_id,
            from_=_time("from", params.from_),
            to=_time("to", params.to),
            action=_given(params.action),
            actor=self._kept(params.actor),
            session_id=self._kept(params.session_id),
            run_id=self._kept(params.run_id),
            limit=params.limit + 1,
            before_id=_given(params.cursor),
        )
        items = [wire_record(row) for row in rows[: params.limit]]
        more = len(rows) > params.limit
        return AuditQueryResult(items=items, next_cursor=items[-1].id if more else UNSET)

    async def verify(self, caller: Caller, params: Params | None = None) -> AuditVerifyResult:  # noqa: ARG002
        """Check the whole chain of the caller's tenant. Raises StoreUnavailable."""
        return await self._keeper.verify(caller.tenant_id)

    def _kept(self, text: str | UnsetType) -> str | None:
        return None if text is UNSET else self._audit.shown(text)


def wire_record(row: AuditRow) -> AuditRecord:
    """A record as `audit.query` gives it."""
    return AuditRecord(
        id=row.id,
        action=row.action,
        actor=row.actor,
        actor_type=row.actor_type,
        resource_type=row.resource_type,
        resource_id=row.resource_id,
        outcome=cast(Outcome, row.outcome),
        metadata=row.metadata,
        trace_id=row.trace_id,
        created_at=row.created_at,
        prev_hash=row.prev_hash,
        hash=row.hash,
    )


def _given(value: Any) -> Any:
    return None if value is UNSET else value


def _time(field: str, value: str | UnsetType) -> str | None:
    """`value` in the form of `createdAt`, whose texts have the order of the times."""
    return None if value is UNSET else rfc3339(read_time(field, value))
