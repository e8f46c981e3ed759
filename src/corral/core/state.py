"""What a run is driven with: the house's services, the run as the store has it, and the fence around its writes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from msgspec import Struct

from corral.bus.api import Bus
from corral.clock import Clock
from corral.core.transcript import Measured, Opening, load_transcript
from corral.executor.api import CallContext, ToolExecutor
from corral.governance.approvals import Approvals
from corral.governance.audit import Audit
from corral.governance.policy import EffectivePolicy, effective_policy
from corral.ids import Ids
from corral.models.api import Message, Models
from corral.protocol.errors import PolicyDenied
from corral.protocol.ready import look_through
from corral.protocol.types import RunStatus, SessionStatus
from corral.storage.api import Store, StoreUnavailable
from corral.storage.repositories import Transaction
from corral.storage.rows import AgentRow, ApprovalRow, RunRow, SessionRow, ToolRunRow
from corral.tracing import Record

look_through(Message)

log = logging.getLogger(__name__)

T = TypeVar("T")

_RETRY_FIRST_S = 0.1
_RETRY_MOST_S = 5.0


class LeaseLost(Exception):
    """Somebody else owns the run now, or it has ended; whatever this process still has to say is void."""


class RunOptions(Struct, kw_only=True, frozen=True):
    """What the server's settings say of every run. `data_dir` holds the workspaces' own folders."""

    data_dir: Path
    roots: Sequence[Path]
    model: str
    fallbacks: Sequence[str]
    tool_timeout_ms: int
    run_timeout_ms: int
    compaction: bool
    compaction_threshold: float
    memory: bool


class Deps(Struct, kw_only=True, frozen=True):
    """What a run needs of the rest of the house."""

    store: Store
    bus: Bus
    models: Models
    executor: ToolExecutor
    approvals: Approvals
    audit: Audit
    clock: Clock
    ids: Ids
    options: RunOptions
    record: Record | None = None
    """Where spans go, if they go anywhere."""


class Loaded(Struct, kw_only=True):
    """A run as the store has it.

    `open_calls` are its last message's calls without a result, `approvals` those of the run by
    tool call. `opening`, `messages`, `measured`, `notes_due` and `flush` are the transcript's.
    """

    run: RunRow
    session: SessionRow
    agent: AgentRow | None
    opening: Opening
    messages: list[Message]
    measured: Measured
    notes_due: bool
    flush: frozenset[str] | None
    open_calls: list[ToolRunRow]
    approvals: dict[str, ApprovalRow]
    policy: EffectivePolicy


def load(tx: Transaction, tenant_id: str, run_id: str) -> Loaded:
    """All that `continue` goes by. Raises LeaseLost if the run is not there to be driven."""
    run = tx.runs.get(tenant_id, run_id)
    session = tx.sessions.get(tenant_id, run.session_id) if run is not None else None
    if run is None or session is None or RunStatus(run.status).terminal:
        raise LeaseLost
    transcript = load_transcript(tx, run, session)
    # The calls of a message are written with the step that it is.
    open_calls, approvals = open_calls_of(tx, run) if run.steps else ([], {})
    return Loaded(
        run=run,
        session=session,
        agent=tx.agents.get(tenant_id, run.workspace_id, run.agent_id),
        opening=transcript.opening,
        messages=transcript.messages,
        measured=transcript.measured,
        notes_due=transcript.notes_due,
        flush=transcript.flush,
        open_calls=open_calls,
        approvals=approvals,
        policy=policy_of(tx, run),
    )


def open_calls_of(tx: Transaction, run: RunRow) -> tuple[list[ToolRunRow], dict[str, ApprovalRow]]:
    """The run's calls without a result, and its approvals by tool call."""
    calls = [row for row in tx.tool_runs.of_run(run.tenant_id, run.id) if row.state != "finished"]
    waiting = any(call.decision == "approval-required" for call in calls)
    approvals = tx.approvals.of_run(run.tenant_id, run.id) if waiting else []
    return calls, {row.tool_call_id: row for row in approvals}


