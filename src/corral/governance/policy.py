"""Policy: what each layer says, how the layers are merged, and what that means for one call.

Layers, coarse to fine: the built-in default, tenant, workspace, agent. Of daily budgets
(`limits.perDay`) each layer has its own; `corral.governance.budgets` keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import msgspec
from msgspec import UNSET, Struct

from corral.clock import Clock, rfc3339
from corral.executor import catalogue
from corral.governance.access import require_session
from corral.governance.audit import Audit
from corral.governance.caller import Caller
from corral.governance.facts import CallFacts, facts_for
from corral.governance.policy_examples import check_rules
from corral.governance.rules import Evaluation, Match
from corral.protocol.errors import Conflict, Forbidden, InvalidRequest, NotFound
from corral.protocol.methods import (
    PolicyExplainParams,
    PolicyExplainResult,
    PolicyGetParams,
    PolicyResult,
    PolicyUpdateParams,
    PolicyUpdateResult,
)
from corral.protocol.ready import look_through
from corral.protocol.types import (
    BashMode,
    BashNetwork,
    DayLimits,
    Decision,
    Policy,
    PolicyDocument,
    PolicyLayer,
    PolicyLimits,
    PolicyModels,
    Risk,
)
from corral.storage.repositories import Transaction
from corral.storage.rows import PolicyRow, SessionRow

look_through(PolicyDocument)

DEFAULT_MAX_STEPS = 50
DEFAULT_AGENT = "a_default"

BUILT_IN = PolicyDocument(
    tool_default="deny",
    high_risk="approval-required",
    bash_mode="sandbox",
    bash_network="none",
    four_eyes=False,
    tools={
        "file.read": "allow",
        "file.list": "allow",
        "file.search": "allow",
        "file.write": "approval-required",
        "file.edit": "approval-required",
        "memory.read": "allow",
        "memory.search": "allow",
        "memory.append": "approval-required",
    },
)

_STRICTNESS: dict[str, int] = {"allow": 0, "approval-required": 1, "deny": 2}
_SCALARS = ("tool_default", "high_risk", "bash_mode", "bash_network", "four_eyes")


class Layer(Struct, kw_only=True, frozen=True):
    """One layer's document; `name` is `default`, `tenant`, `workspace` or `agent`."""

    name: str
    document: PolicyDocument


class Verdict(Struct, kw_only=True, frozen=True):
    """What policy says of a call, which layer said it, and why in a few words."""

    decision: Decision
    reason: str
    layer: str
    rule_id: str | None = None


