"""The method registry: the single table from which dispatch, validation, schema and docs come."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, UnsetType, field

from corral.protocol.frames import Features
from corral.protocol.types import (
    Agent,
    AgentChange,
    Approval,
    AuditAnchor,
    AuditRecord,
    Decision,
    Grant,
    HistoryItem,
    Id,
    Input,
    Metrics,
    PersonId,
    Policy,
    PolicyLayer,
    Principal,
    Role,
    Run,
    RunLimits,
    RuntimeMode,
    Session,
    SessionId,
    Title,
    Token,
    ToolName,
    Visibility,
    Wire,
)

Cursor = Annotated[str, Meta(min_length=1, max_length=1000)]
Version = Annotated[int, Meta(ge=0, le=2**53)]


class Params(Wire, kw_only=True, frozen=True):
    """Every method takes these two; the tenant comes from the principal alone."""

    workspace_id: Id | UnsetType = UNSET
    tenant_id: Id | UnsetType = UNSET


class SideEffectParams(Params, kw_only=True, frozen=True):
    """Params of a method that changes something: the key makes it safe to send again."""

    idempotency_key: Annotated[str, Meta(min_length=1, max_length=256)]


# ---- connect


class ClientInfo(Wire, kw_only=True, frozen=True):
    name: Annotated[str, Meta(max_length=200)] | UnsetType = UNSET
    version: Annotated[str, Meta(max_length=200)] | UnsetType = UNSET


class ConnectAuth(Wire, kw_only=True, frozen=True):
    token: Annotated[str, Meta(max_length=4096)]
    type: Literal["Bearer"] = "Bearer"


class ProtocolRange(Wire, kw_only=True, frozen=True):
    """Protocol versions that the client speaks: `"1"`, `"1.0"` or `"1.0.0"`, or a number."""

    min: str | int | float | UnsetType = UNSET
    max: str | int | float | UnsetType = UNSET


class ConnectParams(Params, kw_only=True, frozen=True):
    client: ClientInfo | UnsetType = UNSET
    auth: ConnectAuth | UnsetType = UNSET
    protocol: ProtocolRange | UnsetType = UNSET


class Limits(Wire, kw_only=True, frozen=True):
    max_frame_bytes: int
    heartbeat_ms: int
    max_subscriptions: int
    max_steps_per_run: int


class ConnectResult(Wire, kw_only=True, frozen=True):
    protocol_version: str
    server_time: str
    server_version: str
    connection_id: str
    principal: Principal
    workspace_id: str
    features: Features
    limits: Limits
    pending_approvals: list[Approval]


# ---- agent and runs


class AgentRunParams(SideEffectParams, kw_only=True, frozen=True):
    session_id: SessionId | UnsetType = UNSET
    input: Input
    runtime_mode: RuntimeMode | UnsetType = UNSET
    agent_id: Id | UnsetType = UNSET
    model: Annotated[str, Meta(min_length=1, max_length=200)] | UnsetType = UNSET
    limits: RunLimits | UnsetType = UNSET
    wait_ms: Annotated[int, Meta(ge=0, le=3_600_000)] = 120_000


class AgentRunResult(Wire, kw_only=True, frozen=True):
    run_id: str
    session_id: str
    status: Literal["accepted"]


class RunParams(Params, kw_only=True, frozen=True):
    run_id: Id


class AgentAbortParams(SideEffectParams, kw_only=True, frozen=True):
    run_id: Id


class AgentAbortResult(Wire, kw_only=True, frozen=True):
    """`leftover` names processes of a run under `bashMode: host` that could not be ended."""

    run_id: str
    status: str
    leftover: list[str] | UnsetType = UNSET


class RunResult(Wire, kw_only=True, frozen=True):
    run: Run


class SetModeParams(SideEffectParams, kw_only=True, frozen=True):
    session_id: SessionId
    runtime_mode: RuntimeMode


class SetModeResult(Wire, kw_only=True, frozen=True):
    session_id: str
    runtime_mode: RuntimeMode
    status: Literal["applied", "queued-change"]
    effective_on: Literal["next_turn"] | UnsetType = UNSET


# ---- sessions


class SessionsCreateParams(SideEffectParams, kw_only=True, frozen=True):
    title: Title | UnsetType = UNSET
    runtime_mode: RuntimeMode | UnsetType = UNSET
    agent_id: Id | UnsetType = UNSET
    session_key: Annotated[str, Meta(min_length=1, max_length=512)] | UnsetType = UNSET
    visibility: Visibility | UnsetType = UNSET
    root: Annotated[str, Meta(min_length=1, max_length=4096)] | UnsetType = UNSET


class SessionsUpdateParams(SideEffectParams, kw_only=True, frozen=True):
    session_id: SessionId
    title: Title | UnsetType = UNSET
    visibility: Visibility | UnsetType = UNSET


class SessionsDeleteParams(SideEffectParams, kw_only=True, frozen=True):
    session_id: SessionId


class SessionResult(Wire, kw_only=True, frozen=True):
    session: Session


class MaybeSessionResult(Wire, kw_only=True, frozen=True):
    session: Session | None


class SessionDeletedResult(Wire, kw_only=True, frozen=True):
    session_id: str
    deleted: Literal[True]


class SessionsListParams(Params, kw_only=True, frozen=True):
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: Cursor | UnsetType = UNSET
    agent_id: Id | UnsetType = UNSET


class SessionParams(Params, kw_only=True, frozen=True):
    session_id: SessionId


class SessionsListResult(Wire, kw_only=True, frozen=True):
    items: list[Session]
    next_cursor: str | UnsetType = UNSET


class HistoryParams(Params, kw_only=True, frozen=True):
    session_id: SessionId
    limit: Annotated[int, Meta(ge=1, le=500)] = 100
    before_id: Version | UnsetType = UNSET
    after_id: Version | UnsetType = UNSET


class HistoryResult(Wire, kw_only=True, frozen=True):
    items: list[HistoryItem]
    next_cursor: str | UnsetType = UNSET


class ToolsOutputParams(Params, kw_only=True, frozen=True):
    tool_call_id: Id
    offset: Annotated[int, Meta(ge=0)] = 0
    limit: Annotated[int, Meta(ge=1, le=262_144)] = 65_536


class ToolsOutputResult(Wire, kw_only=True, frozen=True):
    """`offset` and `totalBytes` count bytes of the output in UTF-8."""

    text: str
    offset: int
    total_bytes: int
    eof: bool


# ---- agents


class AgentsListResult(Wire, kw_only=True, frozen=True):
    items: list[Agent]


class AgentsUpsertParams(SideEffectParams, kw_only=True, frozen=True):
    """An agent as it was read may be sent back: its times are the server's, and are ignored and not compared."""

    agent: AgentChange


