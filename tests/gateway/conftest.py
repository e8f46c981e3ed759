"""A server with the usual options."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.house import House, house


@pytest.fixture
async def home(tmp_path: Path) -> AsyncIterator[House]:
    """A server of its own for the test."""
    async with house(tmp_path / "data") as running:
        yield running
