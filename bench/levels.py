"""Whether a quantity levels off, and the report that shows it.

What is judged is growth after the warm-up: the Theil-Sen slope (the median of the slopes of all pairs of
samples, which up to 29 % of outliers do not move) times the time that was measured. It may be at most
`share` of the median, or `floor`, whichever is more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

WARM_UP = 0.25
"""The part of the time that is not judged: caches fill, the allocator finds its size."""


@dataclass(frozen=True)
class Quantity:
    """What is sampled, and how much it may grow. Both bounds are None for what is only shown.

    With a `ceiling` it may grow up to that and never be above, whatever its slope.
    """

    name: str
    unit: str
    share: float | None
    floor: float | None
    note: str = ""
    ceiling: float | None = None


@dataclass(frozen=True)
class Verdict:
    """`growth` over the time judged and what was allowed, in the quantity's unit; `levels` None if not judged."""

    quantity: Quantity
    first: float
    middle: float
    last: float
    growth: float
    allowed: float | None
    most: float

    @property
    def levels(self) -> bool | None:
        if self.quantity.ceiling is not None:
            return self.most <= self.quantity.ceiling
        return None if self.allowed is None else self.growth <= self.allowed


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """The Theil-Sen slope; 0 for fewer than two samples."""
    pairs = combinations(zip(times, values, strict=True), 2)
    slopes = [(later - value) / (then - time) for (time, value), (then, later) in pairs if then > time]
    return median(slopes) if slopes else 0.0


def judge(quantity: Quantity, times: Sequence[float], values: Sequence[float]) -> Verdict:
    """Judge the samples, whose times are in seconds from the beginning."""
    begin = times[0] + (times[-1] - times[0]) * WARM_UP
    kept = [(time, value) for time, value in zip(times, values, strict=True) if time >= begin]
    late_times, late = [time for time, _ in kept], [value for _, value in kept]
    growth = slope(late_times, late) * (late_times[-1] - late_times[0])
    allowed = None
    if quantity.share is not None and quantity.floor is not None:
        allowed = max(quantity.share * median(late), quantity.floor)
    return Verdict(quantity, late[0], median(late), late[-1], growth, allowed, max(values))


# ---- the report

_WIDTH, _HEIGHT, _LEFT, _GAP, _COLUMNS = 330, 110, 62, 58, 2


def plot(times: Sequence[float], series: Sequence[tuple[Verdict, Sequence[float]]]) -> str:
    """One small plot for each quantity, from 0 on, as SVG; what was the warm-up is shaded."""
    rows = -(-len(series) // _COLUMNS)
    width, height = _COLUMNS * (_WIDTH + _LEFT) + 20, rows * (_HEIGHT + _GAP) + 20
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for number, (verdict, values) in enumerate(series):
        left = (number % _COLUMNS) * (_WIDTH + _LEFT) + _LEFT
        top = (number // _COLUMNS) * (_HEIGHT + _GAP) + 34
        out += _panel(left, top, times, values, verdict)
    return "\n".join([*out, "</svg>"]) + "\n"


def _panel(left: int, top: int, times: Sequence[float], values: Sequence[float], verdict: Verdict) -> list[str]:
    most = max(*values, 1.0) * 1.1
    span = max(times[-1] - times[0], 1.0)

    def x(time: float) -> float:
        return left + (time - times[0]) / span * _WIDTH

    def y(value: float) -> float:
        return top + _HEIGHT - value / most * _HEIGHT

    points = " ".join(f"{x(time):.1f},{y(value):.1f}" for time, value in zip(times, values, strict=True))
    colour = {True: "#27764a", False: "#b3261e", None: "#555"}[verdict.levels]
    unit = f", {verdict.quantity.unit}" if verdict.quantity.unit else ""
    bottom = top + _HEIGHT
    return [
        f'<rect x="{left}" y="{top}" width="{_WIDTH * WARM_UP:.1f}" height="{_HEIGHT}" fill="#eee"/>',
        f'<path d="M{left} {top}V{bottom}H{left + _WIDTH}" fill="none" stroke="#999"/>',
        f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
        f'<text x="{left}" y="{top - 8}" font-weight="bold">{verdict.quantity.name}{unit}</text>',
        f'<text x="{left - 5}" y="{top + 9}" text-anchor="end" fill="#555">{most:,.4g}</text>',
        f'<text x="{left - 5}" y="{bottom}" text-anchor="end" fill="#555">0</text>',
        f'<text x="{left + _WIDTH}" y="{bottom + 13}" text-anchor="end" fill="#555">{span / 60:.1f} min</text>',
    ]


def table(verdicts: Sequence[Verdict]) -> str:
    """The verdicts as a Markdown table."""
    lines = ["| what | after the warm-up | median | at the end | growth | allowed | |", "|---|--:|--:|--:|--:|--:|---|"]
    for each in verdicts:
        word = {True: "levels off", False: "**grows**", None: "shown only"}[each.levels]
        allowed = "" if each.allowed is None else _figure(each.allowed)
        if each.quantity.ceiling is not None:
            allowed = f"never above {_figure(each.quantity.ceiling)}"
        unit = f" ({each.quantity.unit})" if each.quantity.unit else ""
        figures = " | ".join(_figure(value) for value in (each.first, each.middle, each.last))
        lines.append(f"| {each.quantity.name}{unit} | {figures} | {each.growth:+,.4g} | {allowed} | {word} |")
    return "\n".join(lines) + "\n"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.4g}"
