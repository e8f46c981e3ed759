"""One run, driven from its journal to its end: the loop that the project exists for.

Every step is journalled before the next begins, so that another process can take the run
up between any two of them and needs nothing but the store. Per step: call the model, journal
its message with the decisions on its calls, run the calls that may run, journal each result;
where only people can go on, leave the run to them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any

from msgspec import structs

from corral import faults
from corral.core.compaction import Compaction
from corral.core.ending import Ending, aborted, end_run, failed
from corral.core.limits import limits_of
from corral.core.model_step import ModelStep
from corral.core.state import Deps, Fence, LeaseLost, Loaded, context_of, load
from corral.core.tool_step import ToolStep
from corral.core.traces import places
from corral.executor.api import CallContext
from corral.protocol.errors import CorralError, ErrorCode, LimitReached
from corral.protocol.methods import AgentAbortResult
from corral.protocol.types import RunStatus, SessionStatus
from corral.storage.repositories import Transaction
from corral.tracing import WHERE

log = logging.getLogger(__name__)


class RunLoop:
    """Drives one run that this process has the lease of. `drive` is called once.

    `slot` is the place among the runs that may be under way at once. `on_end` is called in the
    commit of the run's end, before its events are told.
    """

    def __init__(
        self,
        deps: Deps,
        tenant_id: str,
        run_id: str,
        epoch: int,
        *,
        slot: AbstractAsyncContextManager[Any],
        on_end: Callable[[AgentAbortResult], None],
    ) -> None:
        self._deps = deps
        self._slot = slot
        self._on_end = on_end
        self._tenant_id = tenant_id
        self._run_id = run_id
        self._fence = Fence(deps.store, tenant_id, run_id, epoch)
        self._model = ModelStep(deps, self._fence, on_end)
        self._compaction = Compaction(deps, self._fence, self._model)
        self._tools = ToolStep(deps, self._fence)
        self._aborting = False
        self._leaving = False
        self._task: asyncio.Task[Any] | None = None

    # ---- from outside

    def abort(self) -> None:
        """End the run as aborted, from wherever it is."""
        if not self._aborting:
            self._aborting = True
            self._interrupt()

    def leave(self, *, now: bool) -> None:
        """Stop driving and leave the run to be taken up later.

        A running tool is left to finish unless `now`; a model's answer is not waited for.
        """
        self._leaving = self._fence.leaving = True
        if now or not self._tools.running:
            self._interrupt()

    def _interrupt(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def drive(self) -> None:
        """Take the run to its end, or as far as it goes before `leave`, a person or the loss of the lease."""
        self._task = asyncio.current_task()
        WHERE.set({"tenant": self._tenant_id, "run": self._run_id})
        if self._aborting or self._leaving:
            # Told before the first step: the message is taken at the first place to wait.
            self._interrupt()
        try:
            ending = await self._until_told(self._guarded())
            while ending is not None:
                ending = await self._until_told(self._finish(ending))
        except LeaseLost:
            log.info("run left to its owner", extra={"action": "run.lease_lost", "run": self._run_id})

    async def _until_told(self, work: Coroutine[Any, Any, Ending | None]) -> Ending | None:
        """Do `work`; what it returns, or what being told to abort or leave in the middle of it means.

        The cancellation was the message. It is taken back, so that an ending is written in peace;
        if it interrupted the writing of one, that one stands (`_finish` finds the run ended).
        """
        try:
            return await work
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not (self._aborting or self._leaving):
                raise
            task.uncancel()
        if self._aborting:
            faults.reached("abort.killed")
            return aborted(self._deps.executor.leftover(self._run_id))
        return None

    # ---- the work

    async def _guarded(self) -> Ending | None:
        """The work, with what can go wrong in it turned into an ending."""
        try:
            async with self._slot:
                state = await self._begin()
                limits = limits_of(state.run, state.policy, self._deps.options.run_timeout_ms)
                return await self._within(limits.seconds_left(state.run, self._deps.clock.now_ms()), state)
        except LeaseLost:
            raise
        except CorralError as error:
            return failed(error.code, error.message, retryable=error.retryable)
        except Exception:
            log.exception("run failed", extra={"action": "run.crashed", "run": self._run_id})
            return failed(ErrorCode.INTERNAL_ERROR, "the run failed by an error of the server's own")

    async def _within(self, seconds: float, state: Loaded) -> Ending | None:
        timeout = asyncio.timeout(seconds)
        try:
            async with timeout:
                return await self._steps(state)
        except TimeoutError:
            if not timeout.expired():
                raise
            raise LimitReached("the run's time is used up") from None

    async def _begin(self) -> Loaded:
        """The run as it stands, marked as running if it waited for a place or for a person."""
        state = await self._deps.store.read(lambda tx: load(tx, self._tenant_id, self._run_id))
        WHERE.set(places(state.run))
        run, now = state.run, self._deps.clock.now_ms()
        if run.status == RunStatus.RUNNING:
            return state
        changes: dict[str, Any] = {"status": str(RunStatus.RUNNING), "waiting_since": None}
        if run.status == RunStatus.QUEUED:
            changes |= {"started_at": now, "attempts": 1}
        elif run.waiting_since is not None:
            changes["waited_ms"] = run.waited_ms + max(0, now - run.waiting_since)

        def unit(tx: Transaction) -> None:
            tx.runs.update(run.tenant_id, run.id, **changes)
            tx.sessions.update(run.tenant_id, run.session_id, status=str(SessionStatus.RUNNING))
            faults.reached("run.beginning", run.session_id)

        await self._fence.commit(unit)
        state.run = structs.replace(run, **changes)
        return state

    async def _steps(self, state: Loaded) -> Ending | None:
        context = await self._context(state)
        await self._compaction.open(state, context)
        fresh = False
        while not self._leaving:
            if state.open_calls:
                if await self._tools.take(state, context, fresh=fresh):
                    return None
                continue
            if not await self._compaction.take(state, context) and await self._model.take(state, context):
                return None
            fresh = True
        return None

    async def _context(self, state: Loaded) -> CallContext:
        """Where the run's tools work. Raises SandboxUnavailable for a cloud run without a sandbox host."""
        known = (self._deps.options, state.run, state.session, state.policy)
        if state.session.root is None:
            # The workspace's own folder lies beside the database; a folder of a person's may lie anywhere.
            context = context_of(*known)
        else:
            context = await asyncio.to_thread(context_of, *known)
        if context.runtime_mode == "cloud":
            await self._deps.executor.ready(context)
        return context

    async def _finish(self, ending: Ending) -> None:
        """Write the ending. Raises LeaseLost if the run has one already."""
        now = self._deps.clock.now_ms()

        def unit(tx: Transaction) -> AgentAbortResult:
            run = tx.runs.get(self._tenant_id, self._run_id)
            if run is None:
                raise LeaseLost
            return end_run(tx, self._deps, run, ending, now)

        await self._fence.commit(unit, self._on_end)
