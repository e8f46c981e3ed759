"""What every store's repositories for approvals, grants and the audit log must do."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace
from sqlalchemy.exc import IntegrityError

from corral.storage.api import Store
from corral.storage.repositories import Transaction
from corral.storage.rows import ApprovalRow, AuditRow
from tests.storage.make import NOW, A, B, approval, audit, grant, session


class ApprovalRows:
    async def test_an_approval_belongs_to_a_session_that_is_there(self, store: Store) -> None:
        with pytest.raises(IntegrityError):
            await store.write(lambda tx: tx.approvals.insert(approval()))

    async def test_of_several_who_expect_the_same_status_one_changes_it(self, store: Store) -> None:
        def insert(tx: Transaction) -> None:
            tx.sessions.insert(session())
            tx.approvals.insert(approval())

        await store.write(insert)

        def resolve(name: str) -> Any:
            return store.write(
                lambda tx: tx.approvals.update(
                    A, "ap_1", expected_status="pending", status="approved", resolved_by=name, resolved_at=NOW
                )
            )

        won = await asyncio.gather(*(resolve(f"u_{n}") for n in range(8)))
        assert sum(won) == 1
        row = await store.read(lambda tx: tx.approvals.get(A, "ap_1"))
        assert row == approval(status="approved", resolved_by=f"u_{won.index(True)}", resolved_at=NOW)

    async def test_an_update_says_whether_there_was_such_a_row(self, store: Store) -> None:
        def work(tx: Transaction) -> list[bool]:
            tx.sessions.insert(session())
            tx.approvals.insert(approval())
            return [
                tx.approvals.update(A, "ap_1", comment="c"),
                tx.approvals.update(A, "ap_none", comment="c"),
                tx.approvals.update(B, "ap_1", comment="c"),
                tx.approvals.update(A, "ap_1", expected_status="approved", comment="c"),
            ]

        assert await store.write(work) == [True, False, False, False]

    async def test_those_of_a_run_are_by_time_and_id(self, store: Store) -> None:
        rows = [
            approval("ap_3", created_at=NOW),
            approval("ap_1", created_at=NOW + 1, status="approved"),
            approval("ap_2", created_at=NOW + 1),
        ]

        def work(tx: Transaction) -> None:
            tx.sessions.insert(session())
            for row in (*rows[::-1], approval("ap_other", run_id="run_2")):
                tx.approvals.insert(row)
            assert tx.approvals.of_run(A, "run_1") == rows
            assert tx.approvals.pending_of_run(A, "run_1") == [rows[0], rows[2]]

        await store.write(work)

    async def test_pages_go_from_the_newest_without_gap_or_repeat(self, store: Store) -> None:
        rows = [
            approval(
                f"ap_{n}",
                created_at=NOW + n // 3,
                session_id=f"s_{n % 2}",
                status="approved" if n == 4 else "pending",
            )
            for n in range(10)
        ]

        def pages(tx: Transaction, session_id: str | None) -> list[ApprovalRow]:
            got: list[ApprovalRow] = []
            before = None
            while page := tx.approvals.page(
                A, "w_1", status="pending", session_id=session_id, user_id="u_1", limit=3, before=before
            ):
                assert len(page) <= 3
                got += page
                before = (page[-1].created_at, page[-1].id)
            return got

        def work(tx: Transaction) -> None:
            for n in range(2):
                tx.sessions.insert(session(f"s_{n}"))
            for row in rows:
                tx.approvals.insert(row)
            for session_id in (None, "s_1"):
                expected = [
                    row for row in rows[::-1] if row.status == "pending" and session_id in (None, row.session_id)
                ]
                expected.sort(key=lambda row: (row.created_at, row.id), reverse=True)
                assert pages(tx, session_id) == expected

        await store.write(work)

    async def test_nobody_sees_those_of_a_session_that_is_hidden_from_them(self, store: Store) -> None:
        def work(tx: Transaction) -> set[str]:
            sessions = [
                session("s_own"),
                session("s_shared", owner_user_id="u_2", visibility="workspace"),
                session("s_secret", owner_user_id="u_2"),
                session("s_elsewhere", workspace_id="w_2"),
            ]
            for row in sessions:
                tx.sessions.insert(row)
                tx.approvals.insert(approval(f"ap_{row.id}", session_id=row.id, workspace_id=row.workspace_id))
            page = tx.approvals.page(A, "w_1", status="pending", session_id=None, user_id="u_1", limit=9, before=None)
            secret = tx.approvals.page(
                A, "w_1", status="pending", session_id="s_secret", user_id="u_1", limit=9, before=None
            )
            assert secret == []
            return {row.id for row in page}

        assert await store.write(work) == {"ap_s_own", "ap_s_shared"}

    async def test_due_are_the_pending_ones_of_every_tenant_whose_time_has_come(self, store: Store) -> None:
        def work(tx: Transaction) -> None:
            for tenant in (A, B):
                tx.sessions.insert(session(tenant_id=tenant))
                tx.approvals.insert(approval("ap_later", tenant, expires_at=NOW + 1))
                tx.approvals.insert(approval("ap_done", tenant, expires_at=NOW - 1, status="approved"))
            tx.approvals.insert(approval("ap_1", A, expires_at=NOW))
            tx.approvals.insert(approval("ap_2", B, expires_at=NOW - 1))
            assert [(row.tenant_id, row.id) for row in tx.approvals.due(NOW, 9)] == [(B, "ap_2"), (A, "ap_1")]
            assert [row.id for row in tx.approvals.due(NOW, 1)] == ["ap_2"]
            assert tx.approvals.due(NOW - 2, 9) == []

        await store.write(work)


class GrantRows:
    @pytest.mark.parametrize(
        ("fields", "found"),
        [
            ({}, True),
            ({"session_id": "s_1"}, True),
            ({"session_id": "s_2"}, False),
            ({"workspace_id": "w_2"}, False),
            ({"tool_name": "file.write"}, False),
            ({"binding": "other"}, False),
            ({"revoked_at": NOW - 5}, False),
            ({"expires_at": NOW}, False),
            ({"expires_at": NOW + 1}, True),
            ({"tenant_id": B}, False),
        ],
    )
    async def test_a_grant_is_found_for_exactly_what_it_covers(
        self, store: Store, fields: dict[str, Any], found: bool
    ) -> None:
        row = grant(**fields)

        def work(tx: Transaction) -> Any:
            for name in ("s_1", "s_2"):
                tx.sessions.insert(session(name))
            tx.grants.insert(row)
            return tx.grants.find(A, "w_1", "s_1", "bash.exec", "binding", NOW)

        assert await store.write(work) == (row if found else None)

    async def test_a_sessions_own_grant_comes_before_the_workspaces(self, store: Store) -> None:
        def work(tx: Transaction) -> Any:
            tx.sessions.insert(session())
            tx.grants.insert(grant("grant_of_all", created_at=NOW - 5))
            tx.grants.insert(grant("grant_own", session_id="s_1"))
            tx.grants.insert(grant("grant_own_newer", session_id="s_1", created_at=NOW + 5))
            return tx.grants.find(A, "w_1", "s_1", "bash.exec", "binding", NOW)

        assert (await store.write(work)).id == "grant_own"

    async def test_a_grant_of_somebody_else_is_found_where_ones_own_does_not_count(self, store: Store) -> None:
        def work(tx: Transaction) -> list[str | None]:
            tx.sessions.insert(session())
            tx.grants.insert(grant("grant_own", session_id="s_1", created_by="u_1"))
            found = [tx.grants.find(A, "w_1", "s_1", "bash.exec", "binding", NOW, not_by="u_1")]
            tx.grants.insert(grant("grant_of_another", created_by="u_2"))
            found.append(tx.grants.find(A, "w_1", "s_1", "bash.exec", "binding", NOW, not_by="u_1"))
            return [None if row is None else row.id for row in found]

        assert await store.write(work) == [None, "grant_of_another"]

    async def test_uses_are_counted_and_the_list_is_from_the_newest_with_revoked_ones(self, store: Store) -> None:
        rows = [grant(f"grant_{n}", created_at=NOW + n // 2) for n in range(4)]

        def work(tx: Transaction) -> None:
            for row in rows:
                tx.grants.insert(row)
            tx.grants.insert(grant("grant_elsewhere", workspace_id="w_2"))
            tx.grants.use(A, "grant_2")
            tx.grants.use(A, "grant_2")
            assert tx.grants.update(A, "grant_1", revoked_at=NOW, revoked_by="u_1")
            assert not tx.grants.update(A, "grant_none", revoked_at=NOW)
            expected = [rows[3], replace(rows[2], uses=2), replace(rows[1], revoked_at=NOW, revoked_by="u_1"), rows[0]]
            assert tx.grants.list(A, "w_1") == expected
            assert tx.grants.get(A, "grant_2") == expected[1]

        await store.write(work)


NO_FILTER: dict[str, Any] = dict.fromkeys(("from_", "to", "action", "actor", "session_id", "run_id"))


class AuditRows:
    async def test_an_id_is_given_once(self, store: Store) -> None:
        await store.write(lambda tx: tx.audit.append(audit()))
        with pytest.raises(Exception) as raised:  # noqa: PT011 - the driver's own, not SQLAlchemy's
            await store.write(lambda tx: tx.audit.append(audit(hash="other")))
        assert type(raised.value).__name__ in ("IntegrityError", "UniqueViolation")
        assert await store.read(lambda tx: tx.audit.get(A, 1)) == audit()

    async def test_the_head_is_the_last_record_of_the_tenant(self, store: Store) -> None:
        def work(tx: Transaction) -> None:
            assert tx.audit.head(A) is None
            for number in (1, 2, 10):
                tx.audit.append(audit(number))
            tx.audit.append(audit(11, B))
            head = tx.audit.head(A)
            assert head is not None
            assert (head.id, head.hash) == (10, "hash 10")
            assert tx.audit.tenants() == [A, B]
            assert tx.audit.count(A) == 3

        await store.write(work)

    async def test_every_filter_and_all_together_find_what_they_say_in_pages_from_the_newest(
        self, store: Store
    ) -> None:
        rows = [
            audit(
                n,
                action=("tool.call", "tool.result")[n % 2],
                actor=f"user:u_{n % 3}",
                session_id=(None, "s_1", "s_2")[n // 2 % 3],
                run_id=(None, "run_1")[n // 3 % 2],
            )
            for n in range(1, 31)
        ]
        filters: list[dict[str, Any]] = [
            {},
            {"action": "tool.call"},
            {"actor": "user:u_1"},
            {"session_id": "s_1"},
            {"run_id": "run_1"},
            {"action": "tool.call", "run_id": "run_1"},
            {"action": "tool.result", "actor": "user:u_2", "session_id": "s_2"},
            {"action": "tool.call", "actor": "user:u_2", "session_id": "s_1", "run_id": "run_1"},
            {"action": "none"},
        ]
        periods = [{}, {"from_": rows[4].created_at}, {"from_": rows[4].created_at, "to": rows[20].created_at}]

        def fits(row: AuditRow, wanted: dict[str, Any]) -> bool:
            return all(
                (name == "from_" and row.created_at >= value)
                or (name == "to" and row.created_at < value)
                or (name not in ("from_", "to") and getattr(row, name) == value)
                for name, value in wanted.items()
            )

        def work(tx: Transaction) -> None:
            for row in rows:
                tx.audit.append(row)
                tx.audit.append(replace(row, tenant_id=B))
            for wanted in [each | period for each in filters for period in periods]:
                got: list[AuditRow] = []
                before_id = None
                while page := tx.audit.page(A, **(NO_FILTER | wanted), limit=4, before_id=before_id):
                    assert len(page) <= 4
                    got += page
                    before_id = page[-1].id
                assert got == [row for row in rows[::-1] if fits(row, wanted)], wanted

        await store.write(work)

    async def test_a_period_holds_its_records_though_the_clock_was_set_back(self, store: Store) -> None:
        times = ["05", "06", "03", "04", "05", "07", "02", "08"]

        def work(tx: Transaction) -> list[int]:
            for number, second in enumerate(times, start=1):
                tx.audit.append(audit(number, created_at=f"2026-01-01T00:00:{second}.000Z"))
            page = tx.audit.page(
                A,
                **(NO_FILTER | {"from_": "2026-01-01T00:00:03.000Z", "to": "2026-01-01T00:00:06.000Z"}),
                limit=9,
                before_id=None,
            )
            return [row.id for row in page]

        assert await store.write(work) == [5, 4, 3, 1]

    async def test_a_scan_gives_the_records_ascending_with_their_metadata_as_text(self, store: Store) -> None:
        def work(tx: Transaction) -> None:
            for number in (3, 1, 2):
                tx.audit.append(audit(number, metadata={"b": "ö", "a": number}))
            found = tx.audit.scan(A, 1, 9)
            assert [each.id for each in found] == [2, 3]
            assert found[0].fields is not None
            assert found[0].fields["metadata"] == '{"a":2,"b":"ö"}'
            assert found[0].fields["prev_hash"] == "hash 1"
            assert [each.id for each in tx.audit.scan(A, 0, 2)] == [1, 2]

        await store.write(work)

    async def test_records_are_deleted_through_an_id(self, store: Store) -> None:
        def work(tx: Transaction) -> None:
            for number in range(1, 6):
                tx.audit.append(audit(number))
                tx.audit.append(audit(number, B))
            assert tx.audit.delete_through(A, 3) == 3
            assert [each.id for each in tx.audit.scan(A, 0, 9)] == [4, 5]
            assert tx.audit.count(B) == 5

        await store.write(work)

    async def test_the_last_record_before_a_time_is_never_the_last_of_all_nor_one_with_a_later_one_before_it(
        self, store: Store
    ) -> None:
        times = ["01", "02", "05", "03", "06"]

        def work(tx: Transaction) -> list[int]:
            found = [tx.audit.last_before(A, "2027")]
            for number, second in enumerate(times, start=1):
                tx.audit.append(audit(number, created_at=f"2026-01-01T00:00:{second}.000Z"))
            return found + [
                tx.audit.last_before(A, f"2026-01-01T00:00:{second}.000Z") for second in ("01", "02", "04", "06", "09")
            ]

        assert await store.write(work) == [0, 0, 1, 2, 4, 4]
