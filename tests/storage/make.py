"""Rows for tests: every field has a value, the ones that matter are named by the test."""

from __future__ import annotations

from typing import Any

from corral.storage.repositories import Transaction
from corral.storage.rows import (
    AgentRow,
    ApprovalFact,
    ApprovalRow,
    AuditRow,
    GrantRow,
    IdempotencyKey,
    IdempotencyRow,
    JournalEntry,
    MessageRow,
    PolicyRow,
    RunFact,
    RunRow,
    SessionRow,
    TokenRow,
    ToolRunRow,
)

A, B = "t_a", "t_b"
"""Two tenants. In the tests of separation the same ids occur under both."""

NOW = 1_700_000_000_000


class FixedClock:
    """A clock that stands."""

    def now_ms(self) -> int:
        return NOW

    def monotonic(self) -> float:
        return 0.0


def session(session_id: str = "s_1", tenant_id: str = A, **fields: Any) -> SessionRow:
    values: dict[str, Any] = {
        "workspace_id": "w_1",
        "agent_id": "a_default",
        "owner_user_id": "u_1",
        "session_key": "workspace:w_1/agent:a_default/main",
        "visibility": "private",
        "title": "title",
        "preview": "preview",
        "runtime_mode": "local",
        "created_at": NOW,
        "updated_at": NOW,
    }
    return SessionRow(tenant_id=tenant_id, id=session_id, **(values | fields))


def run(run_id: str = "run_1", tenant_id: str = A, **fields: Any) -> RunRow:
    values: dict[str, Any] = {
        "session_id": "s_1",
        "workspace_id": "w_1",
        "agent_id": "a_default",
        "actor": "user:u_1",
        "status": "queued",
        "runtime_mode": "local",
        "input": [{"type": "text", "text": "héllo"}],
        "model": "demo",
        "limits": {"maxSteps": 3},
        "accepted_version": 1,
        "trace_id": "trace",
        "created_at": NOW,
    }
    return RunRow(tenant_id=tenant_id, id=run_id, **(values | fields))


def message(version: int, tenant_id: str = A, **fields: Any) -> MessageRow:
    values: dict[str, Any] = {
        "session_id": "s_1",
        "run_id": "run_1",
        "role": "user",
        "content": {"text": f"message {version} of {tenant_id}"},
        "created_at": NOW,
    }
    return MessageRow(tenant_id=tenant_id, version=version, **(values | fields))


def tool_run(call_id: str = "call_1", tenant_id: str = A, **fields: Any) -> ToolRunRow:
    values: dict[str, Any] = {
        "run_id": "run_1",
        "session_id": "s_1",
        "step": 1,
        "position": 0,
        "tool_name": "bash.exec",
        "args": {"command": "ls"},
        "args_hash": "hash",
        "risk": "high",
        "repeatable": False,
        "decision": "allow",
        "created_at": NOW,
    }
    return ToolRunRow(tenant_id=tenant_id, id=call_id, **(values | fields))


def agent(agent_id: str = "a_1", tenant_id: str = A, **fields: Any) -> AgentRow:
    values: dict[str, Any] = {
        "workspace_id": "w_1",
        "name": f"agent of {tenant_id}",
        "system_prompt": "be exact",
        "model": None,
        "tools": ["file.read"],
        "created_at": NOW,
        "updated_at": NOW,
    }
    return AgentRow(tenant_id=tenant_id, id=agent_id, **(values | fields))


def policy(scope_key: str = "workspace:w_1", tenant_id: str = A, **fields: Any) -> PolicyRow:
    values: dict[str, Any] = {
        "layer": "workspace",
        "workspace_id": "w_1",
        "agent_id": None,
        "document": {"toolDefault": "deny", "of": tenant_id},
        "version": 1,
        "updated_at": NOW,
    }
    return PolicyRow(tenant_id=tenant_id, scope_key=scope_key, **(values | fields))


def key(name: str = "k_1", tenant_id: str = A, **fields: Any) -> IdempotencyKey:
    values: dict[str, Any] = {"actor": "user:u_1", "method": "agent.run", "scope": "s_1"}
    return IdempotencyKey(tenant_id=tenant_id, key=name, **(values | fields))


def claim(of: IdempotencyKey, **fields: Any) -> IdempotencyRow:
    values: dict[str, Any] = {
        "params_hash": "hash",
        "state": "in_progress",
        "result": None,
        "created_at": NOW,
        "expires_at": NOW + 1000,
    }
    return IdempotencyRow(key=of, **(values | fields))


