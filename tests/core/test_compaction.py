"""Compaction: when it comes, what it sends and keeps, what is journalled, and what it does not break."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from corral.clock import SystemClock
from corral.config import ModelSettings
from corral.core.summary import PROMPT
from corral.governance.budgets import day_of
from corral.storage.rows import SessionRow
from tests.core.conftest import Open
from tests.support.house import House
from tests.support.model_server import CallTools, CutAfter, Hang, Say, Slow, Status
from tests.support.wire import Wire, rpc

Json = dict[str, Any]
WINDOW = 6000
SMALL = {"openai-chat:test": ModelSettings(context_window=WINDOW)}
NEEDLE = "the gate code is 4711-ochre"
SUMMARY = "Summary: the person told that the gate code is 4711-ochre; a long text was read."


def is_summary(request: Json) -> bool:
    return bool(request["messages"][0]["content"] == PROMPT)


def summarises(summary: Any, otherwise: Any) -> Callable[[Json], Any]:
    """A script: one step for requests for a summary, another script for all else."""
    return lambda request: summary if is_summary(request) else otherwise


def requests(home: House, *, summaries: bool) -> list[Json]:
    return [each.json for each in home.model.requests if is_summary(each.json) is summaries]


def text_of(request: Json) -> str:
    return "\n".join(str(message["content"]) for message in request["messages"])


async def turn(wire: Wire, text: Any, **params: Any) -> Json:
    """A run in session s1, to its end; the terminal event's payload with its event's name."""
    run = await wire.effect("agent.run", **{"input": text, "sessionId": "s1", **params})
    ended = await wire.frame(
        lambda frame: (
            frame.get("event") in ("agent.completed", "agent.failed") and frame["payload"]["runId"] == run["runId"]
        )
    )
    return {**ended["payload"], "event": ended["event"]}


async def session(wire: Wire, session_id: str = "s1") -> Json:
    found: Json = (await wire.request("sessions.get", {"sessionId": session_id}))["session"]
    return found


async def history(wire: Wire, session_id: str = "s1") -> list[Json]:
    items: list[Json] = (await wire.request("sessions.history", {"sessionId": session_id, "limit": 500}))["items"]
    return items


LONG = f"Remember: {NEEDLE}. " + "This is filler that nobody needs. " * 400
"""About 3,400 tokens: with prompt and tools past the threshold once something else is asked."""


COMPACTED = ["session.compacted", "agent.message", "agent.completed"]


async def test_past_the_threshold_the_older_history_is_summarised_and_the_summary_is_sent_from_then_on(
    open_house: Open,
) -> None:
    script = summarises(Say(SUMMARY), Say("yes"))
    async with open_house(script, models=SMALL) as home, await home.wire() as wire:
        await turn(wire, LONG)
        assert requests(home, summaries=True) == []
        usage = (await session(wire))["contextUsage"]
        assert usage == 110 / WINDOW
        assert (await turn(wire, "What is the gate code? " + "x" * 3000))["event"] == "agent.completed"
        (asked,) = requests(home, summaries=True)
        assert NEEDLE in text_of(asked)
        assert "What is the gate code?" not in text_of(asked)
        assert "tools" not in asked
        await turn(wire, "And now?")
        for sent in requests(home, summaries=False)[1:]:
            assert "filler" not in text_of(sent)
            assert text_of(sent).count(SUMMARY) == 1
            assert sent["messages"][0]["role"] == "system"
            assert sent["messages"][1]["role"] == "user"
        assert "What is the gate code?" in text_of(requests(home, summaries=False)[-1])


async def test_a_compaction_is_journalled_counted_audited_and_paid_for_and_is_no_step(open_house: Open) -> None:
    script = summarises(Say(SUMMARY, usage=(3000, 40)), Say("yes"))
    async with open_house(script, models=SMALL) as home, await home.wire() as wire:
        await turn(wire, LONG)
        ended = await turn(wire, "Go on. " + "x" * 3000)
        compacted = await wire.event("session.compacted")
        payload = compacted["payload"]
        assert set(payload) == {"sessionId", "before", "after", "summary", "usage"}
        assert payload["usage"] == {"inputTokens": 3000, "outputTokens": 40, "costUsd": None}
        assert payload["summary"] == SUMMARY
        assert WINDOW > payload["before"] > 0.8 * WINDOW
        assert payload["after"] < payload["before"] / 1.5
        assert ended["steps"] == 1
        assert ended["usage"]["inputTokens"] == 3100
        assert ended["usage"]["outputTokens"] == 50
        told = await session(wire)
        assert told["compactionCount"] == 1
        assert told["memoryFlushState"] == "skipped"
        events = [item["event"] for item in await history(wire)]
        assert events.count("session.compacted") == 1
        assert [item["id"] for item in await history(wire)] == list(range(1, len(events) + 1))
        assert NEEDLE in str(await history(wire))
        audit = (await wire.request("audit.query", {"action": "session.compact"}))["items"]
        assert [(record["resourceId"], record["metadata"]["count"]) for record in audit] == [("s1", 1)]
        assert "memory.append" in audit[0]["metadata"]["reason"]
        assert (await wire.request("audit.verify"))["ok"]


async def test_the_usage_of_the_context_is_what_is_left_right_after_a_compaction(open_house: Open) -> None:
    script = summarises(Say(SUMMARY), lambda request: Hang(after=3) if "stay" in text_of(request) else Say("yes"))
    async with open_house(script, models=SMALL) as home, await home.wire() as wire:
        await turn(wire, LONG)
        run = await wire.effect("agent.run", input="stay " + "x" * 3000, sessionId="s1")
        await wire.event("agent.delta", runId=run["runId"])
        payload = (await wire.event("session.compacted"))["payload"]
        assert (await session(wire))["contextUsage"] == pytest.approx(payload["after"] / WINDOW, abs=0.001)
        await wire.effect("agent.abort", runId=run["runId"])


async def test_what_the_provider_counted_decides_where_it_is_more_than_the_estimate(open_house: Open) -> None:
    counts = iter([(5500, 100), (900, 10), (900, 10)])
    script = summarises(Say(SUMMARY), lambda _request: Say("yes", usage=next(counts)))
    async with open_house(script, models=SMALL) as home, await home.wire() as wire:
        await turn(wire, "short " * 20)
        assert (await session(wire))["contextUsage"] == 5600 / WINDOW
        await turn(wire, "again")
        assert len(requests(home, summaries=True)) == 1
        assert (await session(wire))["contextUsage"] == 910 / WINDOW
        await turn(wire, "and again")
        assert len(requests(home, summaries=True)) == 1


async def test_what_a_smaller_model_counted_is_not_taken_for_a_share_of_a_larger_one_s_window(open_house: Open) -> None:
    script = summarises(Say(SUMMARY), Say("yes", usage=(4000, 10)))
    models = {**SMALL, "openai-chat:large": ModelSettings(context_window=100_000)}
    async with open_house(script, models=models) as home, await home.wire() as wire:
        await turn(wire, LONG)
        assert (await session(wire))["contextUsage"] == 4010 / WINDOW
        # Two thirds of the small window's share and what comes now would be past the large one's threshold.
        await turn(wire, "Go on. " + "x" * 66_000, model="openai-chat:large")
        assert requests(home, summaries=True) == []
        assert (await session(wire))["contextUsage"] == 4010 / 100_000
        await turn(wire, "And back. " + "x" * 8000)
        assert len(requests(home, summaries=True)) > 0


async def test_the_threshold_is_a_setting(open_house: Open) -> None:
    script = summarises(Say(SUMMARY), Say("yes"))
    async with open_house(script, models=SMALL, compaction_threshold=1.0) as home, await home.wire() as wire:
        await turn(wire, LONG)
        await turn(wire, "What is the gate code? " + "x" * 3000)
        assert requests(home, summaries=True) == []


async def test_without_compaction_the_oldest_turns_are_left_out_and_nothing_is_asked_of_the_model(
    open_house: Open,
) -> None:
    script = summarises(Say(SUMMARY), Say("yes"))
    async with open_house(script, models=SMALL, compaction=False) as home, await home.wire() as wire:
        for _ in range(3):
            await turn(wire, LONG)
        assert requests(home, summaries=True) == []
        assert (await session(wire))["compactionCount"] == 0
        sent = [text_of(request).count(LONG) for request in requests(home, summaries=False)]
        assert sent[-1] < len(sent)


def reads(steps: int) -> Callable[[Json], Any]:
    """A run that reads a file so many times and then answers."""

    def play(request: Json) -> Any:
        done = sum(message["role"] == "tool" for message in request["messages"])
        if SUMMARY in text_of(request):
            return Say("All read.")
        return CallTools([("file_read", {"path": "big"})]) if done < steps else Say("All read.")

    return play


async def test_in_the_middle_of_a_run_its_input_is_sent_whole_and_calls_stay_with_their_results(
    open_house: Open,
) -> None:
    async with open_house(summarises(Say(SUMMARY), reads(9)), models=SMALL) as home, await home.wire() as wire:
        folder(home).joinpath("big").write_text("words of a file, " * 120)
        picture = {"type": "image", "mimeType": "image/png", "data": "aGk="}
        ended = await turn(wire, [{"type": "text", "text": "Read it nine times, as in this picture."}, picture])
        assert ended["output"] == "All read."
        (asked,) = requests(home, summaries=True)
        assert "[an image, image/png]" in text_of(asked)
        assert "words of a file" in text_of(asked)
        after = requests(home, summaries=False)[-1]["messages"]
        inputs = [m["content"] for m in after if m["role"] == "user" and isinstance(m["content"], list)]
        assert len(inputs) == 1
        assert inputs[0][0]["text"] == "Read it nine times, as in this picture."
        assert inputs[0][1]["image_url"]["url"] == "data:image/png;base64,aGk="
        calls = [call["id"] for m in after for call in m.get("tool_calls", [])]
        assert calls
        assert calls == [m["tool_call_id"] for m in after if m["role"] == "tool"]
        await turn(wire, "Next.")
        again = requests(home, summaries=False)[-1]["messages"]
        assert [m["content"] for m in again if isinstance(m["content"], list)] == []
        assert text_of({"messages": again}).count(SUMMARY) == 1


async def test_a_run_that_is_taken_up_after_a_compaction_in_its_middle_has_its_input_again(open_house: Open) -> None:
    def play(request: Json) -> Any:
        if request["messages"][-1]["role"] == "tool" and "lines of it" in text_of(request):
            return Say("Written.")
        if SUMMARY in text_of(request):
            return CallTools([("file_write", {"path": "out", "content": "lines of it"})])
        return CallTools([("file_read", {"path": "big"})])

    patch = {"tools": {"file.write": "approval-required"}}
    script = summarises(Say(SUMMARY), lambda request: play(request))
    async with open_house(script, patch, models=SMALL) as home, await home.wire() as wire:
        folder(home).joinpath("big").write_text("words of a file, " * 120)
        await wire.effect("agent.run", input="Read it until you know it.", sessionId="s1")
        asked = (await wire.event("approval.required"))["payload"]
        before = requests(home, summaries=False)[-1]["messages"]
        await wire.effect("approval.resolve", approvalId=asked["approvalId"], decision="reject", comment="lines of it")
        assert (await wire.event("agent.completed"))["payload"]["output"] == "Written."
        after = requests(home, summaries=False)[-1]["messages"]
        assert after[: len(before)] == before
        assert text_of({"messages": after}).count("Read it until you know it.") == 1


async def test_a_second_compaction_is_given_the_summary_of_the_first(open_house: Open) -> None:
    summaries = iter([SUMMARY, "Second: 4711-ochre still."])
    script = summarises(lambda _request: Say(next(summaries)), Say("yes"))
    async with open_house(script, models=SMALL) as home, await home.wire() as wire:
        await turn(wire, LONG)
        await turn(wire, "two " + "y" * 9000)
        await turn(wire, "three " + "z" * 9000)
        await turn(wire, "four")
        _first, second = requests(home, summaries=True)
        assert SUMMARY in text_of(second)
        assert "filler" not in text_of(second)
        assert "y" * 500 in text_of(second)
        last = text_of(requests(home, summaries=False)[-1])
        assert "Second: 4711-ochre still." in last
        assert SUMMARY not in last
        assert (await session(wire))["compactionCount"] == 2


async def test_a_history_too_long_for_the_window_is_summarised_in_pieces_that_miss_nothing(open_house: Open) -> None:
    """Told one after another, each with the summary so far; as when the model was changed to a smaller one."""

    def big(request: Json) -> Any:
        return Say("yes", usage=(100, 10))

    script = summarises(lambda request: Say("so far: " + str(text_of(request).count("mark-"))), big)
    models = {**SMALL, "openai-chat:large": ModelSettings(context_window=100_000)}
    async with open_house(script, models=models) as home, await home.wire() as wire:
        for number in range(6):
            await turn(wire, f"mark-{number} " + "w" * 8000, model="openai-chat:large")
        ended = await turn(wire, "now the small one")
        assert ended["event"] == "agent.completed"
        asked = requests(home, summaries=True)
        assert len(asked) > 2
        assert all(len(text_of(each)) < 4 * WINDOW * 0.8 for each in asked)
        for number in range(6):
            assert sum(f"mark-{number}" in text_of(each) for each in asked) == 1
        assert all("The summary so far" in text_of(each) for each in asked[1:])
        assert ended["usage"]["inputTokens"] == 100 * (len(asked) + 1)
        # Each piece is paid for in a commit of its own and told there; the last in that of the summary.
        names = [each["event"] for each in await history(wire) if each["runId"] == ended["runId"]]
        assert names == ["agent.accepted", *["agent.usage"] * (len(asked) - 1), *COMPACTED]


@pytest.mark.parametrize(
    ("step", "asked"),
    [
        (Status(401, message="no"), 1),
        (Status(400, message="maximum context length is 100 tokens", code="context_length_exceeded"), 3),
        (Status(429, retry_after=3600), 1),
        (CutAfter(1, delay=0), 3),
        (Say(""), 1),
        (Say("I had rather not.", finish="content_filter"), 1),
    ],
    ids=["unavailable", "too long", "rate limit", "cut off", "empty", "refused"],
)
async def test_a_run_goes_on_with_a_pruned_history_where_there_is_no_summary_to_be_had(
    open_house: Open, step: Any, asked: int
) -> None:
    """Tried once in a run: with the retries of every call of a model, and in smaller pieces where it was too long."""
    async with open_house(summarises(step, reads(9)), models=SMALL) as home, await home.wire() as wire:
        folder(home).joinpath("big").write_text("words of a file, " * 120)
        ended = await turn(wire, "Read it nine times.")
        assert (ended["event"], ended["output"]) == ("agent.completed", "All read.")
        assert "session.compacted" not in [item["event"] for item in await history(wire)]
        assert (await session(wire))["compactionCount"] == 0
        assert len(requests(home, summaries=True)) == asked
        assert all(len(text_of(each)) < 4 * WINDOW for each in requests(home, summaries=False))


async def test_a_summary_that_is_longer_than_what_it_stands_for_is_not_taken(open_house: Open) -> None:
    script = summarises(Say("A longer text than what it stands for. " * 500), Say("yes"))
    async with open_house(script, models=SMALL) as home, await home.wire() as wire:
        await turn(wire, "few words " * 300)
        assert (await turn(wire, "x" * 13_600))["event"] == "agent.completed"
        assert len(requests(home, summaries=True)) == 1
        assert await stored(home) == 0


async def test_a_summary_that_does_not_keep_to_its_length_is_cut_and_says_so(open_house: Open) -> None:
    script = summarises(Say("Far too long. " * 2000), Say("yes"))
    async with open_house(script, models=SMALL) as home, await home.wire() as wire:
        await turn(wire, LONG)
        await turn(wire, "Go on. " + "x" * 3000)
        told = (await wire.event("session.compacted"))["payload"]["summary"]
        assert told.endswith("[The summary was too long and is cut here.]")
        assert len(told) < WINDOW + 100


async def test_a_summary_without_an_end_is_asked_for_once_more_and_shorter(open_house: Open) -> None:
    script = summarises(
        lambda request: Say(SUMMARY) if "cut off before" in text_of(request) else Say("No end", finish="length"),
        Say("yes"),
    )
    async with open_house(script, models=SMALL) as home, await home.wire() as wire:
        await turn(wire, LONG)
        ended = await turn(wire, "Go on. " + "x" * 3000)
        assert (await wire.event("session.compacted"))["payload"]["summary"] == SUMMARY
        first, second = requests(home, summaries=True)
        assert first["max_tokens"] == second["max_tokens"]
        assert "at most 375 words" in text_of(first)
        assert "at most 187 words" in text_of(second)
        assert ended["usage"]["inputTokens"] == 3 * 100


async def test_a_summary_that_has_no_end_twice_is_taken_and_says_so(open_house: Open) -> None:
    script = summarises(Say("It was asked to read", finish="length"), Say("yes"))
    async with open_house(script, models=SMALL) as home, await home.wire() as wire:
        await turn(wire, LONG)
        await turn(wire, "Go on. " + "x" * 3000)
        told = (await wire.event("session.compacted"))["payload"]["summary"]
        assert told == "It was asked to read\n[The summary was cut off here.]"
        assert len(requests(home, summaries=True)) == 2


async def test_on_rpc_a_compaction_is_one_of_the_run_s_events(open_house: Open) -> None:
    async with open_house(summarises(Say(SUMMARY), Say("yes")), models=SMALL) as home:
        for number, text in enumerate((LONG, "Go on. " + "x" * 3000)):
            params = {"input": text, "sessionId": "s1", "idempotencyKey": str(number)}
            answer = await rpc(home.url, "agent.run", params, token=home.token)
        names = [event["event"] for event in answer.events]
        assert names == ["agent.accepted", *COMPACTED]


async def test_what_failed_to_be_summarised_is_paid_for_all_the_same(open_house: Open) -> None:
    script = summarises(Say("", usage=(2000, 5)), Say("yes"))
    async with open_house(script, models=SMALL) as home, await home.wire() as wire:
        await turn(wire, LONG)
        ended = await turn(wire, "Go on. " + "x" * 3000)
        assert ended["usage"]["inputTokens"] == 2100
        (paid,) = [each["payload"] for each in await history(wire) if each["event"] == "agent.usage"]
        usage = {"inputTokens": 2000, "outputTokens": 5, "costUsd": None}
        assert paid == {"sessionId": "s1", "runId": ended["runId"], "reason": "summary", "usage": usage}


async def test_an_abort_breaks_a_compaction_off(open_house: Open) -> None:
    async with open_house(summarises(Hang(), Say("yes")), models=SMALL) as home, await home.wire() as wire:
        await turn(wire, LONG)
        run = await wire.effect("agent.run", input="Go on. " + "x" * 3000, sessionId="s1")
        await home.model.wait(lambda: bool(requests(home, summaries=True)), 60)
        assert (await wire.effect("agent.abort", runId=run["runId"]))["status"] == "aborted"
        await home.model.wait(lambda: home.model.disconnects == 1, 60)
        told = await session(wire)
        assert (told["status"], told["compactionCount"]) == ("idle", 0)


async def test_a_compaction_by_an_owner_whose_lease_was_taken_over_is_not_written(open_house: Open) -> None:
    script = summarises(Slow(5, Say(SUMMARY)), Say("yes"))
    async with open_house(script, models=SMALL) as home, await home.wire() as wire:
        await turn(wire, LONG)
        run = await wire.effect("agent.run", input="Go on. " + "x" * 3000, sessionId="s1")
        await home.model.wait(lambda: bool(requests(home, summaries=True)), 60)
        await home.server.store.write(
            lambda tx: tx.runs.claim(
                "t_default", run["runId"], owner="another node", now_ms=0, expires_at=2**50, steal=True
            )
        )
        async with asyncio.timeout(60):
            while home.server.core.active_runs:  # noqa: ASYNC110 - the old owner leaves without a word
                await asyncio.sleep(0.01)
        assert "session.compacted" not in [item["event"] for item in await history(wire)]
        assert await stored(home) == 0


async def stored(home: House) -> int:
    """The session's compactions by the store."""
    row: SessionRow | None = await home.server.store.read(lambda tx: tx.sessions.get("t_default", "s1"))
    assert row is not None
    return row.compaction_count


