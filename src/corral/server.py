"""The whole house put together: from settings to a server that listens, and back to nothing.

`serve` is what `corral serve` runs; `Server` is the same for those who bring their own loop.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import os
import signal
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Protocol

from corral import cores
from corral.bus.local import LocalBus
from corral.clock import Clock, SystemClock
from corral.config import (
    ConfigError,
    ModelSettings,
    Settings,
    ensure_token,
    ensure_token_key,
    remove_endpoint,
    write_endpoint,
)
from corral.core.agents import AgentMethods, ensure_agents
from corral.core.judge import Rejudge, four_eyes
from corral.core.service import CoreService
from corral.core.sessions import SessionMethods
from corral.core.state import Deps, RunOptions, folder_of
from corral.core.traces import RunTraces
from corral.executor.leftovers import mark_for
from corral.executor.service import Executor
from corral.gateway.app import Gateway
from corral.gateway.dispatch import Effect, MethodTables
from corral.gateway.options import GatewayOptions
from corral.governance.approvals import Approvals
from corral.governance.audit import Audit, AuditMethods
from corral.governance.backup import record_restored
from corral.governance.idempotency import Idempotency
from corral.governance.keeper import AuditKeeper
from corral.governance.metrics import MetricsMethods
from corral.governance.policy import PolicyMethods, ensure_policies
from corral.governance.retention import Retention
from corral.governance.tokens import TokenMethods
from corral.governance.welcome import Welcome
from corral.ids import Ids
from corral.models.api import ModelInfo
from corral.models.http import Timeouts
from corral.models.router import ModelRouter
from corral.storage.exchange import settle
from corral.storage.lock import DataDirLock
from corral.storage.repositories import Transaction
from corral.storage.rows import TokenRow
from corral.storage.sqlite import SqliteStore
from corral.tracing import Span, wanted

log = logging.getLogger(__name__)

TENANT, WORKSPACE, OWNER, OWNER_TOKEN = "t_default", "w_default", "u_owner", "tok_owner"
"""What the first start makes. The token's row names the others; nothing falls back to them."""

_DRAIN_GRACE_S = 4.0
_GC_EVERY = 10_000
"""New objects, less those freed, after which the collector looks at the young ones."""
_PURGE_INTERVAL_S = 600.0


