"""One data directory, one process; with real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from corral.storage.lock import DataDirLock, DataDirLocked

HOLD = (
    "import sys, pathlib; from corral.storage.lock import DataDirLock\n"
    "lock = DataDirLock(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
)


def test_a_second_process_is_told_who_holds_the_directory_and_gets_it_when_that_one_is_killed(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(DataDirLocked, match=str(holder.pid)) as refused:
            DataDirLock(tmp_path)
        assert refused.value.pid == holder.pid
        holder.kill()
        holder.wait(30)
        with DataDirLock(tmp_path):
            assert (tmp_path / "corral.lock").read_text() == f"{os.getpid()}\n"


def test_the_same_process_does_not_get_it_twice_but_again_after_release(tmp_path: Path) -> None:
    lock = DataDirLock(tmp_path)
    with pytest.raises(DataDirLocked) as refused:
        DataDirLock(tmp_path)
    assert refused.value.pid == os.getpid()
    lock.release()
    lock.release()
    DataDirLock(tmp_path).release()


def test_a_child_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    lock = DataDirLock(tmp_path)
    argv = [sys.executable, "-c", "print('up', flush=True); import sys; sys.stdin.read()"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        lock.release()
        DataDirLock(tmp_path).release()


def test_a_lock_file_of_a_dead_process_locks_nothing(tmp_path: Path) -> None:
    (tmp_path / "corral.lock").write_text("1\n")
    with DataDirLock(tmp_path):
        assert (tmp_path / "corral.lock").read_text() == f"{os.getpid()}\n"


def test_a_holder_whose_file_cannot_be_read_as_a_number_is_another_process(tmp_path: Path) -> None:
    lock = DataDirLock(tmp_path)
    (tmp_path / "corral.lock").write_text("nonsense")
    with pytest.raises(DataDirLocked, match="another process") as refused:
        DataDirLock(tmp_path)
    assert refused.value.pid is None
    lock.release()
