"""One data directory, one process.

Two processes on one SQLite file would not corrupt it, but each would run the other's sessions, take
up its runs and know nothing of its events.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

NAME = "corral.lock"


class DataDirLocked(Exception):
    """Another process serves this data directory. `pid` is its process id, None if it cannot be read."""

    def __init__(self, pid: int | None) -> None:
        who = "another process" if pid is None else f"process {pid}"
        super().__init__(f"the data directory is in use by {who}")
        self.pid = pid


class DataDirLock:
    """The lock on a data directory, held until `release` or the end of the process, however it ends.

    The kernel frees it; a file that was left behind locks nothing. Child processes do not hold it.
    """

    def __init__(self, data_dir: Path) -> None:
        """Take the lock of `data_dir`, which exists. Raises DataDirLocked, OSError."""
        # os.open sets O_CLOEXEC: a tool that outlives us must not keep the next gateway out.
        self._fd: int | None = os.open(data_dir / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, b"%d\n" % os.getpid(), 0)
        except BlockingIOError:
            pid = _pid(os.pread(self._fd, 32, 0))
            self.release()
            raise DataDirLocked(pid) from None
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Give the lock up; a second time does nothing. The file stays, or two could hold two files."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __enter__(self) -> DataDirLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _pid(text: bytes) -> int | None:
    text = text.strip()
    return int(text) if text.isdigit() else None
