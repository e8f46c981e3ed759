"""A store with an audit on a real file, for the tests of the audit, and hands that reach around it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from corral.clock import SystemClock
from corral.governance.audit import Audit, AuditMethods
from corral.governance.caller import Caller
from corral.governance.keeper import AuditKeeper
from corral.protocol.methods import AuditVerifyResult
from corral.storage.repositories import Transaction
from corral.storage.rows import AuditRow
from corral.storage.sqlite import SqliteStore
from tests.support.callers import caller_of

T = "t_1"
SECRET = "the-servers-own-access-token"


class SteppedClock(SystemClock):
    """The wall clock of a test: it moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1_700_000_000_000

    def now_ms(self) -> int:
        return self.now


def caller(tenant_id: str = T) -> Caller:
    return caller_of("user:u_1", user="u_1", tenant=tenant_id, workspace="w_1")


class AuditHouse:
    """Use as an async context manager; `restart` closes and opens everything again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = SteppedClock()

    async def __aenter__(self) -> AuditHouse:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        self.store = await SqliteStore.open(self.folder / "corral.db", self.clock)
        self.audit = Audit(self.clock, secrets=[SECRET])
        self.keeper = AuditKeeper(self.store, self.clock, self.audit, self.folder)
        self.methods = AuditMethods(self.audit, self.keeper)

    async def close(self, *, sign: bool = True) -> None:
        if sign:
            await self.keeper.close()
        await self.store.close()

    async def restart(self, *, sign: bool = True) -> None:
        await self.close(sign=sign)
        await self.open()

    async def fill(self, count: int, tenant_id: str = T, **fields: Any) -> list[AuditRow]:
        """So many records, each a little later than the one before."""

        def work(tx: Transaction) -> list[AuditRow]:
            rows = []
            for number in range(count):
                self.clock.now += 10
                rows.append(self.record(tx, tenant_id=tenant_id, metadata={"number": number, "note": "ö"}, **fields))
            return rows

        return await self.store.write(work)

    def record(self, tx: Transaction, **fields: Any) -> AuditRow:
        values: dict[str, Any] = {
            "tenant_id": T,
            "action": "tool.call",
            "actor": "user:u_1",
            "actor_type": "user",
            "resource_type": "tool",
            "resource_id": "bash.exec",
            "trace_id": "trace",
        }
        return self.audit.record(tx, **(values | fields))

    async def verify(self, tenant_id: str = T) -> AuditVerifyResult:
        return await self.methods.verify(caller(tenant_id))

    async def rows(self, tenant_id: str = T) -> list[AuditRow]:
        """All records, ascending."""
        found = await self.store.read(
            lambda tx: tx.audit.page(
                tenant_id,
                from_=None,
                to=None,
                action=None,
                actor=None,
                session_id=None,
                run_id=None,
                limit=100_000,
                before_id=None,
            )
        )
        return found[::-1]

    def sql(self, *statements: str) -> list[Any]:
        """Run statements on the file, past the store, as somebody with the file would."""
        rows: list[Any] = []
        with closing(sqlite3.connect(self.folder / "corral.db", timeout=30)) as connection:
            connection.execute("PRAGMA foreign_keys = OFF")
            for statement in statements:
                rows = connection.execute(statement).fetchall()
            connection.commit()
        return rows
