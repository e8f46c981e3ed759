"""The page on what is tried against Corral names tests that there are, and for every property one at least."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "explanation" / "security-tests.md"
_NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


@cache
def defined_in(file: str) -> frozenset[str]:
    path = TESTS / file
    if not path.is_file():
        return frozenset()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in tree.body if isinstance(node, kinds) and node.name.startswith("test_"))


def rows() -> list[tuple[str, str]]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [(cell[0], cell[1]) for cell in cells if cell[0] != "property" and set(cell[0]) != {"-"}]


def test_every_test_that_the_page_names_exists() -> None:
    named = _NAMED.findall(PAGE.read_text(encoding="utf-8"))
    assert [f"{file}::{name}" for file, name in named if name not in defined_in(file)] == []
    assert len(named) > 100


def test_every_property_has_a_test_and_nothing_else_stands_beside_it() -> None:
    assert [held for held, tests in rows() if _NAMED.sub("", tests).strip() or not _NAMED.search(tests)] == []
    assert len(rows()) > 40


def test_every_module_of_security_and_fuzzing_stands_on_the_page() -> None:
    named = {file for file, _ in _NAMED.findall(PAGE.read_text(encoding="utf-8"))}
    there = {
        str(path.relative_to(TESTS)) for folder in ("security", "fuzz") for path in (TESTS / folder).glob("test_*.py")
    }
    assert there - named == set()
