"""What the command says of itself, and how quickly."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from corral.cli import COMMANDS
from corral.cli import corral as the_command
from corral.cli.common import TOOLS
from corral.executor.catalogue import SPECS
from tests.cli.command import call, on_a_terminal
from tests.support.gateway import clean_environment


async def test_help_lists_every_command_on_standard_output() -> None:
    code, out, err = await call("--help")
    assert (code, err) == (0, "")
    assert [name for name in COMMANDS if f"  {name} " not in out] == []


async def test_without_arguments_the_help_goes_to_standard_error_and_the_code_is_2() -> None:
    code, out, err = await call()
    assert (code, out) == (2, "")
    assert "Usage: corral" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rnu"], ["rnu", "'run'", "corral --help"]),
        (["serve", "--prot", "1"], ["--prot", "--port", "corral serve --help"]),
        (["run"], ["TEXT", "corral run --help"]),
        (["run", "--allow", "bash", "x"], ["bash is no tool's name", "bash.exec"]),
        (["completion"], ["bash, zsh, fish", "corral completion --help"]),
        (["token", "create"], ["--role", "owner, admin, operator", "corral token create --help"]),
        (
            ["serve", "--model", "gpt", "--data-dir", "/nonexistent/x", "--port", "0"],
            ["'gpt'", "openai-chat", "--model"],
        ),
        (["run", "--timeout", "0", "x"], ["--timeout", "corral run --help"]),
        (["run", "--url", "gopher://x", "x"], ["gopher://x", "http://127.0.0.1:7077"]),
        (["run", "  "], ["TEXT is empty"]),
    ],
)
async def test_wrong_usage_is_two_lines_with_the_remedy_and_code_2(arguments: list[str], words: list[str]) -> None:
    code, out, err = await call(*arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 2, err
    assert [word for word in words if word not in err] == [], err


async def test_a_value_that_looks_like_an_option_stays_a_value() -> None:
    code, _, err = await call("run", "--session=--url=http://127.0.0.1:1", "x", env={"CORRAL_DATA_DIR": "/nonexistent"})
    assert code == 4, err
    assert "/nonexistent" in err


async def test_version_says_program_protocol_and_python() -> None:
    code, out, _ = await call("version")
    assert code == 0
    assert out.startswith("corral 0.")
    assert "protocol 1.0.0" in out


def test_help_imports_nothing_that_it_does_not_use() -> None:
    program = (
        "import sys, json\nfrom corral.cli import main\n"
        "try:\n    main(['--help'])\nfinally:\n    print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    loaded = set(json.loads(done.stderr))
    assert "click" in loaded
    assert loaded & {"aiohttp", "sqlalchemy", "msgspec", "uvloop", "asyncio", "rich", "corral.config"} == set()


def test_help_takes_under_a_quarter_of_a_second_of_processor_time() -> None:
    """The quickest of five, as other work on the machine only ever adds."""
    times = []
    for _ in range(5):
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-m", "corral", "--help"], capture_output=True, env=clean_environment(), timeout=60
        )
        after = os.times()
        assert done.returncode == 0
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(times) < 0.25


async def test_an_error_on_a_narrow_terminal_is_folded_between_words(tmp_path: Path) -> None:
    env = {"COLUMNS": "60", "NO_COLOR": "1", "CORRAL_URL": "http://there.invalid"}
    code, shown = await on_a_terminal("stats", data_dir=tmp_path / "somewhere" / "with-a-name", env=env)
    assert code == 2
    lines = shown.splitlines()
    assert lines[0].startswith("corral: no access token for there.invalid: the one in")
    assert lines[1].startswith("  ")
    assert "  set CORRAL_TOKEN to that gateway's token" in lines


def test_the_tools_that_the_command_knows_are_those_that_there_are() -> None:
    assert set(TOOLS) == {spec.name for spec in SPECS}


def _commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield " ".join(path), command
        return
    with click.Context(command) as ctx:
        for name in command.list_commands(ctx):
            found = command.get_command(ctx, name)
            assert found is not None
            yield from _commands(found, (*path, name))


def test_a_command_that_must_be_told_something_shows_how_in_an_example() -> None:
    lacking = []
    # Below the whole command, as when they are typed: click keeps what they take from there.
    above = the_command.make_context("corral", [], resilient_parsing=True)
    for name, command in _commands(the_command):
        needed = [each for each in command.params if each.required]
        choices = [each for each in needed if isinstance(each.type, click.Choice)]
        shown = command.get_help(click.Context(command, above, info_name=name)).splitlines()[1:]
        if needed and len(choices) < len(needed) and not any(f"corral {name} " in line for line in shown):
            lacking.append(name)
    assert lacking == []


async def test_a_list_of_commands_says_what_each_does_without_cutting_it_short() -> None:
    for group in ("sessions", "audit", "approvals", "grants", "policy", "token", "agents", "config"):
        code, out, _ = await call(group, "--help", env={"COLUMNS": "60"})
        assert code == 0
        assert "..." not in out.split("Commands:")[1], out
        assert [line for line in out.splitlines() if len(line) > 60] == [], out


def test_a_terminal_is_measured_where_it_is_and_not_where_a_pipe_is() -> None:
    program = "import sys\nfrom corral.cli.columns import width\nsys.stderr.write(str(width()))"
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 61, 0, 0))
    environment = {name: value for name, value in clean_environment().items() if name != "COLUMNS"}
    try:
        subprocess.run(
            [sys.executable, "-c", program],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=follower,
            env=environment,
            check=True,
            timeout=60,
        )
        assert os.read(leader, 100) == b"61"
    finally:
        os.close(leader)
        os.close(follower)
