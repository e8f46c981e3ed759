"""Approvals: calls that wait for a person, and what became of them.

An approval is a row bound to one run, one call and a hash of everything that the decision is
about. It is decided once, by an explicit act of somebody who may; silence is a denial. What
lets a call run is the row alone, never a message or a promise in memory.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from msgspec import UNSET, Struct

from corral import faults
from corral.clock import Clock, rfc3339
from corral.governance.access import visible_session
from corral.governance.audit import Audit, Outcome
from corral.governance.caller import Caller
from corral.governance.paging import page_cursor, read_page_cursor
from corral.ids import Ids
from corral.protocol.canonical import canonical_json
from corral.protocol.errors import Conflict, Forbidden, InvalidRequest, NotFound
from corral.protocol.methods import (
    ApprovalQueueParams,
    ApprovalQueueResult,
    ApprovalResolveParams,
    ApprovalResolveResult,
    GrantResult,
    GrantsListResult,
    GrantsRevokeParams,
    Params,
)
from corral.protocol.types import Approval, ApprovalStatus, Grant
from corral.storage.api import Store, StoreUnavailable
from corral.storage.events import append
from corral.storage.repositories import Transaction
from corral.storage.rows import ApprovalFact, ApprovalRow, GrantRow, RunRow, ToolRunRow

log = logging.getLogger(__name__)

GRANT_TTL_MS = 30 * 24 * 3600 * 1000
EXPIRY_INTERVAL_S = 1.0
_EXPIRY_BATCH = 200

_NEXT: dict[ApprovalStatus, frozenset[ApprovalStatus]] = {
    ApprovalStatus.PENDING: frozenset(
        {ApprovalStatus.APPROVED, ApprovalStatus.REJECTED, ApprovalStatus.EXPIRED, ApprovalStatus.CANCELLED}
    )
}


class _Actor(StrEnum):
    USER = "user"
    SYSTEM = "system"


class Edited(Struct, kw_only=True, frozen=True):
    """An edited call as the core judges it: its hash, what it is bound to, or why it may not be."""

    args_hash: str
    binding: str


Rejudge = Callable[[Transaction, ApprovalRow, dict[str, Any]], Edited]
"""Judges edited arguments anew. Raises InvalidRequest if they are none of the tool's, PolicyDenied if policy denies."""

FourEyes = Callable[[Transaction, ApprovalRow], bool]
"""Whether policy wants somebody else than who started the run to decide."""


