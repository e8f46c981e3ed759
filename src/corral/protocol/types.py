"""The objects that travel in params, payloads and events.

Field names are camelCase on the wire. A field typed `… | UnsetType` is left out when it has
no value; a field typed `… | None` is sent as null. Times are RFC 3339 UTC with milliseconds.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType, field

# ---- vocabulary

RuntimeMode = Literal["local", "cloud"]
Visibility = Literal["private", "workspace"]
Decision = Literal["deny", "allow", "approval-required"]
Risk = Literal["low", "medium", "high"]
PolicyLayer = Literal["tenant", "workspace", "agent"]
BashMode = Literal["sandbox", "host"]
BashNetwork = Literal["none", "host"]
ToolStatus = Literal["success", "failed", "denied", "interrupted"]
Role = Literal["owner", "admin", "operator", "member", "viewer", "auditor"]

# `(?![\s\S])` is the end of the text in Python and in ECMAScript alike; `$` would let a newline follow.
# A client may choose a session's id: letters, digits, `_`, `.`, `:` and `-`.
SessionId = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9_.:-]{1,128}(?![\s\S])", description="1-128 of A-Z a-z 0-9 _ . : -")
]
Id = Annotated[str, Meta(min_length=1, max_length=128)]
# A person or program as audit records name it.
PersonId = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9_.:@-]{1,128}(?![\s\S])", description="1-128 of A-Z a-z 0-9 _ . : @ -")
]
ToolName = Annotated[str, Meta(min_length=1, max_length=128)]
Title = Annotated[str, Meta(max_length=300)]
Timestamp = Annotated[str, Meta(description="RFC 3339, UTC, milliseconds")]


class SessionStatus(StrEnum):
    IDLE = "idle"
    RUNNING = "running"
    WAITING_APPROVAL = "waiting_approval"


class RunStatus(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    WAITING_APPROVAL = "waiting_approval"
    COMPLETED = "completed"
    FAILED = "failed"
    ABORTED = "aborted"

    @property
    def terminal(self) -> bool:
        return self in (RunStatus.COMPLETED, RunStatus.FAILED, RunStatus.ABORTED)


class SyncState(StrEnum):
    LOCAL_ONLY = "local_only"
    SYNCING = "syncing"
    SYNCED = "synced"
    CONFLICT = "conflict"


class MemoryFlushState(StrEnum):
    IDLE = "idle"
    PENDING = "pending"
    FLUSHED = "flushed"
    SKIPPED = "skipped"


class ApprovalStatus(StrEnum):
    PENDING = "pending"
    APPROVED = "approved"
    REJECTED = "rejected"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class Wire(Struct, rename="camel", kw_only=True, frozen=True):
    """Base of every object on the wire."""


# ---- input


class TextPart(Wire, tag_field="type", tag="text", kw_only=True, frozen=True):
    text: Annotated[str, Meta(max_length=1_000_000)]


class ImagePart(Wire, tag_field="type", tag="image", kw_only=True, frozen=True):
    mime_type: Literal["image/png", "image/jpeg", "image/gif", "image/webp"]
    data: Annotated[str, Meta(min_length=1, description="base64")]


Input = (
    Annotated[str, Meta(min_length=1, max_length=1_000_000)]
    | Annotated[list[TextPart | ImagePart], Meta(min_length=1, max_length=100)]
)


# ---- people


class Principal(Wire, kw_only=True, frozen=True):
    """Who a connection speaks for. Made by the server from the token alone."""

    subject: str
    user_id: str
    tenant_id: str
    workspace_ids: list[str]
    roles: list[str]
    auth_source: str
    display_name: str | UnsetType = UNSET


# ---- sessions and runs


class Session(Wire, kw_only=True, frozen=True):
    id: str
    session_key: str
    tenant_id: str
    workspace_id: str
    agent_id: str
    owner_user_id: str
    visibility: Visibility
    title: str
    preview: str
    runtime_mode: RuntimeMode
    queued_runtime_mode: RuntimeMode | UnsetType = UNSET
    sync_state: SyncState
    status: SessionStatus
    active_run_id: str | UnsetType = UNSET
    state_version: int
    context_usage: float
    compaction_count: int
    memory_flush_state: MemoryFlushState
    root: str | UnsetType = UNSET
    created_at: Timestamp
    updated_at: Timestamp


class Usage(Wire, kw_only=True, frozen=True):
    """Tokens and money. `costUsd` is null where the model's price is not known."""

    input_tokens: int
    output_tokens: int
    cost_usd: float | None


