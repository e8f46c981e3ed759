"""Every event's payload. Durable events are journalled before anyone sees them."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, UnsetType

from corral.protocol.types import (
    Approval,
    Decision,
    ImagePart,
    RuntimeMode,
    Session,
    TextPart,
    ToolStatus,
    Usage,
    Wire,
)


class ToolError(Wire, kw_only=True, frozen=True):
    code: str
    message: str


class AgentAccepted(Wire, kw_only=True, frozen=True):
    session_id: str
    run_id: str
    runtime_mode: RuntimeMode
    input: str | list[TextPart | ImagePart]


class AgentDelta(Wire, kw_only=True, frozen=True):
    """Transient: text to be placed at code point `offset` of message `messageId`."""

    session_id: str
    run_id: str
    message_id: str
    offset: int
    delta: str


class AgentMessage(Wire, kw_only=True, frozen=True):
    """One whole model message, journalled before its tool calls. `text` may be empty."""

    session_id: str
    run_id: str
    message_id: str
    role: Literal["assistant"]
    text: str
    usage: Usage


class AgentUsage(Wire, kw_only=True, frozen=True):
    """What the run paid for a call of the model whose answer is in no other event: for a piece of a summary
    (`reason` summary), or for one that came to nothing."""

    session_id: str
    run_id: str
    reason: str
    usage: Usage


class AgentToolCall(Wire, kw_only=True, frozen=True):
    """`retryOf` names the call that was interrupted and that this one, if a person approves it, does again."""

    session_id: str
    run_id: str
    tool_call_id: str
    tool_name: str
    args: dict[str, Any]
    decision: Decision
    reason: str | UnsetType = UNSET
    rule_id: str | UnsetType = UNSET
    retry_of: str | UnsetType = UNSET


class AgentToolResult(Wire, kw_only=True, frozen=True):
    session_id: str
    run_id: str
    tool_call_id: str
    tool_name: str
    status: ToolStatus
    output: str
    error: ToolError | UnsetType = UNSET
    duration_ms: int
    truncated: bool


class AgentResumed(Wire, kw_only=True, frozen=True):
    session_id: str
    run_id: str
    attempt: int
    reason: Literal["restart", "takeover"]


class AgentCompleted(Wire, kw_only=True, frozen=True):
    session_id: str
    run_id: str
    output: str
    usage: Usage
    steps: int


class AgentFailed(Wire, kw_only=True, frozen=True):
    session_id: str
    run_id: str
    code: str
    message: str
    retryable: bool


class RuntimeModeChanged(Wire, kw_only=True, frozen=True):
    session_id: str
    runtime_mode: RuntimeMode
    status: Literal["applied"]


class SessionUpdated(Wire, kw_only=True, frozen=True):
    session_id: str
    session: Session
    reason: str


class SessionCompacted(Wire, kw_only=True, frozen=True):
    """The older history was summarised, in the middle of a run. `before` and `after` are the tokens of a request
    with the history as it was and as it is now, estimated where no provider has counted.

    `usage` is what the call cost whose answer is the summary; those that led to it are told by `agent.usage`.
    """

    session_id: str
    before: int
    after: int
    summary: str
    usage: Usage | UnsetType = UNSET


EVENTS: dict[str, type[Wire]] = {
    "agent.accepted": AgentAccepted,
    "agent.delta": AgentDelta,
    "agent.message": AgentMessage,
    "agent.usage": AgentUsage,
    "agent.tool_call": AgentToolCall,
    "agent.tool_result": AgentToolResult,
    "agent.resumed": AgentResumed,
    "agent.completed": AgentCompleted,
    "agent.failed": AgentFailed,
    "runtime.mode_changed": RuntimeModeChanged,
    "session.updated": SessionUpdated,
    "session.compacted": SessionCompacted,
    "approval.required": Approval,
    "approval.resolved": Approval,
}

TRANSIENT_EVENTS = frozenset({"agent.delta"})
TERMINAL_EVENTS = frozenset({"agent.completed", "agent.failed"})