class EffectivePolicy:
    """All layers that hold for one agent, coarse to fine."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = list(layers)

    def decide(self, call: CallFacts | str, risk: Risk | None = None) -> Verdict:
        """What is to happen with a call. Pure: all it needs is in the facts, which `facts_for` makes.

        An explicit deny in any layer wins; else the finest layer that says something decides,
        but never more loosely than a locked rule or entry of a coarser one.

        A bare tool name with its risk is a call of which nothing else is known: rules that ask
        for more count as failed.
        """
        if isinstance(call, str):
            call = CallFacts(tool=call, risk=risk or "high")
        evaluation = Evaluation(call)
        matched = [evaluation.matching(layer.document.rules) for layer in self.layers]
        verdict = Verdict(decision="deny", reason="toolDefault", layer="default")
        floors: list[Verdict] = []
        for layer, matches in zip(self.layers, matched, strict=True):
            entry = _entry(layer, call.tool)
            strictest = _strictest(layer, matches)
            if strictest is not None and strictest.decision == "deny":
                return strictest
            if entry is not None and entry.decision == "deny":
                return entry
            said = strictest or entry or _general(layer, call.risk, verdict)
            verdict = said if said is not None else verdict
            floors += _locked(layer, call.tool, matches, said)
        for floor in floors:
            if _STRICTNESS[floor.decision] > _STRICTNESS[verdict.decision]:
                verdict = floor
        return verdict

    @property
    def bash_mode(self) -> BashMode:
        return cast(BashMode, self._finest("bash_mode"))

    @property
    def bash_network(self) -> BashNetwork:
        return cast(BashNetwork, self._finest("bash_network"))

    @property
    def four_eyes(self) -> bool:
        """Whether any layer wants somebody else than who started a run to decide on its calls."""
        return any(layer.document.four_eyes for layer in self.layers)

    @property
    def max_steps(self) -> int | None:
        return cast("int | None", self._tightest("max_steps_per_run"))

    @property
    def max_tokens(self) -> int | None:
        return cast("int | None", self._tightest("max_tokens_per_run"))

    @property
    def max_cost_usd(self) -> float | None:
        return self._tightest("max_cost_usd_per_run")

    def day_limits(self) -> dict[str, DayLimits]:
        """Each layer's `limits.perDay`, of the layers that limit anything."""
        found = {layer.name: layer.document.limits.per_day for layer in self.layers}
        return {name: limits for name, limits in found.items() if limits != DayLimits()}

    def session_limits(self) -> DayLimits:
        """What one session may use up in a day: the tightest of the layers' `limits.sessionPerDay`."""
        return DayLimits(
            steps=cast("int | None", self._tightest_of_session("steps")),
            tokens=cast("int | None", self._tightest_of_session("tokens")),
            cost_usd=self._tightest_of_session("cost_usd"),
        )

    @property
    def primary_model(self) -> str | None:
        named = [layer.document.models.primary for layer in self.layers if layer.document.models.primary]
        return named[-1] if named else None

    @property
    def fallback_models(self) -> list[str] | None:
        named = [
            layer.document.models.fallbacks for layer in self.layers if layer.document.models.fallbacks is not None
        ]
        return named[-1] if named else None

    def allows_model(self, model: str) -> bool:
        """Whether every layer that limits the models lets this one through (names or globs)."""
        return all(
            any(fnmatchcase(model, pattern) for pattern in layer.document.models.allowed)
            for layer in self.layers
            if layer.document.models.allowed is not None
        )

    def merged(self) -> PolicyDocument:
        """All layers as one document, for showing; decisions are made on the layers."""
        tools: dict[str, Decision] = {}
        locked: set[str] = set()
        for layer in self.layers:
            tools.update(layer.document.tools)
            locked.update(layer.document.locked_tools)
        # A tool that a deny or a lock settles is shown as it is settled.
        for name in list(tools):
            for layer in self.layers:
                said = layer.document.tools.get(name)
                if said == "deny" or (name in layer.document.locked_tools and said is not None):
                    tools[name] = max(tools[name], said, key=_STRICTNESS.__getitem__)
        return PolicyDocument(
            tool_default=cast(Decision, self._finest("tool_default")),
            high_risk=cast(Decision, self._finest("high_risk")),
            bash_mode=self.bash_mode,
            bash_network=self.bash_network,
            four_eyes=self.four_eyes,
            tools=tools,
            locked_tools=sorted(locked),
            rules=[rule for layer in self.layers for rule in layer.document.rules],
            models=PolicyModels(primary=self.primary_model, fallbacks=self.fallback_models, allowed=self._allowed()),
            limits=PolicyLimits(
                max_steps_per_run=self.max_steps or DEFAULT_MAX_STEPS,
                max_tokens_per_run=self.max_tokens,
                max_cost_usd_per_run=self.max_cost_usd,
                per_day=DayLimits(
                    steps=cast("int | None", self._tightest_day("steps")),
                    tokens=cast("int | None", self._tightest_day("tokens")),
                    cost_usd=self._tightest_day("cost_usd"),
                ),
                session_per_day=self.session_limits(),
            ),
        )

    def _allowed(self) -> list[str] | None:
        lists = [layer.document.models.allowed for layer in self.layers if layer.document.models.allowed is not None]
        if not lists:
            return None
        return [pattern for pattern in lists[-1] if all(pattern in other for other in lists)]

    def _finest(self, field: str) -> str:
        values = [getattr(layer.document, field) for layer in self.layers]
        return cast(str, [value for value in values if value is not None][-1])

    def _tightest(self, field: str) -> float | None:
        values = [getattr(layer.document.limits, field) for layer in self.layers]
        return min((value for value in values if value is not None), default=None)

    def _tightest_day(self, field: str) -> float | None:
        values = [getattr(limits, field) for limits in self.day_limits().values()]
        return min((value for value in values if value is not None), default=None)

    def _tightest_of_session(self, field: str) -> float | None:
        values = [getattr(layer.document.limits.session_per_day, field) for layer in self.layers]
        return min((value for value in values if value is not None), default=None)


