"""What a command imports before it has anything to do with it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"aiohttp", "sqlalchemy", "rich", "prompt_toolkit", "uvloop", "corral.client", "corral.server"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--help"],
        ["chat", "--help"],
        ["sessions", "list", "--help"],
        ["agents", "set", "--help"],
        ["doctor", "--help"],
        ["config", "show", "--help"],
        ["completion", "zsh"],
        ["run", "  "],
    ],
)
def test_a_command_that_is_not_carried_out_imports_nothing_heavy(arguments: list[str]) -> None:
    assert _loaded(arguments) & HEAVY == set()


def test_config_and_an_empty_chat_load_no_gateway_and_no_line_editor(tmp_path: object) -> None:
    loaded = _loaded(["chat", "--data-dir", str(tmp_path)])
    assert loaded & (HEAVY - {"aiohttp", "corral.client"}) == set()


def _loaded(arguments: list[str]) -> set[str]:
    program = (
        "import sys, json\nfrom corral.cli import main\n"
        f"try:\n    main({arguments!r})\nfinally:\n    print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_a_gateway_that_listens_has_its_garbage_collected(tmp_path: object) -> None:
    program = (
        "import asyncio, gc, os, signal, sys\nfrom pathlib import Path\n"
        "from corral.config import Settings\nfrom corral.server import serve\n"
        "gc.disable()\n"  # as `corral serve` does, which loads all of this
        "def listening(url):\n    print(gc.isenabled())\n    os.kill(os.getpid(), signal.SIGTERM)\n"
        "settings = Settings(data_dir=Path(sys.argv[1]), port=0, token='a-token-for-the-tests-0123456789')\n"
        "asyncio.run(serve(settings, on_listening=listening))"
    )
    argv = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n", done.stderr
