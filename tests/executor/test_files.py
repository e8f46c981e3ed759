from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

import pytest

from corral.executor.api import OUTPUT_LIMIT
from tests.executor.make import Bench, until


async def message(bench: Bench, tool: str, **args: object) -> str:
    """The error message of a call that must fail."""
    outcome = await bench.call(tool, **args)
    assert outcome.status == "failed"
    assert outcome.error is not None
    assert outcome.error.code == "TOOL_EXEC_FAILED"
    assert outcome.error.message in outcome.output
    return outcome.error.message


async def test_a_file_that_was_written_is_read_back(bench: Bench) -> None:
    outcome = await bench.call("file.write", path="a/b/c.txt", content="eins\nzwei ä\n")
    assert outcome.status == "success"
    assert (bench.root / "a/b/c.txt").read_text() == "eins\nzwei ä\n"
    assert (await bench.call("file.read", path="a/b/c.txt")).output == "eins\nzwei ä\n"


async def test_an_absolute_path_inside_the_folder_is_as_good_as_a_relative_one(bench: Bench) -> None:
    await bench.call("file.write", path=str(bench.root / "x"), content="1")
    assert (await bench.call("file.read", path=f"{bench.root}/./x")).output == "1"


async def test_a_folder_reached_over_a_link_works_by_both_of_its_names(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bench.root)
    (bench.root / "x").write_text("1")
    linked = Bench(bench.executor, tmp_path / "link")
    assert (await linked.call("file.read", path=str(tmp_path / "link" / "x"))).output == "1"
    assert (await linked.call("file.read", path=str(bench.root / "x"))).output == "1"


async def test_reading_goes_on_where_the_last_part_said(bench: Bench) -> None:
    lines = [f"line {number} {'x' * 40}\n" for number in range(1, 3001)]
    (bench.root / "long").write_text("".join(lines))
    read, offset = "", 1
    for _ in range(100):
        output = (await bench.call("file.read", path="long", offset=offset)).output
        assert len(output) <= OUTPUT_LIMIT
        part, mark, rest = output.partition("[... there is more; go on with offset ")
        read += part
        if not mark:
            break
        offset = int(rest.split()[0])
    assert read == "".join(lines)


async def test_offset_and_limit_pick_lines(bench: Bench) -> None:
    (bench.root / "f").write_text("1\n2\n3\n4")
    assert (await bench.call("file.read", path="f", offset=2, limit=2)).output.startswith("2\n3\n[... there is more")
    assert (await bench.call("file.read", path="f", offset=4)).output == "4"
    assert await message(bench, "file.read", path="f", offset=9) == "$.offset: the file has 4 lines"


async def test_a_line_too_long_to_show_is_cut_and_the_next_one_can_be_read(bench: Bench) -> None:
    (bench.root / "f").write_text("a" * 100_000 + "\nnext\n")
    output = (await bench.call("file.read", path="f")).output
    assert "the next line is offset 2" in output
    assert (await bench.call("file.read", path="f", offset=2)).output == "next\n"


async def test_an_empty_file_reads_as_nothing(bench: Bench) -> None:
    (bench.root / "f").touch()
    assert (await bench.call("file.read", path="f")).output == ""


async def test_a_binary_file_is_said_to_be_one(bench: Bench) -> None:
    (bench.root / "f").write_bytes(b"\x7fELF\0\0")
    assert "binary file of 6 bytes" in await message(bench, "file.read", path="f")


async def test_invalid_utf_8_is_replaced(bench: Bench) -> None:
    (bench.root / "f").write_bytes(b"a\xffb\n")
    assert (await bench.call("file.read", path="f")).output == "a\ufffdb\n"


async def test_a_fifo_or_a_device_is_refused_and_nobody_waits_for_it(bench: Bench) -> None:
    os.mkfifo(bench.root / "fifo")
    async with asyncio.timeout(30):
        assert await message(bench, "file.read", path="fifo") == "$.path: is not a regular file"
        assert "not a regular file" in await message(bench, "file.edit", path="fifo", old="a", new="b")
        assert "not a regular file" in await message(bench, "file.write", path="fifo", content="")
        assert "neither" in await message(bench, "file.search", path="fifo", pattern="x")