class AgentResult(Wire, kw_only=True, frozen=True):
    agent: Agent


# ---- events


class SubscribeParams(Params, kw_only=True, frozen=True):
    """`after` is a stateVersion with a session, a feedCursor without."""

    session_id: SessionId | UnsetType = UNSET
    after: Version | Cursor | UnsetType = UNSET


class SubscribeResult(Wire, kw_only=True, frozen=True):
    session_id: str | UnsetType = UNSET
    state_version: int | UnsetType = UNSET
    feed_cursor: str | UnsetType = UNSET


class UnsubscribeParams(Params, kw_only=True, frozen=True):
    session_id: SessionId | UnsetType = UNSET


class EmptyResult(Wire, kw_only=True, frozen=True):
    pass


# ---- policy


class PolicyGetParams(Params, kw_only=True, frozen=True):
    layer: PolicyLayer | UnsetType = UNSET
    agent_id: Id | UnsetType = UNSET
    effective: bool = False


class PolicyResult(Wire, kw_only=True, frozen=True):
    policy: Policy


class PolicyUpdateParams(SideEffectParams, kw_only=True, frozen=True):
    layer: PolicyLayer | UnsetType = UNSET
    agent_id: Id | UnsetType = UNSET
    patch: dict[str, Any]
    expected_version: Version | UnsetType = UNSET


class PolicyUpdateResult(Wire, kw_only=True, frozen=True):
    policy: Policy
    version: int
    updated_at: str


class PolicyExplainParams(Params, kw_only=True, frozen=True):
    tool_name: ToolName
    args: dict[str, Any]
    session_id: SessionId | UnsetType = UNSET
    agent_id: Id | UnsetType = UNSET


class PolicyExplainResult(Wire, kw_only=True, frozen=True):
    decision: Decision
    reason: str
    layer: str
    rule_id: str | UnsetType = UNSET
    facts: dict[str, Any]


# ---- approvals and grants


