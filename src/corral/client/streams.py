"""Streams of events, and the subscriptions that feed them.

A gateway sends an event once on a socket, however many subscriptions match, and may carry out the
requests of one socket side by side. So there is at most one subscription of a session on a link,
whatever streams want of it, and it is changed by one hand at a time: a `Channel`'s lock.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Protocol

from corral.client.errors import GatewayUnreachable
from corral.protocol.errors import CorralError
from corral.protocol.events import TRANSIENT_EVENTS
from corral.protocol.frames import Event, Request

STREAM_LIMIT = 10_000
"""Events that wait in one stream; past it they are let go and asked for again when there is room."""


_WAITS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Seconds between tries of a subscription that the gateway cannot take just now."""


class Stream:
    """The events of one session as they come, each durable one once and in order.

    `position` is the stateVersion of the last one taken in; None until the first is known.
    `restart` asks for the events while there is no position to ask from. A stream that is
    `behind` takes nothing in until the channel's subscription begins again at its position.
    """

    def __init__(self, position: int | None, *, restart: Request | None = None, behind: bool = False) -> None:
        self.position = position
        self.restart = restart
        self.behind = behind
        self.error: Exception | None = None
        self._waiting: deque[Event] = deque()
        self._changed = asyncio.Event()

    def take_in(self, event: Event) -> None:
        """Called for every event of the session that comes."""
        if self.behind or self.error is not None:
            return
        if event.event in TRANSIENT_EVENTS:
            if len(self._waiting) < STREAM_LIMIT:
                self._put(event)
            return
        if self.position is not None and event.state_version <= self.position:
            return  # asked for by another stream of the session, which is not as far
        if len(self._waiting) >= STREAM_LIMIT or self._misses(event):
            self.fall_behind()
            return
        self.position = event.state_version
        self._put(event)

    def fall_behind(self) -> None:
        """Let go of what comes; it is asked for again when what waits has been taken."""
        self.behind = True
        self._changed.set()

    def end(self, error: Exception) -> None:
        self.error = error
        self._changed.set()

    async def next(self, catch_up: Callable[[], Coroutine[Any, Any, None]]) -> Event:
        """The next event; raises what ended the stream. `catch_up` is called when it is behind."""
        while not self._waiting:
            if self.error is not None:
                raise self.error
            self._changed.clear()
            if self.behind:
                await catch_up()
            else:
                await self._changed.wait()
        return self._waiting.popleft()

    def _misses(self, event: Event) -> bool:
        return self.position is not None and event.state_version > self.position + 1

    def _put(self, event: Event) -> None:
        self._waiting.append(event)
        self._changed.set()


class Channel:
    """One session on one link. `subscribed` is what holds on the socket that is open now.

    Whoever changes the subscription holds `lock`. `users` counts those who may take it without
    having a stream yet; without them and without streams the channel is dropped.
    """

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        self.streams: list[Stream] = []
        self.subscribed = False
        self.settling = False
        self.users = 0
        self.lock = asyncio.Lock()

    @property
    def idle(self) -> bool:
        return not self.streams and not self.users

    def oldest(self) -> int | None:
        """Where a subscription must begin so that no stream misses anything; None: now."""
        return min((stream.position for stream in self.streams if stream.position is not None), default=None)

    def newest(self) -> int | None:
        """The version up to which everything has come on this socket; None if that is not known."""
        known = [stream.position for stream in self.streams if stream.position is not None and not stream.behind]
        return max(known, default=None) if self.subscribed else None


class Asking(Protocol):
    """What channels need of the link."""

    async def request(self, method: str, params: dict[str, Any], on_result: Callable[[Any], None] | None = None) -> Any:
        """A request that is answered once, over as many sockets as it takes."""
        ...

    async def send(self, request: Request, on_result: Callable[[Any], None] | None = None) -> Any: ...

    def is_pending(self, request: Request) -> bool: ...


