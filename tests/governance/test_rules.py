"""Rules with conditions: when they hold, how layers weigh them, what is kept and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corral.governance import rules as rules_module
from corral.governance.facts import CallFacts, facts_for
from corral.governance.policy import EffectivePolicy, Verdict
from corral.governance.policy_examples import check_rules
from corral.governance.rules import RuleProblem, compile_condition, measure
from corral.protocol.errors import InvalidRequest
from corral.protocol.types import PolicyRule
from tests.support.examples import examples
from tests.support.policies import layered

STRICT = {"allow": 0, "approval-required": 1, "deny": 2}
SESSION = {"id": "s_1", "agentId": "a_1", "runtimeMode": "cloud"}


def call(tool: str, risk: Any = "high", root: Path = Path("/nowhere"), **args: Any) -> CallFacts:
    return facts_for(tool, risk, args, session=SESSION, actor="u_1", root=root)


def bash(command: str) -> CallFacts:
    return call("bash.exec", command=command)


def rule(action: str, when: str | None = None, tools: list[str] | None = None, **more: Any) -> dict[str, Any]:
    made = {"id": more.pop("id", "r"), "tools": tools or ["*"], "action": action, **more}
    return made if when is None else {**made, "when": when}


def one(action: str, when: str | None = None, **more: Any) -> EffectivePolicy:
    return layered(workspace={"rules": [rule(action, when, **more)]})


def holds(when: str, facts: CallFacts) -> bool:
    """Whether a condition is true; a failure is not."""
    return one("allow", when).decide(facts).rule_id == "r"


# ---- facts


@pytest.mark.parametrize(
    ("when", "facts"),
    [
        ('tool == "bash.exec" && risk == "high"', bash("ls")),
        ('args.command == "ls -l"', bash("ls -l")),
        ('session.id == "s_1" && session.agentId == "a_1" && session.runtimeMode == "cloud"', bash("ls")),
        ('actor == "u_1"', bash("ls")),
        ("shell.simple && size(shell.commands) == 2", bash("ls; git status")),
        ('shell.commands[0] == {"name": "./ls", "base": "ls", "argv": ["./ls", "-l"]}', bash("./ls -l")),
        ("!shell.simple && shell.commands == []", bash("ls $x")),
        ('argv == ["git", "-c", "x"]', call("process.exec", argv=["git", "-c", "x"])),
        ('path == {"absolute": "/nowhere/b", "relative": "b", "inWorkspace": true}', call("file.read", path="a/../b")),
        ("!path.inWorkspace", call("file.write", path="../x", content="")),
        ("!path.inWorkspace", call("file.write", path="/nowhere-else/x", content="")),
        ("path.inWorkspace", call("file.list")),
        (
            'url == {"scheme": "https", "host": "example.org", "port": 443, "path": "/a"}',
            call("http.request", url="HTTPS://Example.ORG./a?b"),
        ),
    ],
)
def test_a_condition_sees_the_facts_of_the_contract(when: str, facts: CallFacts) -> None:
    assert holds(when, facts)
    assert not holds(f"!({when})", facts)


def test_a_path_is_judged_where_its_links_lead(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "link").symlink_to("/etc")
    assert holds("!path.inWorkspace", call("file.read", root=tmp_path / "work", path="link/passwd"))


FAILING = [
    ("shell.simple", call("file.read", path="x")),
    ("argv[0] == 'x'", bash("ls")),
    ("path.inWorkspace", call("http.request", url="http://x/")),
    ("url.host == 'x'", call("http.request", url="http://[")),
    ("args.nothing == 1", bash("ls")),
    ("nothing == 1", bash("ls")),
    ("nothing(1)", bash("ls")),
    ("shell.commands[5].name == 'x'", bash("ls")),
    ("1 / 0 == 1", bash("ls")),
    ("tool", bash("ls")),
    ("1", bash("ls")),
    ("null", bash("ls")),
    ("'true'", bash("ls")),
    ("tool > 1", bash("ls")),
    ("tool.matches('(')", bash("ls")),
    ("args.command == 'x'", CallFacts(tool="bash.exec", risk="high", args={"command": "\ud800"})),
    ("args.x == 1", CallFacts(tool="t", risk="low", args={"x": list(range(5000))})),
    ("shell.commands.all(c, shell.commands.all(d, c == d))", bash("; ".join(["ls"] * 250))),
    ("('a' + args.command + args.command + args.command).size() > 0", bash("x" * 9_000_000)),
]


@pytest.mark.parametrize(("when", "facts"), FAILING)
def test_a_condition_that_fails_is_not_matched_to_allow_and_matched_to_restrict(when: str, facts: CallFacts) -> None:
    assert one("allow", when).decide(facts).rule_id is None
    for action in ("approval-required", "deny"):
        verdict = one(action, when).decide(facts)
        assert (verdict.decision, verdict.rule_id) == (action, "r")
        assert "could not be evaluated" in verdict.reason


def test_a_fact_too_big_for_rules_is_missing_whole_so_that_no_absence_can_be_seen() -> None:
    facts = CallFacts(tool="t", risk="low", args={"x": list(range(5000)), "y": 1})
    for when in ("!has(args.x)", "size(args) == 1", "args.y == 1"):
        assert one("allow", when).decide(facts).rule_id is None
        assert one("deny", when).decide(facts).decision == "deny"


def test_a_bare_tool_name_is_a_call_of_which_nothing_is_known() -> None:
    assert one("deny", "args.command == 'x'").decide("bash.exec", "high").decision == "deny"
    assert one("allow", "shell.simple").decide("bash.exec", "high").decision == "approval-required"
    assert one("allow", "risk == 'high'").decide("bash.exec", "high").decision == "allow"


@pytest.mark.parametrize(
    ("tools", "tool", "matches"),
    [
        (["*"], "bash.exec", True),
        (["file.*"], "file.read", True),
        (["file.*"], "filexread", False),
        (["bash.exec"], "bash.exec", True),
        (["bash.exe"], "bash.exec", False),
        (["BASH.*"], "bash.exec", False),
        (["x", "*.exec"], "process.exec", True),
    ],
)
def test_tools_are_globs(tools: list[str], tool: str, matches: bool) -> None:
    assert (one("allow", tools=tools).decide(tool, "high").decision == "allow") is matches


# ---- layers


def test_within_a_layer_the_strictest_matching_rule_decides_then_tools() -> None:
    rules = [rule("allow", id="a"), rule("approval-required", "args.command == 'b'", id="b"), rule("deny", "false")]
    policy = layered(workspace={"rules": rules, "tools": {"bash.exec": "approval-required"}})
    assert policy.decide(bash("a")) == Verdict(decision="allow", reason="rule a", layer="workspace", rule_id="a")
    assert policy.decide(bash("b")).rule_id == "b"
    rules = [rule("allow", "args.command == 'a'")]
    policy = layered(workspace={"rules": rules, "tools": {"bash.exec": "approval-required"}})
    assert policy.decide(bash("b")).reason == "tools: bash.exec"


def test_a_verdict_says_the_rule_and_its_reason() -> None:
    verdict = one("deny", "true", reason="not on my machine").decide(bash("ls"))
    assert verdict == Verdict(decision="deny", reason="not on my machine", layer="workspace", rule_id="r")


def test_a_deny_by_rule_wins_in_every_layer() -> None:
    for layer in ("tenant", "workspace", "agent"):
        documents: dict[str, Any] = {
            name: {"rules": [rule("allow", id="open")], "tools": {"bash.exec": "allow"}}
            for name in ("tenant", "workspace", "agent")
        }
        documents[layer]["rules"] = [rule("allow"), rule("deny", "true", id="no")]
        verdict = layered(**documents).decide(bash("ls"))
        assert (verdict.decision, verdict.layer, verdict.rule_id) == ("deny", layer, "no")


def test_an_unlocked_rule_gives_way_to_a_finer_layer_and_a_locked_one_does_not() -> None:
    ask = rule("approval-required", "true", tools=["file.read"])
    read = call("file.read", "low", path="x")
    loose = layered(tenant={"rules": [ask]}, agent={"tools": {"file.read": "allow"}})
    assert loose.decide(read).decision == "allow"
    held = layered(tenant={"rules": [{**ask, "locked": True}]}, agent={"tools": {"file.read": "allow"}})
    assert (held.decide(read).decision, held.decide(read).layer) == ("approval-required", "tenant")


def test_a_layer_may_except_from_its_own_locked_entry_but_no_finer_layer_may() -> None:
    locked = {"tools": {"bash.exec": "approval-required"}, "lockedTools": ["bash.exec"]}
    ls = rule("allow", "args.command == 'ls'")
    assert layered(tenant={**locked, "rules": [ls]}).decide(bash("ls")).decision == "allow"
    assert layered(tenant={**locked, "rules": [ls]}, agent={"highRisk": "allow"}).decide(bash("ls")).decision == "allow"
    assert layered(tenant=locked, agent={"rules": [ls]}).decide(bash("ls")).decision == "approval-required"
    asks = rule("approval-required", "true")
    policy = layered(tenant={**locked, "rules": [asks]}, agent={"tools": {"bash.exec": "allow"}})
    assert policy.decide(bash("ls")).decision == "approval-required"


ACTION = st.sampled_from(["allow", "approval-required", "deny"])
CONDITION = st.sampled_from(
    [None, "true", "false", "nothing", "args.command == 'ls'", "shell.simple", "path.inWorkspace"]
)
RULE = st.builds(
    lambda action, when, tools, locked: rule(action, when, tools=tools, locked=locked),
    ACTION,
    CONDITION,
    st.sampled_from([["*"], ["bash.*"], ["file.read"]]),
    st.booleans(),
)
DOCUMENT = st.fixed_dictionaries(
    {},
    optional={
        "toolDefault": ACTION,
        "highRisk": ACTION,
        "tools": st.dictionaries(st.sampled_from(["bash.exec", "file.read"]), ACTION, max_size=2),
        "lockedTools": st.lists(st.sampled_from(["bash.exec", "file.read"]), max_size=2),
        "rules": st.lists(RULE, max_size=3),
    },
)
CALL = st.sampled_from([bash("ls"), bash("rm $x"), call("file.read", "low", path="x")])


LOCKED = st.fixed_dictionaries(
    {
        "rules": st.lists(RULE.map(lambda made: {**made, "locked": True}), max_size=3),
        "tools": st.dictionaries(st.sampled_from(["bash.exec", "file.read"]), ACTION, max_size=2),
    }
).map(lambda document: {**document, "lockedTools": list(document["tools"])})


@examples(300)
@given(
    coarse=LOCKED,
    beside=st.lists(RULE, max_size=2),
    finer=st.lists(DOCUMENT, min_size=1, max_size=2),
    facts=CALL,
    at=st.sampled_from(["tenant", "workspace"]),
)
def test_no_finer_layer_loosens_what_a_locked_rule_or_entry_says(
    coarse: dict[str, Any], beside: list[dict[str, Any]], finer: list[dict[str, Any]], facts: CallFacts, at: str
) -> None:
    evaluation = rules_module.Evaluation(facts)
    bound = [each["action"] for each in coarse["rules"] if evaluation.match(msgspec.convert(each, PolicyRule))]
    # A locked entry speaks where no rule of its own layer does.
    if not any(evaluation.match(msgspec.convert(each, PolicyRule)) for each in coarse["rules"] + beside):
        bound = [coarse["tools"][facts.tool]] if facts.tool in coarse["tools"] else []
    documents = {at: {**coarse, "rules": coarse["rules"] + beside}}
    names = ["workspace", "agent"] if at == "tenant" else ["agent"]
    whole = layered(**documents, **dict(zip(names, finer, strict=False)))
    assert all(STRICT[whole.decide(facts).decision] >= STRICT[action] for action in bound)


@examples(300)
@given(layers=st.lists(DOCUMENT, min_size=3, max_size=3), facts=CALL)
def test_a_matching_deny_anywhere_is_final(layers: list[dict[str, Any]], facts: CallFacts) -> None:
    policy = layered(**dict(zip(["tenant", "workspace", "agent"], layers, strict=True)))
    denied = any(
        (each["action"] == "deny" and rules_module.Evaluation(facts).match(msgspec.convert(each, PolicyRule)))
        for document in layers
        for each in document.get("rules", [])
    )
    if denied or any(document.get("tools", {}).get(facts.tool) == "deny" for document in layers):
        assert policy.decide(facts).decision == "deny"


# ---- adding a command never weakens the decision

PIECE = st.sampled_from(
    [
        *("ls", "git status", "rm x", "/bin/rm x", "sudo ls", "make", "echo 'a;b'", 'echo "x|y"', "echo $HOME"),
        *("rm $x", "ls > f", "(ls)", "'rm' y", "A=b make", "r\\m z", "ls &", "x() { ls; }", "ls # no"),
    ]
)
SEPARATOR = st.sampled_from(["; ", "\n", " && ", " || ", " | ", ";", "&&"])
BY_COMMAND = layered(
    tenant={"rules": [rule("deny", 'shell.commands.exists(c, c.base in ["rm", "sudo"])', tools=["bash.exec"])]},
    workspace={
        "highRisk": "approval-required",
        "rules": [
            rule("approval-required", 'shell.commands.exists(c, c.name == "make")', id="make", tools=["bash.exec"]),
            rule(
                "allow",
                'shell.simple && shell.commands.all(c, c.name in ["ls", "echo", "git", "make"])',
                id="some",
                tools=["bash.exec"],
            ),
        ],
    },
)


@examples(500)
@given(text=PIECE, more=st.lists(st.tuples(SEPARATOR, PIECE, st.booleans()), min_size=1, max_size=5))
def test_adding_a_command_never_weakens_the_decision(text: str, more: list[tuple[str, str, bool]]) -> None:
    before = BY_COMMAND.decide(bash(text)).decision
    for separator, piece, behind in more:
        text = f"{text}{separator}{piece}" if behind else f"{piece}{separator}{text}"
        after = BY_COMMAND.decide(bash(text)).decision
        assert STRICT[after] >= STRICT[before], text
        before = after


@pytest.mark.parametrize("filler", ["ls", "ls $x", "echo 'x'", "# y", "ls > z", "l{}"])
@pytest.mark.parametrize("count", [49, 51, 300, 5000, 20_000])
def test_no_number_of_commands_turns_a_decision_into_a_weaker_one(filler: str, count: int) -> None:
    separator = "\n" if filler.startswith("#") else "; "
    many = separator.join(filler.format(index) for index in range(count))
    for text in (f"rm x{separator}{many}", f"{many}{separator}rm x"):
        assert BY_COMMAND.decide(bash(text)).decision == "deny"
    assert BY_COMMAND.decide(bash(f"{many}{separator}curl x")).decision != "allow"


# ---- hostile expressions


def crash_candidates() -> list[str]:
    """Expressions that are as deep as `measure` lets through, one for each way to nest."""
    made = []
    shapes: list[Any] = [
        lambda n: "(" * n + "true" + ")" * n,
        lambda n: "!(" * n + "true" + ")" * n,
        lambda n: "[" * n + "]" * n,
        lambda n: "size(" * n + "'a'" + ")" * n,
        lambda n: "{'a':" * n + "1" + "}" * n,
        lambda n: "-" * n + "1 == 1",
        lambda n: "!" * n + "true",
        lambda n: "args" + ".a" * n,
        lambda n: "args" + "[0]" * n,
        lambda n: "'a'" + ".f()" * n,
        lambda n: " == ".join(["1"] * n),
        lambda n: " in ".join(["args"] * n),
        lambda n: "*".join(["1"] * n) + " > 0",
        lambda n: "true ? true : " * n + "true",
        lambda n: "true ? " * n + "true" + ": true" * n,
        lambda n: "||".join(["a.b.c == 1"] * n),
        lambda n: "&&".join(["(a || b)"] * n),
        lambda n: "[" + ",".join(["1"] * n) + "] == []",
        lambda n: "(1 == " * n + "1" + ")" * n,
        lambda n: "(" * n + "1" + " == 1)" * n,
        lambda n: "[1].all(x, " * n + "true" + ")" * n,
        lambda n: "[1]" + ".map(x, x)" * n,
    ]
    for shape in shapes:
        fits, too_deep = 1, 1200
        while too_deep - fits > 1:
            middle = (fits + too_deep) // 2
            text = shape(middle)
            try:
                measure(text)
                fits, too_deep = (middle, too_deep) if len(text) <= 10_000 else (fits, middle)
            except RuleProblem:
                too_deep = middle
        made.append(shape(fits))
    return made


def test_no_expression_that_is_let_through_ends_the_process() -> None:
    program = (
        "import json, sys, threading\n"
        "from corral.governance.rules import Evaluation, PolicyRule\n"
        "from corral.governance.facts import CallFacts\n"
        "def run():\n"
        "    for text in json.load(sys.stdin):\n"
        "        rule = PolicyRule(id='r', tools=['*'], action='deny', when=text)\n"
        "        Evaluation(CallFacts(tool='t', risk='low', args={})).match(rule)\n"
        "    print('alive')\n"
        # The smallest stack that a thread of ours may have (macOS).
        "threading.stack_size(512 * 1024)\n"
        "thread = threading.Thread(target=run)\n"
        "thread.start(); thread.join()\n"
    )
    texts = crash_candidates()
    assert max(len(text) for text in texts) > 5000
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(texts), capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr[-2000:]


@pytest.mark.parametrize(
    "when",
    [
        "(" * 300 + "true" + ")" * 300,
        "[" * 3000,
        "a" + ".b" * 3000,
        "[1].all(a, [1].all(b, [1].all(c, true)))",
        " + ".join(["args.x"] * 10) + " == 'x'",
        "(",
        ")",
        "shell..simple",
        "'open",
        "",
        "\0",
        "tool == 'x' §",
        # Where the library would see code in what looks like a string.
        "r'\\' == tool || " + "(" * 300 + "true" + ")" * 300 + " || tool == ''",
        "'\\q" + "(" * 300 + "'",
        "'\r" + "(" * 300 + "'",
        "rb'" + "(" * 300,
    ],
)
def test_an_expression_that_is_none_or_too_deep_is_no_condition(when: str) -> None:
    with pytest.raises(RuleProblem):
        compile_condition(when)


@pytest.mark.parametrize(
    "when",
    [
        "shell.commands.all(a, shell.commands.all(b, a.argv.size() == b.argv.size()))",
        "[args.command].map(a, a + a).map(a, a + a).map(a, a + a).map(a, a + a)[0].matches('(x+x+)+y')",
        "args.command.matches('" + "(x{1,9}){1,9}" * 20 + "')",
        "shell.commands.all(c, c.name.matches('" + "\\\\w" * 300 + "'))",
        "[" + ",".join(["1"] * 1000) + "].all(a, [" + ",".join(["1"] * 1000) + "].all(b, a == b))",
    ],
)
def test_a_hostile_policy_costs_no_more_than_a_moment(when: str) -> None:
    policy = layered(workspace={"rules": [rule("approval-required", when, id=f"r{index}") for index in range(200)]})
    facts = bash("; ".join(["ls x"] * 250))
    began = time.process_time()
    assert policy.decide(facts).decision == "approval-required"
    assert time.process_time() - began < 3


def test_a_condition_may_be_evaluated_by_any_thread() -> None:
    verdicts: list[str] = []
    policy = one("deny", "shell.commands.exists(c, c.name == 'ls')")

    def decide() -> None:
        verdicts.extend(policy.decide(bash("ls")).decision for _ in range(50))

    threads = [threading.Thread(target=decide) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == ["deny"] * 200


def test_the_first_decision_loads_no_terminal_libraries() -> None:
    program = (
        "import sys\n"
        "from corral.governance.policy import EffectivePolicy\n"
        "assert 'cel' not in sys.modules and 'tree_sitter' not in sys.modules\n"
        "from corral.governance.rules import compile_condition\n"
        "compile_condition('true')\n"
        "assert 'prompt_toolkit' not in sys.modules and 'rich' not in sys.modules\n"
        "import cel.cli\n"
        "assert cel.cli.__file__\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


# ---- what is kept


def checked(*rules: dict[str, Any]) -> None:
    check_rules(msgspec.convert(list(rules), list[PolicyRule]), list(rules))


LS = 'shell.simple && shell.commands.all(c, c.name == "ls")'


@pytest.mark.parametrize(
    "examples",
    [
        {"match": ["ls", "ls -l; ls"], "not_match": ["rm", "ls $x", "ls > x"]},
        {"match": [{"command": "ls"}], "not_match": [{"command": "rm", "timeoutMs": 5}]},
        {"match": [{"tool": "bash.exec", "args": {"command": "ls"}}], "not_match": [{"toolName": "file.read"}]},
        {"match": [{"args": {"command": "ls"}, "session": {"agentId": "x"}, "actor": "y"}]},
    ],
)
def test_examples_are_texts_calls_or_arguments(examples: dict[str, Any]) -> None:
    checked(rule("allow", LS, tools=["bash.exec"], **examples))


def test_an_example_without_a_tool_stands_for_every_tool_that_takes_such_arguments() -> None:
    checked(rule("deny", "!path.inWorkspace", tools=["file.*"], match=[{"path": "/etc/x"}], not_match=[{"path": "x"}]))
    with pytest.raises(InvalidRequest, match=r"rules\[0\]\.match\[0\]: .*file\.list"):
        checked(rule("deny", "tool == 'file.read'", tools=["file.*"], match=[{"path": "x"}]))


@pytest.mark.parametrize(
    ("made", "place"),
    [
        (rule("allow", "shell.simple &&"), "[1].when: does not compile"),
        (rule("allow", LS, tools=["bash.exec"], match=["rm"]), "[1].match[0]: the rule does not match"),
        (rule("allow", LS, tools=["bash.exec"], match=["ls", "ls *"]), "[1].match[1]"),
        (rule("allow", LS, tools=["bash.exec"], not_match=["ls"]), "[1].not_match[0]: the rule matches"),
        (rule("allow", LS, tools=["file.read"], match=["ls"]), "[1].match[0]"),
        (rule("allow", match=[5]), "[1].match[0]"),
        (rule("allow", match=[{"args": 5}]), "[1].match[0]"),
        (rule("allow", match=[{"tool": 5}]), "[1].match[0]"),
        (rule("allow", match=[{"args": {}, "argz": {}}]), "[1].match[0]: unknown field 'argz'"),
        (rule("allow", tools=["file.*"], match=[{"nothing": 1}]), "[1].match[0]: no tool"),
        (rule("allow", whem="false"), "[1].whem"),
        (rule("allow", match=["ls"] * 101), "[1].match"),
        (rule("allow", id="first"), "[1].id"),
    ],
)
def test_a_rule_that_cannot_be_kept_is_refused_by_its_place(made: dict[str, Any], place: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        checked(rule("deny", id="first"), made)
    assert f"$.params.patch.rules{place}" in caught.value.message


def test_the_number_of_rules_in_a_layer_is_bounded() -> None:
    with pytest.raises(InvalidRequest, match=r"201 rules"):
        checked(*(rule("deny", id=f"r{index}") for index in range(201)))