class RunError(Wire, kw_only=True, frozen=True):
    code: str
    message: str
    retryable: bool


class RunLimits(Wire, kw_only=True, frozen=True):
    """What one run may use up. A run is held to the tighter of these and the policy's."""

    max_steps: Annotated[int, Meta(ge=1, le=10_000)] | UnsetType = UNSET
    max_cost_usd: Annotated[float, Meta(ge=0)] | UnsetType = UNSET
    timeout_ms: Annotated[int, Meta(ge=1, le=604_800_000)] | UnsetType = UNSET


class Run(Wire, kw_only=True, frozen=True):
    id: str
    session_id: str
    status: RunStatus
    input: str | list[TextPart | ImagePart]
    output: str | UnsetType = UNSET
    error: RunError | UnsetType = UNSET
    model: str
    steps: int
    usage: Usage
    attempts: int
    created_at: Timestamp
    started_at: Timestamp | UnsetType = UNSET
    finished_at: Timestamp | UnsetType = UNSET


class AgentChange(Wire, kw_only=True, frozen=True):
    """What is to be said of an agent from now on: of one that is there, what is left out stays."""

    id: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}(?![\s\S])")]
    name: Annotated[str, Meta(max_length=200)] | UnsetType = UNSET
    system_prompt: Annotated[str, Meta(max_length=200_000)] | UnsetType = UNSET
    model: Annotated[str, Meta(max_length=200)] | UnsetType = UNSET
    tools: Annotated[list[ToolName], Meta(max_length=1000)] | UnsetType = UNSET


class Agent(AgentChange, kw_only=True, frozen=True):
    """A name, a system prompt, a model and its tools. No `tools` means every tool there is."""

    created_at: Timestamp | UnsetType = UNSET
    updated_at: Timestamp | UnsetType = UNSET


class HistoryItem(Wire, kw_only=True, frozen=True):
    """One durable event of a session. `id` is its stateVersion."""

    id: int
    run_id: str | None
    event: str
    role: Literal["user", "assistant"] | UnsetType = UNSET
    text: str | UnsetType = UNSET
    payload: Any
    created_at: Timestamp


# ---- governance


class PolicyRule(Wire, kw_only=True, frozen=True):
    id: Annotated[str, Meta(min_length=1, max_length=128)]
    tools: Annotated[list[ToolName], Meta(min_length=1, max_length=1000)]
    when: Annotated[str, Meta(max_length=10_000)] | UnsetType = UNSET
    action: Decision
    reason: Annotated[str, Meta(max_length=1000)] | UnsetType = UNSET
    locked: bool | UnsetType = UNSET
    match: list[Any] | UnsetType = UNSET
    not_match: list[Any] | UnsetType = field(default=UNSET, name="not_match")


class PolicyModels(Wire, kw_only=True, frozen=True):
    """Which models runs may use; null leaves it to the other layers."""

    allowed: list[str] | None = None
    primary: str | None = None
    fallbacks: list[str] | None = None


class DayLimits(Wire, kw_only=True, frozen=True):
    steps: Annotated[int, Meta(ge=0)] | None = None
    tokens: Annotated[int, Meta(ge=0)] | None = None
    cost_usd: Annotated[float, Meta(ge=0)] | None = None


class PolicyLimits(Wire, kw_only=True, frozen=True):
    """What runs under this layer may use up; null is no limit of this layer's.

    `perDay` is for all of them together, `sessionPerDay` for each session by itself.
    """

    max_steps_per_run: Annotated[int, Meta(ge=1)] | None = None
    max_tokens_per_run: Annotated[int, Meta(ge=1)] | None = None
    max_cost_usd_per_run: Annotated[float, Meta(ge=0)] | None = None
    per_day: DayLimits = DayLimits()
    session_per_day: DayLimits = DayLimits()


