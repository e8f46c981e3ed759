"""Gateways for the commands to speak to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.gateway import Gateway
from tests.support.model_server import ModelServer


@pytest.fixture
async def demo(tmp_path: Path) -> AsyncIterator[Gateway]:
    """A gateway with the demo model."""
    async with Gateway(tmp_path / "data") as gateway:
        yield gateway


@pytest.fixture
async def model() -> AsyncIterator[ModelServer]:
    async with ModelServer() as server:
        yield server


@pytest.fixture
async def scripted(tmp_path: Path, model: ModelServer) -> AsyncIterator[Gateway]:
    """A gateway whose model is `model`."""
    env = {"OPENAI_BASE_URL": model.base_url, "OPENAI_API_KEY": "k", "CORRAL_MODEL": "openai-chat:scripted"}
    async with Gateway(tmp_path / "data", env) as gateway:
        yield gateway
