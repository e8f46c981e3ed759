"""Making room: past a threshold of the window the older history is summarised, after the agent could take notes.

Looked at before every call of the model. First one silent step (`ModelStep.take_notes`), whose calls are
run like any others; then the run's model writes the summary; then one commit, in which the
summary is journalled and takes the place of what it stands for. Until that commit nothing of a
compaction is in the store but the step and what was paid for, so a run that is taken up after a crash
does it again. If there is no summary to be had, the run goes on with what `fit` leaves of the
history, and this process does not try again in this run.
"""

from __future__ import annotations

import logging
from contextlib import aclosing

from msgspec import Struct, structs

from corral import faults
from corral.core import summary
from corral.core.limits import Limits, call_of, limits_of
from corral.core.model_step import ModelStep, counted, counts, usage_of
from corral.core.state import Deps, Fence, Loaded, policy_of
from corral.core.transcript import Measured, Opening, Transcript, flush_state, load_transcript, summary_row
from corral.executor.api import CallContext
from corral.governance.budgets import day_of, limits_days, reserve, settle
from corral.models.api import Finished, Message, ModelRequest
from corral.models.tokens import message_tokens, text_tokens
from corral.protocol.errors import (
    BudgetExceeded,
    CorralError,
    InternalError,
    InvalidRequest,
    LimitReached,
    ModelUnavailable,
    PolicyDenied,
)
from corral.protocol.events import AgentUsage, SessionCompacted
from corral.storage.events import append
from corral.storage.repositories import Transaction
from corral.storage.rows import RunRow

log = logging.getLogger(__name__)

NO_SUMMARY = (ModelUnavailable, InvalidRequest, BudgetExceeded, LimitReached, PolicyDenied, InternalError)
"""What a compaction may fail by without failing the run: the next step says it, if it fails by it too."""

NOTES_TOKENS = 3_000
"""So much of a folder's memory does a session begin with, and no more than a tenth of the window."""
_NOTES_SHARE = 0.1
_NOTES_FRAME = 250
"""Tokens of what is said about the notes."""
_HALVINGS = 2


class Load(Struct, kw_only=True, frozen=True):
    """Tokens of the next request: all of it, and those of the messages alone by the estimate.

    `fixed` is what no compaction makes less: prompt, tools and opening. `scale` is how many tokens of the
    provider's count an estimated one of the messages stands for, at least 1.
    """

    total: float
    fixed: int
    scale: float


