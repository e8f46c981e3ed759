"""The checker of the invariants finds each kind of violation, planted in a copy of a store that has none."""

from __future__ import annotations

import asyncio
import copy
import json
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.core.conftest import allow
from tests.support.house import House, house
from tests.support.invariants import Broken, Inspection, Promise, Seen, check
from tests.support.model_server import CallTools, Hang, Say, conversation, script_for, user_texts
from tests.support.wire import Json, Wire

POLICY = {"tools": {"file.write": "allow", "file.edit": "approval-required", "http.request": "deny"}}


def brain(request: dict[str, Any]) -> Any:
    said = user_texts(request)[-1]
    if said == "hang":
        return Hang(after=3)
    if said == "ask":
        return conversation([CallTools([("file_edit", {"path": "a", "old": "one", "new": "two"})]), Say("asked")])(
            request
        )
    return conversation(
        [
            CallTools(
                [
                    ("file_write", {"path": "a", "content": "one"}),
                    ("file_read", {"path": "a"}),
                    ("http_request", {"url": "http://example.com"}),
                    ("file_read", {"path": "missing"}),
                ],
                text="I begin.",
            ),
            Say("All of it is done.", chunks=5),
        ]
    )(request)


class Filled(NamedTuple):
    """A store with something of everything, what a client saw of it, and what it was promised."""

    database: Path
    events: list[Json]
    feed: list[Json]
    promises: list[Promise]


async def _fill(folder: Path) -> Filled:
    async with house(folder, script=script_for({"": brain})) as home:
        await allow(home, POLICY)
        stranger = await home.add_token("u_far", tenant_id="t_far", workspaces=["w_far"], roles=["owner"])
        async with await home.wire(stranger, workspaceId="w_far") as far:
            await far.effect("agents.upsert", agent={"id": "a_default"})
            await far.effect("policy.update", patch=POLICY)
            await far.effect("agent.run", input="work", sessionId="s_far")
            await far.event("agent.completed")
        async with await home.wire() as follower, await home.wire() as wire:
            await follower.request("events.subscribe", {})
            await _work(home, wire)
            await follower.until(lambda: len(follower.durable) >= len(wire.durable))
            return Filled(folder / "corral.db", wire.events, follower.events, wire.promises)


async def _work(home: House, wire: Wire) -> None:
    made = await wire.effect("sessions.create", title="main")
    session = made["session"]["id"]
    await wire.request("events.subscribe", {"sessionId": session, "after": 0})
    await wire.effect("sessions.update", sessionId=session, title="the main one")
    await wire.effect("agent.run", input="work", sessionId=session)
    await wire.event("agent.completed")
    for decision, more in (("approve", {"remember": "session"}), ("reject", {"comment": "no"})):
        run = await wire.effect("agent.run", input="ask", sessionId=session if decision == "approve" else "s_other")
        approval = await wire.event("approval.required", runId=run["runId"])
        await wire.effect("approval.resolve", approvalId=approval["payload"]["approvalId"], decision=decision, **more)
        await wire.event("agent.completed", runId=run["runId"])
    run = await wire.effect("agent.run", input="hang", sessionId=session)
    await wire.event("agent.delta", runId=run["runId"])
    await wire.effect("runtime.setMode", sessionId=session, runtimeMode="cloud")
    await wire.effect("agent.abort", runId=run["runId"])
    await wire.event("runtime.mode_changed")
    gone = (await wire.effect("sessions.create", title="gone"))["session"]["id"]
    await wire.effect("sessions.delete", sessionId=gone)
    # One that waits for a person to the end.
    await wire.effect("agent.run", input="ask", sessionId="s_waits")
    await wire.event("approval.required", sessionId="s_waits")
    async with asyncio.timeout(60):
        while (await wire.request("sessions.get", {"sessionId": "s_waits"}))["session"]["status"] != "waiting_approval":  # noqa: ASYNC110 - parking tells nobody
            await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Filled:
    return asyncio.run(_fill(tmp_path_factory.mktemp("house") / "data"))


