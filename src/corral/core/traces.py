"""The spans of runs, model calls and tool calls, named as OpenTelemetry's conventions for GenAI say.

A model call and a tool call are told by whoever made them, when they have ended. A run is told once, after its end is
committed, from its row: so it is one span with all its children however many processes drove it, and
is told also where nobody drove it (an abort while it waited for a person).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from corral.executor.api import ToolOutcome
from corral.models.api import Finished
from corral.protocol.events import TERMINAL_EVENTS
from corral.protocol.types import RunStatus
from corral.storage.api import Store, StoreUnavailable
from corral.storage.rows import JournalEntry, RunRow, ToolRunRow
from corral.tracing import Record, Span, Stopwatch, Value

log = logging.getLogger(__name__)

MAX_WAITING = 10_000
_FINISH = {"end": "stop", "tool_calls": "tool_call", "length": "length", "refused": "content_filter"}
_DRAIN_S = 2.0


def places(run: RunRow) -> dict[str, str]:
    """The run's ids as the log's lines have them."""
    return {"tenant": run.tenant_id, "session": run.session_id, "run": run.id, "trace_id": run.trace_id}


def model_span(run: RunRow, watch: Stopwatch, asked: str, finished: Finished | None, error: str) -> Span:
    """One step's question to the models: `asked` is the first of the chain; retries and fallbacks are inside."""
    provider, _, name = asked.partition(":")
    attributes: dict[str, Value | None] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": _PROVIDERS.get(provider, provider),
        "gen_ai.request.model": name or provider,
        "gen_ai.request.stream": True,
        **_about(run),
    }
    if finished is not None:
        usage = finished.usage
        attributes |= {
            "gen_ai.response.model": finished.model.partition(":")[2] or finished.model,
            "gen_ai.response.finish_reasons": [_FINISH[finished.stop]],
            "gen_ai.usage.input_tokens": usage.input_tokens,
            "gen_ai.usage.output_tokens": usage.output_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cache_read_tokens or None,
            "gen_ai.usage.cache_creation.input_tokens": usage.cache_write_tokens or None,
            "corral.cost_usd": usage.cost_usd,
        }
    return Span(
        name=f"chat {name or provider}",
        kind="client",
        trace_id=run.trace_id,
        parent=run.id,
        started_ns=watch.started_ns,
        ended_ns=watch.ended_ns(),
        attributes=attributes,
        error=error,
    )


def tool_span(run: RunRow, call: ToolRunRow, watch: Stopwatch, outcome: ToolOutcome | None, error: str) -> Span:
    """One execution of a tool; `outcome` is None if it was broken off."""
    if outcome is not None and outcome.error is not None:
        error = str(outcome.error.code)
    return Span(
        name=f"execute_tool {call.tool_name}",
        kind="internal",
        trace_id=run.trace_id,
        parent=run.id,
        started_ns=watch.started_ns,
        ended_ns=watch.ended_ns(),
        attributes={
            "gen_ai.operation.name": "execute_tool",
            "gen_ai.tool.name": call.tool_name,
            "gen_ai.tool.type": "function",
            "gen_ai.tool.call.id": call.id,
            **_about(run),
        },
        error=error,
    )


def run_span(run: RunRow) -> Span:
    """A run that has ended, from its acceptance to its end."""
    provider, _, name = run.model.partition(":")
    ended_ms = run.finished_at if run.finished_at is not None else run.created_at
    return Span(
        name=f"invoke_agent {run.agent_id}",
        kind="internal",
        trace_id=run.trace_id,
        own=run.id,
        parent=run.trace_id,
        started_ns=run.created_at * 1_000_000,
        ended_ns=ended_ms * 1_000_000,
        attributes={
            "gen_ai.operation.name": "invoke_agent",
            "gen_ai.provider.name": _PROVIDERS.get(provider, provider),
            "gen_ai.request.model": name or provider,
            "gen_ai.agent.id": run.agent_id,
            "gen_ai.agent.name": run.agent_id,
            "gen_ai.usage.input_tokens": run.input_tokens,
            "gen_ai.usage.output_tokens": run.output_tokens,
            "corral.cost_usd": run.cost_usd,
            "corral.run.status": run.status,
            "corral.run.steps": run.steps,
            "corral.run.attempts": run.attempts,
            "corral.run.waited_ms": run.waited_ms,
            **_about(run),
        },
        error="" if run.status == RunStatus.COMPLETED else str((run.error or {}).get("code") or run.status),
    )


def _about(run: RunRow) -> dict[str, Value | None]:
    return {
        "corral.tenant.id": run.tenant_id,
        "corral.workspace.id": run.workspace_id,
        "corral.session.id": run.session_id,
        "corral.run.id": run.id,
        "corral.trace.id": run.trace_id,
        "gen_ai.conversation.id": run.session_id,
    }


_PROVIDERS = {"openai-chat": "openai", "google": "gcp.gemini", "mistral": "mistral_ai", "xai": "x_ai"}
"""Where the conventions have another name for a provider than Corral."""


class RunTraces:
    """Tells of each run when its end is committed. `run` does it, for as long as it is not cancelled."""

    def __init__(self, store: Store, record: Record) -> None:
        self._store = store
        self._record = record
        self._waiting: asyncio.Queue[tuple[str, str]] = asyncio.Queue(MAX_WAITING)
        self._stop = store.add_listener(self._hear)

    def _hear(self, entries: Sequence[JournalEntry]) -> None:
        for entry in entries:
            if entry.run_id is not None and entry.event in TERMINAL_EVENTS:
                try:
                    self._waiting.put_nowait((entry.tenant_id, entry.run_id))
                except asyncio.QueueFull:
                    log.debug("a run is not traced", extra={"action": "traces.queue_full", "run": entry.run_id})

    async def run(self) -> None:
        while True:
            tenant_id, run_id = await self._waiting.get()
            try:
                await self._tell(tenant_id, run_id)
            finally:
                self._waiting.task_done()

    async def _tell(self, tenant_id: str, run_id: str) -> None:
        try:
            run = await self._store.read(lambda tx: tx.runs.get(tenant_id, run_id))
        except StoreUnavailable:
            log.debug("a run is not traced", extra={"action": "traces.store_unavailable", "run": run_id})
            return
        if run is not None:
            self._record(run_span(run))

    async def drain(self) -> None:
        """Until the runs that have ended are told, or for a moment."""
        self._stop()
        try:
            async with asyncio.timeout(_DRAIN_S):
                await self._waiting.join()
        except TimeoutError:
            log.debug("runs left untraced", extra={"action": "traces.drain_timeout"})
