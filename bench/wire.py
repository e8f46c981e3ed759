"""A client of the gateway that does no more than a turn needs."""

from __future__ import annotations

import itertools
import json
import os
from types import TracebackType
from typing import Any

import aiohttp

from bench.children import Corral
from bench.script import WORDS

_keys = itertools.count(1)

COMPLETED = '{"type":"event","event":"agent.completed"'
FAILED = '{"type":"event","event":"agent.failed"'


class TurnFailed(Exception):
    """The gateway did not do what was measured."""


def frame(frame_id: str, method: str, **params: Any) -> str:
    return json.dumps({"type": "req", "id": frame_id, "method": method, "params": params})


def connect_frame(token: str) -> str:
    """The first request of a socket."""
    client = {"name": "bench", "version": "1"}
    return frame("c", "connect", client=client, auth={"type": "Bearer", "token": token})


def run_frame(session_id: str, *, wait_ms: int = 0, **wanted: int) -> str:
    """`agent.run` whose input tells the model what to say (see bench.script)."""
    key = f"{os.getpid()}-{next(_keys)}"
    return frame("r", "agent.run", sessionId=session_id, input=json.dumps(wanted), waitMs=wait_ms, idempotencyKey=key)


class Client:
    """One connected WebSocket."""

    def __init__(self, http: aiohttp.ClientSession, corral: Corral) -> None:
        self._http = http
        self._corral = corral

    async def __aenter__(self) -> Client:
        self._socket = await self._http.ws_connect(f"{self._corral.url}/ws", max_msg_size=0)
        await self._ask(connect_frame(self._corral.token))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._socket.close()

    async def new_session(self) -> str:
        payload = await self._ask(frame("s", "sessions.create", idempotencyKey=f"{os.getpid()}-{next(_keys)}"))
        return str(payload["session"]["id"])

    async def turn(self, session_id: str, chunks: int) -> None:
        """A whole run, from its request to its `agent.completed`. Raises TurnFailed if it ends otherwise."""
        text = run_frame(session_id, chunks=chunks)
        await self._socket.send_str(text)
        while True:
            data = await self._next()
            if data.startswith(COMPLETED):
                break
            if data.startswith(FAILED):
                raise TurnFailed(data)
        if json.loads(data)["payload"]["output"] != WORDS * chunks:
            raise TurnFailed("the run's output is not what the model said")

    async def _ask(self, text: str) -> dict[str, Any]:
        await self._socket.send_str(text)
        while True:
            data = await self._next()
            if data.startswith('{"type":"res"'):
                break
        answer: dict[str, Any] = json.loads(data)
        if not answer["ok"]:
            raise TurnFailed(answer["error"]["message"])
        payload: dict[str, Any] = answer["payload"]
        return payload

    async def _next(self) -> str:
        message = await self._socket.receive(timeout=60)
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise TurnFailed(f"the gateway closed the socket: {message.data}")
        text: str = message.data
        return text


async def rpc(http: aiohttp.ClientSession, corral: Corral, text: str) -> dict[str, Any]:
    """One request over `/rpc`. Raises TurnFailed if it is refused."""
    headers = {"Authorization": f"Bearer {corral.token}", "Content-Type": "application/json"}
    async with http.post(f"{corral.url}/rpc", data=text, headers=headers) as response:
        body = await response.json()
    answer = body["response"]
    if not answer["ok"]:
        raise TurnFailed(answer["error"]["message"])
    payload: dict[str, Any] = answer["payload"]
    return payload