# What no server did, and words of the sentence that must tell of it.
VIOLATIONS: dict[str, tuple[str, str]] = {
    "a gap in a journal": (
        "DELETE FROM journal WHERE event = 'agent.message' AND session_id = '{s}'",
        "where 4 is due",
    ),
    "the journal's end is lost": (
        "DELETE FROM journal WHERE feed_id = (SELECT max(feed_id) FROM journal WHERE session_id = '{s}')",
        "says stateVersion",
    ),
    "a stateVersion ahead of the journal": (
        "UPDATE sessions SET state_version = state_version + 1",
        "says stateVersion",
    ),
    "a journal without its session's making": (
        'UPDATE journal SET payload = replace(payload, \'"reason":"created"\', \'"reason":"renamed"\')',
        "does not begin with its making",
    ),
    "a payload of another session": (
        'UPDATE journal SET payload = replace(payload, \'"sessionId":"s_other"\', \'"sessionId":"s_far"\')',
        "speaks of session s_far",
    ),
    "a payload that is none": (
        "UPDATE journal SET payload = replace(payload, '\"steps\"', '\"stops\"')",
        "does not hold what the protocol says",
    ),
    "an event under another run": (
        "UPDATE journal SET run_id = 'run_x' WHERE event = 'agent.tool_result'",
        "is journalled for run_x",
    ),
    "a second end": (
        "UPDATE journal SET event = 'agent.completed', payload = (SELECT payload FROM journal WHERE event = "
        "'agent.completed' AND session_id = '{s}' LIMIT 1) WHERE event = 'agent.message' AND session_id = '{s}'",
        "which had ended",
    ),
    "an end that is missing": (
        "UPDATE journal SET event = 'session.updated', run_id = NULL WHERE event = 'agent.failed'",
        "has 0 terminal events",
    ),
    "a session that is busy for ever": ("UPDATE sessions SET status = 'running' WHERE id = '{s}'", "where idle is due"),
    "a session with a run that has ended": (
        "UPDATE sessions SET active_run_id = 'run_x' WHERE id = '{s}'",
        "has run run_x on",
    ),
    "a run that says otherwise": (
        "UPDATE runs SET status = 'failed' WHERE status = 'completed'",
        "its last event says completed",
    ),
    "a run that never ended": (
        "UPDATE runs SET status = 'running', finished_at = NULL WHERE status = 'aborted'",
        "is running and has 1",
    ),
    "an output that nobody said": ("UPDATE runs SET output = 'x' WHERE status = 'completed'", "another output"),
    "an error that nobody told": ("UPDATE runs SET error = '{{}}' WHERE status = 'aborted'", "has the error"),
    "steps that nobody made": ("UPDATE runs SET steps = steps + 1", "steps and"),
    "tokens that nobody used": ("UPDATE runs SET input_tokens = input_tokens + 1", "inputTokens, its events"),
    "money that nobody spent": ("UPDATE runs SET cost_usd = 1e3", "has the cost 1000.0, its events"),
    "attempts that nobody made": ("UPDATE runs SET attempts = 3", "was resumed with"),
    "a run without a row": ("DELETE FROM runs WHERE session_id = 's_other'", "was accepted and has no row"),
    "a run with an end and a lease": (
        "UPDATE runs SET lease_expires_at = 1 WHERE status = 'completed'",
        "still has a lease",
    ),
    "a transcript with a hole": ("DELETE FROM messages WHERE role = 'tool'", "the transcript has no tool message"),
    "a transcript with an invention": (
        "UPDATE messages SET version = 999 WHERE version = 3 AND session_id = '{s}'",
        "at version 999",
    ),
    "a session with another mode": (
        "UPDATE sessions SET runtime_mode = 'local' WHERE id = '{s}'",
        "has runtime_mode 'local'",
    ),
    "a session with another title": ("UPDATE sessions SET title = 'x' WHERE id = '{s}'", "has title 'x'"),
    "a queued mode that was applied": (
        "UPDATE sessions SET queued_runtime_mode = 'local' WHERE id = '{s}'",
        "has queued_runtime_mode",
    ),
    "a call without its result": (
        "UPDATE journal SET event = 'session.updated' WHERE event = 'agent.tool_result' AND session_id = '{s}'",
        "has 0 results",
    ),
    "a call with two results": (
        "UPDATE journal SET event = 'agent.tool_result' WHERE event = 'approval.resolved'",
        "has 2 results",
    ),
    "a result before its call": (
        "UPDATE journal SET event = CASE event WHEN 'agent.tool_call' THEN 'agent.tool_result' "
        "ELSE 'agent.tool_call' END WHERE event IN ('agent.tool_call', 'agent.tool_result') AND session_id = 's_other'",
        "which was not journalled before it",
    ),
    "a result before its approval": (
        "UPDATE journal SET event = CASE event WHEN 'approval.resolved' THEN 'agent.tool_result' "
        "ELSE 'approval.resolved' END WHERE event IN ('approval.resolved', 'agent.tool_result') "
        "AND session_id = 's_other'",
        "out of order",
    ),
    "a call that nobody asked about": (
        "UPDATE journal SET payload = replace(payload, 'approval-required', 'allow') WHERE event = 'agent.tool_call'",
        "and has 1 approval.required",
    ),
    "a call without a row": ("DELETE FROM tool_runs WHERE tool_name = 'file.write'", "has no row"),
    "a row without a call": (
        "INSERT INTO tool_runs SELECT tenant_id, 'tc_x', run_id, session_id, 99, position, tool_name, args, "
        "args_hash, risk, repeatable, decision, reason, rule_id, state, status, duration_ms, truncated, created_at, "
        "started_at, finished_at, retry_of FROM tool_runs LIMIT 1",
        "and was not journalled",
    ),
    "a result that was another": (
        "UPDATE tool_runs SET status = 'success' WHERE status = 'failed'",
        "status success, its result failed",
    ),
    "a result that is not in the journal": (
        "UPDATE tool_runs SET state = 'started' WHERE tool_name = 'file.write'",
        "is started and has 1 results",
    ),
    "arguments that nobody allowed": (
        'UPDATE tool_runs SET args = \'{{"path":"b","content":"x"}}\' WHERE tool_name = \'file.write\'',
        "other arguments in its row",
    ),
    "a hash that is another": (
        "UPDATE tool_runs SET args_hash = 'x' WHERE tool_name = 'file.write'",
        "it was allowed with other arguments",
    ),
    "a start that was denied": ("UPDATE tool_runs SET started_at = 1 WHERE decision = 'deny'", "though it was denied"),
    "a start that was rejected": (
        "UPDATE tool_runs SET started_at = 1 WHERE session_id = 's_other'",
        "though its approval is rejected",
    ),
    "a start without an answer": (
        "UPDATE tool_runs SET started_at = 1 WHERE session_id = 's_waits'",
        "though its approval is pending",
    ),
    "a start that was not recorded": (
        "UPDATE tool_runs SET started_at = NULL WHERE tool_name = 'file.write'",
        "no record of its start",
    ),
    "a start that was denied afterwards": (
        "UPDATE tool_runs SET started_at = 1 WHERE status = 'denied'",
        "was started and has the result denied",
    ),
    "an approval with other arguments": (
        "UPDATE approvals SET args_hash = 'x'",
        "it was approved with other arguments",
    ),
    "an approval decided otherwise": (
        "UPDATE approvals SET status = 'approved' WHERE status = 'rejected'",
        "has status approved",
    ),
    "an approval that is open again": (
        "UPDATE approvals SET status = 'pending' WHERE status = 'approved'",
        "is pending and was required",
    ),
    "an approval without a row": ("DELETE FROM approvals WHERE status = 'rejected'", "was journalled and has no row"),
    "a grant that was used in secret": ("UPDATE grants SET uses = 7", "has 7 uses"),
    "a record that was changed": (
        "UPDATE audit_log SET actor = 'x' WHERE action = 'tool.call'",
        "the audit chain of t_default is broken",
    ),
    "a decision without a record": (
        "UPDATE audit_log SET resource_id = 'x' WHERE action = 'tool.call'",
        "0 audit records tool.call",
    ),
    "an effect without a record": (
        "UPDATE audit_log SET action = 'x' WHERE action = 'tool.result'",
        "0 audit records tool.result",
    ),
    "an end without a record": (
        "UPDATE audit_log SET action = 'x' WHERE action = 'run.ended'",
        "0 audit records run.ended",
    ),
    "a record of what did not happen": (
        "UPDATE audit_log SET resource_id = 'tc_x' WHERE action = 'tool.result'",
        "tells of tool.result of tc_x",
    ),
    "a record that says otherwise": (
        "UPDATE audit_log SET metadata = replace(metadata, '\"allow\"', '\"deny\"') WHERE action = 'tool.call'",
        "says {{'decision'",
    ),
    "a session without a record": (
        "UPDATE audit_log SET action = 'x' WHERE action = 'session.create'",
        "audit records of its making",
    ),
    "a deletion without a record": (
        "UPDATE audit_log SET action = 'x' WHERE action = 'session.delete'",
        "is not there, was made 1",
    ),
    "a change without a record": (
        "UPDATE audit_log SET action = 'x' WHERE action = 'session.update'",
        "0 times by the audit",
    ),
    "a policy without a record": (
        "UPDATE policies SET version = 9 WHERE layer = 'workspace'",
        "is at version 9, audited are",
    ),
    "a grant without a record": (
        "UPDATE audit_log SET action = 'x' WHERE action = 'grant.created'",
        "0 audit records grant.created",
    ),
    "two effects of one key": (
        "UPDATE idempotency SET result = (SELECT result FROM idempotency WHERE method = 'agent.run' AND tenant_id = "
        "'t_default' LIMIT 1) WHERE method = 'agent.run' AND tenant_id = 't_default'",
        "have the same effect",
    ),
    "an answer without its effect": (
        "UPDATE idempotency SET result = CAST('{{\"runId\":\"run_x\"}}' AS BLOB) WHERE method = 'agent.run'",
        "run_x, which is not there",
    ),
    "an answer that came otherwise": (
        "UPDATE idempotency SET result = replace(result, 'approved', 'rejected') WHERE method = 'approval.resolve'",
        "as rejected, which is approved",
    ),
    "a key that is claimed for ever": (
        "UPDATE idempotency SET state = 'in_progress', result = NULL WHERE method = 'agent.abort'",
        "is in progress, and its run",
    ),
    "a row of another tenant's": (
        "UPDATE audit_log SET run_id = (SELECT id FROM runs WHERE tenant_id = 't_far') WHERE tenant_id = 't_default'",
        "another tenant's run",
    ),
    "a reference into another tenant": (
        "UPDATE tool_runs SET run_id = (SELECT id FROM runs WHERE tenant_id = 't_far') WHERE session_id = 's_other'",
        "a row of tool_runs in tenant t_default refers to run",
    ),
    "a session of another workspace": (
        "UPDATE sessions SET workspace_id = 'w_far' WHERE id = '{s}'",
        "is of workspace w_default",
    ),
    "an event that tells of another tenant": (
        'UPDATE journal SET payload = replace(payload, \'"tenantId":"t_default"\', \'"tenantId":"t_far"\')',
        "tells of one of t_far",
    ),
    "a row of no session": ("DELETE FROM sessions WHERE id = 's_waits'", "refers to no row of sessions"),
    "a run that is counted twice": (
        "INSERT INTO run_facts SELECT tenant_id, workspace_id, finished_at + 1, run_id, agent_id, status, code, "
        "latency_ms, bucket, tool_calls, tool_failures, input_tokens, output_tokens, cost_usd FROM run_facts LIMIT 1",
        "is counted twice",
    ),
    "a run that is not counted": ("DELETE FROM run_facts", "and not counted in run_facts"),
    "a run that is counted otherwise": ("UPDATE run_facts SET tool_failures = 9", "is counted with tool_failures 9"),
    "a decision that is not counted": ("DELETE FROM approval_facts", "and not counted in approval_facts"),
    "a decision that is counted otherwise": ("UPDATE approval_facts SET wait_ms = 9999999", "is counted with wait_ms"),
    "a decision that is counted twice": (
        "INSERT INTO approval_facts SELECT tenant_id, workspace_id, resolved_at + 1, approval_id, agent_id, status, "
        "wait_ms FROM approval_facts LIMIT 1",
        "is counted twice",
    ),
    "a decision that nobody made": (
        "UPDATE approval_facts SET approval_id = 'ap_none'",
        "which nobody recorded",
    ),
    "an hour that does not add up": ("UPDATE run_hours SET completed = completed + 1", "completed, the runs are"),
    "an hour that costs more than its runs": ("UPDATE run_hours SET cost_usd = cost_usd + 1", "cost_usd, the runs are"),
    "an hour with more words than its runs": ("UPDATE run_hours SET output_tokens = 9", "output_tokens, the runs are"),
    "a bucket that does not add up": (
        "UPDATE run_hour_counts SET count = 9 WHERE kind = 'latency'",
        "counts 9, the runs are",
    ),
    "a budget that is set aside for ever": (
        "INSERT INTO reservations SELECT tenant_id, id, 'tenant:t', 1, 1, 1, 0 FROM runs WHERE status = 'completed'",
        "has something set aside",
    ),
}