class Server:
    """A gateway with everything behind it, in this process. Use as an async context manager.

    Entering raises DataDirLocked if another process has the data directory, OSError if the
    address cannot be had, and StoreUnavailable if the store cannot be opened. `traces` takes the place
    of what the environment's OTEL_* ask for; it is closed with the server.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        clock: Clock | None = None,
        options: GatewayOptions | None = None,
        environ: dict[str, str] | None = None,
        traces: Traces | None = None,
    ) -> None:
        self.settings = settings
        self.url = ""
        self._clock = clock or SystemClock()
        self._options = options or GatewayOptions()
        self._environ = dict(os.environ) if environ is None else environ
        self._traces = traces
        self._run_traces: RunTraces | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Server:
        settings = self.settings
        settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = DataDirLock(settings.data_dir)
        try:
            if (settled := settle(settings.data_dir)) is not None:
                log.warning("%s", settled, extra={"action": "restore.settled"})
            await self._start()
        except BaseException:
            self._lock.release()
            raise
        return self

    async def _start(self) -> None:
        settings, clock = self.settings, self._clock
        token = ensure_token(settings)
        self.store = await SqliteStore.open(settings.data_dir / "corral.db", clock)
        try:
            self._cursor_key = await self.store.write(lambda tx: _first_rows(tx, settings, token, clock.now_ms()))
            self._traces = self._traces or _traces(self._environ)
            self._assemble()
            host, port = await self.gateway.start(settings.host, settings.port)
        except BaseException:
            await self.store.close()
            raise
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{port}"
        write_endpoint(settings.data_dir, self.url)
        self._tasks = [
            asyncio.create_task(self._recover(), name="recover"),
            asyncio.create_task(self.core.keep_leases(), name="leases"),
            asyncio.create_task(self.approvals.keep_time(self.store), name="approvals"),
            asyncio.create_task(self.keeper.run(), name="audit"),
            asyncio.create_task(self._keep_house(), name="housekeeping"),
        ]
        if self._run_traces is not None:
            self._tasks.append(asyncio.create_task(self._run_traces.run(), name="traces"))
        for task in self._tasks:
            task.add_done_callback(_report)

    def _assemble(self) -> None:
        settings, clock = self.settings, self._clock
        ids = Ids(clock)
        roots = [root.resolve() for root in settings.roots]
        self.bus = LocalBus()
        self.store.add_listener(self.bus.publish)
        self.models = ModelRouter(
            self._environ,
            known={name: _known(name, model) for name, model in settings.models.items()},
            timeouts=Timeouts(total=settings.model_timeout_ms / 1000),
            clock=clock,
            ids=ids,
        )
        self.executor = _executor(settings, clock, self._environ)
        audit = self.audit = Audit(clock, secrets=self._secrets())
        self.keeper = AuditKeeper(self.store, clock, audit, settings.data_dir)
        options = RunOptions(
            data_dir=settings.data_dir,
            roots=roots,
            model=settings.model,
            fallbacks=settings.fallbacks,
            tool_timeout_ms=settings.tool_timeout_ms,
            run_timeout_ms=settings.run_timeout_ms,
            compaction=settings.compaction,
            compaction_threshold=settings.compaction_threshold,
            memory=settings.memory,
        )
        self.approvals = Approvals(
            clock,
            ids,
            audit,
            ttl_ms=settings.approval_ttl_ms,
            rejudge=Rejudge(self.executor, options),
            four_eyes=four_eyes,
        )
        record = self._traces.record if self._traces is not None else None
        self._run_traces = RunTraces(self.store, record) if record is not None else None
        deps = Deps(
            store=self.store,
            bus=self.bus,
            models=self.models,
            executor=self.executor,
            approvals=self.approvals,
            audit=audit,
            clock=clock,
            ids=ids,
            options=options,
            record=record,
        )
        sessions = SessionMethods(clock, ids, audit, roots)
        self.core = CoreService(deps, sessions, owner=ids.new("node"), max_active=settings.max_active_runs)
        self.gateway = Gateway(
            settings=settings,
            options=self._options,
            store=self.store,
            bus=self.bus,
            core=self.core,
            idempotency=Idempotency(self.store, clock),
            welcome=Welcome(self.store, audit, self.approvals),
            cursor_key=self._cursor_key,
            clock=clock,
            ids=ids,
            methods=self._methods(deps, sessions),
            record=record,
        )

    def _methods(self, deps: Deps, sessions: SessionMethods) -> MethodTables:
        """Which function answers which method; those that are not here are the gateway's own."""
        clock, audit = deps.clock, deps.audit
        agents = AgentMethods(clock, audit)
        policies = PolicyMethods(clock, audit, partial(folder_of, deps.options))
        tokens = TokenMethods(clock, deps.ids, audit, ensure_token_key(self.settings.data_dir))
        records = AuditMethods(audit, self.keeper)
        return MethodTables(
            reads={
                "runs.get": sessions.run,
                "sessions.get": sessions.get,
                "sessions.list": sessions.list,
                "sessions.history": sessions.history,
                "tools.output": sessions.tool_output,
                "agents.list": agents.list,
                "policy.get": policies.get,
                "policy.explain": policies.explain,
                "audit.query": records.query,
                "approval.queue": self.approvals.queue,
                "grants.list": self.approvals.grants,
                "metrics.summary": MetricsMethods(clock).summary,
                "tokens.list": tokens.list,
            },
            writes={
                "sessions.create": sessions.create,
                "sessions.update": sessions.update,
                "sessions.delete": sessions.delete,
                "runtime.setMode": sessions.set_mode,
                "agents.upsert": agents.upsert,
                "policy.update": policies.update,
                "approval.resolve": self.approvals.resolve,
                "grants.revoke": self.approvals.revoke,
                "tokens.create": Effect(function=tokens.create, finish=tokens.with_text),
                "tokens.revoke": Effect(function=tokens.revoke, committed=lambda: self.gateway.tokens_changed()),
            },
            others={"audit.verify": lambda caller, _params: records.verify(caller)},
        )

    async def _recover(self) -> None:
        await record_restored(self.store, self.audit, TENANT)
        await self.executor.end_leftovers()
        count = await self.core.recover()
        if count:
            log.info("runs taken up again: %d", count, extra={"action": "recovery.done", "count": count})

    async def _keep_house(self) -> None:
        """Look the database over if the last process did not close it, and let go of what has had its time."""
        if not self.store.clean_start:
            for problem in await self.store.quick_check():
                log.error("the database is damaged: %s", problem, extra={"action": "store.damaged"})
        retention = Retention(
            self.store,
            self._clock,
            self.keeper,
            audit_keep_days=self.settings.audit_keep_days,
            tool_output_keep_days=self.settings.tool_output_keep_days,
        )
        while True:
            await retention.purge()
            await asyncio.sleep(_PURGE_INTERVAL_S)

    def _secrets(self) -> list[str]:
        """What no record may hold: the access token, and whatever looks like a provider's key."""
        named = [value for name, value in self._environ.items() if name.endswith(("_API_KEY", "_TOKEN", "_SECRET"))]
        return [ensure_token(self.settings), *named]

    async def _close_traces(self) -> None:
        """Send what is left of the spans, after the last run was let go and before the store closes."""
        if self._run_traces is not None:
            await self._run_traces.drain()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._traces is not None:
            await asyncio.to_thread(self._traces.close)

    async def drain(self) -> None:
        """Refuse new runs, leave the live ones resumable, close the sockets with 1012."""
        self.core.draining = True
        await asyncio.gather(self.core.drain(_DRAIN_GRACE_S), self.gateway.drain())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            helpers = [task for task in self._tasks if task.get_name() != "traces"]
            for task in helpers:
                task.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)
            await self.drain()
            await self._close_traces()
            await self.gateway.close()
            await self.models.close()
            await self.executor.close()
            await self.keeper.close()
            await self.store.close()
        finally:
            remove_endpoint(self.settings.data_dir)
            self._lock.release()