def token(token_id: str = "tok_1", tenant_id: str = A, **fields: Any) -> TokenRow:
    values: dict[str, Any] = {
        "token_hash": f"hash of {token_id} of {tenant_id}",
        "subject": "user:u_1",
        "user_id": "u_1",
        "display_name": None,
        "workspace_ids": ["w_1"],
        "roles": ["owner"],
        "created_at": NOW,
    }
    return TokenRow(tenant_id=tenant_id, id=token_id, **(values | fields))


def approval(approval_id: str = "ap_1", tenant_id: str = A, **fields: Any) -> ApprovalRow:
    values: dict[str, Any] = {
        "workspace_id": "w_1",
        "session_id": "s_1",
        "run_id": "run_1",
        "tool_call_id": "call_1",
        "tool_name": "bash.exec",
        "args": {"command": "ls", "of": tenant_id},
        "args_hash": "hash",
        "binding": "binding",
        "risk": "high",
        "reason": "highRisk",
        "requested_by": "user:u_1",
        "created_at": NOW,
        "expires_at": NOW + 1000,
    }
    return ApprovalRow(tenant_id=tenant_id, id=approval_id, **(values | fields))


def grant(grant_id: str = "grant_1", tenant_id: str = A, **fields: Any) -> GrantRow:
    values: dict[str, Any] = {
        "workspace_id": "w_1",
        "session_id": None,
        "tool_name": "bash.exec",
        "binding": "binding",
        "matcher": f"exactly: ls (of {tenant_id})",
        "approval_id": "ap_1",
        "created_by": "user:u_1",
        "created_at": NOW,
        "expires_at": NOW + 1000,
    }
    return GrantRow(tenant_id=tenant_id, id=grant_id, **(values | fields))


def fact(run_id: str = "run_1", tenant_id: str = A, **fields: Any) -> RunFact:
    values: dict[str, Any] = {
        "workspace_id": "w_1",
        "agent_id": "a_default",
        "finished_at": NOW,
        "status": "failed",
        "code": "ABORTED",
        "latency_ms": 100,
        "bucket": 82,
        "tool_calls": 2,
        "tool_failures": 1,
        "input_tokens": 100,
        "output_tokens": 10,
        "cost_usd": 0.5,
    }
    return RunFact(tenant_id=tenant_id, run_id=run_id, **(values | fields))


def decision(approval_id: str = "ap_1", tenant_id: str = A, **fields: Any) -> ApprovalFact:
    values: dict[str, Any] = {
        "workspace_id": "w_1",
        "agent_id": "a_default",
        "resolved_at": NOW,
        "status": "approved",
        "wait_ms": 100,
    }
    return ApprovalFact(tenant_id=tenant_id, approval_id=approval_id, **(values | fields))


def audit(record_id: int = 1, tenant_id: str = A, **fields: Any) -> AuditRow:
    values: dict[str, Any] = {
        "action": "tool.call",
        "actor": "user:u_1",
        "actor_type": "user",
        "resource_type": "tool",
        "resource_id": "bash.exec",
        "outcome": "ok",
        "metadata": {"of": tenant_id},
        "trace_id": "trace",
        "created_at": f"2026-01-01T00:00:00.{record_id:03d}Z",
        "prev_hash": f"hash {record_id - 1}",
        "hash": f"hash {record_id}",
    }
    return AuditRow(tenant_id=tenant_id, id=record_id, **(values | fields))


def append(
    tx: Transaction, session_id: str = "s_1", tenant_id: str = A, *, event: str = "agent.message", **fields: Any
) -> JournalEntry:
    """Append one entry; its payload names the tenant and the session."""
    values: dict[str, Any] = {"payload": f'{{"of":"{tenant_id}/{session_id}"}}'.encode(), "run_id": None, "now_ms": NOW}
    return tx.journal.append(tenant_id, session_id, event, **(values | fields))


def append_changing(
    tx: Transaction, changes: dict[str, Any], session_id: str = "s_1", *, now_ms: int = NOW
) -> tuple[JournalEntry, SessionRow]:
    """Append one entry of tenant A, changing its session."""
    payload = f'{{"of":"{A}/{session_id}"}}'.encode()
    return tx.journal.append_changing(
        A, session_id, "agent.message", payload, run_id=None, now_ms=now_ms, changes=changes
    )
