"""The other Pythons that pyproject.toml claims are tried where they are, and where they are not that is said."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "pythons.py"
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def tool() -> dict[str, Any]:
    return runpy.run_path(str(TOOL))


def test_a_python_that_is_not_here_is_named_and_is_no_failure(tmp_path: Path, tool: dict[str, Any]) -> None:
    env = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, str(TOOL)], capture_output=True, text=True, env=env, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    others = [version for version in tool["claimed"]() if version != VERSION]
    said = "pythons: no Python {} that can make an environment is here: not tried"
    assert done.stdout.splitlines() == [said.format(version) for version in others]


def test_a_program_of_the_name_that_does_not_start_or_is_another_version_is_passed_over_for_pyenvs(
    tmp_path: Path, tool: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, body in (("shims", "exit 127"), ("lying", "echo 3.6")):
        script = tmp_path / folder / f"python{VERSION}"
        script.parent.mkdir()
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join(str(tmp_path / name) for name in ("none", "shims", "lying")))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert tool["find"](VERSION) is None
    real = tmp_path / "versions" / f"{VERSION}.99" / "bin" / f"python{VERSION}"
    real.parent.mkdir(parents=True)
    real.symlink_to(Path(sys.executable).resolve())
    assert tool["find"](VERSION) == real
    monkeypatch.setenv("PATH", str(real.parent))
    monkeypatch.delenv("PYENV_ROOT")
    assert tool["find"](VERSION) == real


def test_what_is_tried_is_there_and_the_oldest_claimed_version_is_the_one_required(tool: dict[str, Any]) -> None:
    assert [path for path in tool["SOME"] if not (ROOT / path.partition("::")[0]).is_file()] == []
    oldest = min(tool["claimed"](), key=lambda version: int(version.partition(".")[2]))
    assert f'requires-python = ">={oldest}"' in (ROOT / "pyproject.toml").read_text()