async def serve(
    settings: Settings, *, on_listening: Callable[[str], None] | None = None, clock: Clock | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return. Raises what entering `Server` raises."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with Server(settings, clock=clock) as server:
        # What is loaded by now stays. A turn makes thousands of objects that its end frees without the collector, which
        # at the default of 700 looks through them all the same, a twentieth of a turn's processor time.
        gc.freeze()
        gc.set_threshold(_GC_EVERY)
        gc.enable()
        together = asyncio.create_task(cores.keep_together(), name="cores") if settings.one_core else None
        if together is not None:
            together.add_done_callback(_report)
        if on_listening is not None:
            on_listening(server.url)
        await stop.wait()
        log.info("draining", extra={"action": "server.drain"})
        if together is not None:
            together.cancel()


class Traces(Protocol):
    """What takes spans over; `corral.otel.Traces` is it."""

    def record(self, span: Span) -> None: ...

    def close(self) -> None: ...


def _traces(environ: Mapping[str, str]) -> Traces | None:
    """What the environment asks for. Traces are a help: a lack of what sends them stops nothing."""
    if not wanted(environ):
        return None
    try:
        from corral.otel import open_traces

        return open_traces()
    except ImportError:
        text = "OTEL_* ask for traces, and what sends them is not installed: make otel, or pip install 'corral[otel]'"
        log.warning(text, extra={"action": "traces.not_installed"})
    except Exception:
        log.exception("traces cannot be sent with these OTEL_* variables", extra={"action": "traces.not_opened"})
    return None


def _report(task: asyncio.Task[None]) -> None:
    """A helper task that died is noticed at once, not when the server stops."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a helper task died: %s", task.get_name(), exc_info=error, extra={"action": "task.died"})


def _first_rows(tx: Transaction, settings: Settings, token: str, now_ms: int) -> bytes:
    """The tenant, its owner's token, its agents; on later starts the token and agents of the settings.

    Returns the store's own secret that hides what is in feed cursors.
    """
    tx.tenants.ensure(TENANT, WORKSPACE, OWNER, now_ms=now_ms)
    digest = hashlib.sha256(token.encode()).hexdigest()
    standing = tx.tokens.get(TENANT, OWNER_TOKEN)
    if standing is None or standing.token_hash != digest:
        tx.tokens.upsert(
            TokenRow(
                tenant_id=TENANT,
                id=OWNER_TOKEN,
                token_hash=digest,
                subject=OWNER,
                user_id=OWNER,
                display_name="Owner",
                workspace_ids=[WORKSPACE],
                roles=["owner"],
                created_at=now_ms,
            )
        )
    ensure_agents(tx, TENANT, WORKSPACE, settings.agents, now_ms)
    ensure_policies(tx, TENANT, WORKSPACE, now_ms)
    secret = tx.meta.get("cursor_key")
    if secret is None:
        secret = os.urandom(32).hex()
        tx.meta.set("cursor_key", secret)
    return bytes.fromhex(secret)


def _executor(settings: Settings, clock: Clock, environ: dict[str, str]) -> Executor:
    try:
        return Executor(
            clock=clock,
            data_dir=settings.data_dir,
            environ=environ,
            ask_again=settings.ask_again,
            memory=settings.memory,
            mark=mark_for(settings.data_dir, ensure_token_key(settings.data_dir)),
        )
    except ValueError as error:
        raise ConfigError(f"ask_again from {settings.origins.get('ask_again', 'the settings')}: {error}") from None


def _known(name: str, model: ModelSettings) -> ModelInfo:
    return ModelInfo(
        model=name,
        context_window=model.context_window or 128_000,
        input_usd_per_million=model.input_usd_per_million,
        output_usd_per_million=model.output_usd_per_million,
    )
