"""What the store keeps, as plain structs: one for each table. Times are milliseconds since the epoch.

Every row carries its tenant. `None` is SQL NULL. JSON columns are given and returned as
Python values.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct


class SessionRow(Struct, kw_only=True):
    tenant_id: str
    id: str
    workspace_id: str
    agent_id: str
    owner_user_id: str
    session_key: str
    visibility: str
    title: str
    preview: str
    runtime_mode: str
    queued_runtime_mode: str | None = None
    sync_state: str = "local_only"
    status: str = "idle"
    active_run_id: str | None = None
    state_version: int = 0
    context_usage: float = 0.0
    compaction_count: int = 0
    memory_flush_state: str = "idle"
    root: str | None = None
    created_at: int
    updated_at: int


class JournalEntry(Struct, kw_only=True):
    """One durable event. `payload` is its JSON text, encoded once, when it was appended.

    `feed_id` is the event's place in the order of all the store's events; it grows, with gaps.
    """

    tenant_id: str
    workspace_id: str
    session_id: str
    version: int
    feed_id: int
    event: str
    run_id: str | None
    payload: bytes
    created_at: int


class RunRow(Struct, kw_only=True):
    """A run, and who owns it: the lease is (`lease_owner`, `lease_epoch`, `lease_expires_at`).

    `cost_usd` is None once any step used a model without a known price. `stalls` counts the
    attempts in a row that journalled no step. `waited_ms` is time spent waiting for people or for a
    server to come back; `waiting_since` is when the present wait for a person began.
    `limits` is what the caller asked for, on the wire's names.
    """

    tenant_id: str
    id: str
    session_id: str
    workspace_id: str
    agent_id: str
    actor: str
    status: str
    runtime_mode: str
    input: Any
    output: str | None = None
    error: dict[str, Any] | None = None
    model: str
    steps: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float | None = 0.0
    attempts: int = 0
    stalls: int = 0
    waited_ms: int = 0
    limits: dict[str, Any]
    accepted_version: int
    trace_id: str
    lease_owner: str | None = None
    lease_epoch: int = 0
    lease_expires_at: int | None = None
    abort_requested_at: int | None = None
    waiting_since: int | None = None
    created_at: int
    started_at: int | None = None
    finished_at: int | None = None


class MessageRow(Struct, kw_only=True):
    """One entry of the transcript that the model sees; `version` is its place in the journal.

    `content` is the JSON of a `corral.models.api` message: what the journal's event shows
    and what only the model needs (its own call ids, reasoning to be sent back). Of the other roles it is

    - `notes`: `{text}`, what the memory's files said when the session began; its version is 0, before all events;
    - `summary`: `{through, summary, notes}`, which stands for every entry up to version `through`;
    - `flush`: the model's message in a silent step, which later requests do not hold, nor its calls' results.
    """

    tenant_id: str
    session_id: str
    version: int
    run_id: str
    role: Literal["user", "assistant", "tool", "notes", "summary", "flush"]
    content: Any
    created_at: int


class ToolRunRow(Struct, kw_only=True):
    """One tool call. `state` goes `decided` -> `started` -> `finished`, or `decided` -> `finished`.

    `id` is the public toolCallId; `step` and `position` place it in its run.
    """

    tenant_id: str
    id: str
    run_id: str
    session_id: str
    step: int
    position: int
    tool_name: str
    args: dict[str, Any]
    args_hash: str
    risk: str
    repeatable: bool
    decision: str
    reason: str | None = None
    rule_id: str | None = None
    state: Literal["decided", "started", "finished"] = "decided"
    status: str | None = None
    duration_ms: int | None = None
    truncated: bool = False
    created_at: int
    started_at: int | None = None
    finished_at: int | None = None
    retry_of: str | None = None


class AgentRow(Struct, kw_only=True):
    tenant_id: str
    workspace_id: str
    id: str
    name: str
    system_prompt: str
    model: str | None
    tools: list[str] | None
    created_at: int
    updated_at: int


class PolicyRow(Struct, kw_only=True):
    """One layer's document. `scope_key` is `tenant:T`, `workspace:W` or `workspace:W/agent:A`."""

    tenant_id: str
    scope_key: str
    layer: str
    workspace_id: str
    agent_id: str | None
    document: dict[str, Any]
    version: int
    updated_at: int


