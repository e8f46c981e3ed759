"""What there must be only one way to do, read from the code; and the lint rules that other properties lean on."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "corral"


def callers(wanted: str) -> list[tuple[str, str]]:
    """(file, function) of every call whose text ends in `wanted`."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for function in ast.walk(ast.parse(text)) if wanted in text else ():
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                for node in ast.walk(function):
                    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(wanted):
                        found.append((str(path.relative_to(SOURCE)), function.name))
    return found


def test_an_approval_is_decided_in_one_function_that_is_told_who_decides() -> None:
    assert callers("approvals.update") == [("governance/approvals.py", "_move")]
    tree = ast.parse((SOURCE / "governance" / "approvals.py").read_text(encoding="utf-8"))
    deciding = [
        function
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        and any(isinstance(node, ast.Call) and ast.unparse(node.func) == "self._move" for node in ast.walk(function))
        and any(ast.unparse(node) == "ApprovalStatus.APPROVED" for node in ast.walk(function))
    ]
    assert [function.name for function in deciding] == ["resolve"]
    caller = next(each for each in deciding[0].args.args if each.arg == "caller")
    assert caller.annotation is not None
    assert ast.unparse(caller.annotation) == "Caller"
    assert deciding[0].args.defaults == []


REFUSED = {
    "an object out of bytes": ("import pickle\n", "TID251"),
    "an object out of bytes, by another name": ("from marshal import loads\n", "TID251"),
    "yaml that makes objects": ("import yaml\n\nyaml.load(open('x'))\n", "S506"),
    "a shell": ("import subprocess\n\nsubprocess.run('ls', shell=True)\n", "S602"),
    "a shell by os": ("import os\n\nos.system('ls ' + input())\n", "S605"),
    "SQL out of pieces": ("def find(name: str) -> str:\n    return f\"SELECT * FROM t WHERE a = '{name}'\"\n", "S608"),
    "a name in /tmp that can be guessed": ("PATH = '/tmp/corral'\n", "S108"),
    "code out of a text": ("eval(input())\n", "S307"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_lint_that_every_change_passes_refuses(what: str) -> None:
    text, rule = REFUSED[what]
    command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", "src/corral/core/made_up.py", "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert rule in done.stdout


def test_every_file_of_the_product_passes_that_lint_without_exceptions_for_it() -> None:
    excepted = [
        f"{path.relative_to(SOURCE)}: {line.strip()}"
        for path in sorted(SOURCE.rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if "noqa" in line and any(rule in line for rule in ("S301", "S506", "S602", "S604", "S605", "S608", "S307"))
    ]
    assert [each for each in excepted if not each.startswith("storage/migrations/")] == []
