"""Text in the columns of a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import ConsoleDimensions

from corral.cli.columns import cells, cut, fold, pad
from corral.cli.markdown import MarkdownWriter
from corral.cli.visible import unusual

CHINESE = "中文标题很长很长的会话，看看表格是否会对齐，标题是否会被正确截断。"


@pytest.mark.parametrize(
    ("text", "columns"), [("", 0), ("abc", 3), ("中文", 4), ("é", 1), ("e\u0301", 1), ("，", 2), ("a中b", 4)]
)
def test_a_chinese_character_takes_two_columns_and_an_accent_none(text: str, columns: int) -> None:
    assert cells(text) == columns
    assert cells(pad(text, 9)) == 9


@pytest.mark.parametrize("columns", range(2, 80))
def test_what_is_cut_fits_its_columns_and_fills_all_but_one(columns: int) -> None:
    shown = cut(CHINESE, columns)
    assert cells(shown) <= columns
    assert shown == CHINESE or (shown.endswith("…") and cells(shown) >= columns - 1)


@pytest.mark.parametrize("columns", range(12, 80))
def test_folded_chinese_fits_and_no_line_begins_with_a_closing_mark(columns: int) -> None:
    lines = fold(f"the title: {CHINESE}", columns)
    assert [line for line in lines if cells(line) > columns] == []
    assert [line for line in lines if line.lstrip().startswith(("，", "。"))] == []
    assert "".join(line.strip() for line in lines).replace(" ", "") == f"thetitle:{CHINESE}"


def test_what_is_to_be_copied_stays_whole_and_columns_in_a_line_stay_apart() -> None:
    wanted = "s_01a215babdde74df97b7837623df257f"
    assert fold(f"see the session {wanted} for more", 20) == ["see the session", f"  {wanted}", "  for more"]
    assert fold("  asked     today", 60) == ["  asked     today"]


def test_letters_of_a_script_with_thousands_do_not_hide_one_that_looks_like_another() -> None:
    assert unusual({"text": "删除目录里所有的文件和c\u0430t"}) == [
        "U+0430 CYRILLIC SMALL LETTER A",
        "11 Chinese characters",
    ]
    assert unusual({"text": "テスト, かな, 한국"}) == ["5 kana", "2 Hangul syllables"]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_a_narrowed_terminal_has_folded_is_taken_away_before_it_is_drawn_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("corral.cli.markdown.REDRAW_S", 0)
    monkeypatch.setenv("TERM", "xterm")
    out = _Terminal()
    writer = MarkdownWriter(out, colour=False)
    writer._console.size = ConsoleDimensions(80, 40)
    writer.write("word " * 40)  # three lines of 80
    writer._console.size = ConsoleDimensions(50, 40)  # each takes two rows now
    before = out.tell()
    writer.write("word ")
    assert out.getvalue()[before:].startswith("\r" + "\x1b[2K\x1b[1A" * 3 + "\r\x1b[2K")
    before = out.tell()
    writer.write("word ")
    assert out.getvalue()[before:].startswith("\r\x1b[2K\x1b[1A")
    writer.end()