def policy_of(tx: Transaction, run: RunRow) -> EffectivePolicy:
    """The policy that holds for the run, as of this transaction."""
    return effective_policy(tx, run.tenant_id, run.workspace_id, run.agent_id)


def context_of(options: RunOptions, run: RunRow, session: SessionRow, policy: EffectivePolicy) -> CallContext:
    """Where the run's tools work. Makes the workspace's own folder; raises PolicyDenied for a root not allowed."""
    return CallContext(
        tenant_id=run.tenant_id,
        workspace_id=run.workspace_id,
        session_id=session.id,
        run_id=run.id,
        root=folder_of(options, session.tenant_id, session.workspace_id, session),
        runtime_mode=run.runtime_mode,  # type: ignore[arg-type]
        bash_mode=policy.bash_mode,
        bash_network=policy.bash_network,
        timeout_ms=options.tool_timeout_ms,
    )


def folder_of(options: RunOptions, tenant_id: str, workspace_id: str, session: SessionRow | None) -> Path:
    """Where tools work: the session's root, or the workspace's own folder, which is made if need be.

    Raises PolicyDenied for a root that the server does not allow.
    """
    if session is None or session.root is None:
        folder = options.data_dir / "workspaces" / tenant_id / workspace_id
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder
    folder = Path(session.root)
    # Judged again: the settings may have changed since, or the path become a link.
    if folder.resolve() != folder or not any(folder == root or root in folder.parents for root in options.roots):
        raise PolicyDenied("the session's folder is no longer inside the roots that the server allows")
    return folder


LEASE_MS = 30_000
"""How long a run is owned before its owner must have renewed that."""


def let_go_at(run: RunRow, now_ms: int) -> int:
    """From when on a run's time does not run that its owner lets go of now: `run` as it stands in the store.

    A lease that has run out meanwhile was not renewed for the clock was put forward, the machine slept
    or the store could not write, and none of that is the run's own time. The loop, which counts on a clock that
    does not leap, has not ended the run for it; nor may whoever takes it up.
    """
    expires_at = run.lease_expires_at
    if expires_at is None or expires_at > now_ms:
        return now_ms
    return max(expires_at - LEASE_MS, run.started_at or 0)


def park(tx: Transaction, run: RunRow, now_ms: int) -> None:
    """Leave a run to the people that it waits for: owned by nobody, holding no place."""
    waiting = str(RunStatus.WAITING_APPROVAL)
    since = let_go_at(tx.runs.get(run.tenant_id, run.id) or run, now_ms)
    tx.runs.update(run.tenant_id, run.id, status=waiting, waiting_since=since, lease_expires_at=None)
    tx.sessions.update(run.tenant_id, run.session_id, status=str(SessionStatus.WAITING_APPROVAL))


class Fence:
    """Commits for one run under its lease: what another owner's epoch has overtaken is not written."""

    def __init__(self, store: Store, tenant_id: str, run_id: str, epoch: int) -> None:
        self._store = store
        self._tenant_id = tenant_id
        self._run_id = run_id
        self._epoch = epoch
        self.leaving = False
        """Set when the run is to be left: then a store that cannot write is not waited for."""

    async def commit(self, unit: Callable[[Transaction], T], on_commit: Callable[[T], None] | None = None) -> T:
        """Commit under the lease. While the store cannot write the run waits, and goes on when it can.

        Raises LeaseLost if the run has another owner or has ended.
        """

        def fenced(tx: Transaction) -> T:
            epoch, status = tx.runs.lease(self._tenant_id, self._run_id) or (None, "")
            if epoch != self._epoch or RunStatus(status).terminal:
                raise LeaseLost
            return unit(tx)

        delay = _RETRY_FIRST_S
        while True:
            try:
                return await self._store.write(fenced, on_commit)
            except StoreUnavailable:
                if self.leaving:
                    raise LeaseLost from None
                log.warning("store cannot write", extra={"action": "run.store_wait", "run": self._run_id})
                await asyncio.sleep(delay)
                delay = min(delay * 2, _RETRY_MOST_S)