class PolicyDocument(Wire, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """What one layer says. A field that is null or left out says nothing: other layers decide."""

    tool_default: Decision | None = None
    high_risk: Decision | None = None
    bash_mode: BashMode | None = None
    bash_network: BashNetwork | None = None
    four_eyes: bool | None = None
    tools: dict[ToolName, Decision] = {}
    locked_tools: list[ToolName] = []
    rules: list[PolicyRule] = []
    models: PolicyModels = PolicyModels()
    limits: PolicyLimits = PolicyLimits()


class Policy(Wire, kw_only=True, frozen=True):
    """A layer's document with its address; with `effective` the merge of all layers.

    The four scalar fields always have a value: where this layer says nothing it is the one
    that holds for it from the coarser layers, and `inherited` lists the field.
    """

    tenant_id: str
    workspace_id: str
    agent_id: str | UnsetType = UNSET
    layer: PolicyLayer
    scope_key: str
    tool_default: Decision
    high_risk: Decision
    bash_mode: BashMode
    bash_network: BashNetwork
    four_eyes: bool
    inherited: list[str]
    tools: dict[str, Decision]
    locked_tools: list[str]
    rules: list[PolicyRule]
    models: PolicyModels
    limits: PolicyLimits
    version: int
    updated_at: Timestamp | None


class Grant(Wire, kw_only=True, frozen=True):
    grant_id: str
    scope: Literal["session", "workspace"]
    session_id: str | UnsetType = UNSET
    tool_name: str
    matcher: str
    created_by: str
    created_at: Timestamp
    expires_at: Timestamp
    uses: int
    revoked_at: Timestamp | UnsetType = UNSET


class Approval(Wire, kw_only=True, frozen=True):
    """`retryOf` names the interrupted call, which may have taken effect, that would be run again."""

    approval_id: str
    run_id: str
    session_id: str
    tool_call_id: str
    tool_name: str
    args: dict[str, Any]
    args_hash: str
    risk: Risk
    reason: str
    rule_id: str | UnsetType = UNSET
    status: ApprovalStatus
    created_at: Timestamp
    expires_at: Timestamp
    resolved_at: Timestamp | UnsetType = UNSET
    resolved_by: str | UnsetType = UNSET
    comment: str | UnsetType = UNSET
    retry_of: str | UnsetType = UNSET


class Token(Wire, kw_only=True, frozen=True):
    """An access token as it may be shown: its text is told once, by `tokens.create`, and kept nowhere."""

    token_id: str
    subject: str
    user_id: str
    display_name: str | UnsetType = UNSET
    roles: list[str]
    workspace_ids: list[str]
    created_at: Timestamp
    expires_at: Timestamp | UnsetType = UNSET
    revoked_at: Timestamp | UnsetType = UNSET


class AuditRecord(Wire, kw_only=True, frozen=True):
    id: int
    action: str
    actor: str
    actor_type: str
    resource_type: str
    resource_id: str
    outcome: Literal["ok", "denied", "failed"]
    metadata: dict[str, Any]
    trace_id: str
    created_at: Timestamp
    prev_hash: str
    hash: str


class AuditAnchor(Wire, kw_only=True, frozen=True):
    """What the server has signed of an audit chain: it ends in record `id` with `hash`.

    `base_id` and `base_hash` are of the last record that retention has taken away (0 and 64 zeros
    if it took none): the chain begins after it. `public_key` is an Ed25519 key and `sig` its
    signature, both in hexadecimal.
    """

    tenant_id: str
    id: int
    hash: str
    base_id: int
    base_hash: str
    at: Timestamp
    public_key: str
    sig: str


class Metrics(Wire, kw_only=True, frozen=True):
    runs_total: int
    runs_completed: int
    runs_failed: int
    runs_aborted: int
    success_rate: float | None
    failure_reasons: dict[str, int]
    p50_latency_ms: float | None
    p95_latency_ms: float | None
    p99_latency_ms: float | None
    tool_calls_total: int
    tool_failures: int
    approvals_pending: int
    approvals_approved: int
    approvals_rejected: int
    approval_wait_p50_ms: float | None = field(name="approvalWaitP50Ms")
    input_tokens: int
    output_tokens: int
    cost_usd: float | None
    from_: Timestamp = field(name="from")
    to: Timestamp
