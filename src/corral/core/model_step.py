"""The first half of a step: ask the model, journal its message with the decisions on its calls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

from msgspec import Struct, structs

from corral import faults
from corral.bus.api import Delta
from corral.core.calls import (
    CANNOT_RUN,
    Candidate,
    broken,
    candidate,
    refused,
    tool_run_row,
)
from corral.core.context import budget, fit
from corral.core.ending import completed, end_run, record_call, record_result
from corral.core.judge import binding_of, question
from corral.core.limits import Limits, call_of, limits_of
from corral.core.state import Deps, Fence, Loaded, park, policy_of
from corral.core.summary import FLUSH_PROMPT
from corral.core.traces import model_span
from corral.core.transcript import Measured, notes_row, user_texts
from corral.executor.api import CallContext, ToolOutcome
from corral.governance.budgets import day_of, limits_days, reserve, settle
from corral.governance.facts import CallFacts
from corral.governance.policy import EffectivePolicy, Verdict
from corral.models.api import (
    AssistantMessage,
    Finished,
    Message,
    ModelRequest,
    Restarted,
    TextDelta,
    ToolDefinition,
    ToolMessage,
)
from corral.models.tokens import text_tokens, tools_tokens
from corral.protocol.errors import CorralError, ErrorCode, InternalError, PolicyDenied
from corral.protocol.events import AgentMessage
from corral.protocol.methods import AgentAbortResult
from corral.protocol.types import Usage
from corral.storage.events import append_changing
from corral.storage.repositories import Transaction
from corral.storage.rows import ApprovalRow, MessageRow, RunRow, ToolRunRow
from corral.tracing import Record, Stopwatch

DEFAULT_PROMPT = (
    "You are an agent that works on a person's machine through tools. Tools run in the session's folder; "
    "relative paths are relative to it. Every call is judged by a policy and may be denied: then say so and "
    "do not try to get around it. Look before you change things, and say plainly what you did and what failed."
)


class _Journalled(Struct, kw_only=True):
    """What the commit of a message came to; `answer` is set if it ended the run, `parked` if it waits for people."""

    version: int
    open_calls: list[ToolRunRow]
    approvals: dict[str, ApprovalRow]
    results: list[ToolMessage]
    answer: AgentAbortResult | None
    parked: bool = False


class ModelStep:
    """Asks the models of one run."""

    def __init__(self, deps: Deps, fence: Fence, on_end: Callable[[AgentAbortResult], None]) -> None:
        self._deps = deps
        self._fence = fence
        self._on_end = on_end

    async def take(self, state: Loaded, context: CallContext) -> bool:
        """One model message, streamed and journalled.

        Without tool calls it ends the run, and where every call that may run waits for a person it parks it.
        Says whether it did either: then there is nothing left to drive.
        """
        day = day_of(self._deps.clock.now_ms())
        finished, message_id = await self._ask(state, day)
        faults.reached("model.end", state.run.session_id)
        return await self._journal(state, context, finished, message_id, day)

    async def take_notes(self, state: Loaded, context: CallContext, head: Sequence[Message]) -> None:
        """A silent step: the model is asked for notes on `head`, and its calls of memory.append are journalled.

        What is asked begins as an earlier request of the session did, so that a provider's cache may have it.
        Its text is shown to nobody, a call of another tool is refused, and what would need a person is
        denied, for nobody may be there. The step is no part of later requests.
        """
        day = day_of(self._deps.clock.now_ms())
        finished, message_id = await self._ask(state, day, head, FLUSH_PROMPT)
        faults.reached("model.end", state.run.session_id)
        await self._journal(state, context, finished, message_id, day, silent=True)

    async def refusal(self, state: Loaded, context: CallContext, tool_name: str, args: dict[str, Any]) -> str:
        """Why policy would not let such a call run without a person; empty if it would."""
        spec = self._deps.executor.spec(tool_name)
        if spec is None:
            return f"there is no {tool_name}"
        facts = await asyncio.to_thread(question, context, state.run, tool_name, spec.risk, args)
        verdict = state.policy.decide(facts)
        if verdict.decision == "allow":
            return ""
        said = "needs approval" if verdict.decision == "approval-required" else "is denied"
        return f"{tool_name} {said} ({verdict.reason})"

    # ---- asking

    async def _ask(
        self, state: Loaded, day: int, head: Sequence[Message] | None = None, prompt: str = ""
    ) -> tuple[Finished, str]:
        """The message. Its text goes to the bus as it comes, under a message id of its own.

        With a `head`, which takes the place of the messages, and a `prompt` behind it nothing goes to the bus.
        """
        if state.run.steps > 0:
            state.policy = await self._deps.store.read(lambda tx: policy_of(tx, state.run))
        limits = limits_of(state.run, state.policy, self._deps.options.run_timeout_ms)
        chain = self.chain(state, limits)
        limits.check_step(state.run)
        request = self._request(state, chain[0], state.messages if head is None else head, prompt)
        request.max_output_tokens = limits.output_tokens(state.run, request, self._deps.models.info(chain[0]))
        if limits_days(state.policy):
            call = call_of(request, chain, self._deps.models)
            request.max_output_tokens = await self._fence.commit(
                lambda tx: reserve(tx, state.run, state.policy, call, day)
            )
            faults.reached("model.reserved", state.run.session_id)
        if self._deps.record is None:
            return await self._stream(state, request, chain, silent=head is not None)
        return await self._traced(self._deps.record, state, request, chain, silent=head is not None)

    async def _traced(
        self, record: Record, state: Loaded, request: ModelRequest, chain: Sequence[str], *, silent: bool
    ) -> tuple[Finished, str]:
        """`_stream`, told as a span however it ends."""
        watch = Stopwatch(self._deps.clock.now_ms, self._deps.clock.monotonic)
        finished, error = None, str(ErrorCode.INTERNAL_ERROR)
        try:
            finished, message_id = await self._stream(state, request, chain, silent=silent)
            error = ""
        except CorralError as problem:
            error = str(problem.code)
            raise
        except asyncio.CancelledError:
            error = str(ErrorCode.ABORTED)
            raise
        finally:
            record(model_span(state.run, watch, chain[0], finished, error))
        return finished, message_id

    async def _stream(
        self, state: Loaded, request: ModelRequest, chain: Sequence[str], *, silent: bool
    ) -> tuple[Finished, str]:
        message_id, offset = self._deps.ids.new("m"), 0
        async with aclosing(self._deps.models.stream(request, chain)) as events:
            async for event in events:
                if isinstance(event, TextDelta):
                    if not silent:
                        self._publish(state, message_id, offset, event.text)
                    offset += len(event.text)
                    faults.reached("model.delta", state.run.session_id)
                elif isinstance(event, Restarted):
                    message_id, offset = self._deps.ids.new("m"), 0
                else:
                    return event, message_id
        raise InternalError("the model's answer ended without an end")

    def chain(self, state: Loaded, limits: Limits) -> list[str]:
        fallbacks = state.policy.fallback_models
        wanted = [state.run.model, *(self._deps.options.fallbacks if fallbacks is None else fallbacks)]
        models = [model for model in dict.fromkeys(wanted) if state.policy.allows_model(model)]
        if not models:
            raise PolicyDenied(f"policy does not allow the model {state.run.model}")
        return limits.affordable(models, self._deps.models)

    def _request(self, state: Loaded, model: str, messages: Sequence[Message], prompt: str) -> ModelRequest:
        system, tools = self._frame(state)
        room = budget(self._deps.models.info(model).context_window, system, tools)
        opening = state.opening.within(room // 2)
        kept = fit(messages, room - opening.tokens() - text_tokens(prompt))
        last = user_texts(prompt) if prompt else []
        return ModelRequest(system=system, messages=[*opening.messages(), *kept, *last], tools=tools)

    def _frame(self, state: Loaded) -> tuple[str, list[ToolDefinition]]:
        """The prompt and the tools, which are the same in every request of a run."""
        allowed = _tools_of(state)
        tools = [
            ToolDefinition(name=spec.name, description=spec.description, parameters=spec.parameters)
            for spec in self._deps.executor.specs()
            if allowed is None or spec.name in allowed
        ]
        return (state.agent.system_prompt if state.agent is not None else "") or DEFAULT_PROMPT, tools

    def fixed_tokens(self, state: Loaded) -> int:
        """The estimate for what a request holds besides the messages."""
        system, tools = self._frame(state)
        return text_tokens(system) + tools_tokens(tools) + state.opening.tokens()

    def _publish(self, state: Loaded, message_id: str, offset: int, text: str) -> None:
        self._deps.bus.publish_delta(
            Delta(
                tenant_id=state.run.tenant_id,
                workspace_id=state.run.workspace_id,
                session_id=state.session.id,
                run_id=state.run.id,
                message_id=message_id,
                offset=offset,
                text=text,
                version=state.session.state_version,
            )
        )

    # ---- journalling

    async def _journal(
        self,
        state: Loaded,
        context: CallContext,
        finished: Finished,
        message_id: str,
        day: int,
        *,
        silent: bool = False,
    ) -> bool:
        # A provider's ids may be missing or used before; ours are made here.
        calls = [structs.replace(call, id=self._deps.ids.new("tc")) for call in finished.message.tool_calls]
        message = structs.replace(finished.message, tool_calls=calls)
        run = counted(state.run, finished)
        allowed = ("memory.append",) if silent else _tools_of(state)
        candidates = [candidate(call, self._deps.executor, allowed) for call in calls]
        # Links are resolved for the facts, which may take a disk.
        questions = await asyncio.to_thread(self._questions, candidates, context, run) if calls else []
        now = self._deps.clock.now_ms()
        window = self._deps.models.info(finished.model).context_window
        used = min(1.0, (finished.usage.input_tokens + finished.usage.output_tokens) / window)
        flush = "pending" if calls else "skipped"

        def unit(tx: Transaction) -> _Journalled:
            text = "" if silent else message.text
            event = _message_event(run, message_id, text, finished)
            # A silent step asks for less than the next step will, so it says nothing of how full the window is.
            told = {"memory_flush_state": flush} if silent else {"context_usage": used}
            entry, _session = append_changing(tx, run.tenant_id, event, now, told)
            tx.messages.insert(_transcript_row(run, entry.version, message, now, silent=silent))
            if state.notes_due:
                tx.messages.insert(notes_row(run, state.opening.notes, now))
            if calls or silent:
                tx.runs.update(run.tenant_id, run.id, **counts(run))
            settle(tx, run, day, finished.usage.input_tokens + finished.usage.output_tokens, finished.usage.cost_usd)
            rulings = self._rulings(tx, run, context, candidates, questions, silent=silent)
            done = self._journal_calls(tx, run, rulings, now)
            done.version = entry.version
            if not calls and not silent:
                done.answer = end_run(tx, self._deps, run, completed(message.text), now, counts(run))
            elif done.open_calls and all(call.id in done.approvals for call in done.open_calls):
                # In this commit, so that who hears of the question never finds the run still running.
                park(tx, run, now)
                done.parked = True
            return done

        def tell(done: _Journalled) -> None:
            if done.answer is not None:
                self._on_end(done.answer)

        done = await self._fence.commit(unit, tell)
        state.run = run
        state.notes_due = False
        state.session.state_version = done.version
        if silent:
            state.flush = frozenset(call.id for call in calls)
            state.session.memory_flush_state = flush
        else:
            state.session.context_usage = used
            state.measured = Measured(model=run.model, messages=len(state.messages) + 1)
            state.messages += [message, *done.results]
        state.open_calls, state.approvals = done.open_calls, done.approvals
        return done.answer is not None or done.parked

    def _questions(self, candidates: Sequence[Candidate], context: CallContext, run: RunRow) -> list[CallFacts | None]:
        return [
            question(context, run, each.call.name, each.spec.risk, each.call.args)
            if each.problem is None and each.spec is not None and each.call.args is not None
            else None
            for each in candidates
        ]

    def _rulings(
        self,
        tx: Transaction,
        run: RunRow,
        context: CallContext,
        candidates: Sequence[Candidate],
        questions: Sequence[CallFacts | None],
        *,
        silent: bool,
    ) -> list[_Ruling]:
        """The decisions on the calls of one message, by the policy as it is in this transaction."""
        if not candidates:
            return []
        policy = policy_of(tx, run)
        rulings = [
            self._rule(tx, run, context, policy, each, asked) for each, asked in zip(candidates, questions, strict=True)
        ]
        return [_unattended(ruling) for ruling in rulings] if silent else rulings

    def _rule(
        self,
        tx: Transaction,
        run: RunRow,
        context: CallContext,
        policy: EffectivePolicy,
        each: Candidate,
        asked: CallFacts | None,
    ) -> _Ruling:
        """The decision on one call: what policy says, and where that asks for a person, what a grant says."""
        if asked is None or each.spec is None:
            return _Ruling(each=each, verdict=CANNOT_RUN, refusal=broken(each.problem or "there is no such tool"))
        verdict = policy.decide(asked)
        if verdict.decision == "deny":
            return _Ruling(each=each, verdict=verdict, refusal=refused(asked.tool, verdict.reason))
        if verdict.decision == "allow":
            return _Ruling(each=each, verdict=verdict)
        binding = binding_of(each.spec, asked.args or {}, context, policy)
        now = self._deps.clock.now_ms()
        grant = self._deps.approvals.granted(tx, run, asked.tool, binding, now, four_eyes=policy.four_eyes)
        if grant is not None:
            verdict = structs.replace(verdict, decision="allow", reason=f"grant {grant.id}: {grant.matcher}"[:500])
        return _Ruling(each=each, verdict=verdict, binding=binding)

    def _journal_calls(self, tx: Transaction, run: RunRow, rulings: Sequence[_Ruling], now: int) -> _Journalled:
        """Journal every decision, then the questions to people, then the results of what will not run."""
        done = _Journalled(version=0, open_calls=[], approvals={}, results=[], answer=None)
        rows = [tool_run_row(run, position, each.each, each.verdict, now) for position, each in enumerate(rulings)]
        for row, ruling in zip(rows, rulings, strict=True):
            record_call(tx, self._deps.audit, run, row, ruling.verdict.layer)
            if row.decision == "approval-required":
                done.approvals[row.id] = self._deps.approvals.require(tx, run, row, ruling.binding, now)
        for row, ruling in zip(rows, rulings, strict=True):
            if ruling.refusal is None:
                done.open_calls.append(row)
            else:
                done.results.append(record_result(tx, self._deps.audit, run, row, ruling.refusal, now))
        return done


class _Ruling(Struct, kw_only=True, frozen=True):
    """A call with the decision on it. `refusal` is its outcome where it will not run."""

    each: Candidate
    verdict: Verdict
    binding: str = ""
    refusal: ToolOutcome | None = None


def _unattended(ruling: _Ruling) -> _Ruling:
    """The ruling where no person can be asked: what needs one is denied."""
    if ruling.verdict.decision != "approval-required":
        return ruling
    reason = f"it needs approval ({ruling.verdict.reason}), and nobody is asked in a silent step"
    verdict = structs.replace(ruling.verdict, decision="deny", reason=reason)
    return _Ruling(each=ruling.each, verdict=verdict, refusal=refused(ruling.each.call.name, reason))


def _tools_of(state: Loaded) -> list[str] | None:
    return state.agent.tools if state.agent is not None else None


def _message_event(run: RunRow, message_id: str, text: str, finished: Finished) -> AgentMessage:
    return AgentMessage(
        session_id=run.session_id,
        run_id=run.id,
        message_id=message_id,
        role="assistant",
        text=text,
        usage=usage_of(finished),
    )


def _transcript_row(run: RunRow, version: int, message: AssistantMessage, now_ms: int, *, silent: bool) -> MessageRow:
    return MessageRow(
        tenant_id=run.tenant_id,
        session_id=run.session_id,
        version=version,
        run_id=run.id,
        role="flush" if silent else "assistant",
        content=message,
        created_at=now_ms,
    )


def usage_of(finished: Finished) -> Usage:
    """What a call cost, as events tell it."""
    usage = finished.usage
    return Usage(input_tokens=usage.input_tokens, output_tokens=usage.output_tokens, cost_usd=usage.cost_usd)


def counted(run: RunRow, finished: Finished) -> RunRow:
    """The run with one more step and what it cost. A step without a known price leaves the cost unknown."""
    usage = finished.usage
    cost = None if run.cost_usd is None or usage.cost_usd is None else run.cost_usd + usage.cost_usd
    return structs.replace(
        run,
        model=finished.model,
        steps=run.steps + 1,
        input_tokens=run.input_tokens + usage.input_tokens,
        output_tokens=run.output_tokens + usage.output_tokens,
        cost_usd=cost,
        stalls=0,
    )


def counts(run: RunRow) -> dict[str, Any]:
    """The columns that `counted` changes."""
    names = ("model", "steps", "input_tokens", "output_tokens", "cost_usd", "stalls")
    return {name: getattr(run, name) for name in names}
