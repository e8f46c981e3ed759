"""The SQLite store against what every store must do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from corral.storage.api import Store
from corral.storage.sqlite import SqliteStore
from tests.storage import conformance, conformance_governance, conformance_rows
from tests.storage.make import FixedClock


class SqliteMade:
    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[Store]:
        store = await SqliteStore.open(tmp_path / "corral.db", FixedClock())
        yield store
        await store.close()


class TestUnitsOfWork(SqliteMade, conformance.UnitsOfWork):
    pass


class TestOrderOfDelivery(SqliteMade, conformance.OrderOfDelivery):
    pass


class TestClosing(SqliteMade, conformance.Closing):
    pass


class TestRowsAndOrders(SqliteMade, conformance_rows.RowsAndOrders):
    pass


class TestLeases(SqliteMade, conformance_rows.Leases):
    pass


class TestIdempotencyRows(SqliteMade, conformance_rows.IdempotencyRows):
    pass


class TestTenantsApart(SqliteMade, conformance_rows.TenantsApart):
    pass


class TestApprovalRows(SqliteMade, conformance_governance.ApprovalRows):
    pass


class TestGrantRows(SqliteMade, conformance_governance.GrantRows):
    pass


class TestAuditRows(SqliteMade, conformance_governance.AuditRows):
    pass