def _entry(layer: Layer, tool_name: str) -> Verdict | None:
    """What the layer's `tools` say of a tool."""
    entry = layer.document.tools.get(tool_name)
    if entry is None:
        return None
    reason = f"tools: {tool_name} is denied" if entry == "deny" else f"tools: {tool_name}"
    return Verdict(decision=entry, reason=reason, layer=layer.name)


def _strictest(layer: Layer, matches: Sequence[Match]) -> Verdict | None:
    """What the strictest of a layer's matching rules says; of equals the first."""
    if not matches:
        return None
    match = max(matches, key=lambda each: _STRICTNESS[each.rule.action])
    reason = match.rule.reason or f"rule {match.rule.id}"
    if match.why is not None:
        reason = f"{reason} ({match.why})"
    return Verdict(decision=match.rule.action, reason=reason, layer=layer.name, rule_id=match.rule.id)


def _locked(layer: Layer, tool_name: str, matches: Sequence[Match], said: Verdict | None) -> list[Verdict]:
    """What finer layers may not loosen: locked rules that match, and a locked entry.

    A layer may make exceptions to its own locked entry by its own rules; they hold for finer layers too.
    """
    floors = []
    locked_rule = _strictest(layer, [match for match in matches if match.rule.locked is True])
    if locked_rule is not None:
        floors.append(locked_rule)
    entry = _entry(layer, tool_name)
    if entry is not None and said is not None and tool_name in layer.document.locked_tools:
        floors.append(
            min(
                Verdict(decision=entry.decision, reason=f"tools: {tool_name} is locked", layer=layer.name),
                said,
                key=lambda each: _STRICTNESS[each.decision],
            )
        )
    return floors


def _general(layer: Layer, risk: Risk, coarser: Verdict) -> Verdict | None:
    """What a layer says of a tool that it does not name, None if it leaves it to the coarser ones.

    Of a high-risk tool a layer speaks by `highRisk`; its `toolDefault` alone may tighten what
    the coarser layers say, never loosen it, so that opening the default does not open the shell.
    """
    document = layer.document
    if risk == "high" and document.high_risk is not None:
        return Verdict(decision=document.high_risk, reason="highRisk", layer=layer.name)
    default = document.tool_default
    if default is None or (risk == "high" and _STRICTNESS[default] <= _STRICTNESS[coarser.decision]):
        return None
    return Verdict(decision=default, reason="toolDefault", layer=layer.name)


# ---- the store's side


def scope_key(caller_tenant: str, workspace_id: str, layer: PolicyLayer, agent_id: str | None) -> str:
    """The address of one layer's document within its tenant."""
    if layer == "tenant":
        return f"tenant:{caller_tenant}"
    if layer == "workspace":
        return f"workspace:{workspace_id}"
    return f"workspace:{workspace_id}/agent:{agent_id}"


def effective_policy(tx: Transaction, tenant_id: str, workspace_id: str, agent_id: str | None) -> EffectivePolicy:
    """The layers that hold for an agent (or, without one, for the workspace), read in this transaction."""
    names: list[tuple[PolicyLayer, str]] = [
        ("tenant", scope_key(tenant_id, workspace_id, "tenant", None)),
        ("workspace", scope_key(tenant_id, workspace_id, "workspace", None)),
    ]
    if agent_id is not None:
        names.append(("agent", scope_key(tenant_id, workspace_id, "agent", agent_id)))
    rows = tx.policies.get_many(tenant_id, [key for _, key in names])
    layers = [Layer(name="default", document=BUILT_IN)]
    for name, key in names:
        row = rows.get(key)
        if row is not None:
            layers.append(Layer(name=name, document=msgspec.convert(row.document, PolicyDocument)))
    return EffectivePolicy(layers)


def ensure_policies(tx: Transaction, tenant_id: str, workspace_id: str, now_ms: int) -> None:
    """Give a new tenant and its workspace their first, empty documents: version 1, saying nothing."""
    layers: tuple[PolicyLayer, ...] = ("tenant", "workspace")
    for layer in layers:
        key = scope_key(tenant_id, workspace_id, layer, None)
        if tx.policies.get(tenant_id, key) is None:
            tx.policies.upsert(
                PolicyRow(
                    tenant_id=tenant_id,
                    scope_key=key,
                    layer=layer,
                    workspace_id=workspace_id,
                    agent_id=None,
                    document={},
                    version=1,
                    updated_at=now_ms,
                )
            )