class Approvals:
    """The state machine and the methods `approval.*` and `grants.*`.

    `ttl_ms` is how long a call waits for a person before that counts as a no.
    """

    def __init__(
        self, clock: Clock, ids: Ids, audit: Audit, *, ttl_ms: int, rejudge: Rejudge, four_eyes: FourEyes
    ) -> None:
        self._clock = clock
        self._ids = ids
        self._audit = audit
        self._ttl_ms = ttl_ms
        self._rejudge = rejudge
        self._four_eyes = four_eyes

    # ---- for the core

    def require(self, tx: Transaction, run: RunRow, call: ToolRunRow, binding: str, now_ms: int) -> ApprovalRow:
        """Make the pending approval of a call and journal `approval.required`."""
        row = ApprovalRow(
            tenant_id=run.tenant_id,
            id=self._ids.new("ap"),
            workspace_id=run.workspace_id,
            session_id=run.session_id,
            run_id=run.id,
            tool_call_id=call.id,
            tool_name=call.tool_name,
            args=call.args,
            args_hash=call.args_hash,
            binding=binding,
            risk=call.risk,
            reason=call.reason or "",
            rule_id=call.rule_id,
            requested_by=run.actor,
            retry_of=call.retry_of,
            created_at=now_ms,
            expires_at=now_ms + self._ttl_ms,
        )
        tx.approvals.insert(row)
        append(tx, run.tenant_id, approval_view(row), now_ms, event="approval.required")
        self._record(tx, row, "approval.required", run.actor, _Actor.USER, run.trace_id, "ok", {})
        return row

    def standing(
        self, tx: Transaction, run: RunRow, tool_name: str, binding: str, now_ms: int, *, four_eyes: bool
    ) -> GrantRow | None:
        """The grant that covers exactly this call, None if there is none.

        Under four eyes what the person who started the run was the one to approve does not cover it: a grant
        is their word, also when it was given for another's run or before policy wanted two.
        """
        not_by = run.actor if four_eyes else None
        return tx.grants.find(
            run.tenant_id, run.workspace_id, run.session_id, tool_name, binding, now_ms, not_by=not_by
        )

    def granted(
        self, tx: Transaction, run: RunRow, tool_name: str, binding: str, now_ms: int, *, four_eyes: bool
    ) -> GrantRow | None:
        """The same, counted as used."""
        grant = self.standing(tx, run, tool_name, binding, now_ms, four_eyes=four_eyes)
        if grant is not None:
            tx.grants.use(run.tenant_id, grant.id)
        return grant

    def cancel_of_run(self, tx: Transaction, run: RunRow, now_ms: int) -> None:
        """What is still pending of a run that ends is decided no more."""
        for row in tx.approvals.pending_of_run(run.tenant_id, run.id):
            self._move(tx, row, ApprovalStatus.CANCELLED, now_ms, by=None, actor=_Actor.SYSTEM, trace_id=run.trace_id)

    def expire_due(self, tx: Transaction) -> int:
        """Let the time of pending approvals run out; how many there were. A no, and journalled as one."""
        now = self._clock.now_ms()
        due = tx.approvals.due(now, _EXPIRY_BATCH)
        for row in due:
            self._move(tx, row, ApprovalStatus.EXPIRED, now, by=None, actor=_Actor.SYSTEM, trace_id="")
        return len(due)

    async def keep_time(self, store: Store) -> None:
        """Let approvals expire when their time has come, for as long as it is not cancelled."""
        while True:
            try:
                due = await store.read(lambda tx: bool(tx.approvals.due(self._clock.now_ms(), 1)))
                if due:
                    await store.write(self.expire_due)
            except StoreUnavailable:
                log.warning("approvals not looked at", extra={"action": "approval.expiry_failed"})
            await asyncio.sleep(EXPIRY_INTERVAL_S)

    # ---- approval.resolve

    def resolve(self, tx: Transaction, caller: Caller, params: ApprovalResolveParams) -> ApprovalResolveResult:
        """Approve or reject a pending call; the only place where a person's decision is written.

        Raises NotFound, Conflict (with the standing decision) if it was decided or has expired,
        Forbidden under four eyes, PolicyDenied or InvalidRequest for edited arguments.
        """
        row = self._pending_of(tx, caller, params.approval_id)
        if self._four_eyes(tx, row) and caller.principal.subject in _names_of_person(
            tx, row.tenant_id, row.requested_by
        ):
            raise Forbidden("policy wants four eyes: who started the run may not decide on its calls")
        approved = params.decision == "approve"
        if not approved and (params.remember is not UNSET or params.args is not UNSET):
            raise InvalidRequest("$.params.remember and $.params.args go with an approval, not with a rejection")
        now = self._clock.now_ms()
        changes: dict[str, Any] = {}
        if params.args is not UNSET and canonical_json(params.args) != canonical_json(row.args):
            changes = self._edit(tx, row, params.args)
        comment = params.comment if params.comment is not UNSET else None
        row = self._move(
            tx,
            row,
            ApprovalStatus.APPROVED if approved else ApprovalStatus.REJECTED,
            now,
            by=caller.principal.subject,
            actor=_Actor.USER,
            trace_id=caller.trace_id,
            comment=comment,
            **changes,
        )
        faults.reached("approval.resolving", row.tool_name, row.session_id)
        if approved and params.remember is not UNSET:
            self._remember(tx, caller, row, params.remember, now)
        return ApprovalResolveResult(approval_id=row.id, status=row.status)

    def _pending_of(self, tx: Transaction, caller: Caller, approval_id: str) -> ApprovalRow:
        row = tx.approvals.get(caller.tenant_id, approval_id)
        if row is None or visible_session(tx, caller, row.session_id) is None:
            raise NotFound("there is no such approval: $.params.approvalId names none that you may see")
        status = row.status
        if status == ApprovalStatus.PENDING and row.expires_at <= self._clock.now_ms():
            status = ApprovalStatus.EXPIRED
        if status != ApprovalStatus.PENDING:
            details: dict[str, Any] = {"approvalId": row.id, "status": status}
            if row.resolved_by is not None:
                details["resolvedBy"] = row.resolved_by
            if row.resolved_at is not None:
                details["resolvedAt"] = rfc3339(row.resolved_at)
            raise Conflict(f"this approval is {status} already: the first decision stands", details=details)
        return row

    def _edit(self, tx: Transaction, row: ApprovalRow, args: dict[str, Any]) -> dict[str, Any]:
        """The call's new arguments, judged as if the model had sent them, in the call and the approval."""
        edited = self._rejudge(tx, row, args)
        tx.tool_runs.update(row.tenant_id, row.tool_call_id, args=args, args_hash=edited.args_hash)
        return {"args": args, "args_hash": edited.args_hash, "binding": edited.binding}

    def _remember(self, tx: Transaction, caller: Caller, row: ApprovalRow, scope: str, now_ms: int) -> None:
        grant = GrantRow(
            tenant_id=row.tenant_id,
            id=self._ids.new("gr"),
            workspace_id=row.workspace_id,
            session_id=row.session_id if scope == "session" else None,
            tool_name=row.tool_name,
            binding=row.binding,
            matcher=_in_words(row),
            approval_id=row.id,
            created_by=caller.principal.subject,
            created_at=now_ms,
            expires_at=now_ms + GRANT_TTL_MS,
        )
        tx.grants.insert(grant)
        self._record_grant(tx, caller, grant, "grant.created")

    # ---- the queue, and grants

    def queue(self, tx: Transaction, caller: Caller, params: ApprovalQueueParams) -> ApprovalQueueResult:
        """`approval.queue`: the workspace's approvals that the caller may see, newest first."""
        rows = tx.approvals.page(
            caller.tenant_id,
            caller.workspace_id,
            status=params.status,
            session_id=params.session_id if params.session_id is not UNSET else None,
            user_id=caller.user_id,
            limit=params.limit + 1,
            before=read_page_cursor("approvals", params.cursor) if params.cursor is not UNSET else None,
        )
        items = rows[: params.limit]
        more = page_cursor("approvals", items[-1].created_at, items[-1].id) if len(rows) > params.limit else UNSET
        return ApprovalQueueResult(items=[approval_view(row) for row in items], next_cursor=more)

    def pending(self, tx: Transaction, caller: Caller) -> list[Approval]:
        """What waits in the caller's workspace, for the answer to `connect`: the newest 200."""
        return self.queue(tx, caller, ApprovalQueueParams(limit=200)).items

    def grants(self, tx: Transaction, caller: Caller, _params: Params) -> GrantsListResult:
        """`grants.list`: newest first, the revoked and expired ones too."""
        rows = tx.grants.list(caller.tenant_id, caller.workspace_id)
        return GrantsListResult(items=[grant_view(row) for row in rows if _may_see_grant(tx, caller, row)])

    def revoke(self, tx: Transaction, caller: Caller, params: GrantsRevokeParams) -> GrantResult:
        """`grants.revoke`: from the next tool call on. Revoking twice changes nothing."""
        row = tx.grants.get(caller.tenant_id, params.grant_id)
        known = row is not None and row.workspace_id in caller.principal.workspace_ids
        if row is None or not known or not _may_see_grant(tx, caller, row):
            raise NotFound("there is no such grant: $.params.grantId is none of grants.list")
        if row.revoked_at is None:
            row.revoked_at, row.revoked_by = self._clock.now_ms(), caller.principal.subject
            tx.grants.update(row.tenant_id, row.id, revoked_at=row.revoked_at, revoked_by=row.revoked_by)
            self._record_grant(tx, caller, row, "grant.revoked")
        return GrantResult(grant=grant_view(row))

    # ---- the one place where a status changes

    def _move(
        self,
        tx: Transaction,
        row: ApprovalRow,
        status: ApprovalStatus,
        now_ms: int,
        *,
        by: str | None,
        actor: _Actor,
        trace_id: str,
        **changes: Any,
    ) -> ApprovalRow:
        """Take a pending approval to `status`, journalled and audited. The row must be pending still."""
        if status not in _NEXT.get(ApprovalStatus(row.status), frozenset()):
            raise Conflict(f"an approval that is {row.status} cannot become {status}")
        changes |= {"status": str(status), "resolved_at": now_ms, "resolved_by": by}
        if not tx.approvals.update(row.tenant_id, row.id, expected_status=row.status, **changes):
            raise Conflict("this approval was decided meanwhile")
        for name, value in changes.items():
            setattr(row, name, value)
        append(tx, row.tenant_id, approval_view(row), now_ms, event="approval.resolved")
        if status in (ApprovalStatus.APPROVED, ApprovalStatus.REJECTED):
            _count(tx, row, now_ms)
        outcome: Outcome = "ok" if status is ApprovalStatus.APPROVED else "denied"
        extra = {"status": str(status), "comment": row.comment}
        self._record(tx, row, "approval.resolved", by or "system", actor, trace_id, outcome, extra)
        return row

    def _record(
        self,
        tx: Transaction,
        row: ApprovalRow,
        action: str,
        who: str,
        actor: _Actor,
        trace_id: str,
        outcome: Outcome,
        extra: dict[str, Any],
    ) -> None:
        self._audit.record(
            tx,
            tenant_id=row.tenant_id,
            action=action,
            actor=who,
            actor_type=str(actor),
            resource_type="approval",
            resource_id=row.id,
            outcome=outcome,
            metadata={
                "toolCallId": row.tool_call_id,
                "toolName": row.tool_name,
                **self._audit.about_call(row.args, row.args_hash),
                "binding": row.binding,
                "reason": row.reason,
                **({"retryOf": row.retry_of} if row.retry_of is not None else {}),
                **extra,
            },
            trace_id=trace_id,
            session_id=row.session_id,
            run_id=row.run_id,
        )

    def _record_grant(self, tx: Transaction, caller: Caller, row: GrantRow, action: str) -> None:
        shown = {
            "workspaceId": row.workspace_id,
            "toolName": row.tool_name,
            "matcher": row.matcher,
            "approvalId": row.approval_id,
        }
        self._audit.record_by(tx, caller, action, "grant", row.id, metadata=shown, session_id=row.session_id)


