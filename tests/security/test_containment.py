"""File tools reach nothing outside the session's folder: not by name, link, race, or mistake."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from corral.executor.jail import Jail, has_openat2
from corral.executor.service import Executor
from corral.protocol.errors import ToolExecFailed
from tests.executor.make import Bench
from tests.support import needs

SECRET = "the secret outside"
OUTSIDE = "$.path: leads out of the session's folder"
ROUNDS = 10_000
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "work").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text(SECRET)
    (tmp_path / "work-evil").mkdir()
    (tmp_path / "work-evil" / "secret").write_text(SECRET)
    return tmp_path / "work"


@pytest.fixture
async def bench(root: Path) -> AsyncIterator[Bench]:
    executor = Executor()
    yield Bench(executor, root)
    await executor.close()


@pytest.fixture(params=["openat2", "walk"])
def openat2(request: pytest.FixtureRequest) -> bool:
    """Both ways to stay inside: the kernel's, and the one where the kernel has none."""
    if request.param == "openat2" and not has_openat2():
        pytest.skip("the kernel has no openat2")
    return bool(request.param == "openat2")


def escapes(root: Path) -> list[str]:
    """Paths that lead out, with the links they need."""
    (root / "sub").mkdir()
    (root / "absolute").symlink_to(root.parent / "outside")
    (root / "relative").symlink_to("../outside")
    (root / "sub" / "chain").symlink_to("../relative")
    (root / "file").symlink_to("../outside/secret")
    (root / "loop").symlink_to("loop")
    (root / "proc").symlink_to("/proc/self/root")
    (root / "cwd").symlink_to("/proc/self/cwd")
    return [
        "../outside/secret",
        "sub/../../outside/secret",
        "./../outside/secret",
        str(root.parent / "outside" / "secret"),
        f"{root}-evil/secret",
        f"{root}/../outside/secret",
        f"/../..{root}-evil/secret",
        "absolute/secret",
        "relative/secret",
        "sub/chain/secret",
        "file",
        "loop",
        f"proc{root.parent}/outside/secret",
        "proc/etc/passwd",
        "cwd/secret",
        "/etc/passwd",
        "/proc/self/environ",
        "../work/../outside/secret",
        "//etc/passwd",
    ]


async def test_no_path_leads_out_for_any_file_tool(bench: Bench, root: Path) -> None:
    for path in escapes(root):
        for tool, args in (
            ("file.read", {}),
            ("file.edit", {"old": "secret", "new": "broken"}),
            ("file.search", {"pattern": "secret"}),
            ("file.list", {}),
        ):
            outcome = await bench.call(tool, path=path, **args)
            assert outcome.status == "failed", (tool, path)
            assert outcome.error is not None
            assert outcome.error.message.startswith("$.path: "), (tool, path)
            assert SECRET not in outcome.output
            assert str(root.parent) not in outcome.output
    assert (root.parent / "outside" / "secret").read_text() == SECRET


async def test_no_write_leads_out(bench: Bench, root: Path) -> None:
    for path in escapes(root):
        if path in ("file", "loop"):
            continue  # links themselves: replaced, see below
        outcome = await bench.call("file.write", path=path, content="broken")
        assert outcome.status == "failed", path
    for path in ("absolute/new", "relative/deep/new", "../outside/new", "sub/chain/new"):
        assert (await bench.call("file.write", path=path, content="broken")).status == "failed"
    assert os.listdir(root.parent / "outside") == ["secret"]
    assert (root.parent / "outside" / "secret").read_text() == SECRET
    assert sorted(os.listdir(root.parent)) == ["outside", "work", "work-evil"]


async def test_writing_to_a_link_that_leads_out_replaces_the_link(bench: Bench, root: Path) -> None:
    (root / "file").symlink_to("../outside/secret")
    assert (await bench.call("file.write", path="file", content="inside")).status == "success"
    assert not (root / "file").is_symlink()
    assert (root.parent / "outside" / "secret").read_text() == SECRET


async def test_the_answer_is_the_same_whether_there_is_something_outside_or_not(bench: Bench, root: Path) -> None:
    (root / "there").symlink_to("../outside/secret")
    (root / "missing").symlink_to("../outside/nothing")
    for there, missing in (
        ("../outside/secret", "../outside/nothing"),
        ("/etc/passwd", "/etc/nothing-of-the-kind"),
        ("there", "missing"),
        ("../outside", "../nowhere"),
    ):
        for tool in ("file.read", "file.list"):
            first = await bench.call(tool, path=there)
            second = await bench.call(tool, path=missing)
            assert first.error == second.error
            assert first.error is not None
            assert first.error.message == OUTSIDE


@pytest.mark.parametrize("path", ["a\0b", "a" * 300, "d/" * 2100 + "f", "x" * 5000])
async def test_impossible_names_are_refused_and_named(bench: Bench, path: str) -> None:
    for tool, args in (("file.read", {}), ("file.write", {"content": ""}), ("file.list", {})):
        outcome = await bench.call(tool, path=path, **args)
        assert outcome.error is not None
        assert outcome.error.message.startswith("$.path: ")


