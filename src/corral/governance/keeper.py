"""Keeps the audit chains: signs their heads outside the database, checks them, and lets old records go.

One keeper for a store. Its work is done off the writer, in the store's readers and in threads.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from corral.clock import Clock, rfc3339
from corral.governance.anchors import AnchorError, AnchorFiles
from corral.governance.chain import GENESIS, ChainCheck, Finding
from corral.protocol.canonical import canonical_json
from corral.protocol.methods import AuditVerifyResult
from corral.protocol.types import AuditAnchor
from corral.storage.api import Store, StoreUnavailable
from corral.storage.repositories import Transaction
from corral.storage.repositories.governance import AuditHead, StoredAudit

if TYPE_CHECKING:
    from corral.governance.audit import Audit

log = logging.getLogger(__name__)

INTERVAL_S = 1.0
"""How often heads are signed, at most; what is recorded between two is not vouched for if the server dies."""

_PAGE = 500
_PURGE_AT_ONCE = 1_000
# A record may be committed a little later than it is made: so long a tenant's head is looked at again.
_SETTLED_S = 5.0
KEY_META = "audit_public_key"
_BROKEN = "audit.broken"


class _State(Struct, kw_only=True):
    """One look at a tenant's chain: its head, and whether what was signed is still in it."""

    head: AuditHead | None
    departed: Finding | None
    base_id: int
    base_hash: str


