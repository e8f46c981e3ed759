"""Shell facts: what is simple is what a real shell runs, word for word."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from corral.governance.shell import MAX_COMMANDS, MAX_TEXT, Command, parse
from tests.support.examples import examples

# ---- the contract, line by line


def argvs(text: str) -> list[list[str]] | None:
    facts = parse(text)
    if not facts.simple:
        assert facts.commands == ()
        return None
    return [list(command.argv) for command in facts.commands]


@pytest.mark.parametrize(
    ("text", "commands"),
    [
        ("ls", [["ls"]]),
        ("  ls   -l  ", [["ls", "-l"]]),
        ("a; b\nc && d || e | f", [["a"], ["b"], ["c"], ["d"], ["e"], ["f"]]),
        ("\n\nls\n\n", [["ls"]]),
        ("a &&\n\n b |\n c", [["a"], ["b"], ["c"]]),
        ("echo 'a  $b' \"c;d\" --x='1 2'\"3\"4", [["echo", "a  $b", "c;d", "--x=1 234"]]),
        ("echo '' \"\" ''''", [["echo", "", "", ""]]),
        ("echo '\"' \"'\" '\\' '!' '`'", [["echo", '"', "'", "\\", "!", "`"]]),
        ("git x=y HEAD^ a@b 50% a,b +x 1 :/", [["git", "x=y", "HEAD^", "a@b", "50%", "a,b", "+x", "1", ":/"]]),
        ("cat größe 日本 файл", [["cat", "größe", "日本", "файл"]]),
        ("echo if then [x", None),
        ("echo if then done", [["echo", "if", "then", "done"]]),
        ("set -eu -o pipefail; ls", [["set", "-eu", "-o", "pipefail"], ["ls"]]),
        ("set -k", [["set", "-k"]]),
        ("set -k; ls a=b", None),
        ("alias", [["alias"]]),
        ("alias ls=rm\nls", None),
        ("shopt -s expand_aliases; ls", None),
        ("printf %s -w", [["printf", "%s", "-w"]]),
        ("printf -v PATH /w/bin; ls", None),
        ("printf '-v' 'a[$(rm x)]' 1", None),
        ("printf -v'a[$(rm x)]' 1", None),
        ("test -d src && test -r x", [["test", "-d", "src"], ["test", "-r", "x"]]),
        ("test -n x -a -v 'a[$(rm x)]'", None),
        ("test -R 'a[$(rm x)]'", None),
        ("echo /w/bin | read PATH", None),
        ("wait -fp x", None),
        ("hash -p /w/ls ls; ls", None),
        ("enable -f ./x.so ls; ls", None),
        ("trap 'rm x' EXIT; ls", None),
        ("", None),
        (" \n ", None),
    ],
)
def test_a_text_is_simple_or_not(text: str, commands: list[list[str]] | None) -> None:
    assert argvs(text) == commands


def test_the_name_is_as_written_and_the_base_its_last_component() -> None:
    (command,) = parse("../../bin/ls x/y").commands
    assert command == Command(name="../../bin/ls", base="ls", argv=("../../bin/ls", "x/y"))
    assert [(each.name, each.base) for each in parse("ls/; ./git").commands] == [("ls/", "ls"), ("./git", "git")]


@pytest.mark.parametrize("character", [chr(code) for code in range(0x20) if chr(code) != "\n"] + ["\x7f"])
def test_no_control_character_is_simple_anywhere(character: str) -> None:
    for text in (f"ls{character}", f"{character}ls", f"ls {character}x", f"ls '{character}'", f'ls "{character}"'):
        assert argvs(text) is None


@given(st.characters(min_codepoint=0x80))
def test_beyond_ascii_only_letters_are_simple_quoted_or_not(character: str) -> None:
    for text in (f"ls {character}", f"ls '{character}'"):
        if argvs(text) is not None:
            assert character.isalpha()


# ---- too long, too many: not simple, and soon


def test_what_is_too_long_to_be_judged_is_not_simple() -> None:
    assert argvs("ls " + "x" * (MAX_TEXT - 3)) is not None
    assert argvs("ls " + "x" * (MAX_TEXT - 2)) is None
    assert argvs("; ".join(["ls"] * MAX_COMMANDS)) is not None
    assert argvs("; ".join(["ls"] * (MAX_COMMANDS + 1))) is None
    assert argvs("ls" + " x" * 5000) is None


@pytest.mark.parametrize(
    "unit",
    [
        *(
            "ls;",
            ";",
            "'",
            '"',
            "\\",
            "(",
            "{",
            "`",
            "$(",
            "<<",
            "a=",
            "&",
            "&&",
            "';",
            '";',
            ';"',
            ';"\\"',
            "';'\"",
            "\n",
        ),
        *("<(", "((", "[[ ", "if ", "case x in ", "x <<E\n", "${", "\\\n", "; '", ";\\'", "'\\''", "$'", "a b ", "é "),
    ],
)
def test_no_text_of_the_longest_kind_takes_long(unit: str) -> None:
    text = (unit * 120_000)[:120_000]
    began = time.process_time()
    parse(text)
    parse(text[:MAX_TEXT])
    parse("ls;" + text + "x")
    assert time.process_time() - began < 2


# ---- a real shell is asked

# These run what they are given, and say so by their names: a rule that allows one allows that.
RUNS_WORDS = {"builtin", "command", "eval", "exec", "trap", "source", "."}
ALL_OF_THEM = """
while IFS= read -r -d "" text; do (eval "$text") </dev/null >/dev/null 2>&1; done
"""


def test_no_builtin_runs_what_stands_in_a_quoted_word_of_a_simple_text(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    builtins = subprocess.run([bash, "-c", "compgen -b"], capture_output=True, text=True, check=True).stdout.split()
    letters = [chr(code) for code in (*range(ord("A"), ord("Z") + 1), *range(ord("a"), ord("z") + 1))]
    texts = [
        f"{name} {option}'a[$(: >{{mark}})]'{more}"
        for name in builtins
        if name not in {"suspend", *RUNS_WORDS}  # the one stops who asks
        for option in ("", *(f"-{letter} " for letter in letters))
        for more in ("", " x")
    ]
    given = "".join(text.format(mark=number) + "\0" for number, text in enumerate(texts))
    subprocess.run([bash, "--noprofile", "--norc", "-c", ALL_OF_THEM], input=given.encode(), cwd=tmp_path, check=False)
    ran = {int(name) for name in os.listdir(tmp_path) if name.isdigit()}
    assert {texts[number].split()[0] for number in ran} >= {"printf", "test", "read", "let"}
    assert [texts[number] for number in sorted(ran) if parse(texts[number].format(mark=number)).simple] == []


NAMES = ["ls", "git", "x.y", "b-c", "Größe", "1"]
PLAIN = st.text("abzABZ019_-./:,@%+=^éß日", min_size=1, max_size=6)
QUOTED = st.one_of(
    st.text(' ab$`"\\!*?[]{}()<>|&;#~é', max_size=6).map(lambda text: f"'{text}'"),
    st.text(" ab'*?[]{}()<>|&;#~é", max_size=6).map(lambda text: f'"{text}"'),
)
WORD = st.lists(st.one_of(PLAIN, QUOTED), min_size=1, max_size=3).map("".join)
COMMAND = st.tuples(st.sampled_from(NAMES), st.lists(WORD, max_size=3)).map(lambda pair: " ".join([pair[0], *pair[1]]))
SEPARATOR = st.sampled_from(["; ", ";", "\n", " && ", "&&", " || ", "||", " | ", "|", "\n\n", " ;\n", "&&\n", "|\n "])
TEXT = st.tuples(
    COMMAND, st.lists(st.tuples(SEPARATOR, COMMAND), max_size=3), st.sampled_from(["", " ", "\n", ";"])
).map(lambda parts: parts[0] + "".join(separator + command for separator, command in parts[1]) + parts[2])
NOISE = st.sampled_from([*"'\"\\$`!*?[]{}()<>|&;#~= \n\t\r%^+-0é", "&&", "||", "$'", '$"', "=~", "\\\n", "! ", "}}"])

FAKE = '#!/bin/sh\nprintf "%s\\0" "$@" > "$OUT/$$.tmp" && mv "$OUT/$$.tmp" "$OUT/${0##*/}.$$"\nexit "$STATUS"\n'


class Shells:
    """Shells whose only programs are fakes that write down the arguments that they got."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.programs = home / "bin"
        self.programs.mkdir()
        for name in NAMES:
            (self.programs / name).write_text(FAKE)
            (self.programs / name).chmod(0o755)
        (self.programs / "mv").symlink_to(str(shutil.which("mv")))
        self.found = [path for name in ("bash", "dash") if (path := shutil.which(name)) is not None]

    def run(self, shell: str, text: str, status: int) -> list[list[str]]:
        """What the programs got, sorted."""
        out = self.home / "out"
        out.mkdir()
        env = {"PATH": str(self.programs), "OUT": str(out), "STATUS": str(status), "LANG": "C.UTF-8"}
        subprocess.run(
            [shell, "-c", "--", text], env=env, cwd=self.home, stdin=subprocess.DEVNULL, capture_output=True, timeout=30
        )
        got = []
        for path in out.iterdir():
            args = path.read_bytes().split(b"\0")[:-1]
            # printf writes one empty text where there is no argument at all.
            got.append([path.name.rpartition(".")[0], *(arg.decode() for arg in args)])
        shutil.rmtree(out)
        return sorted(got)


