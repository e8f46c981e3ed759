"""A run from its acceptance to its end, as a client sees it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from corral.storage._sqlite_connections import driver
from tests.core.conftest import Open, allow
from tests.support import needs
from tests.support.house import House, house
from tests.support.model_server import CallTools, LengthInToolCall, Say, Slow, conversation


async def finished(home: House, text: str = "go", **params: Any) -> list[dict[str, Any]]:
    """Run to the end; the durable events that carry the run's id."""
    async with await home.wire() as wire:
        run = await wire.effect("agent.run", input=text, **params)
        await wire.frame(
            lambda frame: (
                frame.get("event") in ("agent.completed", "agent.failed") and frame["payload"]["runId"] == run["runId"]
            )
        )
        return [frame for frame in wire.durable if frame["payload"].get("runId") == run["runId"]]


def named(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [event["payload"] for event in events if event["event"] == name]


def workspace(home: House) -> Path:
    return home.server.settings.data_dir / "workspaces" / "t_default" / "w_default"


async def test_a_run_of_several_tool_steps_is_told_in_the_order_of_the_contract(open_house: Open) -> None:
    script = conversation(
        [
            CallTools([("file_write", {"path": "a.txt", "content": "alpha"})], text="I write."),
            CallTools([("file_read", {"path": "a.txt"}), ("file_list", {})]),
            Say("All done.", chunks=4),
        ]
    )
    async with open_house(script) as home:
        events = await finished(home)
        names = [event["event"] for event in events]
        assert names[:4] == ["agent.accepted", "agent.message", "agent.tool_call", "agent.tool_result"]
        assert names[4:7] == ["agent.message", "agent.tool_call", "agent.tool_call"]
        assert names[7:] == ["agent.tool_result", "agent.tool_result", "agent.message", "agent.completed"]
        versions = [event["stateVersion"] for event in events]
        assert versions == list(range(versions[0], versions[0] + len(versions)))
        done = events[-1]["payload"]
        assert (done["output"], done["steps"]) == ("All done.", 3)
        assert done["usage"] == {"inputTokens": 300, "outputTokens": 30, "costUsd": None}
        assert (workspace(home) / "a.txt").read_text() == "alpha"


async def test_a_turn_updates_its_session_once_for_each_event_and_its_run_once(open_house: Open) -> None:
    async with open_house(conversation([Say("done")])) as home:
        await finished(home, sessionId="s1")
        statements: list[str] = []
        await home.server.store.write(
            lambda tx: driver(tx.sessions._connection._connection).set_trace_callback(statements.append)
        )
        events = await finished(home, sessionId="s1")
        assert [event["event"] for event in events] == ["agent.accepted", "agent.message", "agent.completed"]
        # The house writes other things too, in its own time.
        sessions = [sql for sql in statements if sql.startswith("UPDATE sessions") and "'s1'" in sql]
        assert len(sessions) == 3
        run = f"'{events[0]['payload']['runId']}'"
        assert len([sql for sql in statements if sql.startswith("UPDATE runs") and run in sql]) == 1
        assert len([sql for sql in statements if sql.startswith("INSERT INTO usage_days")]) == 1
        assert not [sql for sql in statements if sql.startswith("SAVEPOINT")]


async def test_the_model_gets_the_results_of_its_calls(open_house: Open) -> None:
    script = conversation([CallTools([("file_write", {"path": "n", "content": "x"})]), Say("ok")])
    async with open_house(script) as home:
        await finished(home)
        messages = home.model.requests[-1].json["messages"]
        assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool"]
        assert messages[3]["tool_call_id"] == messages[2]["tool_calls"][0]["id"]


async def test_the_session_remembers_earlier_runs(open_house: Open) -> None:
    async with open_house(conversation([Say("first answer")])) as home:
        await finished(home, "first question", sessionId="s1")
        await finished(home, "second question", sessionId="s1")
        texts = [message["content"] for message in home.model.requests[-1].json["messages"][1:]]
        assert texts == ["first question", "first answer", "second question"]


async def test_a_call_sees_what_the_calls_before_it_in_the_same_message_did(open_house: Open) -> None:
    needs.bubblewrap()
    script = conversation(
        [
            CallTools(
                [
                    ("bash_exec", {"command": "echo 1 >> order"}),
                    ("file_read", {"path": "order"}),
                    ("bash_exec", {"command": "echo 2 >> order"}),
                    ("file_read", {"path": "order"}),
                ]
            ),
            Say("ok"),
        ]
    )
    async with open_house(script) as home:
        results = named(await finished(home), "agent.tool_result")
        reads = [result["output"] for result in results if result["toolName"] == "file.read"]
        assert ["1" in reads[0], "2" in reads[0], "2" in reads[1]] == [True, False, True]


async def test_repeatable_calls_of_one_step_run_at_once(open_house: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    script = conversation([CallTools([("file_list", {})] * 3), Say("ok")])
    async with open_house(script) as home:
        execute, together = home.server.executor.execute, asyncio.Barrier(3)

        async def gathered(*call: Any) -> Any:
            async with asyncio.timeout(30):
                await together.wait()  # passes only when all three are under way
            return await execute(*call)

        monkeypatch.setattr(home.server.executor, "execute", gathered)
        assert [each["status"] for each in named(await finished(home), "agent.tool_result")] == ["success"] * 3


async def test_a_denied_call_is_told_to_the_model_and_the_run_goes_on(open_house: Open) -> None:
    script = conversation([CallTools([("bash_exec", {"command": "touch ran"})]), Say("understood")])
    async with open_house(script, {"tools": {"bash.exec": "deny"}}) as home:
        events = await finished(home)
        call, result = named(events, "agent.tool_call")[0], named(events, "agent.tool_result")[0]
        assert call["decision"] == "deny"
        assert (result["status"], result["error"]["code"]) == ("denied", "POLICY_DENIED")
        assert events[-1]["event"] == "agent.completed"
        assert not (workspace(home) / "ran").exists()
        assert "policy denies" in home.model.requests[-1].json["messages"][-1]["content"]


async def test_a_policy_change_holds_from_the_next_tool_call_of_a_running_run(open_house: Open) -> None:
    needs.bubblewrap()
    script = conversation(
        [
            CallTools(
                [
                    ("bash_exec", {"command": "touch first; while [ ! -e go ]; do sleep 0.05; done"}),
                    ("bash_exec", {"command": "touch second"}),
                ]
            ),
            Say("ok"),
        ]
    )
    async with open_house(script) as home, await home.wire() as wire:
        await wire.effect("agent.run", input="go")
        first = await wire.event("agent.tool_call")
        while not (workspace(home) / "first").exists():
            await wire.request("runs.get", {"runId": first["payload"]["runId"]})
        await allow(home, {"tools": {"bash.exec": "deny"}})
        (workspace(home) / "go").touch()
        await wire.event("agent.completed")
        statuses = [frame["payload"]["status"] for frame in wire.durable if frame["event"] == "agent.tool_result"]
        assert statuses == ["success", "denied"]
        assert not (workspace(home) / "second").exists()


async def test_invented_tools_and_wrong_arguments_come_back_as_errors_the_model_can_act_on(open_house: Open) -> None:
    script = conversation(
        [
            CallTools([("make_coffee", {}), ("file_read", {"path": 7}), ("file_read", "{broken")]),
            LengthInToolCall(),
            Say("ok"),
        ]
    )
    async with open_house(script) as home:
        events = await finished(home)
        results = named(events, "agent.tool_result")
        assert [result["status"] for result in results] == ["failed"] * 4
        assert "bash.exec" in results[0]["output"]
        assert "$.path" in results[1]["output"]
        assert all(call["decision"] == "deny" for call in named(events, "agent.tool_call"))
        assert events[-1]["event"] == "agent.completed"
        sent = [message for message in home.model.requests[-1].json["messages"] if message["role"] == "assistant"]
        assert "{broken" not in str(sent)


async def test_an_agent_may_be_sent_back_as_it_was_read_and_its_times_make_no_other_request(open_house: Open) -> None:
    async with open_house(conversation([])) as home, await home.wire() as wire:
        first = await wire.effect("agents.upsert", agent={"id": "reader", "name": "R"}, idempotencyKey="k")
        read = first["agent"]
        assert read["createdAt"] == read["updatedAt"]
        for agent in (read, {**read, "updatedAt": "2020-01-01T00:00:00.000Z"}):
            again = await wire.effect("agents.upsert", agent=agent, idempotencyKey="k2")
            assert (again["agent"]["name"], again["agent"]["createdAt"]) == ("R", read["createdAt"])


async def test_an_agent_runs_with_its_own_prompt_model_and_tools(open_house: Open) -> None:
    script = conversation([CallTools([("file_list", {})]), Say("ok")])
    async with open_house(script) as home, await home.wire() as wire:
        agent = {"id": "reader", "systemPrompt": "You read.", "model": "openai-chat:other", "tools": ["file.read"]}
        await wire.effect("agents.upsert", agent=agent)
        events = await finished(home, agentId="reader")
        request = home.model.requests[0].json
        assert request["model"] == "other"
        assert request["messages"][0]["content"] == "You read."
        assert [tool["function"]["name"] for tool in request["tools"]] == ["file_read"]
        assert "its tools are file.read" in named(events, "agent.tool_result")[0]["output"]


async def test_context_usage_is_what_the_last_call_took_of_the_window(open_house: Open) -> None:
    async with open_house([Say("x", usage=(12_000, 800))]) as home, await home.wire() as wire:
        await finished(home, sessionId="s1")
        session = (await wire.request("sessions.get", {"sessionId": "s1"}))["session"]
        assert session["contextUsage"] == 12_800 / 128_000


async def test_a_mode_set_while_a_run_is_on_waits_for_its_end(open_house: Open) -> None:
    async with open_house([Slow(0.3, Say("ok"))]) as home, await home.wire() as wire:
        run = await wire.effect("agent.run", input="go", sessionId="s1")
        answer = await wire.effect("runtime.setMode", sessionId="s1", runtimeMode="cloud")
        assert answer == {
            "sessionId": "s1",
            "runtimeMode": "cloud",
            "status": "queued-change",
            "effectiveOn": "next_turn",
        }
        changed = await wire.event("runtime.mode_changed")
        ended = await wire.event("agent.completed")
        assert changed["stateVersion"] == ended["stateVersion"] + 1
        session = (await wire.request("sessions.get", {"sessionId": "s1"}))["session"]
        assert (session["runtimeMode"], session["status"]) == ("cloud", "idle")
        assert "queuedRuntimeMode" not in session
        assert (await wire.request("runs.get", {"runId": run["runId"]}))["run"]["status"] == "completed"


async def test_a_cloud_run_without_a_sandbox_host_fails_and_never_runs_here(open_house: Open) -> None:
    script = conversation([CallTools([("file_write", {"path": "ran", "content": ""})]), Say("ok")])
    async with open_house(script) as home:
        events = await finished(home, runtimeMode="cloud")
        assert (events[-1]["event"], events[-1]["payload"]["code"]) == ("agent.failed", "SANDBOX_UNAVAILABLE")
        assert not (workspace(home) / "ran").exists()


async def test_runs_beyond_the_limit_wait_for_a_place_and_then_run(open_house: Open) -> None:
    async with open_house([Slow(0.2, Say("ok"))], max_active_runs=1) as home, await home.wire() as wire:
        first = await wire.effect("agent.run", input="a")
        second = await wire.effect("agent.run", input="b")
        assert (await wire.request("runs.get", {"runId": second["runId"]}))["run"]["status"] == "queued"
        for run in (first, second):
            await wire.event("agent.completed", runId=run["runId"])
        run = (await wire.request("runs.get", {"runId": second["runId"]}))["run"]
        assert (run["status"], run["attempts"]) == ("completed", 1)
        assert run["startedAt"] > run["createdAt"]


async def test_an_image_in_the_input_reaches_the_model(open_house: Open) -> None:
    async with open_house([Say("a picture")]) as home:
        parts = [{"type": "text", "text": "what is it?"}, {"type": "image", "mimeType": "image/png", "data": "aGk="}]
        async with await home.wire() as wire:
            await wire.effect("agent.run", input=parts)
            accepted = await wire.event("agent.accepted")
            await wire.event("agent.completed")
            assert accepted["payload"]["input"] == parts
        content = home.model.requests[0].json["messages"][1]["content"]
        assert content[1]["image_url"]["url"] == "data:image/png;base64,aGk="


async def test_an_input_that_says_and_shows_nothing_is_refused_in_either_form(open_house: Open) -> None:
    nothing = {"type": "text", "text": " \n"}
    async with open_house([Say("a picture")]) as home, await home.wire() as wire:
        for given in (" \n", [nothing], [nothing, {"type": "text", "text": ""}]):
            refused = await wire.call("agent.run", {"input": given, "idempotencyKey": "k"})
            assert refused["error"]["code"] == "INVALID_REQUEST"
            assert refused["error"]["message"].startswith("$.params.input ")
        image = {"type": "image", "mimeType": "image/png", "data": "aGk="}
        await wire.request("agent.run", {"input": [nothing, image], "idempotencyKey": "k"})
        await wire.event("agent.completed")


async def test_what_an_owner_writes_whose_lease_was_taken_over_is_not_written(open_house: Open) -> None:
    async with open_house([Slow(0.5, Say("too late"))]) as home, await home.wire() as wire:
        run = await wire.effect("agent.run", input="go", sessionId="s1")
        claimed = await home.server.store.write(
            lambda tx: tx.runs.claim(
                "t_default", run["runId"], owner="another node", now_ms=0, expires_at=2**50, steal=True
            )
        )
        assert claimed == 2
        async with asyncio.timeout(60):
            while home.server.core.active_runs:  # noqa: ASYNC110 - the old owner leaves without a word
                await asyncio.sleep(0.01)
        history = await wire.request("sessions.history", {"sessionId": "s1"})
        assert [item["event"] for item in history["items"]] == ["session.updated", "agent.accepted"]
        assert (await wire.request("runs.get", {"runId": run["runId"]}))["run"]["status"] == "running"


class Ticking:
    """A clock on which no two looks show the same time."""

    def __init__(self) -> None:
        self._ms = time.time_ns() // 1_000_000

    def now_ms(self) -> int:
        self._ms += 1
        return self._ms

    def monotonic(self) -> float:
        return time.monotonic()


async def test_a_session_made_by_a_run_is_no_older_than_its_last_change(tmp_path: Path) -> None:
    async with house(tmp_path, clock=Ticking()) as home, await home.wire() as wire:
        run = await wire.effect("agent.run", input="go")
        history = await wire.request("sessions.history", {"sessionId": run["sessionId"], "limit": 1, "afterId": 0})
        made = history["items"][0]["payload"]["session"]
        assert made["createdAt"] == made["updatedAt"]


async def test_an_end_between_the_look_at_a_run_and_the_wait_for_it_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(tmp_path, script=[Slow(0.3)]) as home, await home.wire() as wire:
        core, read = home.server.core, home.server.store.read
        run = await wire.effect("agent.run", input="go")
        await home.model.wait(lambda: len(home.model.requests) == 1)

        async def told_late(query: Any) -> Any:
            found = await read(query)
            if not wire.durable or wire.durable[-1]["event"] != "agent.completed":
                await wire.event("agent.completed")
            return found

        monkeypatch.setattr(home.server.store, "read", told_late)
        async with asyncio.timeout(40):
            await core.wait_run("t_default", run["runId"], 1000)
        assert core._ended == {}


async def test_a_recovery_that_comes_upon_a_run_of_its_own_process_leaves_it_to_its_loop(open_house: Open) -> None:
    script = [Say("Slowly said.", chunks=8, delay=0.1)]
    async with open_house(script) as home, await home.wire() as wire:
        run = await wire.effect("agent.run", input="go")
        await wire.event("agent.delta")
        # As where the run was accepted, or a decision woke it, between recovery's look and its claim.
        await home.server.core.continue_("t_default", run["runId"], steal=True)
        await wire.event("agent.completed")
        assert "agent.resumed" not in [frame["event"] for frame in wire.durable]


async def test_a_folder_that_has_become_a_link_is_worked_in_no_more(open_house: Open, tmp_path: Path) -> None:
    roots, outside = tmp_path / "projects", tmp_path / "outside"
    for folder in (roots / "one", roots / "two", outside):
        folder.mkdir(parents=True)
    (outside / "secret").write_text("the secret outside")
    script = conversation([CallTools([("file_read", {"path": "secret"})]), Say("done")])
    async with open_house(script, roots=[roots]) as home, await home.wire() as wire:
        sessions = []
        for name in ("one", "two"):
            made = await wire.effect("sessions.create", root=str(roots / name))
            sessions.append(made["session"]["id"])
        (roots / "one").rmdir()
        (roots / "one").symlink_to(outside)
        (roots / "two").rename(roots / "moved")
        (roots / "two").symlink_to(roots / "moved")
        for session in sessions:
            run = await wire.effect("agent.run", input="go", sessionId=session)
            failed = (await wire.event("agent.failed", runId=run["runId"]))["payload"]
            assert failed["code"] == "POLICY_DENIED"
        assert not any("secret outside" in str(frame) for frame in wire.frames)


async def test_a_folder_that_the_settings_allow_no_more_is_worked_in_no_more(open_house: Open, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "note").write_text("a note")
    script = conversation([CallTools([("file_read", {"path": "note"})]), Say("done")])
    async with open_house(script, roots=[one, other]) as home, await home.wire() as wire:
        first, second = [
            (await wire.effect("sessions.create", root=str(folder)))["session"]["id"] for folder in (one, other)
        ]
    async with open_house(script, roots=[other]) as home, await home.wire() as wire:
        run = await wire.effect("agent.run", input="go", sessionId=first)
        failed = (await wire.event("agent.failed", runId=run["runId"]))["payload"]
        assert failed["code"] == "POLICY_DENIED"
        assert not any("a note" in str(frame) for frame in wire.frames)
        run = await wire.effect("agent.run", input="go", sessionId=second)
        await wire.event("agent.completed", runId=run["runId"])
        assert any("a note" in str(frame) for frame in wire.frames)
