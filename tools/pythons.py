#!/usr/bin/env python3
"""Tries each Python that pyproject.toml claims and that the suite is not run with, as far as it is on this machine.

    python tools/pythons.py

With the locked requirements under .venv/pythons/VERSION: every module is imported with warnings as errors,
and a small part of the suite is run. A version that is not here is said to be missing, and is no failure.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv" / "pythons"
OWN = f"{sys.version_info.major}.{sys.version_info.minor}"
SET_UP_TRIES = 3

# What depends on the interpreter and is quick: SQLite and its plans, processes, sockets, kills, docstrings, threads.
SOME = (
    "tests/storage/test_lock.py",
    "tests/storage/test_sqlite_failures.py",
    "tests/storage/test_sqlite_store.py",
    "tests/storage/test_statements.py",
    "tests/core/test_run.py",
    "tests/executor/test_files.py",
    "tests/executor/test_service.py",
    "tests/gateway/test_drain.py",
    "tests/models/test_google.py",
    "tests/security/test_ssrf.py",
    "tests/cli/test_demo.py::test_the_tour_kills_a_gateway_and_shows_the_run_going_on",
    "tests/project/test_reference.py",
    "tests/project/test_types_in_threads.py",
)

# Alembic runs its env.py itself, in a context that is there only then.
IMPORT_ALL = """
import importlib, pkgutil, corral
for module in pkgutil.walk_packages(corral.__path__, "corral."):
    if module.name not in ("corral.__main__", "corral.storage.migrations.env"):
        importlib.import_module(module.name)
"""


def main() -> int:
    failed = [version for version in claimed() if version != OWN and not tried(version)]
    if failed:
        say(f"failed with Python {' and '.join(failed)}")
    return 1 if failed else 0


def claimed() -> list[str]:
    """The versions in pyproject.toml's classifiers."""
    return re.findall(r'"Programming Language :: Python :: (\d+\.\d+)"', (ROOT / "pyproject.toml").read_text())


def tried(version: str) -> bool:
    """False if something is wrong with this version; True if nothing is, or if it is not here."""
    python = find(version)
    if python is None:
        say(f"no Python {version} that can make an environment is here: not tried")
        return True
    begun = time.monotonic()
    venv = FOLDER / version
    own = str(venv / "bin" / "python")
    set_up = [str(python), str(ROOT / "tools" / "setup.py"), "--dev", "--same-python", "--venv", str(venv)]
    # A registry may be out of reach for a moment; what fails afterwards is not tried again.
    if not any(run(set_up) for _ in range(SET_UP_TRIES)):
        return False
    say(f"Python {version}, {python}: the imports and a part of the suite")
    # A hang is told well before the time that CI has for everything.
    suite = ["-m", "pytest", "-q", "-n", "2", "-o", "timeout=60", "-p", "no:cacheprovider", *SOME]
    fine = run([own, "-W", "error", "-c", IMPORT_ALL]) and run([own, *suite])
    say(f"Python {version}: {'fine' if fine else 'FAILED'}, {time.monotonic() - begun:.0f} s")
    return fine


def find(version: str) -> Path | None:
    """An interpreter of this version that starts and can make a virtual environment: from PATH, else from pyenv."""
    name = f"python{version}"
    places = [Path(folder) / name for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    places += sorted(pyenv.glob(f"{version}.*/bin/{name}"))
    return next((place for place in places if starts(place, version)), None)


def starts(python: Path, version: str) -> bool:
    """Pyenv puts a program on PATH for each version that it has, and most of them only say how to choose it."""
    code = "import ensurepip, sqlite3, ssl, sys, venv; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and done.stdout.strip() == version


def run(command: list[str]) -> bool:
    return subprocess.run(command, cwd=ROOT).returncode == 0


def say(text: str) -> None:
    print(f"pythons: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