class ApprovalQueueParams(Params, kw_only=True, frozen=True):
    status: Literal["pending", "approved", "rejected", "expired", "cancelled"] = "pending"
    session_id: SessionId | UnsetType = UNSET
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    cursor: Cursor | UnsetType = UNSET


class ApprovalQueueResult(Wire, kw_only=True, frozen=True):
    items: list[Approval]
    next_cursor: str | UnsetType = UNSET


class ApprovalResolveParams(SideEffectParams, kw_only=True, frozen=True):
    approval_id: Id
    decision: Literal["approve", "reject"]
    comment: Annotated[str, Meta(max_length=4000)] | UnsetType = UNSET
    remember: Literal["session", "workspace"] | UnsetType = UNSET
    args: dict[str, Any] | UnsetType = UNSET


class ApprovalResolveResult(Wire, kw_only=True, frozen=True):
    approval_id: str
    status: str


class GrantsListResult(Wire, kw_only=True, frozen=True):
    items: list[Grant]


class GrantsRevokeParams(SideEffectParams, kw_only=True, frozen=True):
    grant_id: Id


class GrantResult(Wire, kw_only=True, frozen=True):
    grant: Grant


# ---- access tokens


class TokensCreateParams(SideEffectParams, kw_only=True, frozen=True):
    """`userId` is the caller's own by default, `subject` the user's id, `workspaceIds` the request's workspace.

    At most one of `expiresAt` and `expiresInMs`; without them the token holds until it is revoked.
    """

    roles: Annotated[list[Role], Meta(min_length=1, max_length=6)]
    user_id: PersonId | UnsetType = UNSET
    subject: PersonId | UnsetType = UNSET
    display_name: Annotated[str, Meta(min_length=1, max_length=200)] | UnsetType = UNSET
    workspace_ids: Annotated[list[Id], Meta(min_length=1, max_length=100)] | UnsetType = UNSET
    expires_at: Annotated[str, Meta(max_length=64)] | UnsetType = UNSET
    expires_in_ms: Annotated[int, Meta(ge=1, le=3_660 * 24 * 3600 * 1000)] | UnsetType = UNSET


class TokensCreateResult(Token, kw_only=True, frozen=True):
    """`token` is the text that a client shows."""

    token: str


class TokensListResult(Wire, kw_only=True, frozen=True):
    items: list[Token]


class TokensRevokeParams(SideEffectParams, kw_only=True, frozen=True):
    token_id: Id


class TokenResult(Wire, kw_only=True, frozen=True):
    token: Token


# ---- audit and metrics


class AuditQueryParams(Params, kw_only=True, frozen=True):
    from_: Annotated[str, Meta(max_length=64)] | UnsetType = field(default=UNSET, name="from")
    to: Annotated[str, Meta(max_length=64)] | UnsetType = UNSET
    action: Annotated[str, Meta(max_length=128)] | UnsetType = UNSET
    actor: Annotated[str, Meta(max_length=256)] | UnsetType = UNSET
    session_id: SessionId | UnsetType = UNSET
    run_id: Id | UnsetType = UNSET
    limit: Annotated[int, Meta(ge=1, le=500)] = 100
    cursor: Annotated[int, Meta(ge=1)] | UnsetType = UNSET


class AuditQueryResult(Wire, kw_only=True, frozen=True):
    items: list[AuditRecord]
    next_cursor: int | UnsetType = UNSET


class AuditVerifyResult(Wire, kw_only=True, frozen=True):
    ok: bool
    checked: int
    head_hash: str
    broken_at: int | UnsetType = UNSET
    reason: str | UnsetType = UNSET
    anchor: AuditAnchor | UnsetType = UNSET


class MetricsParams(Params, kw_only=True, frozen=True):
    from_: Annotated[str, Meta(max_length=64)] | UnsetType = field(default=UNSET, name="from")
    to: Annotated[str, Meta(max_length=64)] | UnsetType = UNSET
    agent_id: Id | UnsetType = UNSET


class MetricsResult(Wire, kw_only=True, frozen=True):
    metrics: Metrics


# ---- the registry

READ = frozenset({"owner", "admin", "operator", "member", "viewer"})
RUN = frozenset({"owner", "admin", "operator", "member"})
APPROVE = frozenset({"owner", "admin", "operator"})
ADMIN = frozenset({"owner", "admin"})
AUDIT = frozenset({"owner", "admin", "auditor"})
ANYONE = READ | AUDIT