Folder = Callable[[str, str, SessionRow | None], Path]
"""Where calls work: of a tenant and its workspace, in a session (None: one made without a root)."""


class PolicyMethods:
    """`policy.get`, `policy.update` and `policy.explain`.

    `folder` says where a session works; without it no call has the fact `path` in explanations.
    """

    def __init__(self, clock: Clock, audit: Audit, folder: Folder | None = None) -> None:
        self._clock = clock
        self._audit = audit
        self._folder = folder

    def get(self, tx: Transaction, caller: Caller, params: PolicyGetParams) -> PolicyResult:
        """One layer's document, or with `effective` the merge of all that hold there."""
        layer, agent_id = _address(tx, caller, params)
        if params.effective:
            merged = effective_policy(tx, caller.tenant_id, caller.workspace_id, agent_id).merged()
            return PolicyResult(policy=self._view(tx, caller, layer, agent_id, merged))
        return PolicyResult(policy=self._view(tx, caller, layer, agent_id, None))

    def update(self, tx: Transaction, caller: Caller, params: PolicyUpdateParams) -> PolicyUpdateResult:
        """Apply a JSON Merge Patch to one layer's document; the version goes up by one.

        Raises Conflict if `expectedVersion` is stale and InvalidRequest if the result is no
        policy, Forbidden for the tenant's layer where it holds in workspaces that the caller may not
        enter; then nothing is changed.
        """
        layer, agent_id = _address(tx, caller, params)
        if layer == "tenant":
            _require_whole_tenant(tx, caller)
        key = scope_key(caller.tenant_id, caller.workspace_id, layer, agent_id)
        row = tx.policies.get(caller.tenant_id, key)
        version = row.version if row is not None else 0
        if params.expected_version is not UNSET and params.expected_version != version:
            raise Conflict(
                f"the policy is at version {version}, not at $.params.expectedVersion: read it again",
                details={"version": version},
            )
        document = _patched(row.document if row is not None else {}, params.patch)
        now = self._clock.now_ms()
        tx.policies.upsert(
            PolicyRow(
                tenant_id=caller.tenant_id,
                scope_key=key,
                layer=layer,
                workspace_id=caller.workspace_id,
                agent_id=agent_id,
                document=document,
                version=version + 1,
                updated_at=now,
            )
        )
        shown = {"layer": layer, "patch": params.patch, "version": version + 1}
        self._audit.record_by(tx, caller, "policy.update", "policy", key, metadata=shown)
        policy = self._view(tx, caller, layer, agent_id, None)
        return PolicyUpdateResult(policy=policy, version=version + 1, updated_at=rfc3339(now))

    def explain(self, tx: Transaction, caller: Caller, params: PolicyExplainParams) -> PolicyExplainResult:
        """What would happen with a call and why; nothing happens, and nothing is kept.

        With a session it is judged as a call of a run there that the caller started, in the mode that
        the next run would have. Without one there is no `session.id`, and the mode is `local`.
        Raises NotFound for a session that the caller may not see and for an agent that is not there.
        """
        session = self._session(tx, caller, params)
        workspace_id = session.workspace_id if session is not None else caller.workspace_id
        agent_id = session.agent_id if session is not None else DEFAULT_AGENT
        if params.agent_id is not UNSET:
            agent_id = params.agent_id
        agent = tx.agents.get(caller.tenant_id, workspace_id, agent_id)
        if agent is None and params.agent_id is not UNSET:
            raise NotFound("there is no such agent: agents.list shows the ones there are")
        spec = catalogue.spec(params.tool_name)
        about: dict[str, Any] = {"agentId": agent_id, "runtimeMode": "local"}
        if session is not None:
            mode = session.queued_runtime_mode or session.runtime_mode
            about = {"id": session.id, "agentId": agent_id, "runtimeMode": mode}
        call = facts_for(
            params.tool_name,
            spec.risk if spec is not None else "high",
            params.args,
            session=about,
            actor=caller.principal.subject,
            root=self._folder(caller.tenant_id, workspace_id, session) if self._folder is not None else None,
        )
        problem = catalogue.problem(params.tool_name, params.args)
        if agent is not None and agent.tools is not None and params.tool_name not in agent.tools:
            problem = f"the agent {agent_id} does not have this tool"
        if problem is not None:
            verdict = Verdict(decision="deny", reason=f"the call cannot be run: {problem}", layer="default")
        else:
            verdict = effective_policy(tx, caller.tenant_id, workspace_id, agent_id).decide(call)
        return PolicyExplainResult(
            decision=verdict.decision,
            reason=verdict.reason,
            layer=verdict.layer,
            rule_id=verdict.rule_id if verdict.rule_id is not None else UNSET,
            facts=call.as_dict(),
        )

    def _session(self, tx: Transaction, caller: Caller, params: PolicyExplainParams) -> SessionRow | None:
        if params.session_id is UNSET:
            return None
        return require_session(tx, caller, params.session_id)

    def _view(
        self, tx: Transaction, caller: Caller, layer: PolicyLayer, agent_id: str | None, merged: PolicyDocument | None
    ) -> Policy:
        key = scope_key(caller.tenant_id, caller.workspace_id, layer, agent_id)
        row = tx.policies.get(caller.tenant_id, key)
        document = merged or msgspec.convert(row.document if row is not None else {}, PolicyDocument)
        above = EffectivePolicy(_layers_up_to(tx, caller, layer, agent_id)).merged()
        inherited = [name for name in _SCALARS if getattr(document, name) is None]
        scalars = {name: getattr(above if name in inherited else document, name) for name in _SCALARS}
        return Policy(
            tenant_id=caller.tenant_id,
            workspace_id=caller.workspace_id,
            agent_id=agent_id if agent_id is not None else UNSET,
            layer=layer,
            scope_key=key,
            inherited=[_camel(name) for name in inherited],
            tools=document.tools,
            locked_tools=document.locked_tools,
            rules=document.rules,
            models=document.models,
            limits=document.limits,
            version=row.version if row is not None else 0,
            updated_at=rfc3339(row.updated_at) if row is not None else None,
            **scalars,
        )


