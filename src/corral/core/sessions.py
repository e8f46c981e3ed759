"""Sessions and what belongs to them: their life, their mode, their history, their outputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET

from corral.clock import Clock, rfc3339
from corral.core.agents import DEFAULT_AGENT
from corral.core.journal import append_session_updated, apply_mode, run_view, session_view
from corral.governance.access import require_run, require_session, visible_session
from corral.governance.audit import Audit
from corral.governance.caller import Caller
from corral.governance.paging import page_cursor, read_page_cursor
from corral.ids import Ids
from corral.protocol.errors import Forbidden, InvalidRequest, NotFound, SessionBusy
from corral.protocol.methods import (
    HistoryParams,
    HistoryResult,
    MaybeSessionResult,
    RunParams,
    RunResult,
    SessionDeletedResult,
    SessionParams,
    SessionResult,
    SessionsCreateParams,
    SessionsDeleteParams,
    SessionsListParams,
    SessionsListResult,
    SessionsUpdateParams,
    SetModeParams,
    SetModeResult,
    ToolsOutputParams,
    ToolsOutputResult,
)
from corral.protocol.types import HistoryItem
from corral.storage.repositories import Transaction
from corral.storage.rows import JournalEntry, SessionRow

TITLE_LENGTH = 80
PREVIEW_LENGTH = 200

_KEY = re.compile(
    r"workspace:(?P<workspace>[^/]+)/agent:(?P<agent>[^/]+)/"
    r"(main|dm:[^:/\s]+:[^:/\s]+|group:[^:/\s]+:[^:/\s]+)(:thread:[^:/\s]+)?"
)


class SessionMethods:
    """The methods of PROTOCOL.md that read or change sessions, one function for each."""

    def __init__(self, clock: Clock, ids: Ids, audit: Audit, roots: Sequence[Path]) -> None:
        self._clock = clock
        self._ids = ids
        self._audit = audit
        self._roots = [Path(root).resolve() for root in roots]

    def create(self, tx: Transaction, caller: Caller, params: SessionsCreateParams) -> SessionResult:
        agent_id = require_agent(tx, caller, params.agent_id if params.agent_id is not UNSET else DEFAULT_AGENT)
        row = self.new_row(caller, self._ids.new("s"), agent_id, self._clock.now_ms())
        if params.session_key is not UNSET:
            row.session_key = _checked_key(params.session_key, caller.workspace_id, agent_id)
        if params.title is not UNSET:
            row.title = params.title
        if params.runtime_mode is not UNSET:
            row.runtime_mode = params.runtime_mode
        if params.visibility is not UNSET:
            row.visibility = params.visibility
        if params.root is not UNSET:
            row.root = self._checked_root(params.root)
        tx.sessions.insert(row)
        self.record(tx, caller, row, "session.create", {"title": row.title, "root": row.root})
        return SessionResult(session=session_view(append_session_updated(tx, row, "created", row.created_at)))

    def record(self, tx: Transaction, caller: Caller, row: SessionRow, action: str, metadata: dict[str, Any]) -> None:
        """Audit what the caller did with a session."""
        shown = {"workspaceId": row.workspace_id, **metadata}
        self._audit.record_by(tx, caller, action, "session", row.id, metadata=shown, session_id=row.id)

    def new_row(self, caller: Caller, session_id: str, agent_id: str, now_ms: int) -> SessionRow:
        """A session of the caller's with the defaults, not yet inserted."""
        return SessionRow(
            tenant_id=caller.tenant_id,
            id=session_id,
            workspace_id=caller.workspace_id,
            agent_id=agent_id,
            owner_user_id=caller.user_id,
            session_key=f"workspace:{caller.workspace_id}/agent:{agent_id}/main",
            visibility="private",
            title="",
            preview="",
            runtime_mode="local",
            created_at=now_ms,
            updated_at=now_ms,
        )

    def update(self, tx: Transaction, caller: Caller, params: SessionsUpdateParams) -> SessionResult:
        row = require_session(tx, caller, params.session_id)
        changes: dict[str, Any] = {}
        if params.title is not UNSET and params.title != row.title:
            changes["title"] = params.title
        if params.visibility is not UNSET and params.visibility != row.visibility:
            if row.owner_user_id != caller.user_id:
                raise Forbidden("only the owner of a session may change $.params.visibility")
            changes["visibility"] = params.visibility
        if not changes:
            return SessionResult(session=session_view(row))
        tx.sessions.update(row.tenant_id, row.id, **changes)
        self.record(tx, caller, row, "session.update", changes)
        reason = "renamed" if "title" in changes else "visibility"
        row = msgspec.structs.replace(row, **changes)
        return SessionResult(session=session_view(append_session_updated(tx, row, reason, self._clock.now_ms())))

    def delete(self, tx: Transaction, caller: Caller, params: SessionsDeleteParams) -> SessionDeletedResult:
        row = require_session(tx, caller, params.session_id)
        if row.active_run_id is not None:
            raise SessionBusy(
                "a run is on in this session: wait for its end or abort it first",
                details={"runId": row.active_run_id},
            )
        self.record(tx, caller, row, "session.delete", {"title": row.title, "stateVersion": row.state_version})
        # Told before it is gone, so that those who follow it hear of its end.
        append_session_updated(tx, row, "deleted", self._clock.now_ms())
        tx.sessions.delete(row.tenant_id, row.id)
        return SessionDeletedResult(session_id=row.id, deleted=True)

    def get(self, tx: Transaction, caller: Caller, params: SessionParams) -> MaybeSessionResult:
        row = visible_session(tx, caller, params.session_id)
        return MaybeSessionResult(session=session_view(row) if row is not None else None)

    def list(self, tx: Transaction, caller: Caller, params: SessionsListParams) -> SessionsListResult:
        rows = tx.sessions.page(
            caller.tenant_id,
            caller.workspace_id,
            user_id=caller.user_id,
            agent_id=params.agent_id if params.agent_id is not UNSET else None,
            limit=params.limit + 1,
            before=read_page_cursor("sessions", params.cursor) if params.cursor is not UNSET else None,
        )
        items = rows[: params.limit]
        more = page_cursor("sessions", items[-1].created_at, items[-1].id) if len(rows) > params.limit else UNSET
        return SessionsListResult(items=[session_view(row) for row in items], next_cursor=more)

    def history(self, tx: Transaction, caller: Caller, params: HistoryParams) -> HistoryResult:
        row = require_session(tx, caller, params.session_id)
        if params.after_id is not UNSET:
            found = tx.journal.after(row.tenant_id, row.id, params.after_id, params.limit + 1)
            items = found[: params.limit]
            edge = items[-1].version if len(found) > params.limit else None
        else:
            before = params.before_id if params.before_id is not UNSET else None
            found = tx.journal.before(row.tenant_id, row.id, before, params.limit + 1)
            items = found[-params.limit :]
            edge = items[0].version if len(found) > params.limit else None
        return HistoryResult(
            items=[_history_item(entry) for entry in items],
            next_cursor=str(edge) if edge is not None else UNSET,
        )

    def set_mode(self, tx: Transaction, caller: Caller, params: SetModeParams) -> SetModeResult:
        row = require_session(tx, caller, params.session_id)
        mode = params.runtime_mode
        now = self._clock.now_ms()
        self.record(tx, caller, row, "runtime.setMode", {"runtimeMode": mode, "queued": row.active_run_id is not None})
        if row.active_run_id is not None:
            if row.queued_runtime_mode != mode:
                tx.sessions.update(row.tenant_id, row.id, queued_runtime_mode=mode)
                append_session_updated(tx, msgspec.structs.replace(row, queued_runtime_mode=mode), "mode", now)
            return SetModeResult(session_id=row.id, runtime_mode=mode, status="queued-change", effective_on="next_turn")
        apply_mode(tx, row, mode, now)
        return SetModeResult(session_id=row.id, runtime_mode=mode, status="applied")

    def run(self, tx: Transaction, caller: Caller, params: RunParams) -> RunResult:
        """`runs.get`."""
        return RunResult(run=run_view(require_run(tx, caller, params.run_id)))

    def tool_output(self, tx: Transaction, caller: Caller, params: ToolsOutputParams) -> ToolsOutputResult:
        """`tools.output`: bytes `offset` to `offset + limit` of the whole, cut at whole characters."""
        call = tx.tool_runs.get(caller.tenant_id, params.tool_call_id)
        if call is None or visible_session(tx, caller, call.session_id) is None:
            raise NotFound("there is no such tool call: $.params.toolCallId names none that you may see")
        kept = tx.outputs.read(caller.tenant_id, call.id, params.offset, params.limit + 4)
        if kept is None and call.truncated:
            raise NotFound("the whole of this output is no longer kept: the event has its beginning and its end")
        if kept is None:
            kept = _output_in_journal(tx, caller.tenant_id, call.session_id, call.run_id, call.id, params.offset)
        data, total = kept
        data = _whole_characters(data, params.limit)
        return ToolsOutputResult(
            text=data.decode("utf-8", "replace"),
            offset=params.offset,
            total_bytes=total,
            eof=params.offset + len(data) >= total,
        )

    def _checked_root(self, root: str) -> str:
        try:
            path = Path(root)
            resolved = path.resolve(strict=True) if path.is_absolute() and "\0" not in root else None
        except (OSError, RuntimeError):
            resolved = None
        # One answer for a folder that is not allowed and for one that is not there.
        if resolved is None or not resolved.is_dir() or not root_is_allowed(resolved, self._roots):
            raise InvalidRequest(
                "$.params.root must be an absolute path of a folder inside one of the server's roots: "
                "CORRAL_ROOTS or `roots` in corral.toml lists them"
            )
        return str(resolved)


