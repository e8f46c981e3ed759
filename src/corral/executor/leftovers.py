"""What a gateway that died left running: known by a mark that nobody else's process bears, and ended.

A gateway that is killed takes its commands with it: each one's supervisor sees the end of its socket
and kills everything below itself (`launcher.py`). This is for the rest: a supervisor that is stopped,
slow or dead itself. A starting gateway calls it before it takes up a run or starts a process of its own
(`processes.py`), so that no command of the run's former life goes on beside it.

The mark belongs to one data directory, whose lock the caller holds, so that whoever bears it was
started by a gateway that is gone. It stands in the command line of the fork server, which its
supervisors share, and in the environment of commands on the host, which what they start inherits.
A process is ended if it bears the mark, or is below one that does; never by a number that was written
down, and never if it is another user's. Linux; elsewhere nothing is found.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import time
from pathlib import Path

from corral.executor.launcher import command_of

VARIABLE = "CORRAL_PROCESS_MARK"
PATIENCE_S = 5.0
"""How long to go on until what is left is given up: a process in uninterruptible sleep."""

_ISOLATED = [b"-I", b"-S"]
_LAUNCHER = b"launcher.py"

Identity = tuple[int, int]
"""A process id and the start of that process in clock ticks: a number that is used again is another's."""


def mark_for(data_dir: Path, secret: bytes) -> str:
    """The mark of a data directory: not to be guessed, and another one for a copy of the directory."""
    about = data_dir.stat()
    text = f"processes:{about.st_dev}:{about.st_ino}:".encode() + secret
    return f"corral-{hashlib.sha256(text).hexdigest()[:32]}"


def end_leftovers(mark: str) -> tuple[list[str], list[str]]:
    """End what bears the mark and all below it; (what has ended, what could not be), as `pid: command`. Blocks."""
    if sys.platform != "linux":
        return [], []
    ended: dict[Identity, str] = {}
    end = time.monotonic() + PATIENCE_S
    while found := _stopped(mark):
        for each in found:
            ended.setdefault(each, f"{each[0]}: {command_of(each[0])}")
            _send(each, signal.SIGKILL)
        while any(_lives(each) for each in found):
            if time.monotonic() > end:
                left = {each for each in found if _lives(each)}
                return [text for each, text in ended.items() if each not in left], [ended[each] for each in left]
            time.sleep(0.005)
    return list(ended.values()), []


def _stopped(mark: str) -> set[Identity]:
    """The processes to be ended, all of them stopped: none forks, or lets go of a child, while others are killed."""
    stopped: set[Identity] = set()
    while new := _marked(mark) - stopped:
        for each in new:
            _send(each, signal.SIGSTOP)
        stopped |= new
    return stopped


def _marked(mark: str) -> set[Identity]:
    """Those that bear the mark, and everything below them by the parent links in /proc."""
    own = os.getuid()
    children: dict[int, list[Identity]] = {}
    todo: list[Identity] = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            parent, identity = _about(int(entry))
            mine = os.stat(f"/proc/{entry}/cmdline").st_uid == own
            children.setdefault(parent, []).append(identity)
            if mine and _bears(identity[0], mark):
                todo.append(identity)
        except OSError:
            continue  # it has ended meanwhile, or is another's
    found: set[Identity] = set()
    while todo:
        each = todo.pop()
        if each not in found and each[0] != os.getpid():
            found.add(each)
            todo += children.get(each[0], [])
    return found


def _bears(pid: int, mark: str) -> bool:
    arguments = Path("/proc", str(pid), "cmdline").read_bytes().split(b"\0")[:-1]
    if len(arguments) == 6 and arguments[5] == mark.encode() and arguments[1:3] == _ISOLATED:
        return arguments[3].endswith(_LAUNCHER)
    return f"{VARIABLE}={mark}".encode() in Path("/proc", str(pid), "environ").read_bytes().split(b"\0")


def _about(pid: int) -> tuple[int, Identity]:
    """(parent's id, identity). Raises ProcessLookupError for one that has ended, reaped or not."""
    # The name in parentheses may hold anything; what follows the last one is fixed.
    fields = Path("/proc", str(pid), "stat").read_bytes().rpartition(b")")[2].split()
    if fields[0] in (b"Z", b"X"):
        raise ProcessLookupError
    return int(fields[1]), (pid, int(fields[19]))


def _lives(each: Identity) -> bool:
    try:
        return _about(each[0])[1] == each
    except OSError:
        return False


def _send(each: Identity, number: int) -> None:
    """Signal that very process, or none."""
    with contextlib.suppress(OSError):
        # Opened first, then looked at: what is signalled is what was looked at.
        descriptor = os.pidfd_open(each[0])
        try:
            if _lives(each):
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)