async def test_a_directory_is_no_file(bench: Bench) -> None:
    (bench.root / "d").mkdir()
    assert await message(bench, "file.read", path="d") == "$.path: is a directory"
    assert await message(bench, "file.write", path="d", content="") == "$.path: is a directory"
    assert await message(bench, "file.write", path="d/", content="") == "$.path: is a directory"
    assert await message(bench, "file.write", path=".", content="") == "$.path: is a directory"


async def test_listing_is_sorted_and_marks_directories_and_links(bench: Bench) -> None:
    (bench.root / "b").mkdir()
    (bench.root / "c").touch()
    (bench.root / "a").symlink_to("c")
    assert (await bench.call("file.list")).output == "a@\nb/\nc\n"
    assert (await bench.call("file.list", path="b")).output == "(empty directory)\n"


async def test_a_large_directory_is_listed_in_part(bench: Bench) -> None:
    for number in range(1100):
        (bench.root / f"{number:04d}").touch()
    output = (await bench.call("file.list")).output
    assert output.startswith("0000\n0001\n")
    assert output.endswith("[... 1000 of 1100 entries ...]\n")


async def test_writing_keeps_the_mode_of_a_file_and_leaves_no_temporary_one(bench: Bench) -> None:
    (bench.root / "run.sh").write_text("old")
    (bench.root / "run.sh").chmod(0o750)
    await bench.call("file.write", path="run.sh", content="new")
    assert (bench.root / "run.sh").read_text() == "new"
    assert stat.S_IMODE((bench.root / "run.sh").stat().st_mode) == 0o750
    assert os.listdir(bench.root) == ["run.sh"]


async def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bench.root / "f").write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert await message(bench, "file.write", path="f", content="new") == "$.path: no space left on the device"
    assert os.listdir(bench.root) == ["f"]
    assert (bench.root / "f").read_text() == "old"


async def test_writing_replaces_a_link_and_a_hard_link_instead_of_writing_through(bench: Bench) -> None:
    (bench.root / "target").write_text("untouched")
    (bench.root / "soft").symlink_to("target")
    os.link(bench.root / "target", bench.root / "hard")
    for name in ("soft", "hard"):
        await bench.call("file.write", path=name, content="new")
        assert (bench.root / name).read_text() == "new"
        assert not (bench.root / name).is_symlink()
    assert (bench.root / "target").read_text() == "untouched"


async def test_editing_replaces_the_one_occurrence_and_keeps_all_else_byte_by_byte(bench: Bench) -> None:
    (bench.root / "f").write_bytes(b"a\r\n\xffold b\n")
    outcome = await bench.call("file.edit", path="f", old="old", new="new\nline")
    assert outcome.output == "edited f at line 2\n"
    assert (bench.root / "f").read_bytes() == b"a\r\n\xffnew\nline b\n"


async def test_an_edit_that_is_not_unique_or_not_there_says_how_often(bench: Bench) -> None:
    (bench.root / "f").write_text("aaa\nb\nb\n")
    assert "occurs 2 times" in await message(bench, "file.edit", path="f", old="aa", new="x")
    assert "occurs 2 times" in await message(bench, "file.edit", path="f", old="b", new="x")
    assert await message(bench, "file.edit", path="f", old="z", new="x") == "$.old: does not occur in the file"
    assert (bench.root / "f").read_text() == "aaa\nb\nb\n"


async def test_editing_over_a_link_that_stays_inside_edits_the_file_it_leads_to(bench: Bench) -> None:
    (bench.root / "d").mkdir()
    (bench.root / "d" / "real").write_text("old")
    (bench.root / "link").symlink_to("d/real")
    await bench.call("file.edit", path="link", old="old", new="new")
    assert (bench.root / "link").is_symlink()
    assert (bench.root / "d" / "real").read_text() == "new"