def planted(filled: Filled, folder: Path, *statements: str) -> Path:
    """A copy of the store in which that was done."""
    session = next(event["payload"]["sessionId"] for event in filled.events)
    database = folder / "corral.db"
    shutil.copy(filled.database, database)
    with closing(sqlite3.connect(database)) as connection:
        for statement in statements:
            assert connection.execute(statement.format(s=session)).rowcount > 0, "this changed nothing"
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return database


def test_a_store_with_something_of_everything_has_no_problem_and_is_checked_quickly(filled: Filled) -> None:
    look = Inspection(filled.database)
    began = time.process_time()
    look.store()
    look.client("the follower", Seen([filled.feed], feed=True))
    look.client("the client", Seen([filled.events]))
    look.promises(filled.promises)
    assert look.problems == []
    assert time.process_time() - began < 0.2  # measured: 0.01 s


@pytest.mark.parametrize("kind", VIOLATIONS)
def test_what_no_server_may_do_to_a_store_is_found(filled: Filled, tmp_path: Path, kind: str) -> None:
    statement, words = VIOLATIONS[kind]
    problems = check(planted(filled, tmp_path, statement))
    assert [problem for problem in problems if words.format() in problem], problems


def test_what_is_still_under_way_is_a_problem_only_where_all_has_settled(filled: Filled) -> None:
    assert check(filled.database) == []
    problems = check(filled.database, settled=True)
    assert [problem.split(" still has run ")[0] for problem in problems] == ["session s_waits"]


