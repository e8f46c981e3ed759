"""Those who use the gateway while it is being broken: each asks until answered, and writes down what for."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from tests.chaos.expected import TENANT, Expected, ExpectedRun, ExpectedSession, plan, task
from tests.support.invariants import Promise
from tests.support.stream import EventStream
from tests.support.wire import Gone, Json, Refused, Wire

TOKEN = "a-token-for-the-chaos-0123456789"
PATIENCE_S = 120.0
"""After so long without an answer something hangs that should not."""

_AGAIN = frozenset({"UNAVAILABLE", "RATE_LIMITED"})
_LOST = (Gone, Refused, aiohttp.ClientError, ConnectionError, TimeoutError)
"""How a connection ends that is cut, or whose gateway is killed, frozen or full."""


class Place:
    """Where the gateway is now, what is known of the world, and what has gone wrong."""

    def __init__(self, seed: str, work: Path) -> None:
        self.seed = seed
        self.work = work
        self.url = ""
        self.up = asyncio.Event()
        self.over = asyncio.Event()
        """Set when nothing new is begun any more."""
        self.expected = Expected()
        self.problems: list[str] = []
        self.promises: list[Promise] = []
        self.token = TOKEN
        self.asked = 0
        self.lost = 0

    def rng(self, name: str) -> random.Random:
        return random.Random(f"{self.seed}/{name}")

    def opened(self, url: str) -> None:
        self.url = url
        self.up.set()

    async def pause(self, seconds: float) -> bool:
        """Wait so long, or until all is over; whether it is."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.over.wait()
        return self.over.is_set()


class Person:
    """A client that is cut off and comes back. `connections` has the frames of each of its sockets."""

    def __init__(self, place: Place, name: str) -> None:
        self.place = place
        self.name = name
        self.rng = place.rng(name)
        self.connections: list[list[Json]] = []
        self._wire: Wire | None = None
        self._keys = 0
        self._connecting = asyncio.Lock()

    async def close(self) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            await wire.close()
            if wire._broken is not None:
                self.place.problems.append(f"{self.name}: {wire._broken}")

    def cut(self) -> None:
        if self._wire is not None:
            self._wire.cut()

    async def connected(self) -> Wire:
        """A connection, whatever that takes."""
        async with self._connecting:
            while self._wire is None or self._wire.close_code is not None:
                await self.close()
                await self.place.up.wait()
                try:
                    wire = await Wire.open(self.place.url)
                except _LOST:
                    await asyncio.sleep(0.05)
                    continue
                try:
                    await wire.connect(self.place.token)
                except _LOST:
                    await wire.close()
                    await asyncio.sleep(0.05)
                    continue
                self._wire = wire
                self.connections.append(wire.frames)
            return self._wire

    def key(self) -> str:
        self._keys += 1
        return f"{self.name}-{self._keys}"

    async def ask(self, method: str, params: Json) -> Json:
        """The answer to a request, asked again with the same key until there is one; its `ok` may be false."""
        begun = time.monotonic()
        hang_up = "idempotencyKey" in params and self.rng.random() < 0.1
        while True:
            self.place.asked += 1
            try:
                wire = await self.connected()
                frame_id = await wire.start(method, params)
                if hang_up:
                    # The effect may have happened or not, and nobody says so.
                    hang_up = False
                    await asyncio.sleep(self.rng.choice((0, 0.001, 0.005, 0.02)))
                    wire.cut()
                answer = await wire.response(frame_id)
            except _LOST as error:
                self.place.lost += 1
                answer = {"ok": False, "error": {"code": "UNAVAILABLE", "message": repr(error)}}
                await asyncio.sleep(self.rng.uniform(0.01, 0.1))
            if answer["ok"]:
                self.place.promises.append(Promise(TENANT, "u_owner", method, params, answer["payload"]))
                return answer
            if answer["error"]["code"] not in _AGAIN:
                return answer
            if time.monotonic() - begun > PATIENCE_S:
                raise AssertionError(f"{self.name} asked {method} {params} for {PATIENCE_S} s, last: {answer['error']}")
            await asyncio.sleep(self.rng.uniform(0.02, 0.2))

    async def effect(self, method: str, **params: Any) -> Json:
        params["idempotencyKey"] = self.key()
        answer = await self.ask(method, params)
        if answer["ok"] and self.rng.random() < 0.05:
            # Whoever asks once more is told the same: the promises are compared.
            await self.ask(method, params)
        return answer

    async def must(self, method: str, **params: Any) -> Any:
        """`effect` where any refusal is a mistake of the gateway's."""
        answer = await self.effect(method, **params)
        if not answer["ok"]:
            raise AssertionError(f"{self.name} was refused {method} {params}: {answer['error']}")
        return answer["payload"]