class AuditKeeper:
    """Signs, checks and purges. `run` is a task to be supervised; `close` signs a last time.

    The files are opened, and the library for signatures is loaded, when first needed.
    """

    def __init__(self, store: Store, clock: Clock, audit: Audit, data_dir: Path) -> None:
        self._store = store
        self._clock = clock
        self._audit = audit
        self._data_dir = data_dir
        self._files: AnchorFiles | None = None
        self._looked_at_all = False
        self._signing = asyncio.Lock()
        # A chain that is being purged must not be walked meanwhile.
        self._walking = asyncio.Lock()

    async def run(self, interval_s: float = INTERVAL_S) -> None:
        """Sign what has changed, for ever. A failure is logged once and tried again."""
        failing = False
        while True:
            await asyncio.sleep(interval_s)
            try:
                await self.sign()
                failing = False
            except (StoreUnavailable, OSError, AnchorError) as error:
                if not failing:
                    log.error("the audit's heads cannot be signed: %s", error, extra={"action": "audit.sign_failed"})
                failing = True

    async def close(self) -> None:
        """Sign the heads of all chains a last time; before the store is closed, after `run` has ended."""
        try:
            await self.sign(everything=True)
        except (StoreUnavailable, OSError, AnchorError) as error:
            log.error("the audit's heads cannot be signed: %s", error, extra={"action": "audit.sign_failed"})

    # ---- signing

    async def sign(self, *, everything: bool = False) -> None:
        """Sign the heads that have moved: of the chains that changed, of all the first time or if `everything`.

        A chain that does not hold what was signed of it is not signed again, or its new head would
        take the place of the evidence; that is audited. Raises StoreUnavailable, OSError, AnchorError.
        """
        async with self._signing:
            files = await self._opened()
            everything = everything or not self._looked_at_all
            names = self._changed()
            heads = files.heads

            def look(tx: Transaction) -> dict[str, _State]:
                tenants = {*tx.audit.tenants(), *heads} if everything else names
                return {tenant: _look(tx, tenant, heads.get(tenant)) for tenant in tenants}

            if not (everything or names):
                return
            states = await self._store.read(look)
            self._looked_at_all = True
            if files.problem is None:
                await self._write(files, states)
        for tenant, state in states.items():
            finding = state.departed
            if files.problem is not None:
                finding = Finding(at=state.base_id + 1, reason=files.problem)
            if finding is not None:
                await self._report(tenant, finding)

    async def _write(self, files: AnchorFiles, states: dict[str, _State]) -> None:
        at = rfc3339(self._clock.now_ms())
        moved = [
            (tenant, state, state.head)
            for tenant, state in states.items()
            if state.head is not None and state.departed is None and _moved(files.heads.get(tenant), state.head)
        ]
        if not moved:
            return

        def work() -> list[AuditAnchor]:
            return files.write(
                [
                    files.signer.anchor(
                        tenant_id=tenant,
                        id=head.id,
                        hash=head.hash,
                        base_id=state.base_id,
                        base_hash=state.base_hash,
                        at=at,
                    )
                    for tenant, state, head in moved
                ]
            )

        for anchor in await asyncio.to_thread(work):
            # Whoever collects the logs elsewhere has, in this line, what nobody here can take back.
            log.info(
                "audit checkpoint: record %d has hash %s",
                anchor.id,
                anchor.hash,
                extra={"action": "audit.checkpoint", "tenant": anchor.tenant_id, "record": anchor.id},
            )

    def _changed(self) -> set[str]:
        """The tenants whose chains may have grown; those that have been quiet for a while are forgotten."""
        changed, now = self._audit.changed, self._clock.monotonic()
        names = set(changed)
        for tenant in names:
            when = changed.get(tenant)
            if when is not None and now - when > _SETTLED_S:
                popped = changed.pop(tenant, None)
                if popped is not None and popped != when:  # the writer's thread was quicker
                    changed.setdefault(tenant, popped)
        return names

    async def _opened(self) -> AnchorFiles:
        """The files, opened once, by whoever holds `_signing`."""
        if self._files is None:
            files = await asyncio.to_thread(lambda: AnchorFiles.open(self._data_dir))
            known = await self._store.read(lambda tx: tx.meta.get(KEY_META))
            if known is None:
                await self._store.write(lambda tx: tx.meta.set(KEY_META, files.signer.public_key))
            elif known != files.signer.public_key:
                files.problem = files.problem or "the key in the data directory is not the one that the store knows"
            self._files = files
        return self._files

    # ---- checking

    async def verify(self, tenant_id: str) -> AuditVerifyResult:
        """Check the tenant's chain from its beginning, and against everything that was signed of it.

        A finding is audited, once. The anchor of the result is signed for the head that was found
        good. Raises StoreUnavailable.
        """
        async with self._walking:
            check, files = await self._walked(tenant_id)
        if check.finding is not None:
            check.finding = await self._report(tenant_id, check.finding)
            return check.result()
        if files is None:
            return check.result()
        base = files.heads.get(tenant_id)
        anchor = await asyncio.to_thread(
            lambda: files.signer.anchor(
                tenant_id=tenant_id,
                id=check.head_id,
                hash=check.head_hash,
                base_id=base.base_id if base is not None else 0,
                base_hash=base.base_hash if base is not None else GENESIS,
                at=rfc3339(self._clock.now_ms()),
            )
        )
        return check.result(anchor)

    async def _walked(self, tenant_id: str) -> tuple[ChainCheck, AnchorFiles | None]:
        files, anchors, problem = await self._anchors(tenant_id)
        check = ChainCheck(tenant_id, anchors)
        after: Any = -(2**63)
        while True:

            def page(tx: Transaction, check: ChainCheck = check, after: Any = after) -> tuple[ChainCheck, int, Any]:
                # On a copy, as a store may ask a query twice.
                check = copy.copy(check)
                rows = tx.audit.scan(tenant_id, after, _PAGE)
                for row in rows:
                    if not check.feed(as_wire(row)):
                        break
                return check, len(rows), rows[-1].id if rows else after

            check, count, after = await self._store.read(page)
            if check.finding is not None or count < _PAGE:
                break
        check.end()
        if problem is not None:
            check.broken(check.base_id + 1, problem)
        return check, files

    async def _anchors(self, tenant_id: str) -> tuple[AnchorFiles | None, list[AuditAnchor], str | None]:
        """The files, what was signed of the tenant's chain, and what is wrong with the files."""
        try:
            async with self._signing:
                files = await self._opened()
            checkpoints, problem = await asyncio.to_thread(lambda: files.checkpoints(tenant_id))
        except (AnchorError, OSError) as error:
            log.error("the audit's heads cannot be read: %s", error, extra={"action": "audit.anchors_unreadable"})
            return None, [], "what was signed of the chain cannot be read"
        head = files.heads.get(tenant_id)
        return files, [*checkpoints, *([head] if head is not None else [])], files.problem or problem

    async def _report(self, tenant_id: str, finding: Finding) -> Finding:
        """Audit a finding unless it has been; gives it as it was when it was first made.

        Records that come after the end was cut off move the end, not the finding.
        """

        def work(tx: Transaction) -> tuple[Finding, bool]:
            before = None
            while rows := tx.audit.page(
                tenant_id,
                from_=None,
                to=None,
                action=_BROKEN,
                actor=None,
                session_id=None,
                run_id=None,
                limit=100,
                before_id=before,
            ):
                for row in rows:
                    at, witness = row.metadata.get("brokenAt"), row.metadata.get("witness")
                    same = at == finding.at or (witness is not None and witness == finding.witness)
                    if same and type(at) is int:
                        return msgspec.structs.replace(finding, at=at), False
                before = rows[-1].id
            self._audit.record(
                tx,
                tenant_id=tenant_id,
                action=_BROKEN,
                actor="system:audit",
                actor_type="system",
                resource_type="audit",
                resource_id=tenant_id,
                outcome="failed",
                metadata={"brokenAt": finding.at, "reason": finding.reason, "witness": finding.witness},
                trace_id="audit",
            )
            return finding, True

        known, new = await self._store.write(work)
        if new:
            log.error(
                "the audit chain is broken at record %d: %s",
                known.at,
                known.reason,
                extra={"action": _BROKEN, "tenant": tenant_id, "record": known.at},
            )
        return known

    # ---- retention

    async def purge(self, keep_ms: int) -> int:
        """Delete the records of every tenant that are older than `keep_ms`; how many.

        Where a chain then begins is signed first, and recorded (`audit.purged`). The last record
        always stays, and of a chain that is broken everything. Raises StoreUnavailable, OSError, AnchorError.
        """
        await self.sign(everything=True)
        purged = 0
        for tenant_id in await self._store.read(lambda tx: tx.audit.tenants()):
            async with self._walking:
                purged += await self._purge(tenant_id, rfc3339(max(0, self._clock.now_ms() - keep_ms)))
        return purged

    async def _purge(self, tenant_id: str, before: str) -> int:
        through = await self._store.read(lambda tx: tx.audit.last_before(tenant_id, before))
        check, files = await self._walked(tenant_id)
        if check.finding is not None or files is None:
            if check.finding is not None:
                await self._report(tenant_id, check.finding)
            return 0
        anchor = files.heads.get(tenant_id)
        if anchor is None:  # its first record came after the heads were signed
            return 0
        if through > anchor.base_id:
            row = await self._store.read(lambda tx: tx.audit.get(tenant_id, through))
            assert row is not None
            async with self._signing:
                await self._move_base(files, tenant_id, row.id, row.hash)
            anchor = files.heads[tenant_id]
        return await self._delete(tenant_id, anchor.base_id)

    async def _move_base(self, files: AnchorFiles, tenant_id: str, base_id: int, base_hash: str) -> None:
        """Say where the chain will begin before it does: if this process dies here, that is no finding."""

        def record(tx: Transaction) -> None:
            self._audit.record(
                tx,
                tenant_id=tenant_id,
                action="audit.purged",
                actor="system:audit",
                actor_type="system",
                resource_type="audit",
                resource_id=tenant_id,
                metadata={"throughId": base_id, "hash": base_hash},
                trace_id="audit",
            )

        await self._store.write(record)
        old = files.heads[tenant_id]
        at = rfc3339(self._clock.now_ms())
        await asyncio.to_thread(
            lambda: files.write(
                [
                    files.signer.anchor(
                        tenant_id=tenant_id, id=old.id, hash=old.hash, base_id=base_id, base_hash=base_hash, at=at
                    )
                ]
            )
        )

    async def _delete(self, tenant_id: str, through: int) -> int:
        """Delete the records up to `through`, in units small enough to keep nobody waiting, the oldest first."""
        deleted = 0

        def work(tx: Transaction) -> tuple[int, bool]:
            first = tx.audit.scan(tenant_id, 0, 1)
            if not first or first[0].id > through:
                return 0, True
            return tx.audit.delete_through(tenant_id, min(through, first[0].id + _PURGE_AT_ONCE - 1)), False

        while True:
            count, done = await self._store.write(work)
            deleted += count
            if done:
                return deleted