def test_a_store_can_be_read_through_any_connection(filled: Filled, tmp_path: Path) -> None:
    with closing(sqlite3.connect(filled.database)) as connection:
        assert check(connection) == []
    harmed = planted(filled, tmp_path, "UPDATE sessions SET state_version = state_version + 1")
    with closing(sqlite3.connect(harmed)) as connection:
        assert check(connection) == check(harmed) != []


def test_a_file_that_is_damaged_is_found(filled: Filled, tmp_path: Path) -> None:
    database = planted(filled, tmp_path)
    data = bytearray(database.read_bytes())
    at = data.rindex(b"agent.tool_result")
    data[at - 200 : at] = bytes(200)
    database.write_bytes(data)
    assert "SQLite says: " in check(database)[0]


def test_a_store_is_read_while_a_gateway_writes_into_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with house(tmp_path / "data") as home, await home.wire() as wire:
            for _ in range(5):
                run = await wire.effect("agent.run", input="go")
                assert check(tmp_path / "data" / "corral.db") == []
                await wire.event("agent.completed", runId=run["runId"])

    asyncio.run(scenario())


# ---- what clients see

Change = Callable[[list[Json]], Any]


def _first(events: list[Json], name: str) -> Json:
    return next(event for event in events if event["event"] == name)


SIGHTS: dict[str, tuple[Change, str]] = {
    "a gap in seq": (lambda events: events.pop(3), "was sent seq 5 where 4 was due"),
    "an event that was not committed": (
        lambda events: events[-1].update(stateVersion=999),
        "which is not in the journal",
    ),
    "an event with other words": (
        lambda events: _first(events, "agent.completed")["payload"].update(output="x"),
        "has another payload there",
    ),
    "an event under another name": (
        lambda events: _first(events, "agent.completed").update(event="agent.failed"),
        "which is agent.completed in the journal",
    ),
    "a delta of other words": (
        lambda events: _first(events, "agent.delta")["payload"].update(delta="#"),
        "that is not its text there",
    ),
}


