"""How sessions and runs look on the wire, and the events that tell of a session itself."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from corral import faults
from corral.clock import rfc3339
from corral.protocol.events import RuntimeModeChanged, SessionUpdated
from corral.protocol.ready import look_through
from corral.protocol.types import Run, RunError, Session, Usage
from corral.storage.events import append
from corral.storage.repositories import Transaction
from corral.storage.rows import RunRow, SessionRow

look_through(RunError)


def append_session_updated(tx: Transaction, session: SessionRow, reason: str, now_ms: int) -> SessionRow:
    """Journal `session.updated` with the session as it is after this very event."""
    after = msgspec.structs.replace(session, state_version=session.state_version + 1, updated_at=now_ms)
    event = SessionUpdated(session_id=session.id, session=session_view(after), reason=reason)
    append(tx, session.tenant_id, event, now_ms)
    return after


def apply_mode(tx: Transaction, session: SessionRow, mode: str, now_ms: int) -> SessionRow:
    """Set the session's runtime mode now, journalled; any queued change is done with."""
    tx.sessions.update(session.tenant_id, session.id, runtime_mode=mode, queued_runtime_mode=None)
    changed = RuntimeModeChanged(session_id=session.id, runtime_mode=mode, status="applied")  # type: ignore[arg-type]
    append(tx, session.tenant_id, changed, now_ms)
    faults.reached("mode.applying", session.id)
    after = msgspec.structs.replace(
        session, runtime_mode=mode, queued_runtime_mode=None, state_version=session.state_version + 1
    )
    return append_session_updated(tx, after, "mode", now_ms)


def session_view(row: SessionRow) -> Session:
    return Session(
        id=row.id,
        session_key=row.session_key,
        tenant_id=row.tenant_id,
        workspace_id=row.workspace_id,
        agent_id=row.agent_id,
        owner_user_id=row.owner_user_id,
        visibility=row.visibility,  # type: ignore[arg-type]
        title=row.title,
        preview=row.preview,
        runtime_mode=row.runtime_mode,  # type: ignore[arg-type]
        queued_runtime_mode=_or_unset(row.queued_runtime_mode),
        sync_state=row.sync_state,  # type: ignore[arg-type]
        status=row.status,  # type: ignore[arg-type]
        active_run_id=_or_unset(row.active_run_id),
        state_version=row.state_version,
        context_usage=row.context_usage,
        compaction_count=row.compaction_count,
        memory_flush_state=row.memory_flush_state,  # type: ignore[arg-type]
        root=_or_unset(row.root),
        created_at=rfc3339(row.created_at),
        updated_at=rfc3339(row.updated_at),
    )


def run_view(row: RunRow) -> Run:
    return Run(
        id=row.id,
        session_id=row.session_id,
        status=row.status,  # type: ignore[arg-type]
        input=row.input,
        output=_or_unset(row.output),
        error=msgspec.convert(row.error, RunError) if row.error is not None else UNSET,
        model=row.model,
        steps=row.steps,
        usage=run_usage(row),
        attempts=row.attempts,
        created_at=rfc3339(row.created_at),
        started_at=rfc3339(row.started_at) if row.started_at is not None else UNSET,
        finished_at=rfc3339(row.finished_at) if row.finished_at is not None else UNSET,
    )


def run_usage(row: RunRow) -> Usage:
    """What the run has used up so far."""
    return Usage(input_tokens=row.input_tokens, output_tokens=row.output_tokens, cost_usd=row.cost_usd)


def _or_unset(value: Any) -> Any | UnsetType:
    return UNSET if value is None else value
