"""`agent.run` and `agent.abort` on the wire: the answer first, then the run's events."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Protocol

import msgspec

from corral.gateway.dispatch import Call, Dispatcher
from corral.gateway.frames import entry_frame
from corral.governance.access import visible_session
from corral.governance.caller import Caller
from corral.governance.idempotency import Ongoing, Performed
from corral.protocol.errors import InternalError, NotFound, Unavailable
from corral.protocol.methods import AgentAbortParams, AgentAbortResult, AgentRunParams, AgentRunResult
from corral.storage.api import Store
from corral.storage.repositories import Transaction


class Prepared(Protocol):
    @property
    def session_id(self) -> str: ...

    @property
    def run_id(self) -> str: ...


class Runs(Protocol):
    """What the gateway asks of the core; `corral.core.service.CoreService` is it."""

    @property
    def active_runs(self) -> int: ...

    async def prepare_run(self, caller: Caller, params: AgentRunParams) -> Any: ...

    def accept(self, tx: Transaction, prepared: Any) -> AgentRunResult: ...

    def start(self, tenant_id: str, run_id: str) -> None: ...

    def accepted_version(self, tx: Transaction, tenant_id: str, run_id: str) -> int: ...

    def begin_abort(self, tx: Transaction, caller: Caller, params: AgentAbortParams) -> AgentAbortResult | Ongoing: ...

    def finish_abort(self, _tenant_id: str, run_id: str, waiter: Callable[[bytes], None]) -> None: ...

    async def wait_run(self, _tenant_id: str, run_id: str, timeout_s: float) -> None: ...


class RunMethods:
    """Handlers of the two methods. `draining` is set when the server goes down."""

    def __init__(self, dispatcher: Dispatcher, store: Store, runs: Runs, draining: asyncio.Event) -> None:
        self._dispatcher = dispatcher
        self._store = store
        self._runs = runs
        self._draining = draining
        dispatcher.add("agent.run", self.run)
        dispatcher.add("agent.abort", self.abort)

    async def run(self, call: Call) -> None:
        """Accept a run. On a connection its session is followed from just before its `agent.accepted`."""
        if self._draining.is_set():
            raise Unavailable("the server is shutting down: try again in a moment")
        prepared = await self._runs.prepare_run(call.caller, call.params)
        feeds = call.feeds
        with feeds.room(prepared.session_id in feeds.sessions) if feeds is not None else nullcontext():
            await self._accept(call, prepared)

    async def _accept(self, call: Call, prepared: Prepared) -> None:
        caller = call.caller
        accepted_at: list[int] = []

        def work(tx: Transaction) -> AgentRunResult:
            result = self._runs.accept(tx, prepared)
            accepted_at[:] = [entry.version for entry in tx.appended if entry.event == "agent.accepted"]
            return result

        def on_commit(done: Performed) -> None:
            if done.replayed or done.payload is None:
                return
            # In this order: the feed hears the unit's own entries, which come right after this;
            # the answer precedes them; then the run may make more.
            feed = None
            if call.feeds is not None:
                after = accepted_at[0] - 1
                feed = call.feeds.follow(
                    caller, prepared.session_id, caller.workspace_id, after, by_run=True, fresh=True
                )
            call.answer.give(done.payload)
            if feed is not None:
                feed.go(fresh=True)
            self._runs.start(caller.tenant_id, prepared.run_id)

        done = await self._dispatcher.perform(call, work, on_commit)
        if done.replayed:
            await self._replay(call, done)

    async def _replay(self, call: Call, done: Performed) -> None:
        """The same answer again, and the same subscription, unless the run was deleted meanwhile."""
        if done.payload is None:
            raise InternalError("the run's answer was not kept")
        before = msgspec.json.decode(done.payload, type=AgentRunResult)
        caller, feeds = call.caller, call.feeds
        if feeds is None:
            call.answer.give(done.payload)
            return

        def query(tx: Transaction) -> tuple[int, str] | None:
            session = visible_session(tx, caller, before.session_id)
            if session is None:
                return None
            try:
                return self._runs.accepted_version(tx, caller.tenant_id, before.run_id), session.workspace_id
            except NotFound:
                return None

        found = await self._store.read(query)
        call.answer.give(done.payload)
        if found is not None:
            accepted, workspace_id = found
            feeds.follow(caller, before.session_id, workspace_id, accepted - 1, by_run=True).go()

    async def abort(self, call: Call) -> None:
        """End a run; the answer comes when it has ended."""
        caller = call.caller

        def on_commit(done: Performed) -> None:
            if done.payload is not None:
                call.answer.give(done.payload)
            else:
                self._runs.finish_abort(caller.tenant_id, call.params.run_id, call.answer.give)

        await self._dispatcher.perform(call, lambda tx: self._runs.begin_abort(tx, caller, call.params), on_commit)
        if not await unless(self._draining, call.answer.wait()):
            raise Unavailable("the server is shutting down; the abort is noted and carried out: ask again")

    async def finished(self, tenant_id: str, run_id: str, wait_ms: int) -> None:
        """Until the run has ended or waits for a person, `wait_ms` have passed, or the server goes down."""
        if wait_ms > 0:
            await unless(self._draining, self._runs.wait_run(tenant_id, run_id, wait_ms / 1000))

    async def events_so_far(self, caller: Caller, result: AgentRunResult) -> list[bytes]:
        """The run's durable events as frames without `seq`."""

        def query(tx: Transaction) -> list[bytes]:
            entries = tx.journal.of_run(caller.tenant_id, result.session_id, result.run_id)
            return [entry_frame(entry).without_seq() for entry in entries]

        return await self._store.read(query)


async def unless(stop: asyncio.Event, work: Any) -> bool:
    """Await `work`; False, and it is cancelled, if `stop` is set first."""
    working = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
            return True
        return False
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)
