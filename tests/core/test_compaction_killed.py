"""A gateway that is killed while it makes room, and what the next one finds and does."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.core.test_compaction import LONG, SUMMARY, Json, is_summary, session, text_of
from tests.core.test_memory import NOTE, NOTES, is_flush
from tests.core.test_recovery import check_journal, connected, gateway, whole_journal
from tests.support.gateway import Gateway
from tests.support.model_server import CallTools, Hang, ModelServer, Say

SMALL = '[models."openai-chat:test"]\ncontext_window = 6000\n'


def once_hung(hangs: Callable[[Json], bool]) -> Callable[[Json], Any]:
    """A model that answers everything, but hangs at the first request of a kind."""
    hung: list[Json] = []

    def play(request: Json) -> Any:
        if hangs(request) and not hung:
            hung.append(request)
            return Hang()
        if is_summary(request):
            return Say(SUMMARY, usage=(3000, 40))
        return CallTools([NOTE]) if is_flush(request) else Say("yes")

    return play


async def killed_and_started(running: Gateway, model: ModelServer, at: Callable[[Json], bool]) -> list[Json]:
    """The journal of session s1 after the gateway was killed when such a request had come, and started again."""
    wire = await connected(running)
    await wire.effect("policy.update", patch=NOTES)
    await wire.effect("agent.run", input=LONG, sessionId="s1")
    await wire.event("agent.completed")
    before = len(await whole_journal(wire, "s1"))
    await wire.effect("agent.run", input="Go on. " + "x" * 3000, sessionId="s1")
    await model.wait(lambda: any(at(each.json) for each in model.requests), 60)
    await running.kill()
    await wire.close()
    await running.start()
    async with await connected(running) as wire:
        await wire.request("events.subscribe", {"sessionId": "s1", "after": before})
        await wire.frame(lambda frame: frame.get("event") in ("agent.completed", "agent.failed"))
        return await whole_journal(wire, "s1")


def is_answer_after(request: Json) -> bool:
    """The step for which room was made."""
    return not is_summary(request) and not is_flush(request) and SUMMARY in text_of(request)


@pytest.mark.parametrize("at", [is_flush, is_summary, is_answer_after], ids=["silent step", "summary", "after"])
async def test_killed_while_the_model_is_asked_the_compaction_is_done_again_and_counted_once(
    tmp_path: Path, at: Callable[[Json], bool]
) -> None:
    async with ModelServer(once_hung(at)) as model:
        running = gateway(tmp_path, model)
        running.data_dir.mkdir(mode=0o700)
        (running.data_dir / "corral.toml").write_text(SMALL)
        async with running:
            items = await killed_and_started(running, model, at)
            check_journal(items)
            assert items[-1]["event"] == "agent.completed"
            events = [item["event"] for item in items]
            assert events.count("session.compacted") == 1
            assert events.count("agent.resumed") == 1
            # The notes are written once, whenever the process died.
            assert events.count("agent.tool_call") == 1
            folder = running.data_dir / "workspaces" / "t_default" / "w_default" / "memory"
            assert [path.read_text() for path in folder.iterdir()] == ["The gate code is 4711-ochre.\n"]
            assert len([each for each in model.requests if is_summary(each.json)]) == (2 if at is is_summary else 1)
            async with await connected(running) as wire:
                told = await session(wire)
                assert (told["compactionCount"], told["memoryFlushState"]) == (1, "flushed")
                run = (await wire.request("runs.get", {"runId": items[-1]["runId"]}))["run"]
                # What was broken off is not charged: a silent step, a summary, an answer.
                assert run["usage"]["inputTokens"] == 100 + 3000 + 100
                assert run["steps"] == 2
            last = text_of(model.requests[-1].json)
            assert SUMMARY in last
            assert "filler" not in last


async def test_a_compacted_session_goes_on_from_its_summary_after_a_restart(tmp_path: Path) -> None:
    async with ModelServer(once_hung(lambda _request: False)) as model:
        running = gateway(tmp_path, model)
        running.data_dir.mkdir(mode=0o700)
        (running.data_dir / "corral.toml").write_text(SMALL)
        async with running:
            wire = await connected(running)
            for text in (LONG, "Go on. " + "x" * 3000):
                run = await wire.effect("agent.run", input=text, sessionId="s1")
                await wire.event("agent.completed", runId=run["runId"])
            before = model.requests[-1].json["messages"]
            await running.kill()
            await wire.close()
            await running.start()
            async with await connected(running) as wire:
                run = await wire.effect("agent.run", input="And then?", sessionId="s1")
                await wire.event("agent.completed", runId=run["runId"])
                assert [item["event"] for item in await whole_journal(wire, "s1")].count("session.compacted") == 1
            after = model.requests[-1].json["messages"]
            assert after[: len(before)] == before
            assert [message["content"] for message in after[len(before) :]] == ["yes", "And then?"]


POINTS = {
    "tool.recorded@memory.append": "skipped",
    "tool.end@memory.append": "skipped",
    "compaction.written@s1": "flushed",
    "commit.before@session.compacted/s1": "flushed",
    "commit.after@session.compacted/s1": "flushed",
}
"""Where the gateway ends by itself, and what came of the silent step: a note that may have been written is none."""


@pytest.mark.parametrize(("point", "flushed"), POINTS.items(), ids=POINTS)
async def test_killed_at_a_named_point_room_is_made_once_after_one_silent_step(
    tmp_path: Path, point: str, flushed: str
) -> None:
    async with ModelServer(once_hung(lambda _request: False)) as model:
        running = gateway(tmp_path, model)
        running.data_dir.mkdir(mode=0o700)
        (running.data_dir / "corral.toml").write_text(SMALL)
        await running.start(fault=point)
        try:
            async with await connected(running) as wire:
                await wire.effect("policy.update", patch=NOTES)
                run = await wire.effect("agent.run", input=LONG, sessionId="s1")
                await wire.event("agent.completed", runId=run["runId"])
                before = len(await whole_journal(wire, "s1"))
                run = await wire.effect("agent.run", input="Go on. " + "x" * 3000, sessionId="s1")
            async with asyncio.timeout(60):
                assert await running.process.wait() == -signal.SIGKILL
            await running.start()
            async with await connected(running) as wire:
                await wire.request("events.subscribe", {"sessionId": "s1", "after": before})
                await wire.event("agent.completed", runId=run["runId"])
                items = await whole_journal(wire, "s1")
                check_journal(items)
                events = [item["event"] for item in items]
                assert events.count("session.compacted") == 1
                assert events.count("agent.tool_call") == 1
                told = await session(wire)
                assert (told["compactionCount"], told["memoryFlushState"]) == (1, flushed)
                used = (await wire.request("runs.get", {"runId": run["runId"]}))["run"]["usage"]["inputTokens"]
                assert used == 100 + 3000 + 100
        finally:
            await running.kill()
        notes = running.data_dir / "workspaces" / "t_default" / "w_default" / "memory"
        written = [path.read_text() for path in notes.iterdir()] if notes.exists() else []
        assert written == ([] if point.startswith("tool.recorded") else ["The gate code is 4711-ochre.\n"])
        assert len([each for each in model.requests if is_flush(each.json)]) == 1