@pytest.fixture(scope="module")
def shells(tmp_path_factory: pytest.TempPathFactory) -> Shells:
    return Shells(tmp_path_factory.mktemp("shells"))


def agrees(shells: Shells, text: str) -> None:
    commands = parse(text).commands
    wanted = [list(command.argv) if len(command.argv) > 1 else [command.name, ""] for command in commands]
    for shell in shells.found:
        # With success what follows || does not run, with failure what follows &&.
        succeeding, failing = shells.run(shell, text, 0), shells.run(shell, text, 1)
        ran = {tuple(argv) for argv in succeeding + failing}
        assert ran == {tuple(argv) for argv in wanted}, (shell, text)
        if "||" not in text:
            assert succeeding == sorted(wanted), (shell, text)


@examples(60)
@given(text=TEXT)
def test_every_text_of_literal_commands_is_simple_and_a_shell_runs_just_those(shells: Shells, text: str) -> None:
    assert parse(text).simple
    agrees(shells, text)


@examples(120)
@given(text=TEXT, noise=st.lists(st.tuples(st.integers(0, 200), NOISE), min_size=1, max_size=3))
def test_whatever_is_still_simple_after_a_mutation_is_what_a_shell_runs(
    shells: Shells, text: str, noise: list[tuple[int, str]]
) -> None:
    for place, character in noise:
        place %= len(text) + 1
        text = text[:place] + character + text[place:]
    facts = parse(text)
    assume(facts.simple and all(command.name in NAMES for command in facts.commands))
    agrees(shells, text)


def test_there_is_a_shell_to_ask(shells: Shells) -> None:
    assert [os.path.basename(path) for path in shells.found][:1] == ["bash"]
