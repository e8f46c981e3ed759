"""The spans of a handshake and of a request that starts a run."""

from __future__ import annotations

import msgspec

from corral.gateway.metrics import OK
from corral.protocol.methods import AgentRunResult
from corral.protocol.types import Principal
from corral.tracing import Span, Stopwatch

TRACED = frozenset({"agent.run"})
"""Requests that begin a trace; how long the others take is in the metrics."""


def connect_span(
    connection_id: str, principal: Principal | None, workspace_id: str | None, watch: Stopwatch, outcome: str
) -> Span:
    """A handshake, in a trace of its own under the connection's id."""
    return Span(
        name="connect",
        kind="server",
        trace_id=connection_id,
        own=connection_id,
        started_ns=watch.started_ns,
        ended_ns=watch.ended_ns(),
        attributes={
            "rpc.method": "connect",
            "corral.connection.id": connection_id,
            "corral.tenant.id": principal.tenant_id if principal is not None else None,
            "corral.workspace.id": workspace_id,
        },
        error="" if outcome == OK else outcome,
    )


def request_span(
    method: str,
    trace_id: str,
    principal: Principal,
    connection_id: str,
    payload: bytes | None,
    watch: Stopwatch,
    outcome: str,
) -> Span:
    """A request that starts a run, the root of the run's trace; linked to the connection that it came on, if to one.

    `payload` is the answer's.
    """
    started = msgspec.json.decode(payload, type=AgentRunResult) if payload is not None else None
    return Span(
        name=method,
        kind="server",
        trace_id=trace_id,
        own=trace_id,
        link=connection_id,
        started_ns=watch.started_ns,
        ended_ns=watch.ended_ns(),
        attributes={
            "rpc.method": method,
            "corral.connection.id": connection_id or None,
            "corral.tenant.id": principal.tenant_id,
            "corral.session.id": started.session_id if started is not None else None,
            "corral.run.id": started.run_id if started is not None else None,
            "corral.trace.id": trace_id,
        },
        error="" if outcome == OK else outcome,
    )
