"""What tests of the core share: a house with tools that may run without asking."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.house import House, house

Open = Callable[..., AbstractAsyncContextManager[House]]

OPEN_TOOLS = {"tools": {"bash.exec": "allow", "process.exec": "allow", "file.write": "allow", "file.edit": "allow"}}


async def allow(home: House, patch: dict[str, Any] | None = None) -> None:
    """Let the tools run, or apply another patch to the workspace's policy."""
    async with await home.wire() as wire:
        await wire.effect("policy.update", patch=patch or OPEN_TOOLS)


@pytest.fixture
def open_house(tmp_path: Path) -> Open:
    """Starts a house before a script; `patch` is its workspace's policy, by default open tools."""

    @asynccontextmanager
    async def start(script: Any, patch: dict[str, Any] | None = None, **settings: Any) -> Any:
        async with house(tmp_path / "data", script=script, **settings) as home:
            await allow(home, patch)
            yield home

    return start