@pytest.mark.parametrize("kind", SIGHTS)
def test_what_no_client_may_see_is_found(filled: Filled, kind: str) -> None:
    change, words = SIGHTS[kind]
    events = copy.deepcopy(filled.events)
    change(events)
    look = Inspection(filled.database)
    look.client("she", Seen([events]))
    assert [problem for problem in look.problems if problem.startswith("she ") and words in problem], look.problems


def numbered(events: list[Json]) -> list[Json]:
    return [{**event, "seq": number} for number, event in enumerate(events, 1)]


def test_a_gap_or_a_repeat_in_what_a_follower_sees_is_found_over_all_its_connections(filled: Filled) -> None:
    session = filled.events[0]["payload"]["sessionId"]
    events = [event for event in filled.events if event["payload"]["sessionId"] == session]
    durable = [event for event in events if event["event"] != "agent.delta"]
    first, second = durable[:4], durable[4:]

    def problems(*connections: list[Json]) -> list[str]:
        look = Inspection(filled.database)
        seen = [numbered(events) for events in connections]
        look.client("she", Seen(seen, after={session: 0}))
        return look.problems

    assert problems(first, second) == []
    assert problems(first, second[1:]) == [f"she was sent version 6 of session {session} where 5 was due"]
    assert problems(first, durable[3:]) == [f"she was sent version 4 of session {session} where 5 was due"]
    assert problems(durable[1:]) == [f"she was sent version 2 of session {session} where 1 was due"]
    assert problems(durable[:-1]) == [f"she was sent session {session} to version {len(durable) - 1} of {len(durable)}"]


def test_a_gap_a_turned_order_or_a_lost_end_on_the_feed_is_found(filled: Filled) -> None:
    changes: list[Change] = [
        lambda events: events.pop(5),
        lambda events: events.insert(5, events.pop(6)),
        lambda events: events.pop(),
    ]
    for change in changes:
        events = copy.deepcopy(filled.feed)
        change(events)
        look = Inspection(filled.database)
        look.client("she", Seen([numbered(events)], feed=True))
        assert [
            problem for problem in look.problems if "on the feed where" in problem or "not to its end" in problem
        ], look.problems


# ---- what tools and servers left


def test_a_mark_of_a_call_that_was_not_started_or_was_started_twice_is_found(filled: Filled) -> None:
    with closing(sqlite3.connect(filled.database)) as connection:
        calls = dict(connection.execute("SELECT tool_name || ' ' || session_id, id FROM tool_runs ORDER BY created_at"))
    ran, denied, waits = calls["file.write s_far"], calls["http.request s_far"], calls["file.edit s_waits"]

    def problems(tenant: str, marks: dict[str, int]) -> list[str]:
        look = Inspection(filled.database)
        look.marks(marks, tenant=tenant)
        return [problem.split(") of run")[-1].split(" ", 2)[-1] for problem in look.problems]

    assert problems("t_far", {ran: 1}) == []
    assert problems("t_far", {ran: 2}) == ["was started 2 times"]
    assert problems("t_far", {denied: 1}) == [
        "left a mark, and no start of it is recorded",
        "left a mark and was denied",
    ]
    assert problems("t_default", {waits: 1}) == ["left a mark, and no start of it is recorded"]
    assert len(problems("t_default", {ran: 1})) == 1


