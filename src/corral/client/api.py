"""`Corral`: what users of the Python client call."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, Self

from corral import __version__
from corral.client.link import Link, State
from corral.client.streams import Stream
from corral.protocol.events import TERMINAL_EVENTS, SessionCompacted
from corral.protocol.frames import Event
from corral.protocol.methods import ConnectResult

Address = Callable[[], tuple[str, str]]


class Corral:
    """A client of one gateway. Use it as an async context manager.

    A dropped connection is made again for up to `reconnect_for` seconds, which callers see only
    as time passing; `on_state` is told of it, if given. Any number of requests, runs and event
    streams may be under way at once.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        workspace_id: str | None = None,
        reconnect_for: float = 60.0,
        on_state: Callable[[State, str], None] | None = None,
        name: str = "corral-python",
        address: Address | None = None,
    ) -> None:
        """`url` is `http://HOST:PORT`. `address`, if given, says (url, token) anew before each
        attempt to connect: for a gateway that may come back on another port."""
        params: dict[str, Any] = {"client": {"name": name, "version": __version__}}
        if workspace_id is not None:
            params["workspaceId"] = workspace_id
        self._link = Link(
            address or (lambda: (url, token)),
            connect_params=params,
            reconnect_for=reconnect_for,
            on_state=on_state,
        )

    async def __aenter__(self) -> Self:
        await self._link.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._link.close()

    @property
    def hello(self) -> ConnectResult:
        """What the gateway answered to the latest `connect`: principal, features, limits."""
        if self._link.hello is None:
            raise RuntimeError("not connected: use `async with Corral(…) as corral`")
        return self._link.hello

    async def request(self, method: str, **params: Any) -> Any:
        """Call a method with its params by their names on the wire; returns the payload.

        A method with a side effect gets an idempotency key unless one is given, and is sent
        again with the same key when the connection drops. Raises the error classes of
        `corral.protocol.errors`, and GatewayUnreachable.
        """
        return await self._link.request(method, params)

    async def run(
        self,
        input: str | list[dict[str, Any]],  # the wire's own name
        *,
        session_id: str | None = None,
        **params: Any,
    ) -> AsyncIterator[Event]:
        """Start a run and yield its events, `agent.accepted` first and the terminal one last.

        Further params of `agent.run` go by their names on the wire (`model=…`, `agentId=…`,
        `limits={…}`). Leaving the loop early leaves the run going: `abort` ends it.
        """
        params["input"] = input
        if session_id is not None:
            params["sessionId"] = session_id
        request = self._link.make("agent.run", params)
        channels = self._link.channels
        made: list[tuple[Stream, str, str]] = []

        def accepted(payload: Any) -> None:
            made.append((channels.run_accepted(payload["sessionId"], request), payload["sessionId"], payload["runId"]))

        try:
            async with channels.starting_run(session_id):
                await self._link.send(request, accepted)
            stream, ran_in, run_id = made[0]
            began = False
            while True:
                event = await stream.next(lambda: channels.catch_up(ran_in))
                its_own = getattr(event.payload, "run_id", None) == run_id
                began = began or its_own
                # A compaction names no run: it is part of the one that is on.
                if not (its_own or (began and isinstance(event.payload, SessionCompacted))):
                    continue
                yield event
                if event.event in TERMINAL_EVENTS:
                    return
        finally:
            for stream, ran_in, _ in made:
                channels.leave(ran_in, stream)

    async def events(self, session_id: str, *, after: int | None = None) -> AsyncIterator[Event]:
        """Every event of a session after version `after` (by default from now), without end.

        Each durable event comes once and in order, whatever happens to the connection. Deltas
        of a message that was being written when it dropped start again at offset 0.
        """
        channels = self._link.channels
        stream = channels.follow(session_id, after)
        try:
            while True:
                yield await stream.next(lambda: channels.catch_up(session_id))
        finally:
            channels.leave(session_id, stream)

    async def abort(self, run_id: str) -> str:
        """End a run and its processes; the status it ended in."""
        answer = await self.request("agent.abort", runId=run_id)
        return str(answer["status"])