class Channels:
    """All sessions that a link follows."""

    def __init__(self, link: Asking) -> None:
        self._link = link
        self._by_session: dict[str, Channel] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    # ---- what streams come and go

    @asynccontextmanager
    async def starting_run(self, session_id: str | None) -> AsyncIterator[None]:
        """Around `agent.run`, which subscribes by itself: nobody else changes the subscription meanwhile."""
        if session_id is None:  # a session that is about to be made: nobody follows it yet
            yield
            return
        channel = self._channel(session_id)
        channel.users += 1
        try:
            async with channel.lock:
                yield
        finally:
            channel.users -= 1
            self._drop_if_idle(channel)

    def run_accepted(self, session_id: str, request: Request) -> Stream:
        """The stream of a run, to be called with its answer: its events come after that."""
        channel = self._channel(session_id)
        stream = Stream(channel.newest(), restart=request)
        channel.subscribed = True
        channel.streams.append(stream)
        return stream

    def follow(self, session_id: str, after: int | None) -> Stream:
        """A stream of what comes after version `after`, or of what comes from now on."""
        channel = self._channel(session_id)
        stream = Stream(after, behind=True)
        if after is None and channel.subscribed:
            stream.position = channel.newest()
            stream.behind = False
        channel.streams.append(stream)
        return stream

    def leave(self, session_id: str, stream: Stream) -> None:
        """Let a stream go. With a session's last one goes the subscription; nobody waits for that."""
        channel = self._by_session.get(session_id)
        if channel is None or stream not in channel.streams:
            return
        channel.streams.remove(stream)
        if channel.idle:
            self._spawn(self._settle(channel))

    async def catch_up(self, session_id: str) -> None:
        """Begin the session's subscription again where its slowest stream is.

        Goes on if the caller is cancelled: other streams live on the same subscription.
        """
        task = self._spawn(self._settle(self._channel(session_id)))
        await asyncio.wait([task])

    def deliver(self, session_id: Any, make: Callable[[], Event]) -> None:
        """Give an event to the streams of its session; `make` is called if there are any."""
        channel = self._by_session.get(session_id)
        if channel is not None and channel.streams:
            event = make()
            for stream in list(channel.streams):
                stream.take_in(event)

    # ---- what sockets come and go

    def socket_lost(self) -> None:
        """The subscriptions went with the socket."""
        for channel in self._by_session.values():
            channel.subscribed = False

    def socket_opened(self) -> None:
        """Every stream asks again from where it is: when it is waited for, its `next` catches up."""
        for channel in self._by_session.values():
            for stream in channel.streams:
                if stream.position is None and stream.restart is not None:
                    self._spawn(self._run_again(channel, stream, stream.restart))
                elif not channel.settling:  # a renewal that was under way is sent again and serves them all
                    stream.fall_behind()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def end(self, error: Exception) -> None:
        for channel in self._by_session.values():
            for stream in channel.streams:
                stream.end(error)
        self._by_session.clear()

    # ---- changing a subscription

    async def _run_again(self, channel: Channel, stream: Stream, request: Request) -> None:
        """Nothing of the run had come. The same request with the same key brings all of it."""
        if self._link.is_pending(request):
            return
        try:
            async with channel.lock:
                await self._link.send(request, lambda _: _mark_subscribed(channel))
        except (CorralError, GatewayUnreachable) as error:
            stream.end(error)

    async def _settle(self, channel: Channel) -> None:
        """Bring the subscription in line with the streams: none, or one that begins early enough."""
        async with channel.lock:
            channel.settling = True
            try:
                await self._renew_patiently(channel)
            except (CorralError, GatewayUnreachable) as error:
                for stream in channel.streams:
                    stream.end(error)
            finally:
                channel.settling = False
        self._drop_if_idle(channel)

    async def _renew_patiently(self, channel: Channel) -> None:
        """A gateway that drains, or cannot just now, is asked again: it will close the socket or recover."""
        for wait in _WAITS:
            try:
                return await self._renew(channel)
            except CorralError as error:
                if not error.retryable:
                    raise
            await asyncio.sleep(wait)
        return await self._renew(channel)

    async def _renew(self, channel: Channel) -> None:
        wanting = [stream for stream in channel.streams if stream.behind]
        if channel.streams and not wanting:
            return  # another stream's catching up was this one's too
        if channel.subscribed:
            channel.subscribed = False
            await self._link.request("events.unsubscribe", {"sessionId": channel.session_id})
        if not channel.streams:
            return
        wanting = [stream for stream in channel.streams if stream.behind]
        oldest = channel.oldest()
        params: dict[str, Any] = {"sessionId": channel.session_id}
        if oldest is not None:
            params["after"] = oldest

        def begun(payload: Any) -> None:
            # Before any later frame is looked at: the events that follow are theirs.
            channel.subscribed = True
            for stream in wanting:
                stream.behind = False
                if stream.position is None:
                    stream.position = payload.get("stateVersion")

        await self._link.request("events.subscribe", params, begun)

    # ---- keeping

    def _channel(self, session_id: str) -> Channel:
        return self._by_session.setdefault(session_id, Channel(session_id))

    def _drop_if_idle(self, channel: Channel) -> None:
        known = self._by_session.get(channel.session_id) is channel
        if known and channel.idle and not channel.subscribed and not channel.lock.locked():
            del self._by_session[channel.session_id]

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _mark_subscribed(channel: Channel) -> None:
    channel.subscribed = True
