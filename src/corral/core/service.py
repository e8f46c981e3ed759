"""The core's face: accept a run, take it up, end it; and the care for all runs of this process."""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import msgspec
from msgspec import UNSET, Struct

from corral import faults
from corral.bus.api import Notice
from corral.core.ending import aborted, end_run, failed
from corral.core.journal import append_session_updated, apply_mode
from corral.core.run import RunLoop
from corral.core.sessions import SessionMethods, cut_preview, cut_title, input_text, require_agent
from corral.core.state import LEASE_MS, Deps, let_go_at, open_calls_of
from corral.core.stream import follow
from corral.governance.access import may_see, require_run
from corral.governance.budgets import release
from corral.governance.caller import Caller
from corral.governance.idempotency import Ongoing
from corral.governance.policy import effective_policy
from corral.models.api import Image, Text, UserMessage
from corral.protocol.errors import ErrorCode, InvalidRequest, NotFound, PolicyDenied, SessionBusy, Unavailable
from corral.protocol.events import AgentAccepted, AgentResumed
from corral.protocol.methods import AgentAbortParams, AgentAbortResult, AgentRunParams, AgentRunResult
from corral.protocol.types import ApprovalStatus, ImagePart, Input, RunStatus, SessionStatus
from corral.storage.api import StoreUnavailable
from corral.storage.events import append, append_changing
from corral.storage.repositories import Transaction
from corral.storage.rows import JournalEntry, MessageRow, RunRow, SessionRow

log = logging.getLogger(__name__)

MAX_STALLS = 5
_RECOVERY_BATCH = 256
_RETRY_FIRST_S, _RETRY_MOST_S = 0.1, 1.0


class PreparedRun(Struct, kw_only=True, frozen=True):
    """A run that is not accepted yet, with the ids that it will have."""

    caller: Caller
    params: AgentRunParams
    run_id: str
    session_id: str
    queued: bool


class _Active(Struct):
    loop: RunLoop
    task: asyncio.Task[None]


