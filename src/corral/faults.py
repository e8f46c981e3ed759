"""A switch for tests that kill: ends, or freezes, this process at a named point of its work.

Off unless `CORRAL_FAULT` is set when `corral serve` starts; nothing else arms it, no setting and
nothing that comes over the wire reaches it. `CORRAL_FAULT` is `POINT[@ABOUT][:NTH][:freeze]`:

    tool.recorded                        SIGKILL where a tool call's start is on the disk and it has not begun
    tool.recorded@s1                     the same, but only in the session s1
    tool.recorded:2                      the second time that the process comes there
    commit.before@agent.completed        before the first commit that has such an event in it
    commit.before@agent.completed/s1     that has such an event of the session s1 in it
    publish.before@agent.message:freeze  SIGSTOP instead; SIGCONT lets it go on, and it stops only once

To add a point: a line in `Point` that says what is done and what is not, `faults.reached(POINT, ABOUT…)`
at its place (one call, also inside an open transaction), and its name in a test of `tests/kill`, which a
test there insists on. While the switch is off a call costs the test of one global.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Mapping
from typing import Literal, get_args

VARIABLE = "CORRAL_FAULT"

Point = Literal[
    # A commit and what follows it. About: the events in it, each also as EVENT/SESSION.
    "commit.before",  # a group of units has been carried out, its COMMIT has not been said
    "commit.after",  # it is on the disk, and nobody knows
    "publish.before",  # back on the event loop, before who asked is answered
    "publish.between",  # who asked has been answered, the events have been told to nobody
    # A run. About: its session; of a tool call also the tool's name.
    "run.beginning",  # that it runs again is written in a transaction that is open
    "run.parking",  # that it waits for people is written in a transaction that is open
    "model.reserved",  # the step's share of a budget is set aside on the disk, the model has not been asked
    "model.delta",  # a piece of a model's text has been shown
    "model.end",  # a model's message is whole and not journalled
    "compaction.written",  # a summary is whole, and neither it nor what it cost is in a commit
    "tool.decided",  # a call is about to start, which is not recorded
    "tool.recorded",  # its start is on the disk, it has not begun
    "tool.during",  # a command has begun and printed something; a file is written and not in its place
    "tool.end",  # the tool has ended, its result is not journalled
    "recover.taking",  # it is being taken up, in a transaction that is open
    # What people do. About: the session, save for aborts; of an approval also the tool's name.
    "approval.resolving",  # a decision is written in a transaction that is open
    "mode.applying",  # a runtime mode is written in a transaction that is open
    "abort.noted",  # an abort is on the disk, the run goes on
    "abort.killed",  # the run's processes are dead, its end is not written
]
POINTS: tuple[str, ...] = get_args(Point)

_FORM = re.compile(
    r"(?P<point>[a-z.]+)(?:@(?P<about>[A-Za-z0-9_./-]+))?(?::(?P<nth>[1-9][0-9]{0,5}))?(?P<freeze>:freeze)?"
)


class FaultRefused(ValueError):
    """`CORRAL_FAULT` cannot be used; the text says why."""


class _Plan:
    """What to do where. Points are reached by several threads."""

    def __init__(self, point: str, about: str | None, nth: int, signal_number: int) -> None:
        self._point = point
        self._about = about
        self._left = nth
        self._signal = signal_number
        self._lock = threading.Lock()

    def reached(self, point: str, about: tuple[str, ...]) -> None:
        if point != self._point or (self._about is not None and self._about not in about):
            return
        with self._lock:
            self._left -= 1
            due = self._left == 0
        if due:
            os.kill(os.getpid(), self._signal)


_plan: _Plan | None = None


def arm(environ: Mapping[str, str]) -> str | None:
    """Take the switch from the environment; what it says, None if it is off. Raises FaultRefused."""
    global _plan
    text = environ.get(VARIABLE, "").strip()
    if not text:
        _plan = None
        return None
    form = _FORM.fullmatch(text)
    if form is None or form["point"] not in POINTS:
        raise FaultRefused(f"{VARIABLE} is POINT[@ABOUT][:NTH][:freeze]; the points are {', '.join(POINTS)}")
    number = signal.SIGSTOP if form["freeze"] else signal.SIGKILL
    _plan = _Plan(form["point"], form["about"], int(form["nth"] or 1), number)
    return text


def armed() -> bool:
    """Whether the switch is on: for callers to whom it costs something to say what a point is about."""
    return _plan is not None


def reached(point: Point, *about: str) -> None:
    """The process is at this point, with what is at hand there. It ends here if it was told to. Any thread."""
    if _plan is not None:
        _plan.reached(point, about)
