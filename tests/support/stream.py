"""A client for a session's stream of server-sent events, which reads what the wire says and nothing into it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import aiohttp

Json = dict[str, Any]


class Sse:
    """One event as it came: its name, its id (None where there is none) and its data."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        assert set(fields) <= {"event", "id", "data"}, fields
        self.event = fields["event"]
        self.id = int(fields["id"]) if "id" in fields else None
        self.data: Json = json.loads(fields["data"])


class EventStream:
    """`async with EventStream(url, session, token) as stream`; `status` and, if that is not 200, `body`."""

    def __init__(
        self, url: str, session_id: str, token: str | None, *, query: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        self._url = f"{url}/v1/sessions/{session_id}/events{query}"
        self._headers = {**({"Authorization": f"Bearer {token}"} if token else {}), **(headers or {})}
        self._lines: list[str] = []
        self.comments: list[str] = []
        self.events: list[Sse] = []
        self.body = ""

    async def __aenter__(self) -> EventStream:
        self._client = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, sock_read=60), read_bufsize=16 * 1024 * 1024
        )
        try:
            self._response = await self._client.get(self._url, headers=self._headers)
            self.status, self.headers = self._response.status, self._response.headers
            if self.status != 200:
                self.body = await self._response.text()
        except BaseException:
            await self._client.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._response.close()
        await self._client.close()

    def cut(self) -> None:
        """End the connection as a network does."""
        connection = self._response.connection
        if connection is not None and connection.transport is not None:
            connection.transport.abort()

    async def next(self) -> Sse | None:
        """The next event, None at the end. Raises aiohttp.ClientError if the stream is cut off."""
        fields: dict[str, str] = {}
        while True:
            line = (await self._response.content.readuntil(b"\n")).decode()
            if not line:
                return None
            assert line.endswith("\n")
            line = line[:-1]
            if line.startswith(":"):
                self.comments.append(line[1:].strip())
            elif line:
                name, _, value = line.partition(": ")
                assert name not in fields, fields
                fields[name] = value
            elif fields:
                event = Sse(fields)
                self.events.append(event)
                return event

    async def until(self, name: str) -> Sse:
        """The next event of that name."""
        async with asyncio.timeout(60):
            while (event := await self.next()) is not None:
                if event.event == name:
                    return event
        raise AssertionError(f"ended before {name}: {[event.event for event in self.events]} {self.comments}")

    async def end(self) -> None:
        """Read to the end."""
        async with asyncio.timeout(60):
            while await self.next() is not None:
                pass

    @property
    def versions(self) -> list[int]:
        """The ids that came, in order."""
        return [event.id for event in self.events if event.id is not None]