class CoreService:
    """`run`, `continue_` and `abort`, and what the gateway needs to do them within one transaction.

    `owner` names this process in leases; it differs from one start to the next.
    """

    def __init__(self, deps: Deps, sessions: SessionMethods, *, owner: str, max_active: int) -> None:
        self._deps = deps
        self._sessions = sessions
        self._owner = owner
        self._slots = asyncio.Semaphore(max_active)
        self._active: dict[str, _Active] = {}
        self._ended: dict[str, asyncio.Event] = {}
        self._abort_waiters: dict[str, list[Callable[[bytes], None]]] = {}
        self._woken: set[str] = set()
        self._background: set[asyncio.Task[bool]] = set()
        self.draining = False
        deps.store.add_listener(self._hear)

    # ---- run

    async def run(self, caller: Caller, params: AgentRunParams) -> AsyncIterator[Notice]:
        """Accept a run and yield what happens in it, from `agent.accepted` to its terminal event."""
        prepared = await self.prepare_run(caller, params)
        await self._deps.store.write(
            lambda tx: self.accept(tx, prepared), lambda _result: self.start(caller.tenant_id, prepared.run_id)
        )
        async for notice in self.events(caller.tenant_id, prepared.run_id):
            yield notice

    async def events(self, tenant_id: str, run_id: str) -> AsyncIterator[Notice]:
        """What happened and happens in a run, from `agent.accepted` on. Raises NotFound."""
        row = await self._deps.store.read(lambda tx: tx.runs.get(tenant_id, run_id))
        if row is None:
            raise NotFound("there is no such run")
        async for notice in follow(
            self._deps.store, self._deps.bus, tenant_id, row.session_id, run_id, row.accepted_version - 1
        ):
            yield notice

    async def prepare_run(self, caller: Caller, params: AgentRunParams) -> PreparedRun:
        """Check what can be checked without the store and choose the ids."""
        if self.draining:
            raise Unavailable("the server is shutting down: try again in a moment")
        _check_input(params.input)
        ids = self._deps.ids
        return PreparedRun(
            caller=caller,
            params=params,
            run_id=ids.new("run"),
            session_id=params.session_id if params.session_id is not UNSET else ids.new("s"),
            queued=self._slots.locked(),
        )

    def accept(self, tx: Transaction, prepared: PreparedRun) -> AgentRunResult:
        """Journal the run as accepted, with its session if there is none yet. It does not run yet."""
        caller, params = prepared.caller, prepared.params
        now = self._deps.clock.now_ms()
        session, busy = self._session_for(tx, prepared, now)
        agent_id = session.agent_id
        if params.agent_id is not UNSET:
            agent_id = require_agent(tx, caller, params.agent_id)
        run = RunRow(
            tenant_id=caller.tenant_id,
            id=prepared.run_id,
            session_id=session.id,
            workspace_id=session.workspace_id,
            agent_id=agent_id,
            actor=caller.principal.subject,
            status=str(RunStatus.QUEUED if prepared.queued else RunStatus.RUNNING),
            runtime_mode=session.runtime_mode,
            input=msgspec.to_builtins(params.input),
            model=self._model_for(tx, session.workspace_id, agent_id, params, caller.tenant_id),
            attempts=0 if prepared.queued else 1,
            limits=msgspec.to_builtins(params.limits) if params.limits is not UNSET else {},
            accepted_version=session.state_version + 1,
            trace_id=caller.trace_id,
            lease_owner=self._owner,
            lease_epoch=1,
            lease_expires_at=now + LEASE_MS,
            created_at=now,
            started_at=None if prepared.queued else now,
        )
        tx.runs.insert(run)
        accepted = AgentAccepted(
            session_id=session.id,
            run_id=run.id,
            runtime_mode=session.runtime_mode,  # type: ignore[arg-type]
            input=params.input,
        )
        entry, _session = append_changing(tx, caller.tenant_id, accepted, now, busy)
        tx.messages.insert(
            MessageRow(
                tenant_id=caller.tenant_id,
                session_id=session.id,
                version=entry.version,
                run_id=run.id,
                role="user",
                content=_user_message(params.input),
                created_at=now,
            )
        )
        self._record(tx, caller, run, "agent.run", {"model": run.model, "agentId": agent_id, "mode": run.runtime_mode})
        return AgentRunResult(run_id=run.id, session_id=session.id, status="accepted")

    def _record(self, tx: Transaction, caller: Caller, run: RunRow, action: str, metadata: dict[str, Any]) -> None:
        shown = {"workspaceId": run.workspace_id, **metadata}
        self._deps.audit.record_by(
            tx, caller, action, "run", run.id, metadata=shown, session_id=run.session_id, run_id=run.id
        )

    def _session_for(self, tx: Transaction, prepared: PreparedRun, now: int) -> tuple[SessionRow, dict[str, Any]]:
        """The run's session, made if it is new, and what is to be changed in it for it to be running this run."""
        caller, params = prepared.caller, prepared.params
        text = input_text(msgspec.to_builtins(params.input))
        session = tx.sessions.get(caller.tenant_id, prepared.session_id)
        busy = {"status": str(SessionStatus.RUNNING), "active_run_id": prepared.run_id, "preview": cut_preview(text)}
        if session is None:
            agent_id = params.agent_id if params.agent_id is not UNSET else "a_default"
            row = self._sessions.new_row(caller, prepared.session_id, require_agent(tx, caller, agent_id), now)
            row = msgspec.structs.replace(row, title=cut_title(text), **busy)
            if params.runtime_mode is not UNSET:
                row.runtime_mode = params.runtime_mode
            tx.sessions.insert(row)
            self._sessions.record(tx, caller, row, "session.create", {"title": row.title, "byRun": prepared.run_id})
            return append_session_updated(tx, row, "created", now), {}
        if not may_see(caller, session):
            raise NotFound("there is no such session: $.params.sessionId names none that you may see")
        if session.active_run_id is not None:
            raise SessionBusy(
                "a run is on in this session: wait for its end, abort it, or use another session",
                details={"runId": session.active_run_id},
            )
        if params.runtime_mode is not UNSET and params.runtime_mode != session.runtime_mode:
            session = apply_mode(tx, session, params.runtime_mode, now)
        if not session.title:
            busy["title"] = cut_title(text)
        return session, busy

    def _model_for(
        self, tx: Transaction, workspace_id: str, agent_id: str, params: AgentRunParams, tenant_id: str
    ) -> str:
        """The run's model: asked for, the agent's, policy's, the server's; allowed by policy."""
        policy = effective_policy(tx, tenant_id, workspace_id, agent_id)
        agent = tx.agents.get(tenant_id, workspace_id, agent_id)
        asked = params.model if params.model is not UNSET else None
        model = asked or (agent.model if agent else None) or policy.primary_model or self._deps.options.model
        if not policy.allows_model(model):
            raise PolicyDenied(f"policy does not allow the model {model}")
        self._deps.models.info(model)
        return model

    def start(self, tenant_id: str, run_id: str) -> None:
        """Begin to drive a run that was accepted just now. Called after the commit, on the event loop."""
        self._drive(tenant_id, run_id, epoch=1)

    def accepted_version(self, tx: Transaction, tenant_id: str, run_id: str) -> int:
        """The stateVersion of the run's `agent.accepted`."""
        row = tx.runs.get(tenant_id, run_id)
        if row is None:
            raise NotFound("there is no such run")
        return row.accepted_version

    async def wait_run(self, tenant_id: str, run_id: str, timeout_s: float) -> None:
        """Return when the run has ended or waits for a person, or after `timeout_s` seconds.

        A run that nobody drives at this moment (a decision has just been taken, or recovery has not come to it
        yet) is waited for too. Raises StoreUnavailable.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not await self._rests_or_left(tenant_id, run_id):
                    pass
        except TimeoutError:
            return

    async def _rests_or_left(self, tenant_id: str, run_id: str) -> bool:
        """Whether nothing goes on in the run; if something does, False when its loop has left it."""
        # Taken before the store is asked: a loop that leaves in between sets this very event.
        ended = self._ended.setdefault(run_id, asyncio.Event())
        try:
            if await self._deps.store.read(partial(_at_rest, tenant_id, run_id)):
                return True
            await ended.wait()
            return False
        finally:
            if run_id not in self._active and self._ended.get(run_id) is ended:
                # Nobody is there to set it. Others who wait for it look again.
                del self._ended[run_id]
                ended.set()

    # ---- abort

    async def abort(self, caller: Caller, run_id: str) -> bytes:
        """End a run; the JSON of an AgentAbortResult, when its processes are dead and its end is journalled."""
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        params = AgentAbortParams(run_id=run_id, idempotency_key="-")

        def told(result: AgentAbortResult | Ongoing) -> None:
            if isinstance(result, Ongoing):
                self.finish_abort(caller.tenant_id, run_id, answer.set_result)
            else:
                answer.set_result(msgspec.json.encode(result))

        await self._deps.store.write(lambda tx: self.begin_abort(tx, caller, params), told)
        return await answer

    def begin_abort(self, tx: Transaction, caller: Caller, params: AgentAbortParams) -> AgentAbortResult | Ongoing:
        """Note that the run is to be aborted; or, if it has ended, say how."""
        run = require_run(tx, caller, params.run_id)
        if RunStatus(run.status).terminal:
            return AgentAbortResult(run_id=run.id, status=run.status)
        self._record(tx, caller, run, "agent.abort", {})
        if run.abort_requested_at is None:
            tx.runs.update(run.tenant_id, run.id, abort_requested_at=self._deps.clock.now_ms())
        return Ongoing(run_id=run.id)

    def finish_abort(self, tenant_id: str, run_id: str, waiter: Callable[[bytes], None]) -> None:
        """Carry a noted abort out; `waiter` gets the answer's JSON when the run has ended.

        Called in the on_commit of `begin_abort`: the run's end is committed later than that, so
        the waiter cannot come too late. A run that nobody drives (it waits for a person, or
        recovery is under way) is taken up to be ended: whoever takes it up sees the note.
        """
        faults.reached("abort.noted")
        self._abort_waiters.setdefault(run_id, []).append(waiter)
        active = self._active.get(run_id)
        if active is not None:
            active.loop.abort()
        self._wake(tenant_id, run_id)

    def _run_ended(self, answer: AgentAbortResult) -> None:
        """After the commit of a run's end, before its events are told."""
        waiters = self._abort_waiters.pop(answer.run_id, [])
        if waiters:
            payload = msgspec.json.encode(answer)
            for waiter in waiters:
                waiter(payload)
        ended = self._ended.pop(answer.run_id, None)
        if ended is not None:
            ended.set()

    # ---- continue

    def _hear(self, entries: Sequence[JournalEntry]) -> None:
        """A decision of a person, or the lack of one, lets a waiting run go on."""
        for entry in entries:
            if entry.event == "approval.resolved" and entry.run_id is not None:
                self._wake(entry.tenant_id, entry.run_id)

    def _wake(self, tenant_id: str, run_id: str) -> None:
        """Take the run up if nobody drives it.

        A loop that is just parking it has looked at the decisions in the same transaction in
        which it parks; one that was committed after that is why the run is looked at again
        when that loop's task has ended.
        """
        if run_id in self._active:
            self._woken.add(run_id)
        elif not self.draining:
            task = asyncio.get_running_loop().create_task(self._surely(partial(self.continue_, tenant_id, run_id)))
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    async def _surely(self, take_up: Callable[[], Awaitable[None]]) -> bool:
        """Do it again and again while the store cannot write: nothing else would take the runs up before
        the next start, which finds them if this process drains first. Says whether it was done."""
        delay = _RETRY_FIRST_S
        while not self.draining:
            try:
                await take_up()
                return True
            except StoreUnavailable:
                log.warning("runs not taken up yet", extra={"action": "run.wake_failed"})
            await asyncio.sleep(delay)
            delay = min(2 * delay, _RETRY_MOST_S)
        return False

    async def continue_(self, tenant_id: str, run_id: str, *, steal: bool = False) -> None:
        """Take a run up from its journal, if nobody else owns it (`steal`: whoever does).

        A run that has ended is left alone; so asking twice is harmless. What a dead gateway left running for it
        is dead by then.
        """
        await self._deps.executor.end_leftovers()
        # Driven in the commit's own callback: an abort that is committed right behind it must find the loop.
        await self._deps.store.write(lambda tx: self._take_up(tx, tenant_id, run_id, steal), self._taken_up)

    async def recover(self) -> int:
        """Take up every run that was not at its end when its owner died; how many there were.

        For a store that this process alone uses: no lease of another is alive. Runs that wait
        for people go on waiting, unless one has decided and nobody had the time to act on it.

        All are taken up before the first goes on: what a run does next takes more of the processor than
        taking it up, and that it goes on is to be told soon.
        """
        await self._deps.executor.end_leftovers()
        count, after = 0, None
        told = asyncio.Event()
        try:
            while True:
                rows = await self._deps.store.read(partial(_unfinished, after))
                if not rows:
                    return count
                wanted = [row for row, idle in rows if row.id not in self._active and not idle]
                if await self._surely(partial(self._take_batch_up, wanted, told)):
                    count += len(wanted)
                after = (rows[-1][0].created_at, rows[-1][0].id)
        finally:
            told.set()

    async def _take_batch_up(self, rows: Sequence[RunRow], told: asyncio.Event) -> None:
        await self._deps.store.write(partial(self._take_all_up, rows), partial(self._all_taken_up, told))

    def _take_all_up(self, rows: Sequence[RunRow], tx: Transaction) -> list[_TakenUp]:
        return [self._take_up(tx, row.tenant_id, row.id, steal=True) for row in rows]

    def _all_taken_up(self, told: asyncio.Event, results: Sequence[_TakenUp]) -> None:
        for result in results:
            self._taken_up(result, after=told)

    def _take_up(self, tx: Transaction, tenant_id: str, run_id: str, steal: bool) -> _TakenUp:
        now = self._deps.clock.now_ms()
        before = tx.runs.get(tenant_id, run_id)
        if steal and before is not None and before.lease_owner == self._owner and before.lease_expires_at is not None:
            # This very process has it: accepted, or woken by a decision, since recovery looked. To steal it from
            # oneself is to fence off the loop that drives it.
            return _TakenUp(tenant_id=tenant_id, run_id=run_id)
        epoch = tx.runs.claim(tenant_id, run_id, owner=self._owner, now_ms=now, expires_at=now + LEASE_MS, steal=steal)
        if before is None or epoch is None:
            return _TakenUp(tenant_id=tenant_id, run_id=run_id)
        faults.reached("recover.taking", before.session_id)
        # A call that was under way when the last owner went will not come to its end.
        release(tx, before)
        run = before
        if before.status == RunStatus.RUNNING:
            run = self._resumed(tx, before, now)
        answer = None
        if before.abort_requested_at is not None:
            answer = end_run(tx, self._deps, run, aborted([]), now)
        elif run.stalls >= MAX_STALLS:
            message = f"the run took its server down {MAX_STALLS} times without getting on"
            answer = end_run(tx, self._deps, run, failed(ErrorCode.INTERNAL_ERROR, message), now)
        return _TakenUp(tenant_id=tenant_id, run_id=run_id, epoch=epoch, answer=answer)

    def _resumed(self, tx: Transaction, before: RunRow, now: int) -> RunRow:
        """Journal that a run whose owner is gone is taken up, and count what that says of it."""
        # Who let go of a run in good order (`drain`) has no lease on it; only a death counts.
        expired_at = before.lease_expires_at
        since = expired_at - LEASE_MS if expired_at is not None else before.waiting_since
        down = now - since if since is not None else 0
        if since is not None:
            # The last sign of who ran them: what came of them is unknown, but not that they ran so long.
            tx.tool_runs.stopped(before.tenant_id, before.id, since)
        changes: dict[str, Any] = {
            "waiting_since": None,
            "attempts": before.attempts + 1,
            "stalls": before.stalls + (expired_at is not None),
            "waited_ms": before.waited_ms + max(0, down),
        }
        tx.runs.update(before.tenant_id, before.id, **changes)
        run = msgspec.structs.replace(before, **changes)
        resumed = AgentResumed(session_id=run.session_id, run_id=run.id, attempt=run.attempts, reason="restart")
        append(tx, run.tenant_id, resumed, now)
        return run

    def _taken_up(self, result: _TakenUp, *, after: asyncio.Event | None = None) -> None:
        """After the commit: drive the run, once `after` is set, or tell that it has ended."""
        if result.answer is not None:
            self._run_ended(result.answer)
        elif result.epoch is not None:
            self._drive(result.tenant_id, result.run_id, result.epoch, after=after)

    # ---- the care for all runs

    def _drive(self, tenant_id: str, run_id: str, epoch: int, *, after: asyncio.Event | None = None) -> None:
        if self.draining or run_id in self._active:
            return
        slot = self._slots if after is None else _slot_after(after, self._slots)
        loop = RunLoop(self._deps, tenant_id, run_id, epoch, slot=slot, on_end=self._run_ended)
        self._ended.setdefault(run_id, asyncio.Event())
        task = asyncio.get_running_loop().create_task(loop.drive(), name=run_id)
        self._active[run_id] = _Active(loop, task)
        task.add_done_callback(lambda done: self._done(tenant_id, run_id, done))

    def _done(self, tenant_id: str, run_id: str, task: asyncio.Task[None]) -> None:
        self._active.pop(run_id, None)
        if run_id in self._woken:
            self._woken.discard(run_id)
            self._wake(tenant_id, run_id)
        ended = self._ended.pop(run_id, None)
        if ended is not None:
            ended.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("run's task died", exc_info=error, extra={"action": "run.task_died", "run": run_id})

    async def keep_leases(self) -> None:
        """Renew the leases of this process's runs for as long as it is not cancelled."""
        while True:
            await asyncio.sleep(LEASE_MS / 3000)
            if self._active:
                now = self._deps.clock.now_ms()
                try:
                    await self._deps.store.write(
                        lambda tx, at=now: tx.runs.renew(self._owner, now_ms=at, expires_at=at + LEASE_MS)  # type: ignore[misc]
                    )
                except StoreUnavailable:
                    log.warning("leases not renewed", extra={"action": "lease.renew_failed"})

    @property
    def active_runs(self) -> int:
        return len(self._active)

    async def drain(self, grace_s: float) -> None:
        """Accept no more runs and leave the live ones to be taken up later.

        Tools that run have `grace_s` seconds to come to their end; what runs after that is killed,
        and its call is `interrupted` when the run is taken up again.
        """
        self.draining = True
        for active in list(self._active.values()):
            active.loop.leave(now=False)
        tasks = [active.task for active in self._active.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=grace_s)
        left = [active for active in self._active.values() if not active.task.done()]
        for active in left:
            active.loop.leave(now=True)
        if left:
            await asyncio.wait([active.task for active in left])
        if self._background:
            await asyncio.wait(self._background)
        await self._let_go()

    async def _let_go(self) -> None:
        """Give the leases up, so that the next start knows that nobody died."""
        owner, now = self._owner, self._deps.clock.now_ms()

        def unit(tx: Transaction) -> None:
            for row in tx.runs.unfinished(10_000):
                if row.lease_owner != owner:
                    continue
                changes: dict[str, Any] = {"lease_expires_at": None}
                if row.status == RunStatus.RUNNING:
                    # Until the next start, which may be tomorrow, its time does not run.
                    changes["waiting_since"] = let_go_at(row, now)
                tx.runs.update(row.tenant_id, row.id, epoch=row.lease_epoch, **changes)

        try:
            await self._deps.store.write(unit)
        except StoreUnavailable:
            log.warning("leases not given up", extra={"action": "lease.release_failed"})


