"""One checker of the design's ten invariants, which reads the store and what clients saw.

    problems = check(data_dir / "corral.db")

    look = Inspection(data_dir / "corral.db", settled=True)
    look.store()
    look.client("the first client", Seen([first.frames, second.frames], after={"s_1": 0}))
    look.promises([answer for wire in wires for answer in wire.promises])
    look.report()

The database is opened for reading only, of a gateway that runs or of one that does not, and all
is read in one snapshot. Each problem is a sentence that says what is wrong with what. `settled`
says that nothing is under way any more: then every run has ended and every session is idle.

| invariant | held by |
|---|---|
| 1 what was answered `ok: true` is there | `promises` |
| 2 one key, one effect | `keys`; `promises`, for one key answered in two ways |
| 3 nobody sees what is not committed | `client`, each event against the journal |
| 4 no gap, no repeat, the same sequence for all | `versions`; `client` with `after` or `feed` |
| 5 every run ends in exactly one terminal event | `turns`, `run_rows` |
| 6 no tool starts without a decision for exactly its arguments | `clearances`, `approval_rows` |
| 7 no call is started twice | `results`, `tool_rows`; `marks`, what the tools themselves left |
| 8 nothing crosses a tenant | `tenants`; `client`, whose journal is its tenant's alone |
| 9 every decision and effect is audited, the chain verifies | `chains`, `audited`, and the two beside it |
| 10 memory and queues are bounded | `idle`: nothing is kept for who is gone; `client`: nothing durable was dropped |

The remaining rules hold the projections to the journal: rows, transcripts, counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.support.invariants.calls import call_rules, check_marks
from tests.support.invariants.clients import Promise, Seen, check_client, check_promises
from tests.support.invariants.counts import count_rules
from tests.support.invariants.records import record_rules
from tests.support.invariants.runs import run_rules
from tests.support.invariants.snapshot import Database, Snapshot

__all__ = ["Broken", "Inspection", "Promise", "Seen", "check"]

RULES = (*run_rules, *call_rules, *record_rules, *count_rules)


class Broken(AssertionError):
    """Invariants do not hold; `problems` says which, in sentences."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(f"{len(problems)} invariants broken:\n  " + "\n  ".join(problems[:50]))
        self.problems = problems


class Inspection:
    """One look at a store. What is wrong collects in `problems`."""

    def __init__(self, database: Path | Database, *, settled: bool = False) -> None:
        self.snapshot = Snapshot(database, settled=settled)
        self.problems: list[str] = []

    def store(self) -> None:
        """Check the store by itself."""
        for rule in RULES:
            try:
                for problem in rule(self.snapshot):
                    self.problems.append(problem)
            except (KeyError, IndexError, TypeError, ValueError) as error:
                # Rows that do not even have the form that other rules go by.
                self.problems.append(f"the rule {rule.__name__} cannot be checked here: {error!r}")

    def client(self, name: str, seen: Seen) -> None:
        """Check what one client was sent against the journal."""
        self.problems += (f"{name} {problem}" for problem in check_client(self.snapshot, seen))

    def promises(self, promises: Iterable[Promise]) -> None:
        """Check that what was answered `ok: true` is there, and was answered alike each time."""
        self.problems += check_promises(self.snapshot, promises)

    def marks(self, marks: Mapping[str, int], *, tenant: str = "t_default") -> None:
        """Check how often each call's tool was started by what it left in the world: call's id -> times."""
        self.problems += check_marks(self.snapshot, tenant, marks)

    def idle(self, gauges: Mapping[str, float]) -> None:
        """Check a gateway that nobody uses any more: each of its gauges, by name, has to be zero."""
        self.problems += (f"{name} is {value:g} when all are gone" for name, value in gauges.items() if value)

    def report(self) -> None:
        """Raises Broken if anything is wrong."""
        if self.problems:
            raise Broken(self.problems)


def check(database: Path | Database, *, settled: bool = False) -> list[str]:
    """What is wrong with a store, in sentences."""
    look = Inspection(database, settled=settled)
    look.store()
    return look.problems
