"""Policy conditions, well-formed and spoilt, over calls of every kind: always a decision, and soon.

What must hold: nothing but RuleProblem is ever raised, and no decision takes longer than its budget; a
condition that has no value matches nothing that allows and all that restricts; what a rule that restricts
says, no rule beside it takes away.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from corral.governance.facts import CallFacts, facts_for
from corral.governance.policy import BUILT_IN, EffectivePolicy, Layer
from corral.governance.rules import Evaluation, RuleProblem, compile_condition, measure
from corral.protocol.types import PolicyDocument, PolicyRule
from tests.fuzz.support import LETTERS, VALUES
from tests.support.examples import examples

STRICT = {"allow": 0, "approval-required": 1, "deny": 2}
SESSION = {"id": "s", "agentId": "a", "runtimeMode": "local"}

TEXTS = st.one_of(st.text(max_size=5), st.sampled_from(["ls", "rm", "bash.exec", "(a+)+$", "[", "\\\\", "é", "x" * 99]))
QUOTED = TEXTS.map(lambda text: msgspec.json.encode(text).decode())
NAMES = st.sampled_from(
    [
        *("tool", "risk", "args", "session.id", "actor", "shell.simple", "shell.commands", "argv", "path.absolute"),
        *("path.inWorkspace", "url.host", "url.port", "args.command", "args['command']", "shell.commands[0].argv[1]"),
        *("nobody", "args.no.such", "true", "false", "null", "1", "-1", "1.5", "9223372036854775807", "1u", "[]", "{}"),
    ]
)


def compound(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    two = st.tuples(inner, inner)
    signs = st.sampled_from(["==", "!=", "<", ">=", "&&", "||", "+", "-", "*", "/", "%", "in"])
    macros = st.sampled_from(["all", "exists", "exists_one", "map", "filter"])
    calls = st.sampled_from(["size", "string", "int", "bool", "double", "type", "duration", "timestamp", "none"])
    methods = st.sampled_from(["startsWith", "contains", "matches", "endsWith", "split"])
    return st.one_of(
        st.tuples(inner, signs, inner).map(lambda parts: f"({' '.join(parts)})"),
        st.tuples(inner, macros, inner).map(lambda parts: f"{parts[0]}.{parts[1]}(c, {parts[2]})"),
        st.tuples(calls, inner).map(lambda parts: f"{parts[0]}({parts[1]})"),
        st.tuples(inner, methods, inner).map(lambda parts: f"{parts[0]}.{parts[1]}({parts[2]})"),
        two.map(lambda pair: f"{pair[0]}[{pair[1]}]"),
        two.map(lambda pair: f"[{pair[0]}, {pair[1]}]"),
        two.map(lambda pair: f"{{{pair[0]}: {pair[1]}}}"),
        st.tuples(inner, inner, inner).map(lambda parts: f"({parts[0]} ? {parts[1]} : {parts[2]})"),
        inner.map(lambda one: f"!{one}"),
        inner.map(lambda one: f"has({one})"),
    )


EXPRESSIONS = st.recursive(st.one_of(NAMES, NAMES, QUOTED, st.just("c"), st.just("c.argv[0]")), compound, max_leaves=12)

# What has a truth value for one call or another.
TRUTHS = st.recursive(
    st.one_of(
        st.sampled_from(
            [
                *("true", "false", "shell.simple", "path.inWorkspace", "has(args.command)", "size(argv) > 1"),
                *("shell.commands.exists(c, c.base == 'rm')", "shell.commands.all(c, c.name in ['ls', 'rm'])"),
                *("shell.commands.exists(c, c.argv.exists(a, a.startsWith('x')))", "args.command.contains('x')"),
                *("risk == 'high'", "session.runtimeMode == 'local'", "url.scheme == 'http'", "url.port in [80, 443]"),
                *("args.command.matches('^(x|l)+s?$')", "argv.map(a, a + a).size() < 3", "path.absolute == '/tmp'"),
            ]
        ),
        QUOTED.map(lambda text: f"tool == {text}"),
        QUOTED.map(lambda text: f"args.command != {text}"),
    ),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["&&", "||", "==", "!="]), inner).map(lambda parts: f"({' '.join(parts)})"),
        inner.map(lambda one: f"!({one})"),
        st.tuples(inner, inner, inner).map(lambda parts: f"({parts[0]} ? {parts[1]} : {parts[2]})"),
    ),
    max_leaves=6,
)


@st.composite
def conditions(draw: st.DrawFn) -> str:
    """An expression, in some of the cases with something left out or put in."""
    text = draw(st.one_of(TRUTHS, EXPRESSIONS))
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 1, 3]))):
        place = draw(st.integers(0, len(text)))
        more = draw(st.sampled_from([*"()[]{}'\"\\.,:?!&|+-*/% \n\0", "//", "r'", 'b"""', "§", "all(", "0x", "1e9"]))
        text = text[:place] + more + text[place + draw(st.integers(0, 2)) :]
    return text


def facts(tool: str, risk: Any, args: dict[str, Any]) -> CallFacts:
    return facts_for(tool, risk, args, session=SESSION, actor="u", root=Path("/tmp"))


COMMANDS = st.one_of(LETTERS, st.sampled_from(["ls", "rm x; ls", "ls $x", "ls; " * 300, "x" * 40_000, "'", ""]))
CALLS = st.one_of(
    COMMANDS.map(lambda text: facts("bash.exec", "high", {"command": text})),
    st.lists(LETTERS, max_size=3).map(lambda argv: facts("process.exec", "high", {"argv": argv})),
    LETTERS.map(lambda path: facts("file.read", "low", {"path": path})),
    LETTERS.map(lambda rest: facts("http.request", "high", {"url": f"http://{rest}"})),
    st.dictionaries(LETTERS, VALUES, max_size=3).map(lambda args: facts("none.such", "high", args)),
    # Wrong types where a fact would be made.
    VALUES.map(lambda value: facts("bash.exec", "high", {"command": value, "argv": value, "path": value})),
)


@examples(150)
@given(when=conditions(), call=CALLS)
def test_a_condition_of_any_kind_is_decided_within_its_budget_and_fails_to_the_strict_side(
    when: str, call: CallFacts
) -> None:
    began = time.process_time()
    try:
        measure(when)
        compile_condition(when)
        whole = True
    except RuleProblem:
        whole = False
    matches = {}
    for action in ("allow", "approval-required", "deny"):
        rule = PolicyRule(id="r", tools=["*"], action=action, when=when)
        matches[action] = Evaluation(call).match(rule)
    assert time.process_time() - began < 3
    assert (matches["deny"] is None) == (matches["approval-required"] is None)
    if matches["allow"] is not None:
        assert matches["deny"] is not None
    if not whole:
        assert matches["allow"] is None
        assert matches["deny"] is not None


@examples(80)
@given(when=conditions(), beside=conditions(), action=st.sampled_from(["deny", "approval-required"]), call=CALLS)
def test_no_rule_that_allows_takes_away_what_another_restricts(
    when: str, beside: str, action: str, call: CallFacts
) -> None:
    strict = {"id": "strict", "tools": ["*"], "when": when, "action": action}
    loose = {"id": "loose", "tools": ["*"], "when": beside, "action": "allow"}
    document = msgspec.convert({"rules": [loose, strict], "highRisk": "allow", "toolDefault": "allow"}, PolicyDocument)
    policy = EffectivePolicy([Layer(name="default", document=BUILT_IN), Layer(name="workspace", document=document)])
    if Evaluation(call).match(msgspec.convert(strict, PolicyRule)) is not None:
        assert STRICT[policy.decide(call).decision] >= STRICT[action]
