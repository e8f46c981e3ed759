"""What a rule must show before it is kept: that it compiles, and that its own examples come out as it says.

An example is one of
- a text: the command of a `bash.exec` call;
- an object with any of `tool` (or `toolName`), `args`, `session`, `actor`: that call;
- any other object: the arguments of a call.

Where an example names no tool it stands for every tool that the rule's `tools` match and that takes such
arguments. `match` examples must match the rule for each of them, `not_match` examples for none. What an
example leaves out is filled in: a session `s_example` of agent `a_default` in mode `local`, the actor
`u_example`, and as the session's folder `/example/workspace`, whose links nobody follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET

from corral.executor import catalogue
from corral.governance.facts import CallFacts, facts_for
from corral.governance.rules import MAX_RULES, Evaluation, RuleProblem, compile_condition
from corral.protocol.errors import InvalidRequest
from corral.protocol.types import PolicyRule

MAX_EXAMPLES = 100
"""`match` and `not_match` examples of one rule, each."""

_ROOT = Path("/example/workspace")
_SESSION = {"id": "s_example", "agentId": "a_default", "runtimeMode": "local"}
_ACTOR = "u_example"
_RULE_FIELDS = frozenset(each.encode_name for each in msgspec.structs.fields(PolicyRule))
_FIELDS = frozenset({"tool", "toolName", "args", "session", "actor"})


def check_rules(rules: Sequence[PolicyRule], sent: Sequence[dict[str, Any]]) -> None:
    """Raise InvalidRequest, naming the place, for the first rule that cannot be kept.

    `sent` is the rules as they came: a field that nobody knows is refused, because `whem` for `when`
    would make a rule that always matches.
    """
    where = "$.params.patch.rules"
    for index, raw in enumerate(sent):
        if unknown := raw.keys() - _RULE_FIELDS:
            raise InvalidRequest(f"{where}[{index}].{min(unknown)[:128]}: a rule has no such field")
    if len(rules) > MAX_RULES:
        raise InvalidRequest(f"{where}: {len(rules)} rules, at most {MAX_RULES} are possible in one layer")
    first: dict[str, int] = {}
    for index, rule in enumerate(rules):
        place = f"{where}[{index}]"
        if rule.id in first:
            raise InvalidRequest(f"{place}.id: {rule.id!r} is also the id of rule {first[rule.id]}")
        first[rule.id] = index
        if rule.when is not UNSET:
            try:
                compile_condition(rule.when)
            except RuleProblem as problem:
                raise InvalidRequest(f"{place}.when: does not compile: {problem}") from None
        _check_examples(rule, place)


def _check_examples(rule: PolicyRule, place: str) -> None:
    for name, examples, wanted in (("match", rule.match, True), ("not_match", rule.not_match, False)):
        if examples is UNSET:
            continue
        if len(examples) > MAX_EXAMPLES:
            raise InvalidRequest(f"{place}.{name}: at most {MAX_EXAMPLES} examples are possible")
        for index, example in enumerate(examples):
            _check_example(rule, example, wanted, f"{place}.{name}[{index}]")


def _check_example(rule: PolicyRule, example: Any, wanted: bool, place: str) -> None:
    for call in _calls(rule, example, place):
        match = Evaluation(call).match(rule)
        if (match is not None) is not wanted:
            says = "matches" if match is not None else "does not match"
            why = f" ({match.why})" if match is not None and match.why is not None else ""
            raise InvalidRequest(f"{place}: the rule {says} this example of a {call.tool} call{why}")


def _calls(rule: PolicyRule, example: Any, place: str) -> list[CallFacts]:
    """The calls that an example stands for."""
    if isinstance(example, str):
        example = {"tool": "bash.exec", "args": {"command": example}}
    if not isinstance(example, dict):
        raise InvalidRequest(f"{place}: an example is a command's text or an object")
    call = example if _FIELDS & example.keys() else {"args": example}
    if unknown := call.keys() - _FIELDS:
        raise InvalidRequest(f"{place}: unknown field {min(unknown)!r} beside {', '.join(sorted(_FIELDS))}")
    args, session = call.get("args", {}), call.get("session", {})
    if not isinstance(args, dict) or not isinstance(session, dict):
        raise InvalidRequest(f"{place}: args and session are objects")
    tool, actor = call.get("tool", call.get("toolName")), call.get("actor", _ACTOR)
    if not isinstance(tool, str | None) or not isinstance(actor, str):
        raise InvalidRequest(f"{place}: tool and actor are texts")
    tools = [tool] if tool is not None else _tools_taking(rule, args)
    if not tools:
        raise InvalidRequest(f"{place}: no tool of this rule takes such arguments; name the tool and its args")
    return [
        facts_for(
            name,
            spec.risk if (spec := catalogue.spec(name)) is not None else "high",
            args,
            session={**_SESSION, **session},
            actor=actor,
            root=_ROOT,
        )
        for name in tools
    ]


def _tools_taking(rule: PolicyRule, args: dict[str, Any]) -> list[str]:
    named = [name for name in rule.tools if not any(char in name for char in "*?[")]
    known = [
        name
        for name in catalogue.ARGUMENTS
        if any(fnmatchcase(name, pattern) for pattern in rule.tools) and catalogue.problem(name, args) is None
    ]
    # A tool that is not built in (an MCP server's) takes what it is given here.
    return known + [name for name in named if name not in catalogue.ARGUMENTS]
