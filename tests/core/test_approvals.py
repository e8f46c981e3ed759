"""Calls that wait for a person: parked without a process, decided once, run at most once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from corral.clock import SystemClock, rfc3339
from corral.governance import approvals
from tests.core.conftest import OPEN_TOOLS, Open, allow
from tests.core.test_recovery import check_journal, connected, ended, gateway
from tests.core.test_run import workspace
from tests.support.house import House
from tests.support.model_server import CallTools, ModelServer, Say, conversation, script_for, tool_results
from tests.support.wire import Refused, Wire

ASKS = {"tools": {"file.write": "approval-required"}}
WRITE = CallTools([("file_write", {"path": "a.txt", "content": "one"})])


def echo(request: dict[str, Any]) -> Say:
    return Say("heard: " + " | ".join(tool_results(request)))


ONCE = conversation([WRITE, echo])


async def waiting(home: House, wire: Wire, **params: Any) -> dict[str, Any]:
    """Start a run and return the approval that it waits for, once it is parked."""
    run = await wire.effect("agent.run", input="go", **{"sessionId": "s1", **params})
    approval: dict[str, Any] = (await wire.event("approval.required", runId=run["runId"]))["payload"]
    await parked(wire, run["runId"])
    return approval


async def parked(wire: Wire, run_id: str) -> None:
    async with asyncio.timeout(60):
        while (await wire.request("runs.get", {"runId": run_id}))["run"]["status"] != "waiting_approval":  # noqa: ASYNC110 - parking tells nobody
            await asyncio.sleep(0.01)


async def test_an_approved_call_runs_and_the_run_goes_on_as_the_contract_shows(open_house: Open) -> None:
    async with open_house(ONCE, ASKS) as home, await home.wire() as wire:
        approval = await waiting(home, wire)
        session = (await wire.request("sessions.get", {"sessionId": "s1"}))["session"]
        assert (session["status"], session["activeRunId"]) == ("waiting_approval", approval["runId"])
        assert not (workspace(home) / "a.txt").exists()
        answer = await wire.effect("approval.resolve", approvalId=approval["approvalId"], decision="approve")
        assert answer == {"approvalId": approval["approvalId"], "status": "approved"}
        await wire.event("agent.completed")
        assert (workspace(home) / "a.txt").read_text() == "one"
        names = [frame["event"] for frame in wire.durable]
        assert names == [
            "agent.accepted",
            "agent.message",
            "agent.tool_call",
            "approval.required",
            "approval.resolved",
            "agent.tool_result",
            "agent.message",
            "agent.completed",
        ]
        call, resolved = wire.durable[2]["payload"], wire.durable[4]["payload"]
        assert (call["decision"], approval["toolCallId"]) == ("approval-required", call["toolCallId"])
        assert (resolved["status"], resolved["resolvedBy"]) == ("approved", "u_owner")


async def test_who_hears_the_question_finds_the_run_waiting_at_once(open_house: Open) -> None:
    async with open_house(ONCE, ASKS) as home, await home.wire() as wire:
        for session in (f"s{number}" for number in range(8)):
            run = await wire.effect("agent.run", input="go", sessionId=session)
            await wire.event("approval.required", sessionId=session)
            asked = await wire.start("runs.get", {"runId": run["runId"]})
            found = (await wire.request("sessions.get", {"sessionId": session}))["session"]
            assert (await wire.response(asked))["payload"]["run"]["status"] == "waiting_approval"
            assert (found["status"], found["activeRunId"]) == ("waiting_approval", run["runId"])


async def test_a_rejection_is_told_to_the_model_with_its_comment(open_house: Open) -> None:
    async with open_house(ONCE, ASKS) as home, await home.wire() as wire:
        approval = await waiting(home, wire)
        params = {"approvalId": approval["approvalId"], "decision": "reject", "comment": "not in this folder"}
        assert (await wire.effect("approval.resolve", **params))["status"] == "rejected"
        done = await wire.event("agent.completed")
        result = (await wire.event("agent.tool_result"))["payload"]
        assert (result["status"], result["error"]["code"]) == ("denied", "APPROVAL_REQUIRED")
        assert "not in this folder" in done["payload"]["output"]
        assert not (workspace(home) / "a.txt").exists()


async def test_records_name_the_workspace_that_a_thing_lies_in_not_the_one_the_call_was_made_in(
    open_house: Open,
) -> None:
    async with open_house(ONCE, ASKS) as home:
        token = await home.add_token("ann", workspaces=["w_default", "w_b"], roles=["owner"])
        async with await home.wire(token) as wire:
            await wire.effect("agents.upsert", workspaceId="w_b", agent={"id": "a_default"})
            there = (await wire.effect("sessions.create", workspaceId="w_b"))["session"]["id"]
            await wire.effect("sessions.update", sessionId=there, title="from elsewhere")
            approval = await waiting(home, wire, sessionId=there)
            resolve = {"approvalId": approval["approvalId"], "decision": "approve", "remember": "workspace"}
            await wire.effect("approval.resolve", **resolve)
            await wire.event("agent.completed")
            (grant,) = (await wire.request("grants.list", {"workspaceId": "w_b"}))["items"]
            await wire.effect("grants.revoke", grantId=grant["grantId"], workspaceId="w_b")
            for action in ("session.create", "session.update", "agent.run", "grant.created", "grant.revoked"):
                (record,) = (await wire.request("audit.query", {"action": action, "actor": "ann"}))["items"]
                assert (action, record["metadata"]["workspaceId"]) == (action, "w_b")


async def test_of_many_decisions_at_once_one_wins_and_the_others_get_the_standing_one(open_house: Open) -> None:
    async with open_house(ONCE, ASKS) as home, await home.wire() as wire:
        approval = await waiting(home, wire)
        ids = [
            await wire.start(
                "approval.resolve",
                {
                    "approvalId": approval["approvalId"],
                    "decision": "approve" if number % 2 else "reject",
                    "idempotencyKey": f"race-{number}",
                },
            )
            for number in range(20)
        ]
        answers = [await wire.response(frame_id) for frame_id in ids]
        won = [answer for answer in answers if answer["ok"]]
        lost = [answer["error"] for answer in answers if not answer["ok"]]
        assert (len(won), len(lost)) == (1, 19)
        assert {error["code"] for error in lost} == {"CONFLICT"}
        assert {error["details"]["status"] for error in lost} == {won[0]["payload"]["status"]}
        await wire.event("agent.completed")
        assert [frame["event"] for frame in wire.durable].count("approval.resolved") == 1


async def test_a_pending_approval_survives_a_kill_and_its_call_runs_once(tmp_path: Path) -> None:
    script = conversation([CallTools([("bash_exec", {"command": "echo x >> marks"})]), Say("done")])
    async with ModelServer(script) as model, gateway(tmp_path, model) as running:
        wire = await connected(running)
        await wire.effect("policy.update", patch={**OPEN_TOOLS, "tools": {"bash.exec": "approval-required"}})
        await wire.effect("agent.run", input="go", sessionId="s1")
        approval = (await wire.event("approval.required"))["payload"]
        await running.kill()
        await wire.close()
        await running.start()
        async with await connected(running) as wire:
            assert [each["approvalId"] for each in wire.hello["pendingApprovals"]] == [approval["approvalId"]]
            queue = await wire.request("approval.queue")
            assert [each["approvalId"] for each in queue["items"]] == [approval["approvalId"]]
            await wire.effect("approval.resolve", approvalId=approval["approvalId"], decision="approve")
            items = await ended(wire, "s1")
            check_journal(items)
            assert items[-1]["payload"]["output"] == "done"
            assert (await wire.request("approval.queue"))["items"] == []
        folder = running.data_dir / "workspaces" / "t_default" / "w_default"
        assert (folder / "marks").read_text() == "x\n"


async def test_a_decision_whose_gateway_died_before_acting_on_it_is_acted_on_by_the_next(tmp_path: Path) -> None:
    async with ModelServer(ONCE) as model, gateway(tmp_path, model) as running:
        wire = await connected(running)
        await wire.effect("policy.update", patch=ASKS)
        await wire.effect("agent.run", input="go", sessionId="s1")
        approval = (await wire.event("approval.required"))["payload"]
        await parked(wire, approval["runId"])
        params = {"approvalId": approval["approvalId"], "decision": "approve", "idempotencyKey": "k"}
        await wire.start("approval.resolve", params)
        await wire.frame(lambda frame: frame.get("event") == "approval.resolved")
        await running.kill()
        await wire.close()
        await running.start()
        async with await connected(running) as wire:
            check_journal(await ended(wire, "s1"))
            assert (await wire.request("approval.resolve", params))["status"] == "approved"


async def test_silence_is_a_no(open_house: Open) -> None:
    async with open_house(ONCE, ASKS, approval_ttl_ms=200) as home, await home.wire() as wire:
        await wire.effect("agent.run", input="go", sessionId="s1")
        resolved = (await wire.event("approval.resolved"))["payload"]
        assert (resolved["status"], "resolvedBy" in resolved) == ("expired", False)
        result = (await wire.event("agent.tool_result"))["payload"]
        assert (result["status"], result["error"]["code"]) == ("denied", "APPROVAL_REQUIRED")
        await wire.event("agent.completed")
        assert not (workspace(home) / "a.txt").exists()
        late = await wire.call(
            "approval.resolve", {"approvalId": resolved["approvalId"], "decision": "approve", "idempotencyKey": "k"}
        )
        assert (late["error"]["code"], late["error"]["details"]["status"]) == ("CONFLICT", "expired")


async def test_a_word_that_comes_too_late_is_none_though_nobody_has_written_the_expiry_down_yet(
    open_house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(approvals, "EXPIRY_INTERVAL_S", 3600)
    async with open_house(ONCE, ASKS, approval_ttl_ms=500) as home, await home.wire() as wire:
        approval = await waiting(home, wire)
        async with asyncio.timeout(60):
            while rfc3339(SystemClock().now_ms()) <= approval["expiresAt"]:  # noqa: ASYNC110 - time passes by itself
                await asyncio.sleep(0.01)
        late = await wire.call(
            "approval.resolve", {"approvalId": approval["approvalId"], "decision": "approve", "idempotencyKey": "k"}
        )
        assert (late["error"]["code"], late["error"]["details"]["status"]) == ("CONFLICT", "expired")
        (item,) = (await wire.request("approval.queue"))["items"]
        assert (item["approvalId"], item["status"]) == (approval["approvalId"], "pending")
        assert not (workspace(home) / "a.txt").exists()


async def test_the_person_may_change_the_arguments_and_the_model_is_told(open_house: Open) -> None:
    async with open_house(ONCE, ASKS) as home, await home.wire() as wire:
        approval = await waiting(home, wire)
        args = {"path": "b.txt", "content": "two"}
        await wire.effect("approval.resolve", approvalId=approval["approvalId"], decision="approve", args=args)
        resolved = (await wire.event("approval.resolved"))["payload"]
        assert resolved["args"] == args
        assert resolved["argsHash"] != approval["argsHash"]
        done = await wire.event("agent.completed")
        assert "b.txt" in done["payload"]["output"]
        assert "A person changed the arguments" in done["payload"]["output"]
        assert (workspace(home) / "b.txt").read_text() == "two"
        assert not (workspace(home) / "a.txt").exists()


async def test_edited_arguments_that_are_wrong_or_denied_leave_the_approval_pending(open_house: Open) -> None:
    async with open_house(ONCE, ASKS) as home, await home.wire() as wire:
        approval = await waiting(home, wire)
        base = {"approvalId": approval["approvalId"], "decision": "approve"}
        wrong = await wire.call("approval.resolve", {**base, "args": {"path": 7}, "idempotencyKey": "a"})
        assert wrong["error"]["code"] == "INVALID_REQUEST"
        assert wrong["error"]["message"].startswith("$.params.args.path: ")
        await allow(home, {"tools": {"file.write": "deny"}})
        args = {"path": "b", "content": "c"}
        denied = await wire.call("approval.resolve", {**base, "args": args, "idempotencyKey": "b"})
        assert denied["error"]["code"] == "POLICY_DENIED"
        assert len((await wire.request("approval.queue"))["items"]) == 1


async def test_what_policy_denies_meanwhile_is_not_run_though_a_person_approved_it(open_house: Open) -> None:
    async with open_house(ONCE, ASKS) as home, await home.wire() as wire:
        approval = await waiting(home, wire)
        await allow(home, {"tools": {"file.write": "deny"}})
        await wire.effect("approval.resolve", approvalId=approval["approvalId"], decision="approve")
        result = (await wire.event("agent.tool_result"))["payload"]
        assert (result["status"], result["error"]["code"]) == ("denied", "POLICY_DENIED")
        assert not (workspace(home) / "a.txt").exists()


async def test_an_approval_is_void_when_the_sandbox_that_it_was_given_for_has_changed(open_house: Open) -> None:
    async with open_house(ONCE, ASKS) as home, await home.wire() as wire:
        approval = await waiting(home, wire)
        await allow(home, {"bashNetwork": "host"})
        await wire.effect("approval.resolve", approvalId=approval["approvalId"], decision="approve")
        result = (await wire.event("agent.tool_result"))["payload"]
        assert result["status"] == "denied"
        assert "has changed since" in result["output"]
        assert not (workspace(home) / "a.txt").exists()


AGAIN = conversation([WRITE, Say("done"), WRITE, Say("done"), WRITE, Say("done")])
TWICE = conversation(
    [
        WRITE,
        CallTools([("file_write", {"path": "a.txt", "content": "one"})]),
        CallTools([("file_write", {"path": "a.txt", "content": "other"})]),
        Say("done"),
    ]
)


async def test_a_remembered_approval_covers_exactly_that_call_and_can_be_revoked(open_house: Open) -> None:
    async with open_house(TWICE, ASKS) as home, await home.wire() as wire:
        approval = await waiting(home, wire)
        await wire.effect("approval.resolve", approvalId=approval["approvalId"], decision="approve", remember="session")
        # The second, the same, runs by the grant; the third, another text, waits.
        other = await wire.frame(
            lambda frame: (
                frame.get("event") == "approval.required" and frame["payload"]["approvalId"] != approval["approvalId"]
            )
        )
        assert other["payload"]["args"]["content"] == "other"
        calls = [frame["payload"] for frame in wire.durable if frame["event"] == "agent.tool_call"]
        assert [call["decision"] for call in calls] == ["approval-required", "allow", "approval-required"]
        grant = (await wire.request("grants.list"))["items"][0]
        assert (grant["scope"], grant["sessionId"], grant["uses"]) == ("session", "s1", 1)
        assert '"content":"one"' in grant["matcher"]
        assert calls[1]["reason"].startswith(f"grant {grant['grantId']}")
        revoked = (await wire.effect("grants.revoke", grantId=grant["grantId"]))["grant"]
        assert "revokedAt" in revoked
        await wire.effect("approval.resolve", approvalId=other["payload"]["approvalId"], decision="reject")
        await wire.event("agent.completed")
        assert (await waiting(home, wire))["args"]["content"] == "one"


async def test_a_grant_for_a_session_is_none_in_another_and_one_for_the_workspace_is(open_house: Open) -> None:
    async with open_house(ONCE, ASKS) as home, await home.wire() as wire:
        first = await waiting(home, wire)
        await wire.effect("approval.resolve", approvalId=first["approvalId"], decision="approve", remember="session")
        second = await waiting(home, wire, sessionId="s2")
        await wire.effect("approval.resolve", approvalId=second["approvalId"], decision="approve", remember="workspace")
        run = await wire.effect("agent.run", input="go", sessionId="s3")
        await wire.event("agent.completed", runId=run["runId"])
        call = await wire.event("agent.tool_call", runId=run["runId"])
        assert call["payload"]["decision"] == "allow"


async def test_what_waits_for_a_person_withholds_nothing_else(open_house: Open) -> None:
    calls = [
        ("file_write", {"path": "a", "content": ""}),
        ("file_list", {}),
        ("file_edit", {"path": "b", "old": "x", "new": "y"}),
    ]
    script = conversation([CallTools(calls), Say("done")])
    async with open_house(script, {"tools": {"file.write": "approval-required", "file.edit": "allow"}}) as home:
        (workspace(home)).mkdir(parents=True, exist_ok=True)
        (workspace(home) / "b").write_text("x")
        async with await home.wire() as wire:
            approval = await waiting(home, wire)
            results = [frame["payload"]["toolName"] for frame in wire.durable if frame["event"] == "agent.tool_result"]
            assert results == ["file.list", "file.edit"]
            await wire.effect("approval.resolve", approvalId=approval["approvalId"], decision="approve")
            await wire.event("agent.completed")


async def test_a_waiting_run_holds_no_place_and_its_waiting_is_not_its_time(open_house: Open) -> None:
    script = script_for({"quick": [Say("quick")], "": conversation([WRITE, Say("after all")])})
    async with open_house(script, ASKS, max_active_runs=1) as home, await home.wire() as wire:
        approval = await waiting(home, wire, limits={"timeoutMs": 1500})
        async with await home.wire() as other:
            await other.effect("agent.run", input="quick")
            await other.event("agent.completed")
        await asyncio.sleep(1.6)  # longer than the run may take: the passing of time is what is tried
        await wire.effect("approval.resolve", approvalId=approval["approvalId"], decision="approve")
        assert (await wire.event("agent.completed"))["payload"]["output"] == "after all"


async def test_a_waiting_run_can_be_aborted_and_its_approval_is_cancelled(open_house: Open) -> None:
    async with open_house(ONCE, ASKS) as home, await home.wire() as wire:
        approval = await waiting(home, wire)
        answer = await wire.effect("agent.abort", runId=approval["runId"])
        assert answer["status"] == "aborted"
        await wire.event("agent.failed")
        names = [(frame["event"], frame["payload"].get("status")) for frame in wire.durable[-3:]]
        assert names[0] == ("approval.resolved", "cancelled")
        assert names[1] == ("agent.tool_result", "interrupted")
        late = await wire.call(
            "approval.resolve", {"approvalId": approval["approvalId"], "decision": "approve", "idempotencyKey": "k"}
        )
        assert late["error"]["details"]["status"] == "cancelled"
        assert not (workspace(home) / "a.txt").exists()


async def test_under_four_eyes_who_started_the_run_may_not_approve_its_calls(open_house: Open) -> None:
    async with open_house(ONCE, {**ASKS, "fourEyes": True}) as home, await home.wire() as wire:
        await wire.effect("sessions.create", title="shared", visibility="workspace")
        session = (await wire.request("sessions.list"))["items"][0]["id"]
        approval = await waiting(home, wire, sessionId=session)
        params = {"approvalId": approval["approvalId"], "decision": "approve", "idempotencyKey": "k"}
        assert (await wire.call("approval.resolve", params))["error"]["code"] == "FORBIDDEN"
        token = await home.add_token("u_second", roles=["operator"])
        async with await home.wire(token) as second:
            assert (await second.request("approval.resolve", params))["status"] == "approved"
        resolved = (await wire.event("approval.resolved"))["payload"]
        assert resolved["resolvedBy"] == "u_second"
        await wire.event("agent.completed")


async def test_under_four_eyes_a_person_with_two_names_is_one(open_house: Open) -> None:
    async with open_house(AGAIN, ASKS) as home, await home.wire() as wire:
        made = await wire.effect("tokens.create", roles=["operator"], subject="laptop")
        async with await home.wire(made["token"]) as laptop:
            session = (await laptop.effect("sessions.create", title="shared", visibility="workspace"))["session"]["id"]
            first = await waiting(home, laptop, sessionId=session)
            await wire.effect(
                "approval.resolve", approvalId=first["approvalId"], decision="approve", remember="workspace"
            )
            await laptop.event("agent.completed")
            await allow(home, {"fourEyes": True})
            second = await waiting(home, laptop, sessionId=session)
            params = {"approvalId": second["approvalId"], "decision": "approve", "idempotencyKey": "k"}
            for name in (wire, laptop):
                assert (await name.call("approval.resolve", params))["error"]["code"] == "FORBIDDEN"


async def test_under_four_eyes_what_one_remembered_does_not_stand_for_the_second_pair(open_house: Open) -> None:
    async with open_house(AGAIN, ASKS) as home, await home.wire() as wire:
        await wire.effect("sessions.create", title="shared", visibility="workspace")
        session = (await wire.request("sessions.list"))["items"][0]["id"]
        own = await waiting(home, wire, sessionId=session)
        await wire.effect("approval.resolve", approvalId=own["approvalId"], decision="approve", remember="workspace")
        await wire.event("agent.completed", runId=own["runId"])
        await allow(home, {"fourEyes": True})
        asked = await waiting(home, wire, sessionId=session)
        async with await home.wire(await home.add_token("u_second", roles=["operator"])) as second:
            await second.effect(
                "approval.resolve", approvalId=asked["approvalId"], decision="approve", remember="workspace"
            )
        await wire.event("agent.completed", runId=asked["runId"])
        third = await wire.effect("agent.run", input="go", sessionId=session)
        call = (await wire.event("agent.tool_call", runId=third["runId"]))["payload"]
        assert (call["decision"], call["reason"].partition(" ")[0]) == ("allow", "grant")
        await wire.event("agent.completed", runId=third["runId"])
        grants = (await wire.request("grants.list"))["items"]
        assert {grant["createdBy"]: grant["uses"] for grant in grants} == {"u_owner": 0, "u_second": 1}


async def test_who_may_not_see_the_session_cannot_tell_its_approval_from_none(open_house: Open) -> None:
    async with open_house(ONCE, ASKS) as home, await home.wire() as wire:
        approval = await waiting(home, wire)
        token = await home.add_token("u_second", roles=["operator"])
        async with await home.wire(token) as second:
            answers = []
            for number, name in enumerate((approval["approvalId"], "ap_" + "0" * 32)):
                try:
                    await second.request(
                        "approval.resolve",
                        {"approvalId": name, "decision": "approve", "idempotencyKey": f"k{number}"},
                    )
                except Refused as refused:
                    answers.append((refused.code, refused.message))
            assert answers[0] == answers[1]
            assert answers[0][0] == "NOT_FOUND"
            assert (await second.request("approval.queue"))["items"] == []
            assert second.hello["pendingApprovals"] == []


async def test_a_member_may_run_but_not_approve(open_house: Open) -> None:
    async with open_house(ONCE, ASKS) as home:
        token = await home.add_token("u_member", roles=["member"])
        async with await home.wire(token) as wire:
            approval = await waiting(home, wire)
            answer = await wire.call(
                "approval.resolve", {"approvalId": approval["approvalId"], "decision": "approve", "idempotencyKey": "k"}
            )
            assert answer["error"]["code"] == "FORBIDDEN"


async def test_an_answer_that_comes_while_the_run_is_being_parked_is_not_missed(open_house: Open) -> None:
    async with open_house(ONCE, ASKS) as home, await home.wire() as wire:
        runs = [await wire.effect("agent.run", input="go", sessionId=f"s{number}") for number in range(20)]
        for run in runs:
            # Answered at once, which is before, while or after its loop gives the run up.
            approval = (await wire.event("approval.required", runId=run["runId"]))["payload"]
            await wire.start(
                "approval.resolve",
                {"approvalId": approval["approvalId"], "decision": "approve", "idempotencyKey": run["runId"]},
            )
        for run in runs:
            await wire.event("agent.completed", runId=run["runId"])
        assert [frame["event"] for frame in wire.durable].count("agent.tool_result") == 20


async def test_a_call_whose_arguments_are_not_those_that_were_approved_does_not_run(open_house: Open) -> None:
    unchecked = "the arguments are changed in the store"
    async with open_house(ONCE, ASKS, unchecked=unchecked) as home, await home.wire() as wire:
        approval = await waiting(home, wire)
        other = {"path": "b.txt", "content": "not what was shown"}
        await home.server.store.write(lambda tx: tx.tool_runs.update("t_default", approval["toolCallId"], args=other))
        await wire.effect("approval.resolve", approvalId=approval["approvalId"], decision="approve")
        result = (await wire.event("agent.tool_result"))["payload"]
        assert result["status"] == "denied"
        assert not (workspace(home) / "a.txt").exists()
        assert not (workspace(home) / "b.txt").exists()