class Worker(Person):
    """Has sessions of its own and uses shared ones: runs, aborts, modes, titles."""

    def __init__(self, place: Place, name: str, shared: list[str]) -> None:
        super().__init__(place, name)
        self._shared = shared
        self._own: list[str] = []
        self._runs = 0

    async def make_session(self) -> str:
        number = len(self._own)
        root = self.place.work / f"{self.name}-{number}"
        root.mkdir()
        title = f"{self.name} {number}"
        made = await self.must("sessions.create", title=title, root=str(root))
        session = str(made["session"]["id"])
        self.place.expected.sessions[session] = ExpectedSession(title)
        self._own.append(session)
        return session

    async def work(self) -> None:
        for _ in range(2):
            await self.make_session()
        acts: list[Callable[[], Awaitable[None]]] = [self._run, self._rename, self._mode, self._come_and_go]
        while not self.place.over.is_set():
            await self.rng.choices(acts, (8, 1, 1, 1))[0]()
            await self.place.pause(self.rng.uniform(0, 0.3))

    async def _run(self) -> None:
        use_shared = bool(self._shared) and self.rng.random() < 0.15
        session = self.rng.choice(self._shared if use_shared else self._own)
        self._runs += 1
        tag, steps = f"{self.name}r{self._runs}", plan(self.rng)
        abort = self.rng.random() < 0.15
        modes = [self.rng.choice(["local", "cloud"]) for _ in range(2)] if self.rng.random() < 0.1 else []
        delay = self.rng.uniform(0, 1)
        asked_at = time.monotonic()
        answer = await self.effect("agent.run", sessionId=session, input=task(tag, steps), waitMs=0)
        if not answer["ok"]:
            if use_shared and answer["error"]["code"] == "SESSION_BUSY":
                return
            raise AssertionError(f"{self.name} was refused a run in {session}: {answer['error']}")
        run_id = answer["payload"]["runId"]
        mode = None if use_shared else self.place.expected.sessions[session].mode
        run = self.place.expected.runs[run_id] = ExpectedRun(session, tag, steps, mode, asked_at)
        for each in () if use_shared else modes:
            await self._set_mode(session, each)
        if abort:
            await asyncio.sleep(delay)
            run.abort_asked = True
            await self.must("agent.abort", runId=run_id)
        await self.ended(run_id)
        run.seen_ended_at = time.monotonic()
        for _ in modes[:1]:
            await self._set_mode(session, "local")

    async def ended(self, run_id: str) -> None:
        """Until the run has ended. A run that does not end shows up here."""
        begun = time.monotonic()
        while True:
            answer = await self.ask("runs.get", {"runId": run_id})
            status = answer["payload"]["run"]["status"]
            if status in ("completed", "failed", "aborted"):
                return
            if time.monotonic() - begun > PATIENCE_S:
                raise AssertionError(f"run {run_id} is {status} after {PATIENCE_S} s")
            await asyncio.sleep(0.25)

    async def _set_mode(self, session: str, mode: str) -> None:
        await self.must("runtime.setMode", sessionId=session, runtimeMode=mode)
        self.place.expected.sessions[session].mode = mode

    async def _rename(self) -> None:
        session, title = self.rng.choice(self._own), f"{self.name} called it {self._keys}"
        await self.must("sessions.update", sessionId=session, title=title)
        self.place.expected.sessions[session].title = title

    async def _mode(self) -> None:
        session = self.rng.choice(self._own)
        for mode in ("cloud", "local"):
            await self._set_mode(session, mode)

    async def _come_and_go(self) -> None:
        made = await self.must("sessions.create", title="soon gone")
        await self.must("sessions.delete", sessionId=made["session"]["id"])


class Governor(Person):
    """Changes the policy, again and again, by versions that nobody else makes."""

    async def govern(self) -> None:
        expected = self.place.expected
        while not await self.place.pause(self.rng.uniform(0.3, 1.5)):
            action = self.rng.choice(["allow", "deny", "approval-required"])
            patch = {"tools": {"file.write": action}}
            told = await self.must("policy.update", patch=patch, expectedVersion=expected.policy_version)
            if told["version"] != expected.policy_version + 1:
                raise AssertionError(f"the policy went from {expected.policy_version} to {told['version']}")
            expected.policy_version = told["version"]
            expected.policy_tools["file.write"] = action


