"""The table: on a terminal, in Markdown, in JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from statistics import median
from typing import Any

from bench.machine import Machine
from bench.stats import Row

HEAD = ("what", "Corral", "bare", "ratio, median (least to most)", "target", "rounds")

EXPLAINED = (
    "`Corral` and `bare` are medians. The ratio is the median of the ratios of neighbouring measurements, Corral "
    "by bare: for a time or a size less is better, for a rate more is. Absolute figures hold for this machine and "
    "this hour; ratios carry over."
)


def figure(value: float, unit: str) -> str:
    """Three digits that count, with the unit."""
    places = 0 if value >= 100 else 1 if value >= 10 else 2
    text = f"{value:,.{places}f}"
    return f"{text}{unit}" if unit.startswith("/") else f"{text} {unit}"


def cells(row: Row) -> tuple[str, ...]:
    """A row as the table's six texts."""
    ratio = median(row.ratios)

    def shown(value: float) -> str:
        return f"{value:.0%}" if row.more_is_better else f"{value:.2f}×"

    target = ""
    if row.target is not None:
        met = row.target.met(ratio, median(row.ours))
        target = f"{row.target.shown(row.unit)}: {'met' if met else 'missed'}"
    return (
        row.name,
        figure(median(row.ours), row.unit),
        figure(median(row.bare), row.unit),
        f"{shown(ratio)} ({shown(min(row.ratios))} to {shown(max(row.ratios))})",
        target,
        str(len(row.ours)),
    )


def as_text(rows: Sequence[Row], machine: Machine) -> str:
    """For a terminal: columns padded, notes below."""
    lines = [HEAD, *(cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    out = [f"{name}: {value}" for name, value in machine.facts()] + [""]
    for number, line in enumerate(lines):
        out.append("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
        if number == 0:
            out.append("  ".join("-" * width for width in widths))
    out.append("")
    for row in rows:
        text = f"{row.name}: bare is {row.bare_name}." + (f" {row.note}" if row.note else "")
        out.append(textwrap.fill(text, 118, subsequent_indent="  "))
    out += ["", textwrap.fill(EXPLAINED.replace("`", ""), 118)]
    return "\n".join(out) + "\n"


def as_markdown(rows: Sequence[Row], machine: Machine, command: str) -> str:
    """For docs/reference/benchmarks.md."""
    out = [f"<!-- Written by `{command}`. -->\n", "# Benchmarks\n"]
    out.append(
        "What Corral costs beside the bare limit: the least code on the same libraries that does the same work, "
        "measured in the same run, turn about. `make bench` measures anew and prints this table for your machine; "
        f"`make bench BENCH_ARGS='--help'` says what else it can do.\n\n{EXPLAINED}\n"
    )
    out.append("| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in machine.facts()) + "\n")
    out.append("| " + " | ".join(HEAD) + " |\n|---|--:|--:|---|---|--:|")
    out += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    out.append("\n## What each row is\n")
    for row in rows:
        out.append(f"- **{row.name}**: bare is {row.bare_name}." + (f" {row.note}" if row.note else ""))
    return "\n".join(out) + "\n"


def as_json(rows: Sequence[Row], machine: Machine) -> dict[str, Any]:
    """All samples, for other programs."""
    return {"machine": dict(machine.facts()), "rows": [row.as_json() for row in rows]}