async def test_a_day_s_budget_counts_a_compaction_s_tokens_and_no_step(open_house: Open) -> None:
    patch = {"limits": {"perDay": {"steps": 3, "tokens": 1_000_000}}}
    script = summarises(Say(SUMMARY, usage=(3000, 40)), Say("yes"))
    async with open_house(script, patch, models=SMALL) as home, await home.wire() as wire:
        await turn(wire, LONG)
        await turn(wire, "Go on. " + "x" * 3000)
        assert len(requests(home, summaries=True)) == 1
        assert (await turn(wire, "third"))["event"] == "agent.completed"
        assert (await turn(wire, "fourth"))["code"] == "BUDGET_EXCEEDED"
        day = day_of(SystemClock().now_ms())
        used = await home.server.store.write(lambda tx: tx.usage.taken("t_default", "workspace:w_default", day))
        assert (used.steps, used.tokens) == (3, 3 * 110 + 3040)


@pytest.mark.parametrize(
    ("patch", "limits"), [({"limits": {"maxTokensPerRun": 3000}}, {}), ({}, {"maxCostUsd": 0.005})]
)
async def test_a_budget_that_does_not_pay_for_a_summary_does_not_end_the_run_before_its_answer(
    open_house: Open, patch: Json, limits: Json
) -> None:
    """A step costs less than a summary of all that came before; the run has enough left for the one alone."""
    models = {
        "openai-chat:test": ModelSettings(context_window=WINDOW, input_usd_per_million=1.0, output_usd_per_million=1.0)
    }
    script = summarises(Say(SUMMARY, usage=(3600, 1300)), Say("yes"))
    async with open_house(script, patch, models=models) as home, await home.wire() as wire:
        assert (await turn(wire, LONG))["event"] == "agent.completed"
        ended = await turn(wire, "Go on. " + "x" * 3000, limits=limits)
        assert (ended["event"], ended["output"]) == ("agent.completed", "yes")
        assert requests(home, summaries=True) == []


def folder(home: House) -> Path:
    path = Path(home.server.settings.data_dir) / "workspaces" / "t_default" / "w_default"
    path.mkdir(parents=True, exist_ok=True)
    return path
