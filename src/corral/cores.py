"""All threads of this process on one core at a time, where the system lets us say so (Linux).

Threads of Python take turns at the interpreter's lock, so a second core is of little use to them. It does harm: a
lock that is let go of on one core wakes a thread that sleeps on another, which costs both of them more than the
statement for which it was let go of (decision 0023). On one core the thread that lets go of the lock for a moment
has it again before the other one has run.

What holds no lock is a different matter, and may run anywhere: other processes, and a query that takes long (`roam`).
Which core it is, is thought over every few seconds: the one that others use least.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

log = logging.getLogger(__name__)

FIRST_S, EVERY_S = 1.0, 10.0
"""How long is looked at what others do before the first choice, and before each of the others."""

_WORTH = 0.1
"""A core is left for one that others use less by this share of its time: a move empties its caches."""

_BUSY = (0, 1, 2, 5, 6, 7)
"""Fields of a core's line in /proc/stat: user, nice, system, irq, softirq, steal (proc(5))."""

_everywhere: frozenset[int] | None = None
"""The cores that this process may use; None while its threads are not kept together."""
_core: int | None = None
"""The one that they are kept on."""
_thread = threading.local()


@dataclass(frozen=True, slots=True)
class Usage:
    """Seconds of work up to an instant: of each core, and of this process."""

    cores: Mapping[int, float]
    own: float

    @classmethod
    def now(cls) -> Usage:
        tick = os.sysconf("SC_CLK_TCK")
        cores = {}
        with open("/proc/stat", encoding="ascii") as file:
            for line in file:
                name, *fields = line.split()
                if name.startswith("cpu") and name != "cpu":
                    cores[int(name[3:])] = sum(int(fields[at]) for at in _BUSY) / tick
        return cls(cores, time.process_time())

    def by_others(self, before: Usage, core: int, home: int | None) -> float:
        """Seconds that others have used of `core` since `before`, when this process was at `home`."""
        busy = self.cores.get(core, 0.0) - before.cores.get(core, 0.0)
        return busy - (self.own - before.own) if core == home else busy


def choose(allowed: frozenset[int], home: int | None, before: Usage, now: Usage, seconds: float) -> int:
    """The core that others have used least in these seconds; `home` where another one is not worth the move."""
    best = min(sorted(allowed), key=lambda core: now.by_others(before, core, home))
    if home not in allowed:
        return best
    gained = now.by_others(before, home, home) - now.by_others(before, best, home)
    return best if gained > _WORTH * seconds else home


async def keep_together() -> None:
    """Keep the threads of this process on one core, until cancelled; then they may go anywhere again.

    Returns where that cannot be done or there is one core only. One call at a time, in the main thread.
    """
    global _everywhere, _core
    try:
        seconds = FIRST_S
        while len(_allowed()) > 1:
            before = Usage.now()
            await asyncio.sleep(seconds)
            allowed = _allowed()
            _everywhere, _core = allowed, choose(allowed, _core, before, Usage.now(), seconds)
            _put(frozenset({_core}))
            # Two that came to the same core at the same time do not leave it at the same time.
            seconds = EVERY_S * (0.5 + secrets.randbelow(1000) / 1000)
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
        # Nobody is kept any more if there is none.
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