def root_is_allowed(resolved: Path, roots: Sequence[Path]) -> bool:
    """Whether an already resolved folder lies in one of the resolved roots."""
    return any(resolved == root or root in resolved.parents for root in roots)


def require_agent(tx: Transaction, caller: Caller, agent_id: str) -> str:
    """The id if the workspace has that agent, or NotFound."""
    if tx.agents.get(caller.tenant_id, caller.workspace_id, agent_id) is None:
        raise NotFound("there is no such agent: $.params.agentId is none of agents.list")
    return agent_id


def cut_title(text: str) -> str:
    """A title cut from an input: its first line that holds anything."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return _cut(line, TITLE_LENGTH)


def cut_preview(text: str) -> str:
    return _cut(" ".join(text.split()), PREVIEW_LENGTH)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def _checked_key(key: str, workspace_id: str, agent_id: str) -> str:
    found = _KEY.fullmatch(key)
    if found is None or found["workspace"] != workspace_id or found["agent"] != agent_id:
        base = f"workspace:{workspace_id}/agent:{agent_id}"
        raise InvalidRequest(
            f"$.params.sessionKey must be {base}/main, {base}/dm:CHANNEL:PEER or {base}/group:CHANNEL:ID, "
            "each with :thread:ID behind it if wanted"
        )
    return key


def _history_item(entry: JournalEntry) -> HistoryItem:
    payload = msgspec.json.decode(entry.payload)
    role: Any = UNSET
    text: Any = UNSET
    if entry.event == "agent.accepted":
        role, text = "user", input_text(payload["input"])
    elif entry.event == "agent.message":
        role, text = "assistant", payload["text"]
    return HistoryItem(
        id=entry.version,
        run_id=entry.run_id,
        event=entry.event,
        role=role,
        text=text,
        payload=payload,
        created_at=rfc3339(entry.created_at),
    )


def input_text(given: Any) -> str:
    """The text of a run's input as it stands in the journal: its text parts, joined by newlines."""
    if isinstance(given, str):
        return given
    return "\n".join(part["text"] for part in given if part.get("type") == "text")


def _output_in_journal(
    tx: Transaction, tenant_id: str, session_id: str, run_id: str, call_id: str, offset: int
) -> tuple[bytes, int]:
    for entry in tx.journal.of_run(tenant_id, session_id, run_id):
        if entry.event == "agent.tool_result":
            payload = msgspec.json.decode(entry.payload)
            if payload["toolCallId"] == call_id:
                data = payload["output"].encode()
                return data[offset:], len(data)
    return b"", 0


def _whole_characters(data: bytes, limit: int) -> bytes:
    """At most `limit` bytes that do not end within a UTF-8 character, but always some progress."""
    if len(data) <= limit:
        return data
    end = limit
    while end > 0 and data[end] & 0xC0 == 0x80:
        end -= 1
    return data[: end or limit]
