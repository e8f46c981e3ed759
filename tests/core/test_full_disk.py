"""Runs whose store cannot write just when they are to be taken up: they are taken up when it can."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from corral.storage.repositories.runs import Runs
from tests.core.conftest import Open
from tests.core.test_approvals import ASKS, ONCE, waiting
from tests.support.house import house
from tests.support.model_server import Hang, Say, conversation


class Full:
    """The disk is full for the next `times` claims of a lease, and for nothing else."""

    def __init__(self, patch: pytest.MonkeyPatch, times: int) -> None:
        self.left = times
        claim = Runs.claim

        def refusing(*args: Any, **given: Any) -> int | None:
            if self.left > 0:
                self.left -= 1
                error = sqlite3.OperationalError("database or disk is full")
                error.sqlite_errorcode = sqlite3.SQLITE_FULL
                raise error
            return claim(*args, **given)

        patch.setattr(Runs, "claim", refusing)


async def test_a_decision_is_acted_on_though_the_store_could_not_write_just_then(
    open_house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_house(ONCE, ASKS) as home, await home.wire() as wire:
        approval = await waiting(home, wire)
        full = Full(monkeypatch, times=4)
        await wire.effect("approval.resolve", approvalId=approval["approvalId"], decision="approve")
        await wire.event("agent.completed")
        assert full.left == 0


async def test_a_waiting_run_is_aborted_though_the_store_could_not_write_just_then(
    open_house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_house(ONCE, ASKS) as home, await home.wire() as wire:
        approval = await waiting(home, wire)
        full = Full(monkeypatch, times=4)
        answer = await wire.effect("agent.abort", runId=approval["runId"])
        assert answer["status"] == "aborted"
        assert full.left == 0


async def test_recovery_takes_all_runs_up_though_the_store_could_not_write_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = conversation([[Hang(after=2), Say("at last")]])
    async with house(tmp_path / "data", script=script) as home, await home.wire() as wire:
        for name in ("s1", "s2"):
            await wire.effect("agent.run", input="go", sessionId=name)
            await wire.event("agent.accepted", sessionId=name)
    told, recover = asyncio.Event(), type(home.server.core).recover

    async def when_told(core: Any) -> int:
        await told.wait()
        return await recover(core)

    monkeypatch.setattr(type(home.server.core), "recover", when_told)
    async with house(tmp_path / "data", script=[Say("at last")]) as later, await later.wire() as wire:
        for name in ("s1", "s2"):
            await wire.request("events.subscribe", {"sessionId": name, "after": 0})
        full = Full(monkeypatch, times=6)
        told.set()
        for name in ("s1", "s2"):
            ended = await wire.event("agent.completed", sessionId=name)
            assert ended["payload"]["output"] == "at last"
        assert full.left == 0