class Method(Wire, kw_only=True, frozen=True):
    """One row of the registry.

    `scope` says what an idempotency key is unique within: the named param if it is given
    (`sessionId`, `runId`, `approvalId`), else the workspace.
    """

    name: str
    params: type[Params]
    result: type[Wire]
    roles: frozenset[str]
    scope: Literal["sessionId", "runId", "approvalId"] | None = None
    summary: str

    @property
    def side_effect(self) -> bool:
        """Whether the method changes something and so needs `idempotencyKey`."""
        return issubclass(self.params, SideEffectParams)


def _m(name: str, params: type[Params], result: type[Wire], roles: frozenset[str], summary: str, **rest: Any) -> Method:
    return Method(name=name, params=params, result=result, roles=roles, summary=summary, **rest)


METHODS: dict[str, Method] = {
    method.name: method
    for method in [
        _m("connect", ConnectParams, ConnectResult, ANYONE, "Say who you are; the first request on a WebSocket."),
        _m("agent.run", AgentRunParams, AgentRunResult, RUN, "Start a run and follow it.", scope="sessionId"),
        _m("agent.abort", AgentAbortParams, AgentAbortResult, RUN, "End a run and its processes.", scope="runId"),
        _m("runs.get", RunParams, RunResult, READ, "One run."),
        _m(
            "runtime.setMode",
            SetModeParams,
            SetModeResult,
            RUN,
            "Set where a session's next runs execute.",
            scope="sessionId",
        ),
        _m("sessions.create", SessionsCreateParams, SessionResult, RUN, "Make a session."),
        _m(
            "sessions.update",
            SessionsUpdateParams,
            SessionResult,
            RUN,
            "Rename a session or change who sees it.",
            scope="sessionId",
        ),
        _m(
            "sessions.delete",
            SessionsDeleteParams,
            SessionDeletedResult,
            RUN,
            "Delete a session, its journal and its outputs.",
            scope="sessionId",
        ),
        _m("sessions.list", SessionsListParams, SessionsListResult, READ, "Sessions, newest first."),
        _m("sessions.get", SessionParams, MaybeSessionResult, READ, "One session, or null."),
        _m("sessions.history", HistoryParams, HistoryResult, READ, "A page of a session's journal."),
        _m("tools.output", ToolsOutputParams, ToolsOutputResult, READ, "The whole of a truncated output."),
        _m("agents.list", Params, AgentsListResult, READ, "The agents of a workspace."),
        _m("agents.upsert", AgentsUpsertParams, AgentResult, ADMIN, "Make or change an agent."),
        _m("events.subscribe", SubscribeParams, SubscribeResult, READ, "Follow a session, or the workspace's feed."),
        _m("events.unsubscribe", UnsubscribeParams, EmptyResult, READ, "Stop following."),
        _m("policy.get", PolicyGetParams, PolicyResult, ANYONE, "What one layer says, or all merged."),
        _m("policy.update", PolicyUpdateParams, PolicyUpdateResult, ADMIN, "Change one layer by a JSON Merge Patch."),
        _m("policy.explain", PolicyExplainParams, PolicyExplainResult, ANYONE, "What policy would say of a call."),
        _m("approval.queue", ApprovalQueueParams, ApprovalQueueResult, READ, "Calls that wait for a person."),
        _m(
            "approval.resolve",
            ApprovalResolveParams,
            ApprovalResolveResult,
            APPROVE,
            "Approve or reject a call.",
            scope="approvalId",
        ),
        _m("grants.list", Params, GrantsListResult, READ, "What approvals were told to remember."),
        _m("grants.revoke", GrantsRevokeParams, GrantResult, APPROVE, "Take a grant back."),
        _m(
            "tokens.create",
            TokensCreateParams,
            TokensCreateResult,
            ADMIN,
            "Make an access token; its text is told here alone.",
        ),
        _m("tokens.list", Params, TokensListResult, ADMIN, "The access tokens, without their texts."),
        _m("tokens.revoke", TokensRevokeParams, TokenResult, ADMIN, "Take a token back and close its sockets."),
        _m("audit.query", AuditQueryParams, AuditQueryResult, AUDIT, "Audit records, newest first."),
        _m("audit.verify", Params, AuditVerifyResult, AUDIT, "Check the chain of audit hashes."),
        _m("metrics.summary", MetricsParams, MetricsResult, ANYONE, "Counts, latencies and costs of a period."),
    ]
}
