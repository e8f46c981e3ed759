"""The page on the guards names tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_test_that_is_named_as_a_guards_is_there() -> None:
    page = (ROOT / "docs" / "explanation" / "guards.md").read_text()
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    there = {name for text in files.values() for name in re.findall(r"def (test_\w+)\(", text)}
    named = set(re.findall(r"\btest_\w+\b(?!\.py)", page))
    named_files = set(re.findall(r"\btest_\w+\.py\b", page))
    assert len(named) > 10
    assert named - there == set()
    assert named_files - set(files) == set()
    for module in re.findall(r"`(\w+/\w+\.py)`", page):
        assert (ROOT / "src" / "corral" / module).exists() or (ROOT / "src" / module).exists(), module