class Approver(Person):
    """Decides whatever waits for a person, until there is nobody left who could ask."""

    def __init__(self, place: Place, name: str) -> None:
        super().__init__(place, name)
        self.done = asyncio.Event()

    async def decide(self) -> None:
        while not self.done.is_set():
            answer = await self.ask("approval.queue", {"limit": 50})
            for item in answer["payload"]["items"]:
                await self._decide(item["approvalId"])
            await asyncio.sleep(0.15)

    async def _decide(self, approval_id: str) -> None:
        decision = self.rng.choice(["approve", "approve", "approve", "reject"])
        answer = await self.effect("approval.resolve", approvalId=approval_id, decision=decision)
        if answer["ok"]:
            self.place.expected.decisions[approval_id] = answer["payload"]["status"]
        elif answer["error"]["code"] != "CONFLICT":
            # Expired, or cancelled with its run: that is a conflict. Nothing else may stand in the way.
            raise AssertionError(f"{self.name} could not decide on {approval_id}: {answer['error']}")


class Follower(Person):
    """Follows the workspace's feed by its cursor over all cuts."""

    def __init__(self, place: Place, name: str) -> None:
        super().__init__(place, name)
        self._cursor: str | None = None
        self._subscribed: Wire | None = None

    async def begin(self) -> None:
        answer = await self.ask("events.subscribe", {})
        self._cursor = answer["payload"]["feedCursor"]
        self._subscribed = self._wire

    async def follow(self) -> None:
        """Until cancelled: whenever the connection is gone, go on after the last event that came."""
        while True:
            wire = await self.connected()
            if wire is not self._subscribed:
                self._subscribed = wire
                try:
                    await wire.request("events.subscribe", {"after": self.cursor})
                except _LOST:
                    wire.cut()
            await wire.closed(timeout=3600)

    @property
    def cursor(self) -> str | None:
        """That of the last event that came, on whichever connection."""
        for frames in reversed(self.connections):
            for frame in reversed(frames):
                if frame["type"] == "event":
                    cursor: str = frame["payload"]["feedCursor"]
                    return cursor
        return self._cursor

    def last(self) -> tuple[str, int] | None:
        """(session, version) of the last event."""
        events = [frame for frames in self.connections for frame in frames if frame["type"] == "event"]
        return (events[-1]["payload"]["sessionId"], events[-1]["stateVersion"]) if events else None


class Reader(Person):
    """Follows some sessions by their versions over all cuts."""

    def __init__(self, place: Place, name: str, sessions: Sequence[str]) -> None:
        super().__init__(place, name)
        self._sessions = sessions

    async def follow(self) -> None:
        """Until cancelled."""
        while True:
            # Before there is a new connection, whose first event may come before all is asked for.
            seen = self.versions()
            wire = await self.connected()
            with contextlib.suppress(*_LOST):
                asked = [
                    await wire.start("events.subscribe", {"sessionId": session, "after": seen[session]})
                    for session in self._sessions
                ]
                await wire.response(asked[-1])
                if any(frame["type"] == "res" and not frame["ok"] for frame in wire.frames):
                    wire.cut()
            await wire.closed(timeout=3600)

    def versions(self) -> dict[str, int]:
        """The last version of each session that came, 0 where there is none."""
        last = dict.fromkeys(self._sessions, 0)
        for frames in self.connections:
            for frame in frames:
                if frame["type"] == "event" and frame["event"] != "agent.delta":
                    last[frame["payload"]["sessionId"]] = frame["stateVersion"]
        return last


class Listener:
    """Follows one session over server-sent events by their ids, over all cuts; `slow` takes its time with each."""

    def __init__(self, place: Place, name: str, session: str, *, slow: bool) -> None:
        self.place = place
        self.name = name
        self.session = session
        self.slow = slow
        self.rng = place.rng(name)
        self.frames: list[Json] = []
        self._stream: EventStream | None = None

    @property
    def version(self) -> int:
        durable = [frame["stateVersion"] for frame in self.frames if frame["event"] != "agent.delta"]
        return durable[-1] if durable else 0

    def cut(self) -> None:
        if self._stream is not None:
            self._stream.cut()

    async def follow(self) -> None:
        """Until cancelled."""
        while True:
            await self.place.up.wait()
            with contextlib.suppress(*_LOST, asyncio.IncompleteReadError):
                async with self._connected() as stream:
                    while stream.status == 200 and (event := await stream.next()) is not None:
                        self.frames.append({"type": "event", **event.data})
                        if self.slow:
                            await asyncio.sleep(self.rng.uniform(0, 0.02))
            await asyncio.sleep(0.05)

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[EventStream]:
        headers = {"Last-Event-ID": str(self.version)} if self.rng.random() < 0.5 else {}
        query = "" if headers else f"?after={self.version}"
        async with EventStream(self.place.url, self.session, self.place.token, query=query, headers=headers) as stream:
            self._stream = stream
            try:
                yield stream
            finally:
                self._stream = None