def test_what_a_gateway_keeps_for_those_who_are_gone_is_found(filled: Filled) -> None:
    look = Inspection(filled.database)
    look.idle({"corral_connections_open": 0, "corral_runs_active": 2.0})
    assert look.problems == ["corral_runs_active is 2 when all are gone"]


# ---- what was promised

PROMISES: dict[str, tuple[Json, str]] = {
    "agent.run": ({"runId": "run_x", "sessionId": "s_x"}, "run run_x is not there"),
    "agent.abort": ({"status": "completed"}, "is aborted and not completed"),
    "sessions.create": ({"session.title": "x"}, "was made in another way"),
    "sessions.update": ({"session.title": "x"}, "was changed in another way"),
    "sessions.delete": ({"sessionId": "s_other"}, "session s_other was not deleted"),
    "runtime.setMode": ({"runtimeMode": "x"}, "nothing is recorded of the mode x"),
    "approval.resolve": ({"status": "cancelled"}, "and not cancelled"),
    "policy.update": ({"version": 99}, "and not at 99 or later"),
}


def allowed() -> dict[str, Any]:
    """What `policy.update` answers, as far as the checker looks."""
    return {"version": 2, "policy": {"scopeKey": "workspace:w_default"}}


@pytest.mark.parametrize("method", PROMISES)
def test_a_promise_that_was_not_kept_is_found(filled: Filled, method: str) -> None:
    changes, words = PROMISES[method]
    made = [promise for promise in filled.promises if promise.method == method]
    promise = made[0] if made else Promise("t_default", "u_owner", method, {"idempotencyKey": "k"}, allowed())
    payload = json.loads(json.dumps(promise.payload))
    for path, value in changes.items():
        *way, name = path.split(".")
        target = payload
        for step in way:
            target = target[step]
        target[name] = value
    for case, found in ((promise, 0), (promise._replace(payload=payload), 1)):
        look = Inspection(filled.database)
        look.promises([case])
        assert len([problem for problem in look.problems if words in problem]) == found, look.problems


def test_a_key_that_was_answered_in_two_ways_is_found(filled: Filled) -> None:
    promise = next(promise for promise in filled.promises if promise.method == "agent.run")
    look = Inspection(filled.database)
    look.promises([promise, promise, promise._replace(payload={**promise.payload, "more": 1})])
    assert [problem for problem in look.problems if "and then with" in problem], look.problems


# ---- where it runs


async def test_a_house_that_broke_an_invariant_fails_its_test_at_the_end(tmp_path: Path) -> None:
    def harm(tx: Any) -> None:
        tx.sessions.update("t_default", "s1", status="running")

    async def scenario() -> None:
        async with house(tmp_path / "data") as home, await home.wire() as wire:
            await wire.effect("agent.run", input="go", sessionId="s1")
            await wire.event("agent.completed")
            await home.server.store.write(harm)

    with pytest.raises(Broken, match="session s1 is running where idle is due"):
        await scenario()