async def test_searching_gives_path_line_and_text_and_leaves_out_git_binaries_and_links(bench: Bench) -> None:
    (bench.root / ".git").mkdir()
    (bench.root / ".git" / "x").write_text("needle\n")
    (bench.root / "d").mkdir()
    (bench.root / "d" / "f.txt").write_text("one\ntwo needle\r\nthree\n")
    (bench.root / "bin").write_bytes(b"needle\0")
    (bench.root / "link").symlink_to("d/f.txt")
    assert (await bench.call("file.search", pattern="ne{2}dle")).output == "d/f.txt:2: two needle\n"
    assert (
        await bench.call("file.search", pattern="^t", path="d")
    ).output == "d/f.txt:2: two needle\nd/f.txt:3: three\n"
    assert (await bench.call("file.search", pattern="three", path="d/f.txt")).output == "d/f.txt:3: three\n"
    assert (await bench.call("file.search", pattern="nowhere")).output == "no matches\n"


async def test_a_wrong_pattern_is_named(bench: Bench) -> None:
    assert (await message(bench, "file.search", pattern="(")).startswith("$.pattern: not a regular expression")


async def test_searching_stops_at_its_number_of_matches(bench: Bench) -> None:
    (bench.root / "f").write_text("x\n" * 10_000)
    output = (await bench.call("file.search", pattern="x")).output
    assert output.count("f:") == 200
    assert "only the first 200 matches" in output


async def test_a_pattern_that_takes_for_ever_is_killed_and_the_loop_goes_on(bench: Bench) -> None:
    (bench.root / "f").write_text("a" * 60 + "!\n")
    before = asyncio.get_running_loop().time()
    outcome = await bench.on(timeout_ms=500).call("file.search", pattern="(a+)+$")
    assert asyncio.get_running_loop().time() - before < 5
    assert outcome.error is not None
    assert outcome.error.code == "LIMIT_REACHED"
    assert "500 ms" in outcome.error.message


async def test_a_cancelled_write_has_happened_or_has_not_when_cancellation_leaves(bench: Bench) -> None:
    for step in range(20):
        task = asyncio.create_task(bench.call("file.write", path="f", content=str(step) * 100_000))
        await asyncio.sleep(step * 0.0002)
        task.cancel()
        await asyncio.wait([task])
        entries = os.listdir(bench.root)
        assert entries in ([], ["f"])


async def test_a_missing_folder_is_said_to_be_missing_without_its_path(bench: Bench) -> None:
    bench.root.rmdir()
    words = await message(bench, "file.list")
    assert words == "the session's folder is not there"


async def test_the_loop_is_free_while_files_are_read(bench: Bench) -> None:
    (bench.root / "big").write_text("".join(f"line {number} of a long file\n" for number in range(400_000)))
    task = asyncio.create_task(bench.call("file.read", path="big", offset=399_999))
    worst, loop = 0.0, asyncio.get_running_loop()
    while not task.done():
        before = loop.time()
        await asyncio.sleep(0.001)
        worst = max(worst, loop.time() - before)
    assert (await task).output.startswith("line 399998 ")
    assert worst < 0.2


async def test_no_descriptor_is_lost(bench: Bench) -> None:
    (bench.root / "f").write_text("x")
    calls = [
        ("file.read", {"path": "f"}),
        ("file.read", {"path": "../x"}),
        ("file.read", {"path": "."}),
        ("file.list", {}),
        ("file.list", {"path": "f"}),
        ("file.write", {"path": "a/b/../c/d", "content": ""}),
        ("file.write", {"path": "f/g", "content": ""}),
        ("file.edit", {"path": "f", "old": "y", "new": ""}),
        ("file.search", {"pattern": "x"}),
    ]
    for name, args in calls:
        await bench.call(name, **args)
    before = set(os.listdir("/proc/self/fd"))
    for name, args in calls * 3:
        await bench.call(name, **args)
    await until(lambda: set(os.listdir("/proc/self/fd")) == before, "all descriptors are closed", 2)
