"""What some tests need of the machine. Missing, it skips them with the reason; where
`CORRAL_REQUIRE_ALL=1` is set (CI) it fails them instead, so that nothing is left out unseen."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import pytest


def _lack(reason: str) -> None:
    if os.environ.get("CORRAL_REQUIRE_ALL") == "1":
        pytest.fail(f"needed here and not there: {reason}")
    pytest.skip(reason)


@lru_cache(maxsize=1)
def bubblewrap_works() -> bool:
    """Whether bubblewrap is installed and may make its namespaces."""
    path = shutil.which("bwrap")
    if path is None:
        return False
    argv = [path, "--ro-bind", "/", "/", "--unshare-all", "--die-with-parent", "true"]
    return subprocess.run(argv, capture_output=True, timeout=20).returncode == 0


def bubblewrap() -> None:
    """Skip (or fail) the calling test unless the bubblewrap sandbox runs here."""
    if not bubblewrap_works():
        _lack("bubblewrap (Debian package bubblewrap) is not installed or may not make namespaces")


@lru_cache(maxsize=1)
def mount_works() -> bool:
    """Whether this process may mount a file system of its own."""
    with tempfile.TemporaryDirectory() as path:
        argv = ["mount", "-t", "tmpfs", "-o", "size=64k", "corral-test", path]
        if shutil.which("mount") is None or subprocess.run(argv, capture_output=True, timeout=20).returncode != 0:
            return False
        return subprocess.run(["umount", path], capture_output=True, timeout=20).returncode == 0


def mount() -> None:
    """Skip (or fail) the calling test unless a small file system can be mounted (root on Linux)."""
    if not mount_works():
        _lack("this process may not mount a file system (needs root on Linux)")


def node() -> None:
    """Skip (or fail) the calling test unless Node.js and npm are there."""
    missing = [name for name in ("node", "npm") if shutil.which(name) is None]
    if missing:
        _lack(f"{' and '.join(missing)} not installed (Debian packages nodejs and npm)")


def npm_packages(folder: Path) -> None:
    """Install what `folder`'s lock file names, once. Skip (or fail) where that cannot be had."""
    node()
    installed, wanted = folder / "node_modules" / ".package-lock.json", folder / "package-lock.json"
    if installed.is_file() and installed.stat().st_mtime >= wanted.stat().st_mtime:
        return
    done = subprocess.run(
        ["npm", "ci", "--no-audit", "--no-fund"], cwd=folder, capture_output=True, text=True, timeout=300
    )
    if done.returncode != 0:
        _lack(f"`npm ci` in {folder.name} failed: {done.stderr[-500:]}")


def cores() -> None:
    """Skip (or fail) the calling test unless this process may use two cores and say which."""
    if sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2:
        _lack("this process may use one core only, or the system does not say which")
