"""The documentation holds together: links lead somewhere, what is shown is what is in the files."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
_SKIPPED = {"node_modules", "dist", "build"}
_FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_REFERENCE = re.compile(r"^ {0,3}\[[^\]]+\]:\s+<?(\S+?)>?(?:\s|$)", re.MULTILINE)


def _pages() -> list[Path]:
    found: list[Path] = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in _SKIPPED and not name.startswith(".")]
        found += [Path(folder, name) for name in files if name.endswith(".md")]
    return sorted(found)


PAGES = _pages()


def _links(text: str) -> list[str]:
    text = _CODE.sub("`code`", _FENCE.sub("", text))
    return _LINK.findall(text) + _REFERENCE.findall(text)


@lru_cache
def _anchors(path: Path) -> frozenset[str]:
    headings = re.findall(r"^#+ +(.+?) *#*$", _FENCE.sub("", path.read_text()), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


def _broken(page: Path) -> list[str]:
    broken = []
    for link in _links(page.read_text()):
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = page.parent / unquote(parts.path) if parts.path else page
        there = target.exists() and target.resolve().is_relative_to(ROOT)
        if there and parts.fragment and target.suffix == ".md":
            there = parts.fragment in _anchors(target)
        if not there:
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_of_a_page_leads_to_something(page: Path) -> None:
    assert _broken(page) == []


def test_links_are_found_in_text_and_not_in_code() -> None:
    assert _links("a [b](c.md) `[d](e.md)` [f]: x\n[g]: h.md\n") == ["c.md", "h.md"]


def test_the_index_leads_to_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    led_to = {(index.parent / unquote(urlsplit(link).path)).resolve() for link in _links(index.read_text())}
    docs, decisions = ROOT / "docs", ROOT / "docs" / "decisions"  # the decisions are led to as a folder
    pages = {page for page in PAGES if page.is_relative_to(docs) and not page.is_relative_to(decisions)}
    assert decisions in led_to
    assert sorted(str(page.relative_to(ROOT)) for page in pages - led_to - {index}) == []


def test_a_rule_that_a_page_shows_is_that_of_the_file() -> None:
    """Lines of JSON in the how-to, but for the one that is cut with an ellipsis."""
    page = (ROOT / "docs" / "how-to" / "write-a-policy.md").read_text()
    files = "".join(path.read_text() for path in (ROOT / "docs" / "examples" / "policies").glob("*.json"))
    shown = re.findall(r'^ +("(?:id|tools|when|action|match|not_match)":.*)$', page, re.MULTILINE)
    assert len(shown) == 6
    assert [line for line in shown if line.split("|| …")[0] not in files] == []
