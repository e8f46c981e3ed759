"""`CorralSync`: the client for scripts, without `async`. The same client works behind it, on a thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Self, TypeVar

from msgspec import Struct

from corral.client.api import Corral
from corral.client.link import State
from corral.protocol.errors import CorralError, ErrorCode
from corral.protocol.events import AgentCompleted, AgentFailed
from corral.protocol.frames import Event
from corral.protocol.methods import ConnectResult
from corral.protocol.types import Usage

T = TypeVar("T")


class RunFailed(CorralError):
    """A run ended in `agent.failed`: `code` says why (`ABORTED` for one), `run_id` and `session_id` which it was."""

    def __init__(self, failed: AgentFailed) -> None:
        known = failed.code in ErrorCode.__members__
        super().__init__(failed.message if known else f"{failed.code}: {failed.message}", retryable=failed.retryable)
        if known:
            self.code = ErrorCode(failed.code)
        self.run_id = failed.run_id
        self.session_id = failed.session_id


class Done(Struct, kw_only=True, frozen=True):
    """A run that completed: what was answered, what it took, and its events from the first to the last."""

    run_id: str
    session_id: str
    output: str
    usage: Usage
    steps: int
    events: list[Event]


class CorralSync:
    """A client of one gateway that blocks. Use it as a context manager, from any threads.

    The parameters are `Corral`'s, and so is what happens when the connection drops. `on_state`
    is called on the client's own thread. Do not use it on an event loop's thread: it would stand still.
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
    ) -> None:
        self._corral = Corral(
            url, token, workspace_id=workspace_id, reconnect_for=reconnect_for, on_state=on_state, name=name
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Connect once. Raises GatewayUnreachable, or what the gateway refuses with."""
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._work(ready)), name="corral", daemon=True)
        self._thread.start()
        ready.wait()
        try:
            self._do(self._corral.__aenter__())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._do(self._corral.__aexit__(None, None, None))
        finally:
            self._end()

    @property
    def hello(self) -> ConnectResult:
        """What the gateway answered to the latest `connect`: principal, features, limits."""
        return self._corral.hello

    def request(self, method: str, **params: Any) -> Any:
        """Call a method with its params by their names on the wire; returns the payload. As `Corral.request`."""
        return self._do(self._corral.request(method, **params))

    def run(
        self,
        input: str | list[dict[str, Any]],  # the wire's own name
        *,
        session_id: str | None = None,
        on_event: Callable[[Event], None] | None = None,
        **params: Any,
    ) -> Done:
        """Start a run and wait for its end; `on_event` is called for each event as it comes.

        Raises RunFailed if it does not complete. An exception in the middle, Ctrl-C among them,
        leaves the run going: `abort` ends it.
        """
        events = []
        for event in self.stream(input, session_id=session_id, **params):
            events.append(event)
            if on_event is not None:
                on_event(event)
        last = events[-1].payload
        if isinstance(last, AgentFailed):
            raise RunFailed(last)
        assert isinstance(last, AgentCompleted)
        return Done(
            run_id=last.run_id,
            session_id=last.session_id,
            output=last.output,
            usage=last.usage,
            steps=last.steps,
            events=events,
        )

    def stream(
        self,
        input: str | list[dict[str, Any]],  # the wire's own name
        *,
        session_id: str | None = None,
        **params: Any,
    ) -> Iterator[Event]:
        """Start a run and yield its events, `agent.accepted` first and the terminal one last. As `Corral.run`."""
        return self._each(self._corral.run(input, session_id=session_id, **params))

    def events(self, session_id: str, *, after: int | None = None) -> Iterator[Event]:
        """Every event of a session after version `after` (by default from now), without end. As `Corral.events`."""
        return self._each(self._corral.events(session_id, after=after))

    def abort(self, run_id: str) -> str:
        """End a run and its processes; the status it ended in."""
        return self._do(self._corral.abort(run_id))

    # ---- the other thread

    async def _work(self, ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        ready.set()
        await self._stop.wait()

    def _end(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.call_soon_threadsafe(self._stop.set)
        if self._thread is not None:
            self._thread.join()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        """Have the other thread do it, and wait. Who is interrupted waiting takes the work back."""
        if self._loop is None:
            work.close()
            raise RuntimeError("not connected: use `with CorralSync(…) as corral`")
        answer = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return answer.result()
        except BaseException:
            answer.cancel()
            raise

    def _each(self, events: AsyncIterator[Event]) -> Iterator[Event]:
        try:
            while True:
                try:
                    event = self._do(_next(events))
                except StopAsyncIteration:
                    return
                yield event
        finally:
            # With the connection gone there is nothing to close, and the loop has closed what was open.
            if self._loop is not None:
                self._do(_close(events))


async def _next(events: AsyncIterator[Event]) -> Event:
    return await anext(events)


async def _close(events: Any) -> None:
    await events.aclose()
