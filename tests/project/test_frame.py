"""The project's own files: locked, complete, and free of what would tie them to one place."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))


def _locked(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", path.read_text(), re.MULTILINE))


def _name(requirement: str) -> str:
    return re.split(r"[\s<>=!~;\[]", requirement, maxsplit=1)[0].lower().replace("_", "-")


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_a_lock_file_names_no_host(path: Path) -> None:
    assert "://" not in path.read_text()


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_every_locked_package_has_a_hash(path: Path) -> None:
    blocks = re.split(r"^(?=[A-Za-z0-9_.-]+==)", path.read_text(), flags=re.MULTILINE)[1:]
    assert blocks
    assert [block.split("=")[0] for block in blocks if "--hash=sha256:" not in block] == []


def test_everything_that_pyproject_asks_for_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    runtime = project["project"]["dependencies"] + project["build-system"]["requires"]
    wanted_dev = project["dependency-groups"]["dev"]
    assert {_name(item) for item in runtime} <= set(_locked(ROOT / "requirements" / "runtime.txt"))
    assert {_name(item) for item in runtime + wanted_dev} <= set(_locked(ROOT / "requirements" / "dev.txt"))


def test_the_development_lock_has_the_runtime_versions() -> None:
    runtime, dev = (_locked(ROOT / "requirements" / f"{name}.txt") for name in ("runtime", "dev"))
    assert {name: dev.get(name) for name in runtime} == runtime


def test_set_up_says_which_python_it_needs_and_how_to_name_another() -> None:
    """Run under a version that claims to be too old; the script is read by such interpreters too."""
    script = ROOT / "tools" / "setup.py"
    code = f"import sys, runpy; sys.version_info = (3, 9, 0); runpy.run_path({str(script)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "needs Python 3.11 or newer" in done.stderr
    assert "make PYTHON=" in done.stderr


def test_the_rooms_are_in_order() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports")], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout
