"""What every store's repositories must do: rows come back as they went in, orders, fences, tenants apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from msgspec.structs import replace
from sqlalchemy.exc import IntegrityError

from corral.storage.api import Store
from corral.storage.repositories import Transaction
from corral.storage.rows import IdempotencyRow, JournalEntry, RunRow, SessionRow, UsageRow
from tests.storage.make import (
    NOW,
    A,
    B,
    agent,
    append,
    append_changing,
    approval,
    audit,
    claim,
    decision,
    fact,
    grant,
    key,
    message,
    policy,
    run,
    session,
    token,
    tool_run,
)


def versions(entries: Sequence[JournalEntry]) -> list[int]:
    return [entry.version for entry in entries]


class RowsAndOrders:
    async def test_rows_come_back_as_they_went_in(self, store: Store) -> None:
        rich: dict[str, Any] = {
            "session": session(queued_runtime_mode="cloud", root="/srv/x", context_usage=0.25, active_run_id="run_1"),
            "run": run(error={"code": "ABORTED"}, cost_usd=None, output="öut", limits={}, lease_expires_at=5),
            "message": message(3, content=[1, {"a": None}]),
            "tool_run": tool_run(repeatable=True, truncated=True, duration_ms=7, reason="r", rule_id="x"),
            "agent": agent(tools=None, model="m"),
            "policy": policy(agent_id="a_1"),
            "claim": claim(key(), result=b'{"ok":1}', run_id="run_1"),
            "approval": approval(
                rule_id="r", status="rejected", resolved_at=5, resolved_by="u_1", comment="nö", args={"a": [None]}
            ),
            "grant": grant(session_id="s_1", uses=3, revoked_at=5, revoked_by="u_1"),
            "audit": audit(session_id="s_1", run_id="run_1", metadata={"a": [1.5, None, "ö"]}, outcome="denied"),
            "token": token(expires_at=1, revoked_at=2, display_name="D", workspace_ids=[], roles=["a", "b"]),
        }

        def work(tx: Transaction) -> dict[str, Any]:
            tx.sessions.insert(rich["session"])
            tx.runs.insert(rich["run"])
            tx.messages.insert(rich["message"])
            tx.tool_runs.insert(rich["tool_run"])
            tx.agents.upsert(rich["agent"])
            tx.policies.upsert(rich["policy"])
            tx.idempotency.insert(rich["claim"])
            tx.tokens.upsert(rich["token"])
            tx.approvals.insert(rich["approval"])
            tx.grants.insert(rich["grant"])
            tx.audit.append(rich["audit"])
            return {
                "session": tx.sessions.get(A, "s_1"),
                "run": tx.runs.get(A, "run_1"),
                "message": tx.messages.of_session(A, "s_1")[0],
                "tool_run": tx.tool_runs.get(A, "call_1"),
                "agent": tx.agents.get(A, "w_1", "a_1"),
                "policy": tx.policies.get(A, "workspace:w_1"),
                "claim": tx.idempotency.get(key()),
                "token": tx.tokens.by_hash("hash of tok_1 of t_a"),
                "approval": tx.approvals.get(A, "ap_1"),
                "grant": tx.grants.get(A, "grant_1"),
                "audit": tx.audit.get(A, 1),
            }

        assert await store.write(work) == rich

    async def test_an_update_sets_the_named_columns_and_no_other(self, store: Store) -> None:
        def work(tx: Transaction) -> None:
            tx.sessions.insert(session())
            tx.sessions.insert(session("s_2"))
            tx.sessions.update(A, "s_1", title="new", active_run_id="run_1", updated_at=5)
            tx.sessions.update(A, "s_1")
            tx.runs.insert(run())
            assert tx.runs.update(A, "run_1", error={"code": "X"}, cost_usd=None)
            tx.tool_runs.insert(tool_run())
            tx.tool_runs.update(A, "call_1", state="started", truncated=True)
            assert tx.sessions.get(A, "s_1") == session(title="new", active_run_id="run_1", updated_at=5)
            assert tx.sessions.get(A, "s_2") == session("s_2")
            assert tx.runs.get(A, "run_1") == run(error={"code": "X"}, cost_usd=None)
            assert tx.tool_runs.get(A, "call_1") == tool_run(state="started", truncated=True)

        await store.write(work)

    @pytest.mark.parametrize("name", ["nonsense", "tenant_id", "id", "title = title; --"])
    async def test_an_update_of_what_is_no_column_to_change_is_a_type_error(self, store: Store, name: str) -> None:
        def work(tx: Transaction) -> None:
            tx.sessions.insert(session())
            updates: list[Callable[..., Any]] = [
                tx.sessions.update,
                tx.runs.update,
                tx.tool_runs.update,
                tx.approvals.update,
                tx.grants.update,
            ]
            for update in updates:
                with pytest.raises(TypeError):
                    update(A, "s_1", **{name: "x"})
            assert tx.sessions.get(A, "s_1") == session()

        await store.write(work)

    async def test_an_upsert_replaces_the_row(self, store: Store) -> None:
        def work(tx: Transaction) -> None:
            for name in ("one", "two"):
                tx.agents.upsert(agent(name=name))
                tx.policies.upsert(policy(document={"n": name}))
                tx.tokens.upsert(token(display_name=name))
            assert tx.agents.list(A, "w_1") == [agent(name="two")]
            assert tx.policies.get(A, "workspace:w_1") == policy(document={"n": "two"})
            assert tx.tokens.list(A) == [token(display_name="two")]

        await store.write(work)

    async def test_append_to_no_session_is_a_key_error(self, store: Store) -> None:
        with pytest.raises(KeyError):
            await store.write(lambda tx: append(tx, "s_none"))

    async def test_append_raises_the_sessions_version_and_time_and_notes_the_entry(self, store: Store) -> None:
        def work(tx: Transaction) -> None:
            tx.sessions.insert(session())
            entries = [append(tx, run_id="run_1", now_ms=NOW + n, payload=b'{"n":%d}' % n) for n in (1, 2)]
            assert tx.appended == entries
            assert tx.journal.after(A, "s_1", 0, 10) == entries
            assert entries[0].feed_id < entries[1].feed_id
            assert [(e.version, e.payload, e.created_at) for e in entries] == [
                (1, b'{"n":1}', NOW + 1),
                (2, b'{"n":2}', NOW + 2),
            ]
            assert entries[0].workspace_id == "w_1"
            assert tx.sessions.get(A, "s_1") == session(state_version=2, updated_at=NOW + 2)

        await store.write(work)

    async def test_an_append_may_change_its_session_with_the_statement_that_counts_it_up(self, store: Store) -> None:
        def work(tx: Transaction) -> tuple[JournalEntry, SessionRow]:
            tx.sessions.insert(session())
            tx.sessions.insert(session("s_2"))
            append(tx)
            return append_changing(tx, {"status": "running", "active_run_id": "run_1"}, now_ms=NOW + 5)

        entry, after = await store.write(work)
        assert (entry.version, entry.workspace_id) == (2, "w_1")
        assert after == session(state_version=2, updated_at=NOW + 5, status="running", active_run_id="run_1")
        assert await store.read(lambda tx: tx.sessions.get(A, "s_1")) == after
        assert await store.read(lambda tx: tx.sessions.get(A, "s_2")) == session("s_2")
        assert (await store.read(lambda tx: tx.journal.after(A, "s_1", 1, 9))) == [entry]
        with pytest.raises(KeyError):
            await store.write(lambda tx: append_changing(tx, {"title": "x"}, "s_none"))
        with pytest.raises(TypeError):
            await store.write(lambda tx: append_changing(tx, {"id": "s_3"}))

    async def test_the_journal_is_read_from_either_end(self, store: Store) -> None:
        def work(tx: Transaction) -> None:
            tx.sessions.insert(session())
            for number in range(1, 8):
                append(tx, run_id="run_1" if number in (2, 5) else None)
            journal = tx.journal
            assert versions(journal.after(A, "s_1", 2, 3)) == [3, 4, 5]
            assert versions(journal.after(A, "s_1", 7, 3)) == []
            assert versions(journal.before(A, "s_1", None, 3)) == [5, 6, 7]
            assert versions(journal.before(A, "s_1", 5, 2)) == [3, 4]
            assert versions(journal.before(A, "s_1", 1, 2)) == []
            assert versions(journal.of_run(A, "s_1", "run_1")) == [2, 5]

        await store.write(work)

    async def test_pages_of_sessions_go_from_the_newest_without_gap_or_repeat(self, store: Store) -> None:
        rows = [session(f"s_{n}", created_at=NOW + n // 3, agent_id=f"a_{n % 2}") for n in range(10)]

        def work(tx: Transaction) -> None:
            for row in rows:
                tx.sessions.insert(row)
            for agent_id in (None, "a_1"):
                expected = sorted(
                    (row for row in rows if agent_id in (None, row.agent_id)),
                    key=lambda row: (row.created_at, row.id),
                    reverse=True,
                )
                got, before = [], None
                while page := tx.sessions.page(A, "w_1", user_id="u_1", agent_id=agent_id, limit=3, before=before):
                    assert len(page) <= 3
                    got += page
                    before = (page[-1].created_at, page[-1].id)
                assert got == expected

        await store.write(work)

    async def test_a_private_session_is_in_nobody_elses_page_or_feed(self, store: Store) -> None:
        def work(tx: Transaction) -> None:
            tx.sessions.insert(session("s_own"))
            tx.sessions.insert(session("s_shared", owner_user_id="u_2", visibility="workspace"))
            tx.sessions.insert(session("s_secret", owner_user_id="u_2"))
            tx.sessions.insert(session("s_elsewhere", workspace_id="w_2"))
            names = ["s_own", "s_shared", "s_secret", "s_elsewhere"]
            entries = {name: append(tx, name) for name in names}
            page = tx.sessions.page(A, "w_1", user_id="u_1", agent_id=None, limit=10, before=None)
            assert {row.id for row in page} == {"s_own", "s_shared"}
            feed = tx.journal.feed_after(A, "w_1", 0, user_id="u_1", limit=10)
            assert feed == [entries["s_own"], entries["s_shared"]]
            assert tx.journal.feed_after(A, "w_1", feed[0].feed_id, user_id="u_1", limit=1) == [entries["s_shared"]]
            assert tx.journal.feed_head(A, "w_1") == entries["s_secret"].feed_id
            assert tx.journal.feed_head(A, "w_none") == 0

        await store.write(work)

    async def test_a_feed_id_is_not_given_again_when_its_session_is_deleted(self, store: Store) -> None:
        def work(tx: Transaction) -> None:
            tx.sessions.insert(session())
            last = append(tx)
            tx.sessions.delete(A, "s_1")
            tx.sessions.insert(session())
            assert append(tx).feed_id > last.feed_id

        await store.write(work)

    async def test_delete_takes_all_that_belongs_to_the_session_and_nothing_else(self, store: Store) -> None:
        def fill(tx: Transaction, name: str) -> None:
            tx.sessions.insert(session(name))
            append(tx, name)
            tx.runs.insert(run(f"run_{name}", session_id=name))
            tx.messages.insert(message(1, session_id=name))
            tx.tool_runs.insert(tool_run(f"call_{name}", session_id=name, run_id=f"run_{name}"))
            tx.outputs.insert(A, name, f"call_{name}", b"whole")
            tx.approvals.insert(approval(f"ap_{name}", session_id=name))
            tx.grants.insert(grant(f"grant_{name}", session_id=name))

        def found(tx: Transaction, name: str) -> list[bool]:
            return [
                tx.sessions.get(A, name) is not None,
                bool(tx.journal.after(A, name, 0, 10)),
                tx.runs.get(A, f"run_{name}") is not None,
                bool(tx.messages.of_session(A, name)),
                tx.tool_runs.get(A, f"call_{name}") is not None,
                tx.outputs.read(A, f"call_{name}", 0, 10) is not None,
                tx.approvals.get(A, f"ap_{name}") is not None,
                tx.grants.get(A, f"grant_{name}") is not None,
            ]

        def work(tx: Transaction) -> None:
            for name in ("s_1", "s_2"):
                fill(tx, name)
            tx.grants.insert(grant("grant_of_all", session_id=None))
            tx.audit.append(audit(session_id="s_1"))
            tx.sessions.delete(A, "s_1")
            assert found(tx, "s_1") == [False] * 8
            assert found(tx, "s_2") == [True] * 8
            assert tx.grants.get(A, "grant_of_all") is not None
            assert tx.audit.count(A) == 1
            fill(tx, "s_1")  # nothing of the old one is in the way

        await store.write(work)

    async def test_the_transcript_is_by_version(self, store: Store) -> None:
        def work(tx: Transaction) -> None:
            tx.sessions.insert(session())
            for version in (5, 2, 9):
                tx.messages.insert(message(version))
            assert [m.version for m in tx.messages.of_session(A, "s_1")] == [2, 5, 9]
            assert [m.version for m in tx.messages.of_session(A, "s_1", after_version=2)] == [5, 9]
            assert tx.messages.get(A, "s_1", 5) == message(5)
            assert tx.messages.get(A, "s_1", 6) is None

        await store.write(work)

    async def test_the_newest_entry_of_a_role_in_a_session_is_found(self, store: Store) -> None:
        def work(tx: Transaction) -> None:
            for name in ("s_1", "s_2"):
                tx.sessions.insert(session(name))
                for version, role in ((0, "notes"), (3, "summary"), (7, "summary"), (9, "user")):
                    tx.messages.insert(message(version, session_id=name, role=role))
            tx.messages.insert(message(12, session_id="s_2", role="summary"))
            assert tx.messages.latest(A, "s_1", "summary") == message(7, role="summary")
            assert tx.messages.latest(A, "s_1", "flush") is None

        await store.write(work)

    async def test_tool_runs_are_by_step_and_position_which_are_theirs_alone(self, store: Store) -> None:
        def work(tx: Transaction) -> None:
            tx.sessions.insert(session())
            for name, step, position in (("c", 2, 0), ("b", 1, 1), ("a", 1, 0)):
                tx.tool_runs.insert(tool_run(f"call_{name}", step=step, position=position))
            assert [row.id for row in tx.tool_runs.of_run(A, "run_1")] == ["call_a", "call_b", "call_c"]
            assert [row.id for row in tx.tool_runs.of_run(A, "run_1", step=1)] == ["call_a", "call_b"]

        await store.write(work)
        with pytest.raises(IntegrityError):
            await store.write(lambda tx: tx.tool_runs.insert(tool_run("call_d", step=2, position=0)))

    async def test_calls_without_a_result_have_run_until_they_were_stopped(self, store: Store) -> None:
        """Those that began after the last sign of who ran them, for a time that nobody knows."""
        started = {"known": NOW - 7, "later": NOW + 3, "noted": NOW - 9, "never": None, "done": NOW - 5}

        def work(tx: Transaction) -> dict[str, int | None]:
            tx.sessions.insert(session())
            for position, (name, at) in enumerate(started.items()):
                state = "decided" if at is None else "finished" if name == "done" else "started"
                noted = {"noted": 2, "done": 4}.get(name)
                tx.tool_runs.insert(tool_run(name, position=position, state=state, started_at=at, duration_ms=noted))
            tx.tool_runs.stopped(A, "run_1", NOW)
            return {row.id: row.duration_ms for row in tx.tool_runs.of_run(A, "run_1")}

        assert await store.write(work) == {"known": 7, "later": 0, "noted": 2, "never": None, "done": 4}

    @pytest.mark.parametrize(
        ("offset", "limit", "expected"),
        [(0, 100, b"\x00h\xc3\xa9llo"), (1, 2, b"h\xc3"), (5, 100, b"lo"), (7, 5, b""), (99, 5, b"")],
    )
    async def test_an_output_is_read_in_ranges_of_bytes(
        self, store: Store, offset: int, limit: int, expected: bytes
    ) -> None:
        data = b"\x00h\xc3\xa9llo"

        def work(tx: Transaction) -> Any:
            tx.sessions.insert(session())
            tx.outputs.insert(A, "s_1", "call_1", data)
            return tx.outputs.read(A, "call_1", offset, limit)

        assert await store.write(work) == (expected, len(data))

    async def test_there_is_no_output_where_none_was_kept_and_no_negative_offset(self, store: Store) -> None:
        assert await store.read(lambda tx: tx.outputs.read(A, "call_none", 0, 5)) is None
        for offset, limit in ((-1, 5), (0, -1)):
            with pytest.raises(ValueError, match="count from 0"):
                await store.read(lambda tx, o=offset, n=limit: tx.outputs.read(A, "c", o, n))  # type: ignore[misc]

    async def test_a_tenant_is_made_once(self, store: Store) -> None:
        def work(tx: Transaction) -> list[str]:
            for workspace in ("w_2", "w_1", "w_2"):
                tx.tenants.ensure(A, workspace, "u_1", now_ms=NOW)
            tx.tenants.ensure(B, "w_3", "u_1", now_ms=NOW)
            return tx.tenants.workspace_ids(A)

        assert await store.write(work) == ["w_1", "w_2"]

    async def test_policies_are_found_many_at_once(self, store: Store) -> None:
        def work(tx: Transaction) -> None:
            keys = ["tenant:t_a", "workspace:w_1"]
            for scope_key in keys:
                tx.policies.upsert(policy(scope_key))
            assert tx.policies.get_many(A, [*keys, "workspace:none"]) == {k: policy(k) for k in keys}
            assert tx.policies.get_many(A, []) == {}

        await store.write(work)


class Leases:
    @pytest.fixture
    async def held(self, store: Store) -> None:
        """run_1 is held by `one` in epoch 1 until NOW + 10."""

        def work(tx: Transaction) -> None:
            tx.sessions.insert(session())
            tx.runs.insert(run())
            assert tx.runs.claim(A, "run_1", owner="one", now_ms=NOW, expires_at=NOW + 10, steal=False) == 1

        await store.write(work)

    @pytest.mark.parametrize(
        ("now_ms", "steal", "epoch"), [(NOW + 9, False, None), (NOW + 10, False, 2), (NOW + 9, True, 2)]
    )
    async def test_a_lease_is_taken_when_it_has_expired_or_is_stolen(
        self, store: Store, held: None, now_ms: int, steal: bool, epoch: int | None
    ) -> None:
        def work(tx: Transaction) -> tuple[int | None, RunRow | None]:
            got = tx.runs.claim(A, "run_1", owner="two", now_ms=now_ms, expires_at=NOW + 99, steal=steal)
            return got, tx.runs.get(A, "run_1")

        got, row = await store.write(work)
        assert got == epoch
        owner, expires_at = ("one", NOW + 10) if epoch is None else ("two", NOW + 99)
        assert row == run(lease_owner=owner, lease_epoch=epoch or 1, lease_expires_at=expires_at)

    async def test_a_dead_owners_late_write_changes_nothing(self, store: Store, held: None) -> None:
        def work(tx: Transaction) -> None:
            assert tx.runs.update(A, "run_1", epoch=1, status="running")
            tx.runs.claim(A, "run_1", owner="two", now_ms=NOW, expires_at=NOW + 99, steal=True)
            assert not tx.runs.update(A, "run_1", epoch=1, status="failed")
            assert tx.runs.update(A, "run_1", epoch=2, steps=1)
            row = tx.runs.get(A, "run_1")
            assert row is not None
            assert (row.status, row.steps) == ("running", 1)
            assert not tx.runs.update(A, "run_none", status="failed")

        await store.write(work)

    @pytest.mark.parametrize("status", ["completed", "failed", "aborted"])
    async def test_a_run_that_has_ended_is_neither_claimed_nor_renewed_nor_unfinished(
        self, store: Store, held: None, status: str
    ) -> None:
        def work(tx: Transaction) -> None:
            tx.runs.update(A, "run_1", status=status)
            assert tx.runs.claim(A, "run_1", owner="two", now_ms=NOW + 50, expires_at=NOW + 99, steal=True) is None
            assert tx.runs.renew("one", now_ms=NOW, expires_at=NOW + 99) == 0
            assert tx.runs.unfinished(10) == []

        await store.write(work)

    async def test_renewal_extends_the_owners_unexpired_leases_of_all_tenants(self, store: Store, held: None) -> None:
        def work(tx: Transaction) -> None:
            tx.sessions.insert(session(tenant_id=B))
            tx.runs.insert(run(tenant_id=B, lease_owner="one", lease_expires_at=NOW + 10))
            tx.runs.insert(run("run_2", lease_owner="one", lease_expires_at=NOW))
            tx.runs.insert(run("run_3", lease_owner="two", lease_expires_at=NOW + 10))
            assert tx.runs.renew("one", now_ms=NOW, expires_at=NOW + 99) == 2
            expiries = [
                row and row.lease_expires_at
                for row in (tx.runs.get(A, "run_1"), tx.runs.get(B, "run_1"), tx.runs.get(A, "run_2"))
            ]
            assert expiries == [NOW + 99, NOW + 99, NOW]

        await store.write(work)

    async def test_unfinished_runs_of_every_tenant_come_in_pages_from_the_oldest(self, store: Store) -> None:
        rows = [run(f"run_{n}", (A, B)[n % 2], created_at=NOW + n // 2) for n in range(7)]

        def work(tx: Transaction) -> None:
            for tenant in (A, B):
                tx.sessions.insert(session(tenant_id=tenant))
            for row in rows:
                tx.runs.insert(row)
            tx.runs.update(B, "run_3", status="completed")
            tx.runs.update(A, "run_4", status="waiting_approval")
            got: list[RunRow] = []
            after = None
            while page := tx.runs.unfinished(2, after):
                got += page
                after = (page[-1].created_at, page[-1].id)
            assert [row.id for row in got] == ["run_0", "run_1", "run_2", "run_4", "run_5", "run_6"]
            assert {row.tenant_id for row in got} == {A, B}

        await store.write(work)


class IdempotencyRows:
    async def test_a_key_is_claimed_once_and_every_part_of_it_counts(self, store: Store) -> None:
        variants = [
            key(),
            key("k_2"),
            key(tenant_id=B),
            key(actor="user:u_2"),
            key(method="sessions.create"),
            key(scope="s_2"),
        ]

        def work(tx: Transaction) -> None:
            for number, each in enumerate(variants):
                tx.idempotency.insert(claim(each, params_hash=str(number)))
            tx.idempotency.finish(variants[1], b"done")
            got = [tx.idempotency.get(each) for each in variants]
            expected = [claim(each, params_hash=str(number)) for number, each in enumerate(variants)]
            expected[1] = replace(expected[1], state="done", result=b"done")
            assert got == expected

        await store.write(work)
        with pytest.raises(IntegrityError):
            await store.write(lambda tx: tx.idempotency.insert(claim(key(), params_hash="other")))
        await store.write(lambda tx: tx.idempotency.delete(key()))
        assert await store.read(lambda tx: tx.idempotency.get(key())) is None
        assert await store.read(lambda tx: tx.idempotency.get(key("k_2"))) is not None

    async def test_what_a_run_leaves_in_progress_is_found_by_it(self, store: Store) -> None:
        def work(tx: Transaction) -> list[IdempotencyRow]:
            tx.idempotency.insert(claim(key("k_1"), run_id="run_1"))
            tx.idempotency.insert(claim(key("k_2"), run_id="run_2"))
            tx.idempotency.insert(claim(key("k_3"), run_id="run_1"))
            tx.idempotency.insert(claim(key("k_4")))
            tx.idempotency.finish(key("k_3"), b"{}")
            return tx.idempotency.in_progress_of_run(A, "run_1")

        assert await store.write(work) == [claim(key("k_1"), run_id="run_1")]

    async def test_purge_takes_what_is_done_and_expired_and_never_what_is_in_progress(self, store: Store) -> None:
        def work(tx: Transaction) -> None:
            rows = {}
            for tenant in (A, B):
                for n in range(3):
                    rows[tenant, n] = key(f"expired_{n}", tenant)
                    tx.idempotency.insert(claim(rows[tenant, n], state="done", result=b"", expires_at=NOW - n))
                tx.idempotency.insert(claim(key("in_progress", tenant), expires_at=NOW - 5))
                tx.idempotency.insert(claim(key("fresh", tenant), state="done", result=b"", expires_at=NOW + 1))
            assert tx.idempotency.purge(NOW - 10, 100) == 0
            assert tx.idempotency.purge(NOW, 4) == 4
            assert sum(tx.idempotency.get(each) is not None for each in rows.values()) == 2
            assert tx.idempotency.purge(NOW, 100) == 2
            assert tx.idempotency.purge(NOW, 100) == 0
            for tenant in (A, B):
                assert tx.idempotency.get(key("in_progress", tenant)) is not None
                assert tx.idempotency.get(key("fresh", tenant)) is not None

        await store.write(work)


def fill(tx: Transaction, tenant: str) -> None:
    """One row of each kind for `tenant`; only the tenant tells the two tenants' rows apart."""
    tx.tenants.ensure(tenant, f"w_of_{tenant}", "u_1", now_ms=NOW)
    tx.sessions.insert(session(tenant_id=tenant, title=tenant))
    append(tx, tenant_id=tenant, run_id="run_1")
    tx.runs.insert(run(tenant_id=tenant, output=tenant, lease_epoch=1, steps=1, input_tokens=2, output_tokens=3))
    tx.messages.insert(message(1, tenant))
    tx.tool_runs.insert(tool_run(tenant_id=tenant, reason=tenant, state="started", started_at=NOW))
    tx.outputs.insert(tenant, "s_1", "call_1", tenant.encode())
    tx.agents.upsert(agent(tenant_id=tenant))
    tx.policies.upsert(policy(tenant_id=tenant))
    tx.idempotency.insert(claim(key(tenant_id=tenant), params_hash=tenant, run_id="run_1"))
    tx.tokens.upsert(token(tenant_id=tenant))
    tx.approvals.insert(approval(tenant_id=tenant))
    tx.grants.insert(grant(tenant_id=tenant))
    for number in (1, 2):
        tx.audit.append(audit(number, tenant, session_id="s_1", run_id="run_1", hash=tenant))
    tx.approvals.insert(approval("ap_done", tenant, status="approved", resolved_at=NOW))
    tx.usage.add(tenant, UsageRow(scope="workspace:w_1", day=1, steps=1, tokens=2, cost_usd=0.5))
    tx.usage.reserve(tenant, "run_1", UsageRow(scope="workspace:w_1", day=1, steps=1))
    tx.metrics.add(fact(tenant_id=tenant))
    tx.metrics.decided(decision(tenant_id=tenant))


_ALL = ("w_1", "a_default", 0, 2**60)


def audit_page(tx: Transaction, tenant: str, **filters: Any) -> Any:
    given = dict.fromkeys(("from_", "to", "action", "actor", "session_id", "run_id", "before_id"))
    return tx.audit.page(tenant, limit=9, **(given | filters))


READS: dict[str, Callable[[Transaction, str], Any]] = {
    "usage.reserved": lambda tx, t: tx.usage.reserved(t, "run_1"),
    "usage.of_session": lambda tx, t: tx.usage.of_session(t, "s_1", 0),
    "metrics.hours": lambda tx, t: tx.metrics.hours(t, *_ALL),
    "metrics.hour_counts": lambda tx, t: tx.metrics.hour_counts(t, *_ALL, "latency"),
    "metrics.facts": lambda tx, t: tx.metrics.facts(t, *_ALL),
    "metrics.fact_buckets": lambda tx, t: tx.metrics.fact_buckets(t, *_ALL),
    "metrics.fact_failures": lambda tx, t: tx.metrics.fact_failures(t, *_ALL),
    "metrics.latencies": lambda tx, t: tx.metrics.latencies(t, *_ALL),
    "metrics.decisions": lambda tx, t: tx.metrics.decisions(t, *_ALL),
    "metrics.wait": lambda tx, t: [tx.metrics.wait(t, *_ALL, rank) for rank in (1, 2)],
    "metrics.pending": lambda tx, t: tx.metrics.pending(t, "w_1", "a_default"),
    "sessions.get": lambda tx, t: tx.sessions.get(t, "s_1"),
    "sessions.page": lambda tx, t: tx.sessions.page(t, "w_1", user_id="u_1", agent_id=None, limit=9, before=None),
    "journal.after": lambda tx, t: tx.journal.after(t, "s_1", 0, 9),
    "journal.before": lambda tx, t: tx.journal.before(t, "s_1", None, 9),
    "journal.feed_after": lambda tx, t: tx.journal.feed_after(t, "w_1", 0, user_id="u_1", limit=9),
    "journal.feed_head": lambda tx, t: tx.journal.feed_head(t, "w_1"),
    "journal.of_run": lambda tx, t: tx.journal.of_run(t, "s_1", "run_1"),
    "runs.get": lambda tx, t: [tx.runs.get(t, name) for name in ("run_1", "run_2")],
    "runs.lease": lambda tx, t: [tx.runs.lease(t, name) for name in ("run_1", "run_2")],
    "messages.of_session": lambda tx, t: tx.messages.of_session(t, "s_1"),
    "messages.get": lambda tx, t: tx.messages.get(t, "s_1", 1),
    "messages.latest": lambda tx, t: tx.messages.latest(t, "s_1", "user"),
    "tool_runs.get": lambda tx, t: tx.tool_runs.get(t, "call_1"),
    "tool_runs.of_run": lambda tx, t: tx.tool_runs.of_run(t, "run_1"),
    "outputs.read": lambda tx, t: [tx.outputs.read(t, name, 0, 9) for name in ("call_1", "call_2")],
    "agents.get": lambda tx, t: tx.agents.get(t, "w_1", "a_1"),
    "agents.list": lambda tx, t: tx.agents.list(t, "w_1"),
    "policies.get": lambda tx, t: tx.policies.get(t, "workspace:w_1"),
    "policies.get_many": lambda tx, t: list(tx.policies.get_many(t, ["workspace:w_1"]).values()),
    "idempotency.get": lambda tx, t: tx.idempotency.get(key(tenant_id=t)),
    "idempotency.in_progress_of_run": lambda tx, t: tx.idempotency.in_progress_of_run(t, "run_1"),
    "tenants.workspace_ids": lambda tx, t: tx.tenants.workspace_ids(t),
    "tokens.get": lambda tx, t: tx.tokens.get(t, "tok_1"),
    "tokens.list": lambda tx, t: tx.tokens.list(t),
    "approvals.get": lambda tx, t: [tx.approvals.get(t, name) for name in ("ap_1", "ap_2")],
    "approvals.of_run": lambda tx, t: tx.approvals.of_run(t, "run_1"),
    "approvals.pending_of_run": lambda tx, t: tx.approvals.pending_of_run(t, "run_1"),
    "approvals.page": lambda tx, t: tx.approvals.page(
        t, "w_1", status="pending", session_id=None, user_id="u_1", limit=9, before=None
    ),
    "approvals.page of a session": lambda tx, t: tx.approvals.page(
        t, "w_1", status="pending", session_id="s_1", user_id="u_1", limit=9, before=None
    ),
    "grants.get": lambda tx, t: [tx.grants.get(t, name) for name in ("grant_1", "grant_2")],
    "grants.list": lambda tx, t: tx.grants.list(t, "w_1"),
    "grants.find": lambda tx, t: [
        tx.grants.find(t, "w_1", "s_1", "bash.exec", "binding", NOW),
        tx.grants.find(t, "w_1", "s_1", "bash.exec", "binding", NOW, not_by="u_nobody"),
    ],
    "audit.get": lambda tx, t: [tx.audit.get(t, number) for number in (1, 2, 3)],
    "audit.head": lambda tx, t: tx.audit.head(t),
    "audit.last_before": lambda tx, t: tx.audit.last_before(t, "2027"),
    "audit.count": lambda tx, t: tx.audit.count(t),
    "audit.scan": lambda tx, t: tx.audit.scan(t, 0, 9),
    "audit.page": audit_page,
    "audit.page by action": lambda tx, t: audit_page(tx, t, action="tool.call"),
    "audit.page by actor": lambda tx, t: audit_page(tx, t, actor="user:u_1"),
    "audit.page of a session": lambda tx, t: audit_page(tx, t, session_id="s_1"),
    "audit.page of a run": lambda tx, t: audit_page(tx, t, run_id="run_1"),
    "audit.page of a period": lambda tx, t: audit_page(tx, t, from_="2026", to="2027"),
}

CHANGES: dict[str, Callable[[Transaction], Any]] = {
    "usage.release": lambda tx: tx.usage.release(A, "run_1"),
    "usage.reserve": lambda tx: tx.usage.reserve(A, "run_1", UsageRow(scope="tenant:t_a", day=1, steps=1)),
    "metrics.add": lambda tx: tx.metrics.add(fact("run_2")),
    "metrics.decided": lambda tx: tx.metrics.decided(decision("ap_2")),
    "outputs.purge": lambda tx: tx.outputs.purge(A, "call_2", 9),
    "sessions.update": lambda tx: tx.sessions.update(A, "s_1", title="changed"),
    "sessions.delete": lambda tx: tx.sessions.delete(A, "s_1"),
    "sessions.insert": lambda tx: tx.sessions.insert(session("s_2")),
    "journal.append": lambda tx: append(tx, run_id="run_1"),
    "journal.append_changing": lambda tx: append_changing(tx, {"title": "changed"}),
    "runs.insert": lambda tx: tx.runs.insert(run("run_2")),
    "runs.update": lambda tx: tx.runs.update(A, "run_1", status="failed"),
    "runs.update fenced": lambda tx: tx.runs.update(A, "run_1", epoch=1, status="failed"),
    "runs.claim": lambda tx: tx.runs.claim(A, "run_1", owner="o", now_ms=NOW, expires_at=NOW + 1, steal=False),
    "runs.claim stealing": lambda tx: tx.runs.claim(A, "run_1", owner="o", now_ms=NOW, expires_at=NOW + 1, steal=True),
    "messages.insert": lambda tx: tx.messages.insert(message(2)),
    "tool_runs.insert": lambda tx: tx.tool_runs.insert(tool_run("call_2", position=1)),
    "tool_runs.stopped": lambda tx: tx.tool_runs.stopped(A, "run_1", NOW + 5),
    "tool_runs.update": lambda tx: tx.tool_runs.update(A, "call_1", state="finished"),
    "outputs.insert": lambda tx: tx.outputs.insert(A, "s_1", "call_2", b"x"),
    "agents.upsert": lambda tx: tx.agents.upsert(agent(name="changed")),
    "policies.upsert": lambda tx: tx.policies.upsert(policy(version=2)),
    "idempotency.insert": lambda tx: tx.idempotency.insert(claim(key("k_2"), run_id="run_1")),
    "idempotency.finish": lambda tx: tx.idempotency.finish(key(), b"{}"),
    "idempotency.delete": lambda tx: tx.idempotency.delete(key()),
    "tenants.ensure": lambda tx: tx.tenants.ensure(A, "w_new", "u_1", now_ms=NOW),
    "tokens.upsert": lambda tx: tx.tokens.upsert(token(revoked_at=NOW)),
    "approvals.insert": lambda tx: tx.approvals.insert(approval("ap_2")),
    "approvals.update": lambda tx: tx.approvals.update(A, "ap_1", comment="changed"),
    "approvals.update from a status": lambda tx: tx.approvals.update(
        A, "ap_1", expected_status="pending", status="approved"
    ),
    "grants.insert": lambda tx: tx.grants.insert(grant("grant_2")),
    "grants.use": lambda tx: tx.grants.use(A, "grant_1"),
    "grants.update": lambda tx: tx.grants.update(A, "grant_1", revoked_at=NOW),
    "audit.append": lambda tx: tx.audit.append(audit(3)),
    "audit.delete_through": lambda tx: tx.audit.delete_through(A, 9),
}

