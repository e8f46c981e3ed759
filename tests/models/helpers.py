"""What the tests of this room share: a request, a router that does not wait, and a way to hear a whole stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

from corral.models.api import (
    AssistantMessage,
    Finished,
    Message,
    ModelEvent,
    ModelRequest,
    Restarted,
    Text,
    TextDelta,
    ToolDefinition,
    UserMessage,
)
from corral.models.http import Timeouts
from corral.models.router import ModelRouter, RetryPolicy
from tests.support.model_server import ModelServer, Script

MODEL = "openai-chat:m"
CLAUDE = "anthropic:claude-sonnet-4-6"
GEMINI = "google:gemini-2.5-flash"
KEY = "sk-canary-0123456789abcdef"
TOOLS = [
    ToolDefinition(name=name, description=f"does {name}", parameters={"type": "object", "properties": {}})
    for name in ("bash.exec", "file.read", "file.list", "file.search", "file.write", "http.request")
]


def user(text: str) -> UserMessage:
    return UserMessage(content=[Text(text=text)])


def request(*messages: Message, tools: Sequence[ToolDefinition] = TOOLS, **more: Any) -> ModelRequest:
    return ModelRequest(system="You are a test.", messages=list(messages) or [user("hello")], tools=tools, **more)


def environ(server: ModelServer, key: str = KEY) -> dict[str, str]:
    """The variables that lead every dialect to the scripted server."""
    addresses = {"ANTHROPIC_BASE_URL": server.root_url, "GOOGLE_GEMINI_BASE_URL": server.root_url}
    keys = dict.fromkeys(("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GOOGLE_API_KEY"), key)
    return {"OPENAI_BASE_URL": server.base_url, **addresses, **keys}


class Naps:
    """A sleep that only writes down how long it would have been."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


class Rig:
    """A scripted server and a router that talks to it."""

    def __init__(self, server: ModelServer, router: ModelRouter, naps: Naps) -> None:
        self.server = server
        self.router = router
        self.naps = naps

    async def events(self, asked: ModelRequest | None = None, chain: Sequence[str] = (MODEL,)) -> list[ModelEvent]:
        async with aclosing(self.router.stream(asked or request(), chain)) as stream:
            return [event async for event in stream]

    async def finished(self, asked: ModelRequest | None = None, chain: Sequence[str] = (MODEL,)) -> Finished:
        last = (await self.events(asked, chain))[-1]
        assert isinstance(last, Finished)
        return last

    async def message(self, asked: ModelRequest | None = None, chain: Sequence[str] = (MODEL,)) -> AssistantMessage:
        return (await self.finished(asked, chain)).message

    @property
    def sent(self) -> dict[str, Any]:
        """The JSON of the last request."""
        return self.server.requests[-1].json


@asynccontextmanager
async def rig(
    script: Script,
    *,
    env: Mapping[str, str] | None = None,
    timeouts: Timeouts | None = None,
    retry: RetryPolicy | None = None,
    **router_arguments: Any,
) -> AsyncIterator[Rig]:
    naps = Naps()
    async with ModelServer(script) as server:
        router = ModelRouter(
            {**environ(server), **(env or {})},
            timeouts=timeouts,
            retry=retry,
            sleep=naps,
            chance=lambda: 0.5,
            **router_arguments,
        )
        try:
            yield Rig(server, router, naps)
        finally:
            await router.close()


def text_of(events: Sequence[ModelEvent]) -> str:
    """What a reader sees at the end: deltas in order, void after each Restarted."""
    text = ""
    for event in events:
        if isinstance(event, TextDelta):
            text += event.text
        elif isinstance(event, Restarted):
            text = ""
    return text