def _count(tx: Transaction, row: ApprovalRow, now_ms: int) -> None:
    """Keep for the metrics what a person decided: it stays counted when the session is deleted."""
    run = tx.runs.get(row.tenant_id, row.run_id)
    fact = ApprovalFact(
        tenant_id=row.tenant_id,
        workspace_id=row.workspace_id,
        agent_id=run.agent_id if run is not None else "",
        approval_id=row.id,
        resolved_at=now_ms,
        status=row.status,
        wait_ms=max(0, now_ms - row.created_at),
    )
    tx.metrics.decided(fact)


def _names_of_person(tx: Transaction, tenant_id: str, subject: str) -> list[str]:
    """All subjects of the user whose subject this is: one person may hold tokens under several."""
    tokens = tx.tokens.list(tenant_id)
    users = {token.user_id for token in tokens if token.subject == subject}
    return sorted({subject, *(token.subject for token in tokens if token.user_id in users)})


def approval_view(row: ApprovalRow) -> Approval:
    return Approval(
        approval_id=row.id,
        run_id=row.run_id,
        session_id=row.session_id,
        tool_call_id=row.tool_call_id,
        tool_name=row.tool_name,
        args=row.args,
        args_hash=row.args_hash,
        risk=row.risk,  # type: ignore[arg-type]
        reason=row.reason,
        rule_id=row.rule_id if row.rule_id is not None else UNSET,
        status=ApprovalStatus(row.status),
        created_at=rfc3339(row.created_at),
        expires_at=rfc3339(row.expires_at),
        resolved_at=rfc3339(row.resolved_at) if row.resolved_at is not None else UNSET,
        resolved_by=row.resolved_by if row.resolved_by is not None else UNSET,
        comment=row.comment if row.comment is not None else UNSET,
        retry_of=row.retry_of if row.retry_of is not None else UNSET,
    )


def grant_view(row: GrantRow) -> Grant:
    return Grant(
        grant_id=row.id,
        scope="session" if row.session_id is not None else "workspace",
        session_id=row.session_id if row.session_id is not None else UNSET,
        tool_name=row.tool_name,
        matcher=row.matcher,
        created_by=row.created_by,
        created_at=rfc3339(row.created_at),
        expires_at=rfc3339(row.expires_at),
        uses=row.uses,
        revoked_at=rfc3339(row.revoked_at) if row.revoked_at is not None else UNSET,
    )


def _in_words(row: ApprovalRow) -> str:
    """What a grant covers, for a person to check: exactly these arguments, nothing like them."""
    return f"exactly {row.tool_name} {canonical_json(row.args).decode()}, in the same folder, mode and sandbox"


def _may_see_grant(tx: Transaction, caller: Caller, row: GrantRow) -> bool:
    return row.session_id is None or visible_session(tx, caller, row.session_id) is not None