class Compaction:
    """Makes room in the history of one run."""

    def __init__(self, deps: Deps, fence: Fence, model: ModelStep) -> None:
        self._deps = deps
        self._fence = fence
        self._model = model
        self._given_up = False
        self._skipped = ""

    async def open(self, state: Loaded, context: CallContext) -> None:
        """Read the notes that a new session begins with; they are kept when its first message is journalled."""
        if state.notes_due:
            window = self._deps.models.info(state.run.model).context_window
            state.opening = Opening(notes=await self._notes(state, context, window))
            state.notes_due = bool(state.opening.notes)

    async def take(self, state: Loaded, context: CallContext) -> bool:
        """Make room if it is needed. Says whether a silent step was taken, whose calls come first."""
        if state.session.memory_flush_state == "pending" and state.flush is not None:
            await self._settle_flush(state)
        if self._given_up or not self._deps.options.compaction:
            return False
        window = self._deps.models.info(state.run.model).context_window
        load = self._load(state)
        if load.total <= window * self._deps.options.compaction_threshold:
            return False
        try:
            return await self._make_room(state, context, window, load)
        except NO_SUMMARY as error:
            self._give_up(state, error)
            return False

    def _load(self, state: Loaded) -> Load:
        """The larger of the estimate and what the provider counted last, with what came since."""
        fixed = self._model.fixed_tokens(state)
        sizes = [message_tokens(message) for message in state.messages]
        estimated = sum(sizes)
        # A share of the window of the model that answered last, which need not be this run's.
        counted = state.session.context_usage * self._deps.models.info(state.measured.model).context_window
        total = max(fixed + estimated, counted + sum(sizes[state.measured.messages :]))
        return Load(total=total, fixed=fixed, scale=max(1.0, (total - fixed) / max(1, estimated)))

    async def _make_room(self, state: Loaded, context: CallContext, window: int, load: Load) -> bool:
        transcript = await self._deps.store.read(lambda tx: load_transcript(tx, state.run, state.session))
        input_at = _place(transcript, state.run.accepted_version)
        cut = summary.find_cut(transcript.messages, input_at, window, load.scale)
        if cut is None:
            return False
        state.policy = await self._deps.store.read(lambda tx: policy_of(tx, state.run))
        limits = limits_of(state.run, state.policy, self._deps.options.run_timeout_ms)
        limits.check_step(state.run)
        if state.flush is None and await self._flush(state, context, limits, transcript.messages[: cut.at]):
            return True
        await self._summarise(state, context, transcript, cut, window, load)
        return False

    # ---- the silent step

    async def _flush(self, state: Loaded, context: CallContext, limits: Limits, head: list[Message]) -> bool:
        """Let the agent take notes on what will be summarised, unless that cannot be; says whether it answered."""
        self._skipped = await self._why_not(state, context, limits)
        if not self._skipped:
            await self._set_flush(state, "pending")
            try:
                await self._model.take_notes(state, context, head)
            except ModelUnavailable:
                # All retries and fallbacks are through. It will write no summary either, so that is not waited for.
                await self._set_flush(state, "skipped")
                raise
            except NO_SUMMARY as error:
                self._skipped = f"the model was not to be had: {error.message}"
            else:
                return True
        log.info("no notes taken: %s", self._skipped, extra={"action": "memory.skipped", "run": state.run.id})
        await self._set_flush(state, "skipped")
        return False

    async def _why_not(self, state: Loaded, context: CallContext, limits: Limits) -> str:
        """Why there is no silent step; empty if there is one."""
        if not self._deps.options.memory:
            return "the server is set up without memory"
        if state.agent is not None and state.agent.tools is not None and "memory.append" not in state.agent.tools:
            return "the agent has no memory.append"
        if state.run.steps + 2 > limits.max_steps:
            return "the run has no step to spare"
        # As far as is known beforehand: a rule may look at the text.
        refusal = await self._model.refusal(state, context, "memory.append", {"text": "a note"})
        if refusal:
            return refusal
        if not await self._deps.executor.takes_notes(context):
            return "the session's folder cannot be written"
        return ""

    async def _set_flush(self, state: Loaded, value: str) -> None:
        run = state.run

        def unit(tx: Transaction) -> None:
            tx.sessions.update(run.tenant_id, run.session_id, memory_flush_state=value)

        if state.session.memory_flush_state != value:
            await self._fence.commit(unit)
            state.session.memory_flush_state = value

    async def _settle_flush(self, state: Loaded) -> None:
        """Say what came of a silent step whose calls have their results."""
        session = state.session
        value = await self._deps.store.read(lambda tx: flush_state(tx, session))
        await self._set_flush(state, value)

    # ---- the summary

    async def _summarise(
        self, state: Loaded, context: CallContext, transcript: Transcript, cut: summary.Cut, window: int, load: Load
    ) -> None:
        head = transcript.messages[: cut.at]
        kept = cut.kept(transcript.messages)
        text, last, day = await self._written(state, head, int(window / min(load.scale, 2.0)))
        # Killed here, or anywhere from the silent step on, the summary is in no commit: it is written anew.
        faults.reached("compaction.written", state.session.id)
        opening = Opening(notes=await self._notes(state, context, window), summary=text)
        fixed = load.fixed - state.opening.tokens() + opening.tokens()
        after = fixed + sum(message_tokens(message) for message in kept) * load.scale
        if after >= load.total:
            await self._pay(state, last, day)
            raise InternalError("the summary makes no room")
        await self._write(state, opening, kept, transcript.versions[cut.at - 1], (load.total, after), window, last, day)

    async def _notes(self, state: Loaded, context: CallContext, window: int) -> str:
        """What the folder's memory says now, as much of it as a session may open with.

        Nothing where the agent may not read it: that it would not have to ask is no way around policy.
        """
        if not self._deps.options.memory:
            return ""
        # The workspace's own folder lies beside the database: a look at two names in it costs less than a thread does.
        if state.session.root is None and not self._deps.executor.may_have_notes(context):
            return ""
        most = min(NOTES_TOKENS, int(window * _NOTES_SHARE))
        # About a token, in scripts that take few; of one that takes more, less is read.
        characters = 4 * most
        notes = await self._deps.executor.notes(context, characters)
        while (size := text_tokens(notes)) > most + _NOTES_FRAME and characters > _NOTES_FRAME:
            characters = min(characters * most // size, characters - 1)
            notes = await self._deps.executor.notes(context, characters)
        return notes if notes and not await self._model.refusal(state, context, "memory.read", {}) else ""

    async def _written(self, state: Loaded, head: list[Message], window: int) -> tuple[str, Finished, int]:
        """The summary with the answer that is not paid for yet. Too long for a model it is told in smaller pieces."""
        for halving in range(_HALVINGS + 1):
            try:
                return await self._in_pieces(state, summary.requests(head, window >> halving), window)
            except InvalidRequest:
                if halving == _HALVINGS:
                    raise
        raise AssertionError("unreachable")

    async def _in_pieces(self, state: Loaded, pieces: list[str], window: int) -> tuple[str, Finished, int]:
        text, most = state.opening.summary, summary.longest(window)
        paid: tuple[Finished, int] | None = None
        for piece in pieces:
            if paid is not None:
                await self._pay(state, *paid)
            paid = finished, day = await self._told(state, summary.request(text, piece, most))
            if finished.stop == "length":
                # The end of a summary tells what is still to do: asked once more, for a shorter one.
                await self._pay(state, finished, day)
                paid = finished, day = await self._told(state, summary.request(text, piece, most, shorter=True))
            text = summary.bounded(finished.message.text, most, cut_off=finished.stop == "length")
            if not text or finished.stop == "refused":
                await self._pay(state, finished, day)
                raise InternalError("the model wrote no summary")
        if paid is None:
            raise InternalError("there is nothing to summarise")
        return text, *paid

    async def _told(self, state: Loaded, request: ModelRequest) -> tuple[Finished, int]:
        """The answer to a request for a summary, and the day that it counts on."""
        day = day_of(self._deps.clock.now_ms())
        return await self._ask(state, request, day), day

    async def _ask(self, state: Loaded, request: ModelRequest, day: int) -> Finished:
        """One call for a summary, within the run's limits and the day's budgets."""
        limits = limits_of(state.run, state.policy, self._deps.options.run_timeout_ms)
        limits.check_step(state.run)
        chain = self._model.chain(state, limits)
        call = call_of(request, chain, self._deps.models)
        limits.check_optional(state.run, call)
        if limits_days(state.policy):
            request.max_output_tokens = await self._fence.commit(
                lambda tx: reserve(tx, state.run, state.policy, call, day)
            )
        async with aclosing(self._deps.models.stream(request, chain)) as events:
            async for event in events:
                if isinstance(event, Finished):
                    return event
        raise InternalError("the model's answer ended without an end")

    async def _pay(self, state: Loaded, finished: Finished, day: int) -> None:
        """Count a call that was made, and that no summary comes of yet; journalled, as all that a run pays for is."""
        run, now = _paid(state.run, finished), self._deps.clock.now_ms()
        event = AgentUsage(session_id=run.session_id, run_id=run.id, reason="summary", usage=usage_of(finished))

        def unit(tx: Transaction) -> int:
            _count(tx, run, finished, day)
            return append(tx, run.tenant_id, event, now).version

        state.session.state_version = await self._fence.commit(unit)
        state.run = run

    async def _write(
        self,
        state: Loaded,
        opening: Opening,
        kept: list[Message],
        through: int,
        tokens: tuple[float, float],
        window: int,
        finished: Finished,
        day: int,
    ) -> None:
        """The one commit of a compaction: the journal, the transcript's new beginning, what it cost."""
        now = self._deps.clock.now_ms()
        run = structs.replace(_paid(state.run, finished), stalls=0)
        session = state.session
        before, after = (round(each) for each in tokens)
        used, count = min(1.0, after / window), session.compaction_count + 1
        event = SessionCompacted(
            session_id=session.id, before=before, after=after, summary=opening.summary, usage=usage_of(finished)
        )
        about = {"before": before, "after": after, "count": count, "model": finished.model}
        about |= {"memory": session.memory_flush_state, "reason": self._skipped or None}

        def unit(tx: Transaction) -> int:
            entry = append(tx, run.tenant_id, event, now, run_id=run.id)
            tx.messages.insert(summary_row(run, entry.version, through, opening, now))
            tx.sessions.update(run.tenant_id, session.id, context_usage=used, compaction_count=count)
            _count(tx, run, finished, day)
            self._deps.audit.record_in(tx, run, "session.compact", "session", session.id, outcome="ok", metadata=about)
            return entry.version

        session.state_version = await self._fence.commit(unit)
        session.context_usage, session.compaction_count = used, count
        state.run, state.opening, state.messages = run, opening, kept
        state.measured = Measured(model=run.model, messages=len(kept))
        state.flush, state.notes_due = None, False
        self._skipped = ""
        log.info("compacted", extra={"action": "session.compacted", "run": run.id, "before": before, "after": after})

    def _give_up(self, state: Loaded, error: CorralError) -> None:
        self._given_up = True
        log.warning("not compacted: %s", error.message, extra={"action": "compaction.failed", "run": state.run.id})


def _place(transcript: Transcript, version: int) -> int | None:
    return transcript.versions.index(version) if version in transcript.versions else None


def _paid(run: RunRow, finished: Finished) -> RunRow:
    """The run with what a call cost that makes no step; which model answered does not change the run's."""
    return structs.replace(counted(run, finished), steps=run.steps, model=run.model, stalls=run.stalls)


def _count(tx: Transaction, run: RunRow, finished: Finished, day: int) -> None:
    tx.runs.update(run.tenant_id, run.id, **counts(run))
    usage = finished.usage
    settle(tx, run, day, usage.input_tokens + usage.output_tokens, usage.cost_usd, steps=0)
