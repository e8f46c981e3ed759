"""Runs whose store cannot write just when they are to be taken up: they are taken up when it can."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corral.storage.api import StoreUnavailable
from tests.core.conftest import Open, allow
from tests.core.test_approvals import ASKS, ONCE, waiting
from tests.support.house import House, house
from tests.support.model_server import Hang, Say, conversation


class Full:
    """Refuses the next `times` takings up of the house's runs, as a full disk would; all else is written."""

    def __init__(self, home: House, times: int) -> None:
        self.left = times
        core, store = home.server.core, home.server.store
        write = store.write

        async def refusing(work: Any, on_commit: Callable[[Any], None] | None = None) -> Any:
            takes_up = getattr(on_commit, "func", on_commit) in (core._taken_up, core._all_taken_up)
            if takes_up and self.left > 0:
                self.left -= 1
                raise StoreUnavailable("the store cannot write now")
            return await write(work, on_commit)

        store.write = refusing  # type: ignore[method-assign]


async def test_a_decision_is_acted_on_though_the_store_could_not_write_just_then(open_house: Open) -> None:
    async with open_house(ONCE, ASKS) as home, await home.wire() as wire:
        approval = await waiting(home, wire)
        full = Full(home, times=3)
        await wire.effect("approval.resolve", approvalId=approval["approvalId"], decision="approve")
        await wire.event("agent.completed")
        assert full.left == 0


async def test_a_waiting_run_is_aborted_though_the_store_could_not_write_just_then(open_house: Open) -> None:
    async with open_house(ONCE, ASKS) as home, await home.wire() as wire:
        approval = await waiting(home, wire)
        full = Full(home, times=3)
        answer = await wire.effect("agent.abort", runId=approval["runId"])
        assert answer["status"] == "aborted"
        assert full.left == 0


async def test_recovery_takes_all_runs_up_though_the_store_could_not_write_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = conversation([[Hang(after=2), Say("at last")]])
    async with house(tmp_path / "data", script=script) as home, await home.wire() as wire:
        await allow(home)
        await wire.effect("agent.run", input="go", sessionId="s1")
        await wire.event("agent.delta")
    fulls: list[Full] = []
    told, recover = asyncio.Event(), type(home.server.core).recover

    async def on_a_full_disk(core: Any) -> int:
        await told.wait()
        fulls.append(Full(later, times=2))
        return await recover(core)

    monkeypatch.setattr(type(home.server.core), "recover", on_a_full_disk)
    async with house(tmp_path / "data", script=[Say("at last")]) as later, await later.wire() as wire:
        await wire.request("events.subscribe", {"sessionId": "s1", "after": 0})
        told.set()
        assert (await wire.event("agent.completed"))["payload"]["output"] == "at last"
        assert [full.left for full in fulls] == [0]
