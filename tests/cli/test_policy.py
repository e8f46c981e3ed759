"""`corral policy`: showing, changing, editing, testing and explaining, with and without a gateway."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from corral.cli.policy import call_arguments, document_of, read_policy, replacing, setting
from corral.governance.policy import merge_patch
from tests.cli.command import call
from tests.cli.test_approvals import Terminal
from tests.support.house import house

RULE = {
    "id": "git",
    "tools": ["bash.exec"],
    "when": "shell.simple && shell.commands.all(c, c.name == 'git')",
    "action": "allow",
    "match": ["git status"],
    "not_match": ["git status; rm -r build", "$(git status)"],
}


@pytest.fixture
async def terminal(tmp_path: Path) -> AsyncIterator[Terminal]:
    """An owner at a terminal."""
    async with house(tmp_path / "data") as home:
        yield Terminal(home, home.token, tmp_path / "cli")


def file_of(tmp_path: Path, document: Any) -> str:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(document))
    return str(path)


def editor(tmp_path: Path, program: str) -> str:
    """A command that edits the file named last by running `program` over its text `text`."""
    path = tmp_path / "editor.py"
    path.write_text(
        "import json, sys\npath = sys.argv[-1]\ntext = open(path).read()\n"
        f"{program}\nopen(path, 'w').write(text)\nprint('edited', path, file=sys.stderr)\n"
    )
    return f"{sys.executable} {path}"


# ---- showing and setting


async def test_a_new_layer_says_nothing_and_what_holds_is_told_beside_it(terminal: Terminal) -> None:
    code, out, err = await terminal.call("policy", "show")
    assert (code, json.loads(out)) == (0, {})
    assert "workspace:w_default, version 1" in err
    assert "from coarser layers: toolDefault deny, highRisk approval-required" in err
    code, out, _ = await terminal.call("policy", "show", "--effective")
    assert json.loads(out)["tools"]["file.read"] == "allow"


async def test_set_changes_one_thing_in_one_layer(terminal: Terminal) -> None:
    for key, value in [
        ("tools.bash.exec", "deny"),
        ("fourEyes", "true"),
        ("limits.maxStepsPerRun", "7"),
        ("models.allowed", '["demo"]'),
    ]:
        code, out, _ = await terminal.call("policy", "set", key, value)
        assert (code, out[:34]) == (0, "workspace:w_default is now at vers")
    await terminal.call("policy", "set", "highRisk", "deny", "--agent", "a_default")
    await terminal.call("policy", "set", "toolDefault", "deny", "--layer", "tenant")
    _, out, _ = await terminal.call("policy", "show")
    expected = {
        "fourEyes": True,
        "tools": {"bash.exec": "deny"},
        "limits": {"maxStepsPerRun": 7},
        "models": {"allowed": ["demo"]},
    }
    assert json.loads(out) == expected
    assert json.loads((await terminal.call("policy", "show", "--agent", "a_default"))[1]) == {"highRisk": "deny"}
    assert json.loads((await terminal.call("policy", "show", "--layer", "tenant"))[1]) == {"toolDefault": "deny"}
    await terminal.call("policy", "set", "tools.bash.exec", "null")
    del expected["tools"]
    assert json.loads((await terminal.call("policy", "show"))[1]) == expected


async def test_a_file_is_all_that_the_layer_says_afterwards(terminal: Terminal, tmp_path: Path) -> None:
    await terminal.call("policy", "set", "tools.bash.exec", "deny")
    wanted = {"highRisk": "deny", "rules": [RULE]}
    code, out, _ = await terminal.call("policy", "set", "--file", file_of(tmp_path, wanted))
    assert (code, out) == (0, "workspace:w_default is now at version 3\n")
    [shown] = await terminal.json("policy", "show")
    assert document_of(shown) == wanted
    # What `show --json` prints goes back in as it came, and changes nothing.
    code, out, err = await terminal.call("policy", "set", "--file", file_of(tmp_path, shown))
    assert (code, out) == (0, "")
    assert "it says that already: version 3" in err


async def test_a_rule_whose_example_fails_is_refused_and_nothing_is_changed(terminal: Terminal, tmp_path: Path) -> None:
    bad = {"rules": [{**RULE, "match": ["hg status"]}]}
    code, out, err = await terminal.call("policy", "set", "--file", file_of(tmp_path, bad))
    assert (code, out) == (2, "")
    assert "does not match this example" in err
    assert json.loads((await terminal.call("policy", "show"))[1]) == {}


# ---- editing


async def test_edit_sends_what_the_editor_left(terminal: Terminal, tmp_path: Path) -> None:
    terminal.env["EDITOR"] = editor(tmp_path, "text = json.dumps({'highRisk': 'deny'})")
    code, out, err = await terminal.call("policy", "edit")
    assert (code, out) == (0, "workspace:w_default is now at version 2\n")
    assert json.loads((await terminal.call("policy", "show"))[1]) == {"highRisk": "deny"}
    assert not Path(err.split()[1]).exists()


async def test_edit_opens_no_editor_where_there_is_no_terminal() -> None:
    code, out, err = await call("policy", "edit", env={"EDITOR": "", "VISUAL": ""})
    assert (code, out) == (1, "")
    assert "editing wants a terminal" in err
    assert "corral policy set --file FILE" in err


async def test_edit_without_a_change_changes_nothing(terminal: Terminal, tmp_path: Path) -> None:
    terminal.env["EDITOR"] = editor(tmp_path, "")
    code, out, err = await terminal.call("policy", "edit")
    assert (code, out) == (0, "")
    assert "left as it was" in err
    assert "version 1" in (await terminal.call("policy", "show"))[2]


async def test_edit_does_not_overwrite_what_changed_meanwhile_and_keeps_the_text(
    terminal: Terminal, tmp_path: Path
) -> None:
    program = (
        "import subprocess\n"
        "subprocess.run([sys.executable, '-m', 'corral', 'policy', 'set', 'toolDefault', 'deny'], check=True)\n"
        "text = json.dumps({'highRisk': 'deny'})"
    )
    terminal.env["EDITOR"] = editor(tmp_path, program)
    code, _, err = await terminal.call("policy", "edit")
    assert code == 1
    assert "CONFLICT" in err
    kept = Path(err.split("what you wrote is in ")[1].split(":")[0])
    assert json.loads(kept.read_text()) == {"highRisk": "deny"}
    assert kept.stat().st_mode & 0o077 == 0 or kept.parent.stat().st_mode & 0o077 == 0
    assert json.loads((await terminal.call("policy", "show"))[1]) == {"toolDefault": "deny"}


@pytest.mark.parametrize(
    ("program", "code", "words"),
    [
        ("text = '{'", 2, "no JSON"),
        ("text = json.dumps({'highrisk': 'deny'})", 2, "did you mean highRisk?"),
        ("text = json.dumps({'highRisk': 'denied'})", 2, "highRisk"),
        ("sys.exit(3)", 1, "ended with 3"),
    ],
)
async def test_edit_refuses_what_is_no_policy(
    terminal: Terminal, tmp_path: Path, program: str, code: int, words: str
) -> None:
    terminal.env["EDITOR"] = editor(tmp_path, program)
    got, out, err = await terminal.call("policy", "edit")
    assert (got, out) == (code, "")
    assert words in err
    assert json.loads((await terminal.call("policy", "show"))[1]) == {}


# ---- testing a file


async def test_test_checks_a_file_and_its_examples_without_a_gateway(tmp_path: Path) -> None:
    env = {"CORRAL_DATA_DIR": str(tmp_path / "none")}
    code, out, err = await call("policy", "test", file_of(tmp_path, {"rules": [RULE]}), env=env)
    assert (code, out, err) == (0, "1 rule, 3 examples: good\n", "")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"rules": [RULE, {**RULE, "id": "b", "not_match": ["git log"]}]}, "rules[1] (b).not_match[0]"),
        ({"rules": [{**RULE, "when": "shell.simple &&"}]}, "rules[0] (git).when: does not compile"),
        ({"rules": [RULE, RULE]}, "rules[1].id"),
        ({"rules": [{**RULE, "whem": "true"}]}, "whem"),
        ({"toolDefault": "perhaps"}, "toolDefault"),
        ({"rules": "none"}, "rules"),
    ],
)
async def test_test_says_what_is_wrong_and_where(tmp_path: Path, document: Any, words: str) -> None:
    code, out, err = await call("policy", "test", file_of(tmp_path, document))
    assert code == 1
    assert words in out, out + err
    code, out, _ = await call("policy", "test", "--json", "-", stdin=json.dumps(document))
    assert (code, json.loads(out)["ok"]) == (1, False)


# ---- explaining


async def test_explain_says_what_would_happen_and_why(terminal: Terminal, tmp_path: Path) -> None:
    await terminal.call("policy", "set", "--file", file_of(tmp_path, {"rules": [RULE]}))
    code, out, _ = await terminal.call("policy", "explain", "bash.exec", "git", "status", "--short")
    assert (code, out.split("\n")[0]) == (0, "allow: rule git (workspace layer, rule git)")
    assert '"git"' in out
    code, out, _ = await terminal.call("policy", "explain", "bash.exec", "git status; rm -r build\u202e")
    assert (code, out.split("\n")[0]) == (0, "approval-required: highRisk (built-in default)")
    assert "\u202e" not in out
    answer = json.loads((await terminal.call("policy", "explain", "--json", "file.read", "a.txt"))[1])
    assert (answer["decision"], answer["facts"]["path"]["relative"]) == ("allow", "a.txt")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["set"], ["KEY and VALUE"]),
        (["set", "highRisk"], ["KEY and VALUE"]),
        (["set", "highrisk", "deny"], ["highRisk"]),
        (["set", "tools.", "deny"], ["tools.bash.exec"]),
        (["set", "highRisk", "maybe"], ["highRisk cannot be maybe", "deny, allow, approval-required"]),
        (["set", "tools.file.write", "yes"], ["tools.file.write cannot be yes", "approval-required"]),
        (["set", "fourEyes", "1"], ["fourEyes cannot be 1", "true, false"]),
        (["set", "tools.bash", "allow"], ["bash is no tool's name", "bash.exec"]),
        (["set", "limits.perDay.steps", "many"], ["limits.perDay.steps cannot be many", "a number"]),
        (["set", "--file", "/nonexistent"], ["/nonexistent"]),
        (["set", "highRisk", "deny", "--file", "x"], ["--file"]),
        (["test", "/nonexistent"], ["/nonexistent"]),
        (["explain", "file.read", "a", "b"], ["path"]),
        (["explain", "my.tool", "x"], ["JSON object"]),
        (["explane", "x"], ["explane"]),
        (["show", "--layer", "user"], ["workspace"]),
    ],
)
async def test_wrong_usage_is_two_lines_with_the_remedy_and_code_2(arguments: list[str], words: list[str]) -> None:
    code, out, err = await call("policy", *arguments)
    assert (code, out) == (2, "")
    assert [word for word in words if word not in err] == [], err
    assert len(err.splitlines()) == 2, err


# ---- the parts


@pytest.mark.parametrize(
    ("before", "wanted"),
    [
        ({}, {}),
        ({"a": 1}, {}),
        ({"a": 1}, {"a": 2, "b": {"c": 1}}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}),
        ({"a": {"b": 1}}, {"a": [1]}),
        ({"a": [1]}, {"a": {"b": 1}}),
    ],
)
def test_the_patch_that_replaces_leads_to_what_is_wanted(before: Any, wanted: Any) -> None:
    assert merge_patch(before, replacing(before, wanted)) == wanted


def test_the_name_of_a_tool_keeps_its_dots() -> None:
    assert setting("tools.bash.exec", "deny") == {"tools": {"bash.exec": "deny"}}
    assert setting("limits.perDay.steps", "10") == {"limits": {"perDay": {"steps": 10}}}
    assert setting("tools", "{}") == {"tools": {}}


def test_arguments_are_what_the_tool_takes() -> None:
    assert call_arguments("bash.exec", ("ls", "-l")) == {"command": "ls -l"}
    assert call_arguments("process.exec", ("ls", "-l")) == {"argv": ["ls", "-l"]}
    assert call_arguments("file.edit", ("a", "b", "c")) == {"path": "a", "old": "b", "new": "c"}
    assert call_arguments("my.tool", ('{"a": 1}',)) == {"a": 1}
    assert call_arguments("bash.exec", ("{", "echo", "x;", "}")) == {"command": "{ echo x; }"}


def test_a_file_with_a_field_that_no_policy_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no field tool_default"):
        read_policy(file_of(tmp_path, {"tool_default": "deny"}))


@pytest.mark.parametrize(
    ("document", "place", "words"),
    [
        ({"toolDefault": "sometimes"}, "toolDefault", "deny, allow, approval-required"),
        ({"tools": {"bash.exec": "yes"}}, "bash.exec", "deny, allow, approval-required"),
        ({"bashMode": "docker"}, "bashMode", "sandbox, host"),
    ],
)
async def test_a_word_that_no_policy_takes_is_told_with_those_that_it_takes(
    document: dict[str, object], place: str, words: str, tmp_path: Path
) -> None:
    file = file_of(tmp_path, document)
    code, out, err = await call("policy", "test", file)
    assert (code, err) == (1, "0 rules, 0 examples: not good\n")
    assert words in out
    code, out, err = await call("policy", "set", "--file", file, data_dir=tmp_path)
    assert (code, out) == (2, "")
    assert place in err
    assert words in err
