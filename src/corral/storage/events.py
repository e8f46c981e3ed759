"""Appending typed events to the journal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from corral.protocol.events import EVENTS
from corral.protocol.types import Approval, Wire
from corral.storage.repositories import Transaction
from corral.storage.rows import JournalEntry, SessionRow

# The two events of an approval share a payload, so their names cannot follow from it.
_NAMES = {payload: name for name, payload in EVENTS.items() if payload is not Approval}


def append(
    tx: Transaction,
    tenant_id: str,
    payload: Wire,
    now_ms: int,
    *,
    event: str | None = None,
    run_id: str | None = None,
) -> JournalEntry:
    """Journal one event; its session and run are fields of the payload, its name follows from its type.

    `event` names it where the type alone does not (`approval.required`, `approval.resolved`). `run_id` is
    the run of an event whose payload does not name one (`session.compacted`).
    """
    fields: Any = payload
    run_id = getattr(payload, "run_id", run_id)
    name = event or _NAMES[type(payload)]
    encoded = msgspec.json.encode(payload)
    return tx.journal.append(tenant_id, fields.session_id, name, encoded, run_id=run_id, now_ms=now_ms)


def append_changing(
    tx: Transaction, tenant_id: str, payload: Wire, now_ms: int, changes: Mapping[str, Any]
) -> tuple[JournalEntry, SessionRow]:
    """`append`, setting columns of the event's session too, which costs nothing then; the session after it."""
    fields: Any = payload
    run_id: str | None = getattr(payload, "run_id", None)
    return tx.journal.append_changing(
        tenant_id,
        fields.session_id,
        _NAMES[type(payload)],
        msgspec.json.encode(payload),
        run_id=run_id,
        now_ms=now_ms,
        changes=changes,
    )
