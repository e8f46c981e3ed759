from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from corral.executor.catalogue import SPECS
from corral.executor.facts import facts
from tests.executor.make import Bench


def test_paths_are_resolved_before_they_are_judged(tmp_path: Path) -> None:
    root = tmp_path / "work"
    root.mkdir()
    (root / "out").symlink_to("..")
    (root / "in").symlink_to("sub")
    (tmp_path / "link").symlink_to(root)
    cases: list[tuple[str, str, bool]] = [
        ("a/../b", "b", True),
        ("in/x", "sub/x", True),
        ("out/x", "../x", False),
        ("../work-evil", "../work-evil", False),
        (str(root / "c"), "c", True),
        (str(tmp_path / "link" / "c"), "c", True),
        ("/etc/passwd", "", False),
    ]
    for base in (root, tmp_path / "link"):
        for path, relative, inside in cases:
            fact = facts("file.read", {"path": path}, base)
            assert fact.kind == "path"
            assert fact.value["inWorkspace"] is inside
            if relative:
                assert fact.value["relative"] == relative
                assert fact.value["absolute"] == str((root / relative).resolve())


async def test_a_write_is_judged_by_the_name_that_it_replaces_and_an_edit_by_the_file_that_it_changes(
    bench: Bench, root: Path
) -> None:
    (root / "plain").write_text("old")
    (root / "sub").mkdir()
    for link, target in (("guarded", "plain"), ("innocent", "sub/kept"), ("folder", "sub"), ("out", "/etc/hosts")):
        (root / link).symlink_to(target)
    for path, place in (
        ("guarded", "guarded"),
        ("./sub/../guarded", "guarded"),
        (str(root / "guarded"), "guarded"),
        ("folder/new", "sub/new"),
        ("out", "out"),
        ("sub/..", "."),
    ):
        assert facts("file.write", {"path": path}, root).value["relative"] == place, path
        assert facts("file.write", {"path": path}, root).value["inWorkspace"]
    assert facts("file.edit", {"path": "guarded"}, root).value["relative"] == "plain"
    await bench.call("file.edit", path="guarded", old="old", new="new")
    assert (root / "plain").read_text() == "new"
    await bench.call("file.write", path="guarded", content="mine")
    assert (root / "plain").read_text() == "new"
    assert not (root / "guarded").is_symlink()


def test_a_file_tool_without_a_path_means_the_folder(tmp_path: Path) -> None:
    assert facts("file.list", {}, tmp_path).value == {
        "absolute": str(tmp_path),
        "relative": ".",
        "inWorkspace": True,
    }


@pytest.mark.parametrize(
    ("url", "value"),
    [
        (
            "https://Example.COM./a%20b/../c?q=1#f",
            {"scheme": "https", "host": "example.com", "port": 443, "path": "/c"},
        ),
        ("HTTP://[::1]:8080", {"scheme": "http", "host": "::1", "port": 8080, "path": "/"}),
    ],
)
def test_urls_are_parsed(tmp_path: Path, url: str, value: dict[str, Any]) -> None:
    fact = facts("http.request", {"url": url}, tmp_path)
    assert fact.kind == "url"
    assert fact.value == value


@pytest.mark.parametrize("url", ["file:///x", "http://a@b/", "nonsense", "http://a\\@b/"])
def test_a_url_that_would_be_refused_has_no_facts(tmp_path: Path, url: str) -> None:
    assert facts("http.request", {"url": url}, tmp_path).kind == "none"


def test_an_argument_vector_is_a_fact_and_a_shell_text_is_none_yet(tmp_path: Path) -> None:
    assert facts("process.exec", {"argv": ["ls", "-l"]}, tmp_path).value == ["ls", "-l"]
    assert facts("bash.exec", {"command": "ls"}, tmp_path).kind == "none"


@pytest.mark.parametrize("tool", [*(spec.name for spec in SPECS), "no.such_tool"])
@pytest.mark.parametrize("value", [None, 5, True, "text", "\ud800", "a\0b", [], ["x", None], {"a": []}, 1e300])
def test_arguments_that_no_check_lets_through_have_facts_or_none_and_raise_nothing(
    tmp_path: Path, tool: str, value: Any
) -> None:
    for name in ("path", "url", "argv", "command", "pattern", "method"):
        found = facts(tool, {name: value}, tmp_path)
        assert found.kind == "none" or tool != "process.exec" or isinstance(value, list)