# These serve all tenants, or none; they are looked at by tests of their own.
# `usage.add` and `taken` have a test of their own: only by writing are the counters read.
ACROSS_TENANTS = {
    "usage.add",
    "usage.taken",
    "approvals.due",
    "audit.tenants",
    "runs.unfinished",
    "runs.renew",
    "idempotency.purge",
    "tokens.by_hash",
    "meta.get",
    "meta.set",
}


def snapshot(tx: Transaction, tenant: str) -> dict[str, Any]:
    return {name: read(tx, tenant) for name, read in READS.items()}


class TenantsApart:
    async def test_every_method_of_every_repository_is_tried(self, store: Store) -> None:
        def names(tx: Transaction) -> set[str]:
            repositories = {name: getattr(tx, name) for name in dir(type(tx)) if not name.startswith("_")}
            return {
                f"{name}.{method}"
                for name, repository in repositories.items()
                for method in dir(repository)
                if not method.startswith("_") and callable(getattr(repository, method))
            }

        tried = {name.split()[0] for name in (*READS, *CHANGES)} | ACROSS_TENANTS
        assert await store.read(names) == tried

    @pytest.mark.parametrize("name", READS)
    async def test_a_read_gives_nothing_of_another_tenant(self, store: Store, name: str) -> None:
        empty = await store.read(lambda tx: READS[name](tx, A))
        await store.write(lambda tx: fill(tx, B))
        assert await store.read(lambda tx: READS[name](tx, A)) == empty
        assert await store.read(lambda tx: READS[name](tx, B)) != empty

    @pytest.mark.parametrize("name", CHANGES)
    async def test_a_change_leaves_another_tenants_rows_as_they_are(self, store: Store, name: str) -> None:
        def work(tx: Transaction) -> tuple[dict[str, Any], ...]:
            fill(tx, A)
            fill(tx, B)
            before_a, before_b = snapshot(tx, A), snapshot(tx, B)
            CHANGES[name](tx)
            return before_a, snapshot(tx, A), before_b, snapshot(tx, B)

        before_a, after_a, before_b, after_b = await store.write(work)
        assert after_b == before_b
        assert after_a != before_a

    async def test_a_session_has_used_what_its_runs_of_the_day_and_later_have(self, store: Store) -> None:
        day_ms = 86_400_000
        used: dict[str, Any] = {"steps": 2, "input_tokens": 10, "output_tokens": 5, "cost_usd": 0.5}

        def work(tx: Transaction) -> UsageRow:
            for session_id in ("s_1", "s_2"):
                tx.sessions.insert(session(session_id))
            tx.runs.insert(run("run_1", created_at=2 * day_ms - 1, **used))
            tx.runs.insert(run("run_2", created_at=2 * day_ms, **used))
            tx.runs.insert(run("run_3", created_at=3 * day_ms, **used | {"cost_usd": None}))
            tx.runs.insert(run("run_4", session_id="s_2", created_at=2 * day_ms, **used))
            return tx.usage.of_session(A, "s_1", 2)

        assert await store.write(work) == UsageRow(scope="session:s_1", day=2, steps=4, tokens=30, cost_usd=0.5)

    async def test_usage_of_several_scopes_is_added_to_each_of_them(self, store: Store) -> None:
        def work(tx: Transaction) -> list[UsageRow]:
            used = [UsageRow(scope=scope, day=1, steps=1, tokens=number, cost_usd=0.25) for number, scope in scopes]
            tx.usage.add(A, *used)
            tx.usage.add(A, *used[1:])
            return [tx.usage.taken(A, scope, 1) for _, scope in scopes]

        scopes = [(1, "tenant"), (20, "workspace"), (300, "agent")]
        assert await store.write(work) == [
            UsageRow(scope="tenant", day=1, steps=1, tokens=1, cost_usd=0.25),
            UsageRow(scope="workspace", day=1, steps=2, tokens=40, cost_usd=0.5),
            UsageRow(scope="agent", day=1, steps=2, tokens=600, cost_usd=0.5),
        ]

    async def test_usage_and_reservations_of_another_tenant_scope_and_day_are_not_counted(self, store: Store) -> None:
        def work(tx: Transaction) -> list[UsageRow]:
            for tenant, scope, day in ((A, "s", 1), (A, "s", 2), (A, "other", 1), (B, "s", 1)):
                tx.usage.add(tenant, UsageRow(scope=scope, day=day, steps=1, tokens=10, cost_usd=0.25))
            tx.usage.add(A, UsageRow(scope="s", day=1, steps=1, tokens=10, cost_usd=0.25))
            for tenant, name, day in ((A, "run_1", 1), (A, "run_2", 1), (A, "run_3", 2), (B, "run_1", 1)):
                tx.usage.reserve(tenant, name, UsageRow(scope="s", day=day, steps=1, tokens=100, cost_usd=1.0))
            tx.usage.release(A, "run_2")
            return [tx.usage.taken(A, "s", 1), tx.usage.taken(A, "s", 1), tx.usage.taken(B, "s", 2)]

        first, again, other = await store.write(work)
        assert first == again == UsageRow(scope="s", day=1, steps=3, tokens=120, cost_usd=1.5)
        assert other == UsageRow(scope="s", day=2)

    async def test_a_token_is_found_by_its_hash_with_its_tenant_and_no_two_share_a_hash(self, store: Store) -> None:
        def work(tx: Transaction) -> None:
            fill(tx, A)
            fill(tx, B)
            for tenant in (A, B):
                assert tx.tokens.by_hash(f"hash of tok_1 of {tenant}") == token(tenant_id=tenant)
            assert tx.tokens.by_hash("hash of none") is None

        await store.write(work)
        with pytest.raises(IntegrityError):
            await store.write(lambda tx: tx.tokens.upsert(token("tok_2", B, token_hash="hash of tok_1 of t_a")))