def test_links_that_stay_inside_work_where_the_kernel_can_tell(root: Path) -> None:
    if not has_openat2():
        pytest.skip("the kernel has no openat2")
    (root / "d").mkdir()
    (root / "d" / "f").write_text("inside")
    (root / "link").symlink_to("d")
    with Jail(root) as jail:
        descriptor, _ = jail.open_regular("link/../d/f")
        assert os.read(descriptor, 10) == b"inside"
        os.close(descriptor)


def test_both_ways_to_stay_inside_refuse_the_same(root: Path, openat2: bool) -> None:
    with Jail(root, openat2=openat2) as jail:
        for path in escapes(root):
            with pytest.raises(ToolExecFailed, match=r"^\$\.path: "):
                os.close(jail.open(path))
            if path not in ("file", "loop"):
                with pytest.raises(ToolExecFailed, match=r"^\$\.path: "):
                    jail.replace(path, b"broken")
        os.close(jail.open("sub/../sub"))
    assert (root.parent / "outside" / "secret").read_text() == SECRET


@contextmanager
def swapping(root: Path) -> Iterator[threading.Event]:
    """Somebody swaps `root/d` between a directory and a link to outside, as fast as they can."""
    if sys.platform != "linux":
        pytest.skip("swaps with renameat2")
    (root / "d").mkdir()
    (root / "d" / "secret").write_text("inside")
    (root / "link").symlink_to("../outside")
    stop = threading.Event()
    libc = ctypes.CDLL(None, use_errno=True)

    def swap() -> None:
        while not stop.is_set():
            if libc.renameat2(_AT_FDCWD, bytes(root / "d"), _AT_FDCWD, bytes(root / "link"), _RENAME_EXCHANGE):
                raise OSError(ctypes.get_errno(), "renameat2")

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join()


def test_reading_in_a_race_with_a_swapped_directory_never_reads_outside(root: Path, openat2: bool) -> None:
    inside = 0
    with swapping(root), Jail(root, openat2=openat2) as jail:
        for _ in range(ROUNDS):
            try:
                descriptor, _about = jail.open_regular("d/secret")
            except ToolExecFailed:
                continue
            content = os.read(descriptor, 100)
            os.close(descriptor)
            assert content == b"inside"
            inside += 1
    assert inside > 0


def test_writing_in_a_race_with_a_swapped_directory_never_writes_outside(
    root: Path, openat2: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # ten thousand of them would take minutes
    written = 0
    with swapping(root), Jail(root, openat2=openat2) as jail:
        for count in range(ROUNDS):
            try:
                jail.replace("d/new/file" if count % 2 else "d/secret", b"inside")
            except ToolExecFailed:
                continue
            written += 1
    assert written > 0
    assert os.listdir(root.parent / "outside") == ["secret"]
    assert (root.parent / "outside" / "secret").read_text() == SECRET


async def test_the_data_directory_is_not_there_even_inside_the_folder(root: Path) -> None:
    data = root / "deep" / "corral"
    data.mkdir(parents=True)
    (data / "token").write_text(SECRET)
    (root / "link").symlink_to("deep/corral")
    executor = Executor(data_dir=data)
    bench = Bench(executor, root)
    try:
        for path in ("deep/corral/token", "link/token", str(data / "token")):
            for tool, args in (
                ("file.read", {}),
                ("file.write", {"content": "x"}),
                ("file.edit", {"old": "secret", "new": "x"}),
                ("file.search", {"pattern": "secret"}),
            ):
                outcome = await bench.call(tool, path=path, **args)
                assert outcome.status == "failed", (tool, path)
                assert SECRET not in outcome.output
        assert (await bench.call("file.list", path="deep/corral")).status == "failed"
        assert (await bench.call("file.search", pattern="secret")).output == "no matches\n"
        assert (data / "token").read_text() == SECRET
        assert os.listdir(data) == ["token"]
    finally:
        await executor.close()


async def test_no_command_moves_the_data_directory_to_where_the_next_one_sees_it(root: Path) -> None:
    needs.bubblewrap()
    data = root / "deep" / "er" / "corral"
    data.mkdir(parents=True)
    (data / "token").write_text(SECRET)
    executor = Executor(data_dir=data)
    bench = Bench(executor, root)
    try:
        for command in ("mv deep moved", "mv deep/er deep/moved", "mv deep/er moved", "mv deep/er/corral moved"):
            await bench.bash(command)
            assert SECRET not in (await bench.bash("cat */token */*/token */*/*/token")).output, command
            assert (await bench.call("file.search", pattern="secret")).output == "no matches\n"
        assert (data / "token").read_text() == SECRET
        assert (await bench.bash("echo x > deep/er/new && mv deep/er/new deep/new && cat deep/new")).output == "x\n"
    finally:
        await executor.close()


async def test_a_session_folder_in_the_data_directory_is_open_to_its_session(root: Path) -> None:
    executor = Executor(data_dir=root.parent)
    bench = Bench(executor, root)
    try:
        await bench.call("file.write", path="f", content="mine")
        assert (await bench.call("file.read", path="f")).output == "mine"
        assert (await bench.call("file.search", pattern="mine")).output == "f:1: mine\n"
    finally:
        await executor.close()


async def test_searching_in_a_race_never_finds_what_is_outside(bench: Bench, root: Path) -> None:
    with swapping(root):
        for _ in range(20):
            outcome = await bench.call("file.search", pattern="secret outside|inside")
            assert SECRET not in outcome.output
