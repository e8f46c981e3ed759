"""Where there is no sandbox, nothing runs: never on the host instead."""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import pytest

from corral.executor import local
from corral.executor.service import Executor
from corral.protocol.errors import SandboxUnavailable
from tests.executor.make import Bench, context
from tests.support import needs

COMMANDS: list[tuple[str, dict[str, Any]]] = [
    ("bash.exec", {"command": "touch ran"}),
    ("process.exec", {"argv": ["touch", "ran"]}),
]


def broken_bwrap(folder: Path, script: str) -> str:
    """A search path whose bubblewrap does what `script` says."""
    folder.mkdir()
    (folder / "bwrap").write_text(script if script.startswith("\x7f") else f"#!/bin/sh\n{script}\n")
    (folder / "bwrap").chmod(0o755)
    return str(folder)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


BROKEN = {
    "not installed": None,
    "not permitted": "echo 'bwrap: No permissions to create new namespace' >&2; exit 1",
    "not bubblewrap": "exit 0",
    "runs the command without a sandbox": 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"',
    "crashes": "kill -9 $$",
    "not a program": "\x7fELF",
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize(("tool", "args"), COMMANDS)
async def test_without_a_sandbox_no_command_runs(
    tmp_path: Path, root: Path, tool: str, args: dict[str, Any], kind: str
) -> None:
    script = BROKEN[kind]
    path = str(tmp_path / "empty") if script is None else broken_bwrap(tmp_path / "bin", script)
    executor = Executor(sandbox_path=path)
    try:
        outcome = await Bench(executor, root).call(tool, **args)
        assert outcome.status == "failed"
        assert outcome.error is not None
        assert outcome.error.code == "SANDBOX_UNAVAILABLE"
        assert "bubblewrap" in outcome.error.message
        assert "bashMode" in outcome.error.message
        with pytest.raises(SandboxUnavailable):
            await executor.ready(context(root))
        assert os.listdir(root) == []
    finally:
        await executor.close()


async def test_file_tools_and_host_mode_need_no_sandbox(tmp_path: Path, root: Path) -> None:
    executor = Executor(sandbox_path=str(tmp_path))
    bench = Bench(executor, root)
    assert (await bench.call("file.write", path="f", content="x")).status == "success"
    assert (await bench.call("file.search", pattern="x")).output == "f:1: x\n"
    await executor.ready(context(root, bash_mode="host"))
    assert (await bench.on(bash_mode="host").bash("cat f")).output == "x"
    await executor.close()


async def test_a_sandbox_that_comes_later_is_found_and_one_that_breaks_later_runs_nothing(
    tmp_path: Path, root: Path
) -> None:
    needs.bubblewrap()
    folder = tmp_path / "bin"
    folder.mkdir()
    executor = Executor(sandbox_path=str(folder))
    bench = Bench(executor, root)
    assert (await bench.bash("touch early")).status == "failed"
    (folder / "bwrap").symlink_to("/usr/bin/bwrap")
    assert (await bench.bash("echo now")).output == "now\n"
    (folder / "bwrap").unlink()
    (folder / "bwrap").write_text("#!/bin/sh\nexit 1\n")
    (folder / "bwrap").chmod(0o755)
    for _ in range(2):
        outcome = await bench.bash("touch late")
        assert outcome.error is not None
        assert outcome.error.code == "SANDBOX_UNAVAILABLE"
    assert os.listdir(root) == []
    await executor.close()


@pytest.mark.parametrize("bash_mode", ["sandbox", "host"])
async def test_cloud_mode_runs_nothing_here(root: Path, bash_mode: str) -> None:
    executor = Executor()
    bench = Bench(executor, root, runtime_mode="cloud", bash_mode=bash_mode)
    (root / "f").write_text("x")
    calls: list[tuple[str, dict[str, Any]]] = [
        *COMMANDS,
        ("file.read", {"path": "f"}),
        ("file.list", {}),
        ("file.search", {"pattern": "x"}),
        ("file.write", {"path": "g", "content": ""}),
        ("file.edit", {"path": "f", "old": "x", "new": "y"}),
        ("http.request", {"url": "http://127.0.0.1/"}),
    ]
    for tool, args in calls:
        outcome = await bench.call(tool, **args)
        assert outcome.error is not None
        assert outcome.error.code == "SANDBOX_UNAVAILABLE"
    with pytest.raises(SandboxUnavailable):
        await executor.ready(context(root, runtime_mode="cloud", bash_mode=bash_mode))
    assert os.listdir(root) == ["f"]
    assert (root / "f").read_text() == "x"
    await executor.close()


async def test_the_whole_file_system_is_no_session_folder_for_commands() -> None:
    executor = Executor()
    outcome = await Bench(executor, Path("/")).bash("true")
    assert outcome.error is not None
    assert outcome.error.code == "SANDBOX_UNAVAILABLE"
    await executor.close()


def test_the_host_is_named_once_in_the_code_that_runs_commands() -> None:
    """Reads the code: the program for the host is made in one place, under `bash_mode == "host"`."""
    tree = ast.parse(Path(local.__file__).read_text())
    made = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Program"]
    assert len(made) == 1
    guards = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "context.bash_mode == 'host'"
    ]
    assert any(made[0] in ast.walk(statement) for guard in guards for statement in guard.body)