def _layers_up_to(tx: Transaction, caller: Caller, layer: PolicyLayer, agent_id: str | None) -> list[Layer]:
    whole = effective_policy(tx, caller.tenant_id, caller.workspace_id, agent_id).layers
    order = ["default", "tenant", "workspace", "agent"]
    return [each for each in whole if order.index(each.name) <= order.index(layer)]


def _address(
    tx: Transaction, caller: Caller, params: PolicyGetParams | PolicyUpdateParams
) -> tuple[PolicyLayer, str | None]:
    agent_id = params.agent_id if params.agent_id is not UNSET else None
    layer: PolicyLayer = "agent" if agent_id is not None else "workspace"
    if params.layer is not UNSET:
        layer = params.layer
    if layer != "agent":
        return layer, None
    if agent_id is None:
        raise InvalidRequest('$.params.agentId is required with "layer": "agent"')
    if tx.agents.get(caller.tenant_id, caller.workspace_id, agent_id) is None:
        raise NotFound("there is no such agent: agents.list shows the ones there are")
    return layer, agent_id


def _require_whole_tenant(tx: Transaction, caller: Caller) -> None:
    """Raise Forbidden for an admin of some of the tenant's workspaces: its layer holds in all of them."""
    beyond = set(tx.tenants.workspace_ids(caller.tenant_id)) - set(caller.principal.workspace_ids)
    if beyond and "owner" not in caller.principal.roles:
        raise Forbidden("$.params.layer: the tenant's holds in workspaces too that you may not enter; ask an owner")


def _patched(document: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    result = cast("dict[str, Any]", merge_patch(document, patch))
    try:
        checked = msgspec.convert(result, PolicyDocument)
    except msgspec.ValidationError as error:
        problem = str(error) if " - at `$" in str(error) else f"{error} - at `$`"
        raise InvalidRequest(problem.replace("`$", "`$.params.patch")) from None
    if "rules" in patch:
        check_rules(checked.rules, patch["rules"] or [])
    return result


def merge_patch(target: Any, patch: Any) -> Any:
    """JSON Merge Patch, RFC 7396, section 2: null removes, objects merge, all else replaces."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merge_patch(result.get(name), value)
    return result


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)
