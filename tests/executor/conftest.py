from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from corral.executor.service import Executor
from tests.executor.make import Bench


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


@pytest.fixture
async def bench(root: Path) -> AsyncIterator[Bench]:
    """An executor with a session's folder."""
    executor = Executor()
    yield Bench(executor, root)
    await executor.close()
