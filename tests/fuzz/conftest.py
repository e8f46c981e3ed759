"""One server for all the examples of a module."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from corral.gateway.options import GatewayOptions
from tests.support.house import House, house


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def home(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    async with house(tmp_path_factory.mktemp("fuzz") / "data", options=GatewayOptions(request_rate=1e9)) as running:
        yield running
