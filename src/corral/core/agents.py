"""Agents: a name, a system prompt, a model and its tools."""

from __future__ import annotations

from msgspec import UNSET

from corral.clock import Clock, rfc3339
from corral.config import AgentSettings
from corral.governance.audit import Audit
from corral.governance.caller import Caller
from corral.models.catalogue import parse
from corral.protocol.errors import InvalidRequest
from corral.protocol.methods import AgentResult, AgentsListResult, AgentsUpsertParams, Params
from corral.protocol.types import Agent
from corral.storage.repositories import Transaction
from corral.storage.rows import AgentRow

DEFAULT_AGENT = "a_default"


def ensure_agents(
    tx: Transaction, tenant_id: str, workspace_id: str, configured: dict[str, AgentSettings], now_ms: int
) -> None:
    """Make `a_default` if it is not there, and bring the configured agents up to date.

    What `corral.toml` says of an agent wins over what was upserted before.
    """
    if tx.agents.get(tenant_id, workspace_id, DEFAULT_AGENT) is None and DEFAULT_AGENT not in configured:
        configured = {**configured, DEFAULT_AGENT: AgentSettings()}
    for agent_id, settings in configured.items():
        standing = tx.agents.get(tenant_id, workspace_id, agent_id)
        wanted = AgentRow(
            tenant_id=tenant_id,
            workspace_id=workspace_id,
            id=agent_id,
            name=standing.name if standing else agent_id,
            system_prompt=settings.system_prompt,
            model=settings.model,
            tools=settings.tools,
            created_at=standing.created_at if standing else now_ms,
            updated_at=standing.updated_at if standing else now_ms,
        )
        if wanted != standing:
            wanted.updated_at = now_ms
            tx.agents.upsert(wanted)


class AgentMethods:
    """`agents.list` and `agents.upsert`."""

    def __init__(self, clock: Clock, audit: Audit) -> None:
        self._clock = clock
        self._audit = audit

    def list(self, tx: Transaction, caller: Caller, _params: Params) -> AgentsListResult:
        """The workspace's agents, by id."""
        return AgentsListResult(items=[_view(row) for row in tx.agents.list(caller.tenant_id, caller.workspace_id)])

    def upsert(self, tx: Transaction, caller: Caller, params: AgentsUpsertParams) -> AgentResult:
        """Make an agent, or change the fields that are given of one that is there."""
        now = self._clock.now_ms()
        given = params.agent
        row = tx.agents.get(caller.tenant_id, caller.workspace_id, given.id) or AgentRow(
            tenant_id=caller.tenant_id,
            workspace_id=caller.workspace_id,
            id=given.id,
            name=given.id,
            system_prompt="",
            model=None,
            tools=None,
            created_at=now,
            updated_at=now,
        )
        if given.name is not UNSET:
            row.name = given.name
        if given.system_prompt is not UNSET:
            row.system_prompt = given.system_prompt
        if given.model is not UNSET:
            row.model = _known(given.model)
        if given.tools is not UNSET:
            row.tools = list(given.tools)
        row.updated_at = now
        tx.agents.upsert(row)
        shown = {"name": row.name, "model": row.model, "tools": row.tools, "systemPrompt": row.system_prompt}
        self._audit.record_by(tx, caller, "agents.upsert", "agent", row.id, metadata=shown)
        return AgentResult(agent=_view(row))


def _known(model: str) -> str:
    """`model`, if there is a provider for it. Raises InvalidRequest."""
    try:
        parse(model)
    except InvalidRequest as error:
        raise InvalidRequest(f"$.params.agent.model: {error.message}") from None
    return model


def _view(row: AgentRow) -> Agent:
    return Agent(
        id=row.id,
        name=row.name,
        system_prompt=row.system_prompt,
        model=row.model if row.model is not None else UNSET,
        tools=row.tools if row.tools is not None else UNSET,
        created_at=rfc3339(row.created_at),
        updated_at=rfc3339(row.updated_at),
    )
