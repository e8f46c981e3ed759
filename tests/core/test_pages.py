"""Pages of a session's history, of sessions and of approvals, as a client turns them over."""

from __future__ import annotations

from typing import Any

import pytest

from tests.core.conftest import Open
from tests.support.model_server import CallTools, Say, conversation
from tests.support.wire import Refused, Wire


async def versions(wire: Wire, **params: Any) -> tuple[list[int], str | None]:
    """The ids of a page of the history of s1, and its nextCursor."""
    page = await wire.request("sessions.history", {"sessionId": "s1", **params})
    return [item["id"] for item in page["items"]], page.get("nextCursor")


async def test_a_history_is_read_from_either_end_and_says_whether_there_is_more(open_house: Open) -> None:
    async with open_house([Say("one"), Say("two"), Say("three")]) as home, await home.wire() as wire:
        for text in ("a", "b", "c"):
            run = await wire.effect("agent.run", input=text, sessionId="s1")
            await wire.event("agent.completed", runId=run["runId"])
        session = (await wire.request("sessions.get", {"sessionId": "s1"}))["session"]
        every = list(range(1, session["stateVersion"] + 1))
        assert len(every) >= 9
        assert await versions(wire) == (every, None)
        assert await versions(wire, limit=3) == (every[-3:], str(every[-3]))
        assert await versions(wire, limit=3, beforeId=every[-3]) == (every[-6:-3], str(every[-6]))
        assert await versions(wire, limit=3, beforeId=every[3]) == (every[:3], None)
        assert await versions(wire, limit=3, afterId=0) == (every[:3], str(every[2]))
        assert await versions(wire, limit=3, afterId=every[-4]) == (every[-3:], None)
        assert await versions(wire, afterId=every[-1]) == ([], None)
        # With both it is afterId that decides.
        assert await versions(wire, limit=3, afterId=every[1], beforeId=every[3]) == (every[2:5], str(every[4]))


async def test_a_list_takes_its_own_cursors_only(open_house: Open) -> None:
    asking = [CallTools([("bash_exec", {"command": "true"})]), Say("done")]
    patch = {"highRisk": "approval-required"}
    async with open_house(conversation(asking), patch) as home, await home.wire() as wire:
        for name in ("s1", "s2", "s3"):
            run = await wire.effect("agent.run", input="go", sessionId=name)
            await wire.event("approval.required", runId=run["runId"])
        pages = {}
        for method in ("sessions.list", "approval.queue"):
            first = await wire.request(method, {"limit": 2})
            second = await wire.request(method, {"limit": 2, "cursor": first["nextCursor"]})
            assert (len(first["items"]), len(second["items"]), "nextCursor" in second) == (2, 1, False)
            pages[method] = first["nextCursor"]
        for method, other in (("sessions.list", "approval.queue"), ("approval.queue", "sessions.list")):
            with pytest.raises(Refused) as refused:
                await wire.request(method, {"limit": 2, "cursor": pages[other]})
            assert refused.value.code == "INVALID_REQUEST"
            assert "$.params.cursor" in refused.value.message
