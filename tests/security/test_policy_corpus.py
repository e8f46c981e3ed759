"""With `ls` and `git status` allowed by rule, no text of the corpus runs without a person."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from corral.governance import shell
from corral.governance.facts import facts_for
from corral.governance.policy import BUILT_IN, EffectivePolicy, Layer, Verdict
from corral.protocol.types import PolicyDocument

CORPUS: dict[str, list[str]] = json.loads(
    (Path(__file__).parent / "corpus" / "shell_bypasses.json").read_text(encoding="utf-8")
)
TEXTS = [text for texts in CORPUS.values() for text in texts]

# As a careful user would write them: what is allowed, and nothing else, in every command of the text.
ALLOWED = """shell.simple && shell.commands.all(c,
    c.name == "ls" || (c.name == "git" && c.argv[1] == "status"))"""


def policy(*rules: dict[str, Any], **document: Any) -> EffectivePolicy:
    converted = msgspec.convert({"rules": list(rules), **document}, PolicyDocument)
    return EffectivePolicy([Layer(name="default", document=BUILT_IN), Layer(name="workspace", document=converted)])


TWO_COMMANDS = policy({"id": "two", "tools": ["bash.exec"], "when": ALLOWED, "action": "allow"})
# Each command with its own rule: nothing may add up.
TWO_RULES = policy(
    {
        "id": "ls",
        "tools": ["bash.exec"],
        "when": 'shell.simple && shell.commands.all(c, c.name == "ls")',
        "action": "allow",
    },
    {
        "id": "git-status",
        "tools": ["bash.exec"],
        "when": 'shell.simple && shell.commands.all(c, c.argv == ["git", "status"])',
        "action": "allow",
    },
)
NO_RM = policy(
    {
        "id": "no-rm",
        "tools": ["bash.exec"],
        "when": 'shell.commands.exists(c, c.base in ["rm", "sudo"])',
        "action": "deny",
    },
    highRisk="allow",
)


def bash(policy: EffectivePolicy, text: str) -> Verdict:
    session = {"id": "s", "agentId": "a", "runtimeMode": "local"}
    return policy.decide(
        facts_for("bash.exec", "high", {"command": text}, session=session, actor="u", root=Path("/tmp"))
    )


def test_the_corpus_is_large_and_says_everything_once() -> None:
    assert len(TEXTS) == len(set(TEXTS)) >= 500


@pytest.mark.parametrize("kind", CORPUS)
@pytest.mark.parametrize("allowing", [TWO_COMMANDS, TWO_RULES], ids=["one rule", "two rules"])
def test_no_text_of_the_corpus_is_allowed(kind: str, allowing: EffectivePolicy) -> None:
    assert [text for text in CORPUS[kind] if bash(allowing, text).decision == "allow"] == []


# Cut off in the corpus; with `ls` on the next line they are two harmless commands.
COMPLETED_BY_A_LINE = ("ls ||", "ls &&", "ls |")


@pytest.mark.parametrize("kind", CORPUS)
@pytest.mark.parametrize("separator", ["; ", "\n", " && ", " | "])
def test_no_text_of_the_corpus_is_allowed_beside_what_is(kind: str, separator: str) -> None:
    for text in CORPUS[kind]:
        assert bash(TWO_COMMANDS, f"ls{separator}{text}").decision != "allow", repr(text)
        if separator == "\n" and text in COMPLETED_BY_A_LINE:
            continue
        assert bash(TWO_COMMANDS, f"{text}{separator}ls").decision != "allow", repr(text)


@pytest.mark.parametrize(
    "text",
    [
        "ls",
        "ls -la src 'a b' \"c d\"",
        "git status",
        "git status --short",
        "ls && git status",
        "ls; ls\nls | ls || git status\n",
        "ls --color=auto Größe",
    ],
)
def test_what_is_meant_to_be_allowed_is(text: str) -> None:
    assert bash(TWO_COMMANDS, text).decision == "allow"


@pytest.mark.parametrize(
    "text",
    [
        "rm x",
        "/bin/rm x",
        "../rm x",
        "/usr/bin/sudo ls",
        "sudo ls",
        "'rm' x",
        '"rm" x',
        "r''m x",
        "r\\m x",
        "\\rm x",
        "$'rm' x",
        "/bin/r'm' x",
        "rm $HOME",
        "rm *",
        "rm x > y",
        ">y rm x",
        "A=b rm x",
        "A=b C=d /bin/rm x",
        "! rm x",
        "time rm x",
        "(rm x)",
        "{ rm x; }",
        "f() { rm x; }; f",
        "if true; then rm x; fi",
        "ls & rm x",
        "ls $(rm x)",
        "ls `rm x`",
        'ls "$(rm x)"',
        'ls "`rm x`"',
        "ls <(rm x)",
        "ls # x\nrm x",
        "echo $HOME; rm x",
        "echo 'a;b' $HOME; rm x",
        "\trm\tx",
        "ls\rrm x",
        "rm x\n'",
        "cat <<EOF\n$(rm x)\nEOF",
        "rm\\\n x",
        "echo; " * 2000 + "rm x",
        "echo $x; " * 2000 + "rm x",
        "rm x; " + "echo 'a' " * 20_000,
    ],
    ids=lambda text: repr(text)[:40],
)
def test_a_denial_finds_its_command_as_written_by_its_base_and_however_the_text_is_dressed(text: str) -> None:
    assert bash(NO_RM, text).decision == "deny"


@pytest.mark.parametrize("text", ["ls", "echo $HOME", "echo rm", "ls > x; git status", "grep -r 'rm' .", "farm x"])
def test_a_denial_leaves_alone_what_does_not_look_like_its_command(text: str) -> None:
    assert bash(NO_RM, text).decision == "allow"


@pytest.mark.parametrize("kind", CORPUS)
def test_the_strict_scanner_alone_lets_no_text_of_the_corpus_through(kind: str) -> None:
    """The grammar is a second reader, not the one that the first relies on."""
    for text in CORPUS[kind]:
        words = shell._scan(text)
        assert words is None or not all(each[0] == "ls" or each[:2] == ["git", "status"] for each in words), repr(text)
