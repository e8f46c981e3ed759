"""Sessions by the names that people give them: an id, or a title."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET

from corral.cli import FAILED, USAGE, CliError
from corral.protocol.types import Session

if TYPE_CHECKING:
    from corral.client import Corral

_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_PAGES = 25
_PAGE = 200


async def find_session(corral: Corral, name: str) -> Session | None:
    """The session of that id, else the one of that title; None if there is none of either.

    Raises CliError if several have the title.
    """
    if _ID.fullmatch(name):
        found = (await corral.request("sessions.get", sessionId=name))["session"]
        if found is not None:
            return msgspec.convert(found, Session)
    sessions = await list_sessions(corral, _PAGES * _PAGE)
    for same in (
        [session for session in sessions if session.title == name],
        [session for session in sessions if session.title.casefold() == name.casefold()],
    ):
        if len(same) == 1:
            return same[0]
        if same:
            ids = ", ".join(session.id for session in same[:3]) + (" and more" if len(same) > 3 else "")
            raise CliError(f"{len(same)} sessions are called {name!r}", f"name one by its id: {ids}", code=USAGE)
    return None


async def require_session(corral: Corral, name: str) -> Session:
    """The session of that id or title. Raises CliError if there is none."""
    session = await find_session(corral, name)
    if session is None:
        raise CliError(
            f"there is no session {name!r} that you may see", "`corral sessions list` shows them", code=FAILED
        )
    return session


async def list_sessions(corral: Corral, limit: int, **params: Any) -> list[Session]:
    """The newest sessions, at most `limit`."""
    sessions: list[Session] = []
    while len(sessions) < limit:
        page = await corral.request("sessions.list", limit=min(_PAGE, limit - len(sessions)), **params)
        sessions += msgspec.convert(page["items"], list[Session])
        if "nextCursor" not in page:
            break
        params["cursor"] = page["nextCursor"]
    return sessions


async def session_for(corral: Corral, name: str | None, cwd: str | None, agent: str | None) -> str | None:
    """The id of the session that a run goes into; None leaves it to the gateway to make one.

    A name that no session has is the id of a new one, or its title where it cannot be an id.
    """
    found = await find_session(corral, name) if name is not None else None
    root = None if cwd is None else _folder(cwd)
    if found is not None:
        works_in = found.root if found.root is not UNSET else None
        if root is not None and root != works_in:
            where = "the workspace's own folder" if works_in is None else works_in
            raise CliError(
                f"session {found.id} works in {where}, and a session stays in its folder",
                "leave --session out for a new one in the folder of --cwd",
                code=USAGE,
            )
        return found.id
    if root is None and (name is None or _ID.fullmatch(name)):
        return name
    given = {"title": name, "root": root, "agentId": agent}
    made = await corral.request("sessions.create", **{key: value for key, value in given.items() if value is not None})
    return str(made["session"]["id"])


def _folder(cwd: str) -> str:
    """As the gateway knows folders: absolute, without links."""
    return os.path.realpath(os.path.expanduser(cwd))
