"""Tables and JSON for what is listed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from corral.cli.columns import cells, cut, pad
from corral.cli.show import colours, visible, width
from corral.cli.visible import harmless


def print_json(value: Any) -> None:
    """One JSON document on standard output, indented for a person."""
    encoded = msgspec.json.encode(value)
    print(harmless(msgspec.json.format(encoded, indent=2 if sys.stdout.isatty() else 0).decode()))


def print_lines(values: Sequence[Any]) -> None:
    """JSON Lines: one document a line."""
    for value in values:
        print(harmless(msgspec.json.encode(value).decode()))


_READABLE = 16
"""Columns of text that are worth a look; with less a terminal gets each row in two lines."""


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, stretch: int = -1) -> None:
    """Columns on standard output; on a terminal the column `stretch` is cut to fit, in a pipe nothing is.

    The first column is never cut, as it is what other commands are given.
    """
    flexible = stretch % len(head)
    lines = [list(head), *([visible(cell).replace("\n", " ") for cell in row] for row in rows)]
    widths = [max(cells(line[position]) for line in lines) for position in range(len(head))]
    apart, room = False, widths[flexible]
    if sys.stdout.isatty():
        others = sum(widths) - widths[flexible] + 2 * (len(head) - 1)
        apart = width() < others + min(widths[flexible], _READABLE)
        room = width() - others + (widths[0] if apart else 0)
        widths[flexible] = min(widths[flexible], max(8, room))
    for number, line in enumerate(lines):
        texts = [cut(cell, widths[at]) if at == flexible else cell for at, cell in enumerate(line)]
        padded = [pad(text, widths[at]) for at, text in enumerate(texts)]
        shown = [texts[0], "  " + "  ".join(padded[1:])] if apart else ["  ".join(padded)]
        for text in shown:
            bold = number == 0 and colours(sys.stdout)
            print(f"\x1b[1m{text.rstrip()}\x1b[0m" if bold else text.rstrip())


def ago(time: str) -> str:
    """How long ago an RFC 3339 time was, in the largest unit that fits."""
    from datetime import UTC, datetime

    seconds = max(0, int((datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"
