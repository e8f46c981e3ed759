"""Samples in pairs, and what may honestly be said of them: median, least, most, how many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Target:
    """The bound that the median of the ratios is to keep: at most, or at least, so much.

    An `absolute` one is kept by the median of our own figures, in the row's unit.
    """

    bound: float
    at_most: bool
    absolute: bool = False

    def met(self, ratio: float, ours: float) -> bool:
        figure = ours if self.absolute else ratio
        return figure <= self.bound if self.at_most else figure >= self.bound

    def shown(self, unit: str) -> str:
        sign = "≤" if self.at_most else "≥"
        if self.absolute:
            return f"{sign} {self.bound:g} {unit}"
        return f"{sign} {self.bound:g}×" if self.at_most else f"{sign} {self.bound:.0%}"


@dataclass
class Row:
    """One line of the table. `ours[i]` and `bare[i]` were measured right after each other.

    `unit` is that of both: a time or a size (less is better) or `…/s` (more is better).
    """

    name: str
    unit: str
    bare_name: str
    ours: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    target: Target | None = None
    note: str = ""

    def add(self, ours: float, bare: float) -> None:
        self.ours.append(ours)
        self.bare.append(bare)

    @property
    def ratios(self) -> list[float]:
        """Ours by bare, pair by pair: what slows the machine for a while slows both."""
        return [mine / limit for mine, limit in zip(self.ours, self.bare, strict=True)]

    @property
    def more_is_better(self) -> bool:
        return self.unit.endswith("/s")

    def as_json(self) -> dict[str, Any]:
        ratio = median(self.ratios)
        return {
            "name": self.name,
            "bareName": self.bare_name,
            "unit": self.unit,
            "rounds": len(self.ours),
            "ours": _summary(self.ours),
            "bare": _summary(self.bare),
            "ratio": _summary(self.ratios),
            "target": None if self.target is None else self.target.shown(self.unit),
            "targetMet": None if self.target is None else self.target.met(ratio, median(self.ours)),
            "note": self.note,
        }


def _summary(values: Sequence[float]) -> dict[str, Any]:
    return {"median": median(values), "min": min(values), "max": max(values), "samples": list(values)}
