"""msgspec looks a type through at its first use; two threads that do so at once end the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_no_thread_of_a_gateway_is_the_first_to_use_a_type(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "tests.project.types_in_threads", str(tmp_path / "data")]
    root = Path(__file__).parents[2]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    seen = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert [kind for thread, kind in seen if thread == "main"].count("PolicyDocument") == 1
    assert [(thread, kind) for thread, kind in seen if thread != "main"] == []
