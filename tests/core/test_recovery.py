"""A gateway killed in the middle, and what the next one finds and does."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from corral import server
from tests.core.conftest import OPEN_TOOLS
from tests.core.test_abort import until_dead, until_exists
from tests.support import needs
from tests.support.clocks import Later
from tests.support.gateway import Gateway
from tests.support.house import house
from tests.support.model_server import CallTools, Hang, ModelServer, Say, conversation
from tests.support.wire import Wire

ENDS = ("agent.completed", "agent.failed")


def gateway(tmp_path: Path, model: ModelServer) -> Gateway:
    env = {
        "CORRAL_MODEL": "openai-chat:test",
        "OPENAI_BASE_URL": model.base_url,
        "OPENAI_API_KEY": "sk-canary-0123456789",
    }
    return Gateway(tmp_path / "data", env)


async def connected(running: Gateway) -> Wire:
    wire = await Wire.open(running.url)
    await wire.connect(running.token())
    return wire


async def whole_journal(wire: Wire, session: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = []
    while True:
        after = items[-1]["id"] if items else 0
        page = await wire.request("sessions.history", {"sessionId": session, "afterId": after, "limit": 500})
        items += page["items"]
        if "nextCursor" not in page:
            return items


def check_journal(items: list[dict[str, Any]]) -> None:
    """What holds of every journal: no gap, one end for each run, one result for each call, in order."""
    assert [item["id"] for item in items] == list(range(1, len(items) + 1))
    for run_id in {item["runId"] for item in items if item["runId"]}:
        events = [item for item in items if item["runId"] == run_id]
        assert events[0]["event"] == "agent.accepted"
        assert [event["event"] in ENDS for event in events].count(True) == 1
        assert events[-1]["event"] in ENDS
        calls = [event["payload"]["toolCallId"] for event in events if event["event"] == "agent.tool_call"]
        results = [event["payload"]["toolCallId"] for event in events if event["event"] == "agent.tool_result"]
        assert sorted(calls) == sorted(results)
        assert len(set(calls)) == len(calls)


async def ended(wire: Wire, session: str) -> list[dict[str, Any]]:
    """The session's journal, once its run has ended."""
    await wire.request("events.subscribe", {"sessionId": session, "after": 0})
    await wire.frame(lambda frame: frame.get("event") in ENDS, timeout=40)
    return await whole_journal(wire, session)


STEPS = [
    CallTools([("bash_exec", {"command": "echo one >> marks"})], text="first"),
    CallTools([("file_list", {}), ("bash_exec", {"command": "touch at-two; sleep 0.4; echo two >> marks"})]),
    CallTools([("bash_exec", {"command": "echo three >> marks"})]),
    Say("All three are done.", chunks=10, delay=0.02),
]


@pytest.mark.parametrize("moment", ["first delta", "in a tool", "last answer"])
async def test_a_run_of_several_steps_completes_though_its_gateway_is_killed(tmp_path: Path, moment: str) -> None:
    needs.bubblewrap()
    async with ModelServer(conversation(STEPS)) as model, gateway(tmp_path, model) as running:
        wire = await connected(running)
        await wire.effect("policy.update", patch=OPEN_TOOLS)
        await wire.effect("agent.run", input="go", sessionId="s1")
        folder = running.data_dir / "workspaces" / "t_default" / "w_default"
        if moment == "first delta":
            await wire.event("agent.delta")
        elif moment == "in a tool":
            await until_exists(folder / "at-two")
        else:
            await wire.frame(lambda frame: frame.get("payload", {}).get("delta", "").startswith("Al"))
        await running.kill()
        await wire.close()
        await running.start()
        async with await connected(running) as wire:
            items = await ended(wire, "s1")
        check_journal(items)
        assert items[-1]["event"] == "agent.completed"
        assert items[-1]["payload"]["output"] == "All three are done."
        resumed = [item["payload"] for item in items if item["event"] == "agent.resumed"]
        assert [(each["attempt"], each["reason"]) for each in resumed] == [(2, "restart")]
        marks = (folder / "marks").read_text().split()
        # Killed inside the tool, its effect is unknown and it is not done again; never is anything done twice.
        assert marks == (["one", "three"] if moment == "in a tool" else ["one", "two", "three"])


async def test_a_tool_that_was_under_way_is_interrupted_and_never_run_again(tmp_path: Path) -> None:
    needs.bubblewrap()
    script = conversation(
        [CallTools([("bash_exec", {"command": "echo x >> marks; touch up; sleep 777"})]), Say("I see.")]
    )
    async with ModelServer(script) as model, gateway(tmp_path, model) as running:
        wire = await connected(running)
        await wire.effect("policy.update", patch=OPEN_TOOLS)
        await wire.effect("agent.run", input="go", sessionId="s1")
        folder = running.data_dir / "workspaces" / "t_default" / "w_default"
        await until_exists(folder / "up")
        await running.kill()
        await wire.close()
        await until_dead("sleep\x00777")  # the sandbox dies with its gateway
        await running.start()
        async with await connected(running) as wire:
            items = await ended(wire, "s1")
        check_journal(items)
        result = next(item["payload"] for item in items if item["event"] == "agent.tool_result")
        assert result["status"] == "interrupted"
        assert "may have taken effect" in result["output"]
        assert "may have taken effect" in model.requests[-1].json["messages"][-1]["content"]
        assert (folder / "marks").read_text() == "x\n"


async def test_a_call_that_an_orderly_stop_broke_off_has_run_until_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs.bubblewrap()
    monkeypatch.setattr(server, "_DRAIN_GRACE_S", 0.0)
    clock, script = (
        Later(0),
        conversation([CallTools([("bash_exec", {"command": "touch up; sleep 777"})]), Say("I see.")]),
    )
    async with house(tmp_path / "data", script=script, clock=clock) as home, await home.wire() as wire:
        await wire.effect("policy.update", patch=OPEN_TOOLS)
        await wire.effect("agent.run", input="go", sessionId="s1")
        await until_exists(tmp_path / "data" / "workspaces" / "t_default" / "w_default" / "up")
        clock.ahead = 5000
    clock.ahead = 600_000
    async with house(tmp_path / "data", script=[Say("I see.")], clock=clock) as home, await home.wire() as wire:
        items = await ended(wire, "s1")
        result = next(item["payload"] for item in items if item["event"] == "agent.tool_result")
        assert result["status"] == "interrupted"
        assert 5000 <= result["durationMs"] < 300_000


async def test_an_allowed_call_whose_arguments_are_not_those_that_were_judged_does_not_run(tmp_path: Path) -> None:
    needs.bubblewrap()
    calls = [
        ("bash_exec", {"command": "touch up; sleep 778"}),
        ("file_write", {"path": "judged.txt", "content": "x"}),
    ]
    script = conversation([CallTools(calls), Say("I see.")])
    async with ModelServer(script) as model, gateway(tmp_path, model) as running:
        running.unchecked = "the arguments are changed in the store"
        wire = await connected(running)
        await wire.effect("policy.update", patch=OPEN_TOOLS)
        await wire.effect("agent.run", input="go", sessionId="s1")
        folder = running.data_dir / "workspaces" / "t_default" / "w_default"
        await until_exists(folder / "up")
        await running.kill()
        await wire.close()
        with contextlib.closing(sqlite3.connect(running.data_dir / "corral.db")) as database, database:
            changed = database.execute("UPDATE tool_runs SET args = replace(args, 'judged.txt', 'other.txt')")
            assert changed.rowcount == 2
        await running.start()
        async with await connected(running) as wire:
            items = await ended(wire, "s1")
        results = [item["payload"] for item in items if item["event"] == "agent.tool_result"]
        assert [result["status"] for result in results] == ["interrupted", "denied"]
        assert sorted(path.name for path in folder.iterdir()) == ["up"]


