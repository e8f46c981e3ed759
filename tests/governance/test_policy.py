"""What policy decides: layers, locks, high-risk tools; and how its documents are changed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.clock import SystemClock
from corral.core.agents import ensure_agents
from corral.governance.audit import Audit
from corral.governance.caller import Caller
from corral.governance.policy import (
    PolicyMethods,
    effective_policy,
    ensure_policies,
    merge_patch,
)
from corral.protocol.errors import Conflict, InvalidRequest, NotFound
from corral.protocol.methods import PolicyExplainParams, PolicyGetParams, PolicyUpdateParams
from corral.storage.rows import SessionRow
from corral.storage.sqlite import SqliteStore
from tests.support.callers import caller_of
from tests.support.policies import layered

STRICT = {"allow": 0, "approval-required": 1, "deny": 2}


@pytest.mark.parametrize(
    ("tool", "risk", "decision"),
    [
        ("file.read", "low", "allow"),
        ("file.list", "low", "allow"),
        ("file.search", "low", "allow"),
        ("memory.read", "low", "allow"),
        ("memory.search", "low", "allow"),
        ("memory.append", "medium", "approval-required"),
        ("file.write", "medium", "approval-required"),
        ("file.edit", "medium", "approval-required"),
        ("bash.exec", "high", "approval-required"),
        ("process.exec", "high", "approval-required"),
        ("http.request", "high", "approval-required"),
        ("something.else", "low", "deny"),
    ],
)
def test_the_built_in_default_allows_reads_and_asks_for_the_rest(tool: str, risk: Any, decision: str) -> None:
    assert layered().decide(tool, risk).decision == decision


def test_an_explicit_deny_wins_over_a_finer_allow() -> None:
    policy = layered(tenant={"tools": {"bash.exec": "deny"}}, agent={"tools": {"bash.exec": "allow"}})
    verdict = policy.decide("bash.exec", "high")
    assert (verdict.decision, verdict.layer) == ("deny", "tenant")


def test_the_finest_layer_that_says_something_decides() -> None:
    policy = layered(
        tenant={"tools": {"file.write": "allow"}},
        workspace={"tools": {"file.write": "approval-required"}},
        agent={"toolDefault": "allow"},
    )
    assert policy.decide("file.write", "medium").layer == "agent"
    assert policy.decide("file.write", "medium").decision == "allow"


def test_opening_the_default_does_not_open_high_risk_tools() -> None:
    policy = layered(workspace={"toolDefault": "allow"})
    assert policy.decide("bash.exec", "high").decision == "approval-required"
    assert policy.decide("file.write", "medium").decision == "allow"


def test_closing_the_default_closes_high_risk_tools_too() -> None:
    policy = layered(tenant={"highRisk": "allow"}, workspace={"toolDefault": "deny"})
    assert policy.decide("bash.exec", "high").decision == "deny"


def test_a_locked_entry_is_not_loosened_by_a_finer_layer() -> None:
    policy = layered(
        tenant={"tools": {"file.write": "approval-required"}, "lockedTools": ["file.write"]},
        workspace={"tools": {"file.write": "allow"}},
    )
    assert policy.decide("file.write", "medium").decision == "approval-required"


def test_a_locked_entry_may_be_tightened() -> None:
    policy = layered(
        tenant={"tools": {"file.write": "allow"}, "lockedTools": ["file.write"]},
        workspace={"tools": {"file.write": "approval-required"}},
    )
    assert policy.decide("file.write", "medium").decision == "approval-required"


ACTIONS = st.sampled_from(["allow", "approval-required", "deny"])
DOCUMENT = st.fixed_dictionaries(
    {},
    optional={
        "toolDefault": ACTIONS,
        "highRisk": ACTIONS,
        "tools": st.dictionaries(st.sampled_from(["t", "u"]), ACTIONS, max_size=2),
    },
)


@given(locked=ACTIONS, finer=st.lists(DOCUMENT, min_size=1, max_size=2), risk=st.sampled_from(["low", "high"]))
def test_no_finer_layer_loosens_a_locked_entry_whatever_it_says(locked: str, finer: list[Any], risk: Any) -> None:
    names = ["workspace", "agent"]
    policy = layered(tenant={"tools": {"t": locked}, "lockedTools": ["t"]}, **dict(zip(names, finer, strict=False)))
    assert STRICT[policy.decide("t", risk).decision] >= STRICT[locked]


@given(layers=st.lists(DOCUMENT, min_size=3, max_size=3), risk=st.sampled_from(["low", "high"]))
def test_a_deny_anywhere_is_final(layers: list[Any], risk: Any) -> None:
    policy = layered(**dict(zip(["tenant", "workspace", "agent"], layers, strict=True)))
    if any(document.get("tools", {}).get("t") == "deny" for document in layers):
        assert policy.decide("t", risk).decision == "deny"


def test_limits_are_the_tightest_of_all_layers() -> None:
    policy = layered(
        tenant={"limits": {"maxStepsPerRun": 10, "maxCostUsdPerRun": 2}}, agent={"limits": {"maxStepsPerRun": 30}}
    )
    assert (policy.max_steps, policy.max_cost_usd, policy.max_tokens) == (10, 2, None)


def test_every_layer_that_lists_models_must_let_one_through() -> None:
    policy = layered(
        tenant={"models": {"allowed": ["openai-chat:*", "demo"]}}, workspace={"models": {"allowed": ["openai-chat:a"]}}
    )
    assert policy.allows_model("openai-chat:a")
    assert not policy.allows_model("openai-chat:b")
    assert not policy.allows_model("demo")
    assert layered().allows_model("anything:at-all")


# RFC 7396, appendix A: target, patch, result.
RFC_EXAMPLES: list[tuple[Any, Any, Any]] = [
    ({"a": "b"}, {"a": "c"}, {"a": "c"}),
    ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
    ({"a": "b"}, {"a": None}, {}),
    ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
    ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
    ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
    ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
    ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
    (["a", "b"], ["c", "d"], ["c", "d"]),
    ({"a": "b"}, ["c"], ["c"]),
    ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
    ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
]


@pytest.mark.parametrize(("target", "patch", "result"), RFC_EXAMPLES)
def test_a_merge_patch_does_what_the_rfc_shows(target: Any, patch: Any, result: Any) -> None:
    assert merge_patch(target, patch) == result


# ---- get and update on a real store


def somebody(tenant: str = "t", workspace: str = "w") -> Caller:
    return caller_of("u", tenant=tenant, workspace=workspace)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[SqliteStore]:
    opened = await SqliteStore.open(tmp_path / "corral.db", SystemClock())

    def first(tx: Any) -> None:
        for tenant in ("t", "other"):
            tx.tenants.ensure(tenant, "w", "u", now_ms=1)
            ensure_agents(tx, tenant, "w", {}, 1)
            ensure_policies(tx, tenant, "w", 1)

    await opened.write(first)
    yield opened
    await opened.close()


methods = PolicyMethods(SystemClock(), Audit(SystemClock()))


async def update(store: SqliteStore, patch: dict[str, Any], **rest: Any) -> Any:
    params = PolicyUpdateParams(idempotency_key="k", patch=patch, **rest)
    return await store.write(lambda tx: methods.update(tx, somebody(), params))


async def get(store: SqliteStore, caller: Caller | None = None, **params: Any) -> Any:
    answer = await store.read(lambda tx: methods.get(tx, caller or somebody(), PolicyGetParams(**params)))
    return answer.policy


async def test_a_layer_that_says_nothing_shows_what_holds_for_it_and_that_it_is_inherited(store: SqliteStore) -> None:
    policy = await get(store)
    assert (policy.layer, policy.scope_key, policy.version) == ("workspace", "workspace:w", 1)
    assert (policy.tool_default, policy.high_risk, policy.bash_mode) == ("deny", "approval-required", "sandbox")
    assert policy.inherited == ["toolDefault", "highRisk", "bashMode", "bashNetwork", "fourEyes"]
    assert policy.tools == {}


async def test_an_update_is_a_new_version_and_holds_at_once(store: SqliteStore) -> None:
    answer = await update(store, {"tools": {"bash.exec": "allow"}, "bashNetwork": "host"}, expected_version=1)
    assert answer.version == answer.policy.version == 2
    assert answer.policy.inherited == ["toolDefault", "highRisk", "bashMode", "fourEyes"]
    effective = await store.read(lambda tx: effective_policy(tx, "t", "w", None))
    assert effective.decide("bash.exec", "high").decision == "allow"
    assert (effective.bash_network, effective.bash_mode) == ("host", "sandbox")


async def test_null_in_a_patch_takes_a_statement_back(store: SqliteStore) -> None:
    await update(store, {"tools": {"bash.exec": "allow", "file.write": "allow"}})
    answer = await update(store, {"tools": {"bash.exec": None}})
    assert answer.policy.tools == {"file.write": "allow"}


async def test_a_stale_expected_version_is_a_conflict_that_tells_the_version(store: SqliteStore) -> None:
    await update(store, {"toolDefault": "allow"})
    with pytest.raises(Conflict) as caught:
        await update(store, {"toolDefault": "deny"}, expected_version=1)
    assert caught.value.details == {"version": 2}
    assert (await get(store)).tool_default == "allow"


@pytest.mark.parametrize(
    ("patch", "named"),
    [
        ({"toolDefault": "maybe"}, "$.params.patch.toolDefault"),
        ({"tools": {"x": "yes"}}, "$.params.patch.tools"),
        ({"nonsense": 1}, "`nonsense` - at `$.params.patch`"),
        ({"limits": {"maxStepsPerRun": 0}}, "$.params.patch.limits.maxStepsPerRun"),
        ({"rules": [{"id": "r", "tools": ["*"], "action": "deny", "when": "("}]}, "$.params.patch.rules[0].when"),
        ({"limits": {"perDay": {"steps": -1}}}, "$.params.patch.limits.perDay.steps"),
    ],
)
async def test_what_is_no_policy_or_would_not_be_enforced_is_refused_whole(
    store: SqliteStore, patch: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await update(store, {"highRisk": "deny", **patch})
    assert named in caught.value.message
    assert (await get(store)).version == 1


async def test_an_agent_layer_belongs_to_an_agent_that_is_there(store: SqliteStore) -> None:
    policy = await get(store, agent_id="a_default")
    assert (policy.layer, policy.scope_key) == ("agent", "workspace:w/agent:a_default")
    with pytest.raises(NotFound):
        await get(store, agent_id="a_other")
    with pytest.raises(InvalidRequest, match="agentId"):
        await get(store, layer="agent")


async def test_the_effective_policy_is_the_merge_of_all_layers(store: SqliteStore) -> None:
    await update(store, {"tools": {"bash.exec": "deny"}}, layer="tenant")
    await update(store, {"tools": {"bash.exec": "allow", "file.write": "allow"}, "highRisk": "allow"})
    policy = await get(store, effective=True)
    assert policy.tools["bash.exec"] == "deny"
    assert policy.tools["file.write"] == "allow"
    assert policy.tools["file.read"] == "allow"
    assert policy.high_risk == "allow"
    assert policy.limits.max_steps_per_run == 50


async def test_a_tenants_policy_is_its_own(store: SqliteStore) -> None:
    await update(store, {"toolDefault": "allow"}, layer="tenant")
    assert (await get(store, somebody("other"), layer="tenant")).tool_default == "deny"


# ---- rules and explanations on a real store

LS_ONLY = {
    "id": "ls",
    "tools": ["bash.exec"],
    "when": 'shell.simple && shell.commands.all(c, c.name == "ls")',
    "action": "allow",
    "match": ["ls -l"],
    "not_match": ["rm x", "ls > x"],
}


def folder(tenant: str, workspace: str, session: SessionRow | None) -> Path:
    return Path(session.root) if session is not None and session.root else Path("/nowhere") / tenant / workspace


explaining = PolicyMethods(SystemClock(), Audit(SystemClock()), folder)


async def explain(
    store: SqliteStore, tool: str, args: dict[str, Any], caller: Caller | None = None, **rest: Any
) -> Any:
    params = PolicyExplainParams(tool_name=tool, args=args, **rest)
    return await store.read(lambda tx: explaining.explain(tx, caller or somebody(), params))


def session_row(session_id: str, **changes: Any) -> SessionRow:
    fields: dict[str, Any] = {
        "tenant_id": "t",
        "id": session_id,
        "workspace_id": "w",
        "agent_id": "a_default",
        "owner_user_id": "u",
        "session_key": f"key-{session_id}",
        "visibility": "private",
        "title": "",
        "preview": "",
        "runtime_mode": "local",
        "created_at": 1,
        "updated_at": 1,
    }
    return SessionRow(**{**fields, **changes})


async def test_rules_are_kept_shown_and_hold_at_once(store: SqliteStore) -> None:
    answer = await update(store, {"rules": [LS_ONLY]})
    assert [rule.id for rule in answer.policy.rules] == ["ls"]
    assert [rule.id for rule in (await get(store, effective=True)).rules] == ["ls"]
    assert (await explain(store, "bash.exec", {"command": "ls"})).decision == "allow"
    await update(store, {"rules": None})
    assert (await explain(store, "bash.exec", {"command": "ls"})).decision == "approval-required"


async def test_a_rule_whose_example_fails_changes_nothing_and_is_named_by_its_place(store: SqliteStore) -> None:
    await update(store, {"rules": [LS_ONLY]})
    wrong = {**LS_ONLY, "id": "wrong", "match": ["rm x"]}
    with pytest.raises(InvalidRequest, match=r"\$\.params\.patch\.rules\[1\]\.match\[0\]"):
        await update(store, {"rules": [LS_ONLY, wrong]})
    assert (await get(store)).version == 2


async def test_a_patch_of_something_else_leaves_the_rules_alone(store: SqliteStore) -> None:
    await update(store, {"rules": [LS_ONLY]})
    assert [rule.id for rule in (await update(store, {"highRisk": "deny"})).policy.rules] == ["ls"]


async def test_an_explanation_shows_decision_reason_layer_rule_and_facts(store: SqliteStore) -> None:
    await update(store, {"rules": [LS_ONLY]}, layer="tenant")
    told = await explain(store, "bash.exec", {"command": "ls -l"})
    assert (told.decision, told.layer, told.rule_id, told.reason) == ("allow", "tenant", "ls", "rule ls")
    assert told.facts == {
        "tool": "bash.exec",
        "risk": "high",
        "args": {"command": "ls -l"},
        "session": {"agentId": "a_default", "runtimeMode": "local"},
        "actor": "u",
        "shell": {"simple": True, "commands": [{"name": "ls", "base": "ls", "argv": ["ls", "-l"]}]},
    }
    told = await explain(store, "file.read", {"path": "../x"})
    assert told.facts["path"] == {"absolute": "/nowhere/t/x", "relative": "../x", "inWorkspace": False}
    assert msgspec.json.encode(told)


async def test_an_explanation_takes_mode_agent_and_folder_from_the_session(store: SqliteStore, tmp_path: Path) -> None:
    row = session_row("s", runtime_mode="local", queued_runtime_mode="cloud", root=str(tmp_path))
    await store.write(lambda tx: tx.sessions.insert(row))
    told = await explain(store, "file.read", {"path": "x"}, session_id="s")
    assert told.facts["session"] == {"id": "s", "agentId": "a_default", "runtimeMode": "cloud"}
    assert told.facts["path"]["inWorkspace"] is True
    assert told.facts["path"]["absolute"] == str(tmp_path / "x")


async def test_an_explanation_tells_nothing_of_sessions_that_the_caller_may_not_see(store: SqliteStore) -> None:
    await store.write(lambda tx: tx.sessions.insert(session_row("hers", owner_user_id="v")))
    await store.write(lambda tx: tx.sessions.insert(session_row("shared", owner_user_id="v", visibility="workspace")))
    await store.write(lambda tx: tx.sessions.insert(session_row("foreign", tenant_id="other")))
    messages = set()
    for session_id in ("hers", "foreign", "none"):
        with pytest.raises(NotFound) as caught:
            await explain(store, "file.read", {"path": "x"}, session_id=session_id)
        messages.add(caught.value.message)
    assert len(messages) == 1
    assert (await explain(store, "file.read", {"path": "x"}, session_id="shared")).decision == "allow"


async def test_an_explanation_of_a_call_that_cannot_run_says_so(store: SqliteStore) -> None:
    await update(store, {"toolDefault": "allow", "highRisk": "allow"})
    for tool, args in (("no.tool", {}), ("bash.exec", {"command": 5}), ("bash.exec", {})):
        told = await explain(store, tool, args)
        assert told.decision == "deny"
        assert "cannot be run" in told.reason
    with pytest.raises(NotFound):
        await explain(store, "file.read", {"path": "x"}, agent_id="a_none")


async def test_an_explanation_is_what_the_agents_own_layer_makes_it(store: SqliteStore) -> None:
    await update(store, {"tools": {"file.read": "deny"}}, agent_id="a_default")
    assert (await explain(store, "file.read", {"path": "x"})).layer == "agent"
