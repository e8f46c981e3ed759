"""All threads of this process on one core at a time, where the system lets us say so (Linux).

Threads of Python take turns at the interpreter's lock, so a second core is of little use to them. It does harm: a
lock that is let go of on one core wakes a thread that sleeps on another, which costs both of them more than the
statement for which it was let go of (decision 0023). On one core the thread that lets go of the lock for a moment
has it again before the other one has run.

What holds no lock is a different matter, and may run anywhere: other processes, and a query that takes long (`roam`).
Which core it is, the system is asked anew every few seconds, for there may be others who want that one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

log = logging.getLogger(__name__)

EVERY_S = 10.0
_LOOSE_S = 0.05
"""For how long the threads go where the system puts them, which it does at once where a core is idle."""

_PROCESSOR = 36
"""Which field of /proc/self/task/TID/stat behind the name says on which core the thread ran last (proc(5): 39)."""

_everywhere: frozenset[int] | None = None
"""The cores that this process may use; None while its threads are not kept together."""
_core: int | None = None
"""The one that they are kept on; None as well while the system chooses."""
_thread = threading.local()


async def keep_together() -> None:
    """Keep the threads of this process on one core, until cancelled; then they may go anywhere again.

    Returns at once where that cannot be done or there is one core only. One call at a time, in the main thread.
    """
    global _everywhere, _core
    try:
        while len(allowed := _allowed()) > 1:
            _everywhere, _core = allowed, None
            _put(allowed)
            await asyncio.sleep(_LOOSE_S)
            _core = _last_core()
            _put(frozenset({_core}))
            await asyncio.sleep(EVERY_S)
    except OSError as error:
        # Some sandboxes forbid it, or hide /proc.
        log.info("the threads are not kept on one core: %s", error.strerror, extra={"action": "cores.not_kept"})
    finally:
        if _everywhere is not None:
            allowed, _everywhere, _core = _allowed(), None, None
            with suppress(OSError):
                _put(allowed)


def roam() -> None:
    """Let the calling thread run anywhere, until `come_back`. Does nothing unless the threads are kept together.

    What takes long says so again and again: while it roams, the threads may be put together on another core.
    """
    if (everywhere := _everywhere) is not None:
        _thread.roams = True
        _move(everywhere)


def come_back() -> None:
    """Take the calling thread to the others again, if it went."""
    if getattr(_thread, "roams", False):
        _thread.roams = False
        # While the system chooses, nobody is anywhere; whoever puts the threads together then finds this one too.
        if (core := _core) is not None:
            _move(frozenset({core}))


@contextmanager
def roaming() -> Iterator[None]:
    """`roam` for a block. What is started in it, a thread or a process, may run anywhere for good."""
    roam()
    try:
        yield
    finally:
        come_back()


def _allowed() -> frozenset[int]:
    """The cores that this process may use, as far as it did not restrict itself.

    Somebody else may have said otherwise since (`taskset -ap`, a container's new limits): that holds from then on.
    """
    if sys.platform != "linux":
        return frozenset()
    now = frozenset(os.sched_getaffinity(0))
    return _everywhere if _everywhere is not None and now == {_core} else now


def _last_core() -> int:
    with open(f"/proc/self/task/{threading.get_native_id()}/stat", encoding="utf-8", errors="replace") as file:
        return int(file.read().rpartition(")")[2].split()[_PROCESSOR])


def _put(cores: frozenset[int]) -> None:
    """Every thread there is. One that begins meanwhile has what the thread that starts it has. Raises OSError."""
    for name in os.listdir("/proc/self/task"):
        try:
            os.sched_setaffinity(int(name), cores)
        except ProcessLookupError:
            continue  # ended since


def _move(cores: frozenset[int]) -> None:
    """The calling thread. Where it cannot be moved it stays, which is a matter of speed alone."""
    with suppress(OSError):
        os.sched_setaffinity(0, cores)