async def test_what_was_answered_is_there_after_a_kill_as_it_was_before(tmp_path: Path) -> None:
    async with ModelServer([Say("ok")]) as model, gateway(tmp_path, model) as running:
        wire = await connected(running)
        asked: list[tuple[str, dict[str, Any]]] = [
            ("sessions.create", {"title": "kept", "idempotencyKey": "k1"}),
            ("agents.upsert", {"agent": {"id": "a2", "systemPrompt": "p"}, "idempotencyKey": "k2"}),
            ("policy.update", {"patch": {"highRisk": "deny"}, "idempotencyKey": "k3"}),
            ("agent.run", {"input": "go", "sessionId": "s1", "idempotencyKey": "k4"}),
            ("runtime.setMode", {"sessionId": "s1", "runtimeMode": "cloud", "idempotencyKey": "k5"}),
        ]
        answers = [await wire.request(method, params) for method, params in asked]
        await wire.event("agent.completed")
        reads: list[tuple[str, dict[str, Any]]] = [
            ("sessions.list", {}),
            ("sessions.get", {"sessionId": "s1"}),
            ("runs.get", {"runId": answers[3]["runId"]}),
            ("agents.list", {}),
            ("policy.get", {}),
            ("sessions.history", {"sessionId": "s1"}),
        ]
        seen = [await wire.request(method, params) for method, params in reads]
        await running.kill()
        await wire.close()
        await running.start()
        async with await connected(running) as wire:
            assert [await wire.request(method, params) for method, params in asked] == answers
            assert [await wire.request(method, params) for method, params in reads] == seen


async def test_an_abort_that_was_noted_before_the_kill_is_carried_out_after_it(tmp_path: Path) -> None:
    async with ModelServer([Hang(after=2)]) as model, gateway(tmp_path, model) as running:
        wire = await connected(running)
        run = await wire.effect("agent.run", input="go", sessionId="s1")
        await wire.event("agent.delta")
        await running.kill()
        await wire.close()
        # The note alone, as a gateway leaves it that dies between its first transaction and the end.
        with sqlite3.connect(running.data_dir / "corral.db") as database:
            database.execute("UPDATE runs SET abort_requested_at = 1 WHERE id = ?", (run["runId"],))
        database.close()
        await running.start()
        async with await connected(running) as wire:
            items = await ended(wire, "s1")
            check_journal(items)
            assert items[-1]["payload"]["code"] == "ABORTED"
            answer = await wire.request("agent.abort", {"runId": run["runId"], "idempotencyKey": "k"})
            assert answer["status"] == "aborted"


async def test_a_run_that_takes_its_gateway_down_five_times_without_a_step_fails(tmp_path: Path) -> None:
    async with ModelServer([Hang()]) as model, gateway(tmp_path, model) as running:
        wire = await connected(running)
        await wire.effect("agent.run", input="go", sessionId="s1")
        await wire.event("agent.accepted")
        for died in range(1, 6):
            await running.kill()
            await wire.close()
            await running.start()
            wire = await connected(running)
            await wire.request("events.subscribe", {"sessionId": "s1", "after": 0})
            await wire.event("agent.resumed", attempt=died + 1)
        items = await ended(wire, "s1")
        await wire.close()
        check_journal(items)
        assert items[-1]["payload"]["code"] == "INTERNAL_ERROR"
        assert [item["event"] for item in items].count("agent.resumed") == 5


async def test_an_orderly_stop_leaves_the_run_resumable_and_counts_as_nobodys_death(tmp_path: Path) -> None:
    script = conversation([[Hang(after=2)] * 7 + [Say("at last")]])
    async with ModelServer(script) as model, gateway(tmp_path, model) as running:
        wire = await connected(running)
        await wire.effect("agent.run", input="go", sessionId="s1")
        await wire.event("agent.delta")
        for _ in range(7):
            assert await running.stop() == 0
            assert await wire.closed() == 1012
            await wire.close()
            await running.start()
            wire = await connected(running)
            await wire.request("events.subscribe", {"sessionId": "s1", "after": 0})
            await wire.frame(lambda frame: frame.get("event") in ("agent.delta", *ENDS))
        items = await ended(wire, "s1")
        await wire.close()
        check_journal(items)
        assert items[-1]["payload"]["output"] == "at last"
