"""What a caller may see. What is not the caller's answers exactly like what does not exist."""

from __future__ import annotations

from corral.governance.caller import Caller
from corral.protocol.errors import NotFound
from corral.storage.repositories import Transaction
from corral.storage.rows import RunRow, SessionRow


def may_see(caller: Caller, session: SessionRow) -> bool:
    """Whether the session lies in a workspace of the caller's and is shared or the caller's own."""
    return (
        session.tenant_id == caller.tenant_id
        and session.workspace_id in caller.principal.workspace_ids
        and (session.owner_user_id == caller.user_id or session.visibility == "workspace")
    )


def visible_session(tx: Transaction, caller: Caller, session_id: str) -> SessionRow | None:
    """The session if there is one that the caller may see, else None."""
    session = tx.sessions.get(caller.tenant_id, session_id)
    return session if session is not None and may_see(caller, session) else None


def require_session(tx: Transaction, caller: Caller, session_id: str) -> SessionRow:
    """The session, or NotFound."""
    session = visible_session(tx, caller, session_id)
    if session is None:
        raise NotFound("there is no such session: $.params.sessionId names none that you may see")
    return session


def require_run(tx: Transaction, caller: Caller, run_id: str) -> RunRow:
    """The run if its session may be seen, or NotFound."""
    run = tx.runs.get(caller.tenant_id, run_id)
    if run is None or visible_session(tx, caller, run.session_id) is None:
        raise NotFound("there is no such run: $.params.runId names none that you may see")
    return run