class IdempotencyKey(Struct, kw_only=True, frozen=True):
    """What a key is unique within: tenant, actor, method and scope."""

    tenant_id: str
    actor: str
    method: str
    scope: str
    key: str


class IdempotencyRow(Struct, kw_only=True):
    """A claimed key. `result` is the payload's JSON text, None while the effect goes on.

    `run_id` ties an effect that outlives its transaction to the run whose end finishes it.
    """

    key: IdempotencyKey
    params_hash: str
    state: Literal["in_progress", "done"]
    result: bytes | None
    run_id: str | None = None
    created_at: int
    expires_at: int


class TokenRow(Struct, kw_only=True):
    """An access token, kept as the SHA-256 of its text in hexadecimal."""

    tenant_id: str
    id: str
    token_hash: str
    subject: str
    user_id: str
    display_name: str | None
    workspace_ids: list[str]
    roles: list[str]
    created_at: int
    expires_at: int | None = None
    revoked_at: int | None = None


class ApprovalRow(Struct, kw_only=True):
    """A call that a person must decide on. `status` is an ApprovalStatus.

    `binding` is the hash of everything that the decision is about: the tool and its arguments,
    the folder, the mode and profile that it will run in. `requested_by` is who started the run.
    """

    tenant_id: str
    id: str
    workspace_id: str
    session_id: str
    run_id: str
    tool_call_id: str
    tool_name: str
    args: dict[str, Any]
    args_hash: str
    binding: str
    risk: str
    reason: str
    rule_id: str | None = None
    requested_by: str
    status: str = "pending"
    created_at: int
    expires_at: int
    resolved_at: int | None = None
    resolved_by: str | None = None
    comment: str | None = None
    retry_of: str | None = None


class GrantRow(Struct, kw_only=True):
    """What an approval was told to remember: calls with the same `binding` need no person.

    `session_id` is None for one that holds in the whole workspace. `matcher` says in words what
    it covers.
    """

    tenant_id: str
    id: str
    workspace_id: str
    session_id: str | None
    tool_name: str
    binding: str
    matcher: str
    approval_id: str
    created_by: str
    created_at: int
    expires_at: int
    uses: int = 0
    revoked_at: int | None = None
    revoked_by: str | None = None


class AuditRow(Struct, kw_only=True):
    """One record of a tenant's chain. `created_at` is RFC 3339 text; `hash` covers all but itself.

    `session_id` and `run_id` repeat what `metadata` may say, for look-ups.
    """

    tenant_id: str
    id: int
    action: str
    actor: str
    actor_type: str
    resource_type: str
    resource_id: str
    outcome: str
    metadata: dict[str, Any]
    trace_id: str
    created_at: str
    prev_hash: str
    hash: str
    session_id: str | None = None
    run_id: str | None = None


class UsageRow(Struct, kw_only=True, frozen=True):
    """What was used up, or is reserved, of one scope of policy on one day (days since the epoch, UTC)."""

    scope: str
    day: int
    steps: int = 0
    tokens: int = 0
    cost_usd: float = 0.0


class RunFact(Struct, kw_only=True, frozen=True):
    """What metrics keep of a run that has ended. `code` is empty unless it failed.

    `latency_ms` is the time from its acceptance to its end, `bucket` where that lies in the histogram.
    """

    tenant_id: str
    workspace_id: str
    agent_id: str
    run_id: str
    finished_at: int
    status: str
    code: str
    latency_ms: int
    bucket: int
    tool_calls: int
    tool_failures: int
    input_tokens: int
    output_tokens: int
    cost_usd: float | None


class ApprovalFact(Struct, kw_only=True, frozen=True):
    """What metrics keep of a call that a person decided on. `status` is approved or rejected; `wait_ms` how long
    the person was waited for."""

    tenant_id: str
    workspace_id: str
    agent_id: str
    approval_id: str
    resolved_at: int
    status: str
    wait_ms: int


class RunSums(Struct, kw_only=True):
    """Runs added up. `priced` is the number of those whose cost is known and in `cost_usd`."""

    completed: int = 0
    failed: int = 0
    aborted: int = 0
    tool_calls: int = 0
    tool_failures: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    priced: int = 0