def _look(tx: Transaction, tenant_id: str, anchor: AuditAnchor | None) -> _State:
    head = tx.audit.head(tenant_id)
    if anchor is None:
        return _State(head=head, departed=None, base_id=0, base_hash=GENESIS)
    departed = None
    if head is None or head.id < anchor.id:
        at = head.id + 1 if head is not None else anchor.base_id + 1
        departed = Finding(at=at, reason="the end of the chain is cut off", witness=f"signed {anchor.id}")
    else:
        [row] = tx.audit.scan(tenant_id, anchor.id - 1, 1)
        if row.id != anchor.id or row.fields is None or row.fields["hash"] != anchor.hash:
            departed = Finding(
                at=anchor.id, reason="a record is not the one that was signed", witness=f"signed {anchor.id}"
            )
    return _State(head=head, departed=departed, base_id=anchor.base_id, base_hash=anchor.base_hash)


def _moved(anchor: AuditAnchor | None, head: AuditHead) -> bool:
    return anchor is None or head.id > anchor.id


def as_wire(row: StoredAudit) -> dict[str, Any]:
    """A stored record by its names on the wire; nothing, if it is not even of that form.

    `sessionId` and `runId` have columns of their own, for look-ups, that must say what the metadata says.
    """
    fields = row.fields
    if fields is None:
        return {}
    try:
        metadata = msgspec.json.decode(fields["metadata"])
        # In this form and no other: a text with a name twice, say, can be read in two ways.
        if not isinstance(metadata, dict) or canonical_json(metadata).decode() != fields["metadata"]:
            return {}
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError):
        return {}
    if (fields["session_id"], fields["run_id"]) != (metadata.get("sessionId"), metadata.get("runId")):
        return {}
    return {
        "tenantId": fields["tenant_id"],
        "id": fields["id"],
        "action": fields["action"],
        "actor": fields["actor"],
        "actorType": fields["actor_type"],
        "resourceType": fields["resource_type"],
        "resourceId": fields["resource_id"],
        "outcome": fields["outcome"],
        "metadata": metadata,
        "traceId": fields["trace_id"],
        "createdAt": fields["created_at"],
        "prevHash": fields["prev_hash"],
        "hash": fields["hash"],
    }