def _unfinished(after: tuple[int, str] | None, tx: Transaction) -> list[tuple[RunRow, bool]]:
    """The next unfinished runs, each with whether there is nothing to do for it but wait."""
    return [(row, _idle(tx, row)) for row in tx.runs.unfinished(_RECOVERY_BATCH, after)]


def _at_rest(tenant_id: str, run_id: str, tx: Transaction) -> bool:
    """Whether the run has ended (or was deleted), or nothing is to be done in it before a person decides."""
    run = tx.runs.get(tenant_id, run_id)
    return run is None or RunStatus(run.status).terminal or _idle(tx, run)


def _idle(tx: Transaction, run: RunRow) -> bool:
    if run.status != RunStatus.WAITING_APPROVAL or run.abort_requested_at is not None:
        return False
    calls, approvals = open_calls_of(tx, run)
    return all(call.id in approvals and approvals[call.id].status == ApprovalStatus.PENDING for call in calls)


@asynccontextmanager
async def _slot_after(event: asyncio.Event, slots: asyncio.Semaphore) -> AsyncIterator[None]:
    await event.wait()
    async with slots:
        yield


class _TakenUp(Struct, kw_only=True):
    """`epoch` is the lease's new one, None if it was not to be had; `answer` is set if the run ended."""

    tenant_id: str
    run_id: str
    epoch: int | None = None
    answer: AgentAbortResult | None = None


def _check_input(given: Input) -> None:
    if isinstance(given, str):
        if not given.strip():
            raise InvalidRequest("$.params.input is empty: say what the agent should do")
        return
    if not any(isinstance(part, ImagePart) or part.text.strip() for part in given):
        raise InvalidRequest("$.params.input is empty: say what the agent should do")
    for index, part in enumerate(given):
        if isinstance(part, ImagePart):
            try:
                base64.b64decode(part.data, validate=True)
            except (binascii.Error, ValueError):
                raise InvalidRequest(f"$.params.input[{index}].data is no base64") from None


def _user_message(given: Input) -> UserMessage:
    if isinstance(given, str):
        return UserMessage(content=[Text(text=given)])
    return UserMessage(
        content=[
            Image(mime_type=part.mime_type, data=part.data) if isinstance(part, ImagePart) else Text(text=part.text)
            for part in given
        ]
    )
