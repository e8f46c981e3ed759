"""A gateway to be a client of, and the model that its runs talk to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.gateway import Gateway
from tests.support.model_server import ModelServer


@pytest.fixture
async def model() -> AsyncIterator[ModelServer]:
    async with ModelServer() as server:
        yield server


@pytest.fixture
async def gateway(tmp_path: Path, model: ModelServer) -> AsyncIterator[Gateway]:
    env = {"OPENAI_BASE_URL": model.base_url, "OPENAI_API_KEY": "k", "CORRAL_MODEL": "openai-chat:scripted"}
    async with Gateway(tmp_path / "data", env) as running:
        yield running
