"""Tables and JSON for what is listed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from corral.cli.show import colours, visible, width


def print_json(value: Any) -> None:
    """One JSON document on standard output, indented for a person."""
    encoded = msgspec.json.encode(value)
    print(msgspec.json.format(encoded, indent=2 if sys.stdout.isatty() else 0).decode())


def print_lines(values: Sequence[Any]) -> None:
    """JSON Lines: one document a line."""
    for value in values:
        print(msgspec.json.encode(value).decode())


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, stretch: int = -1) -> None:
    """Columns on standard output; on a terminal the column `stretch` is cut to fit, in a pipe nothing is."""
    # Here, as a command that prints no table does without.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty()
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    flexible = stretch % len(head)
    for position, name in enumerate(head):
        table.add_column(
            name, no_wrap=True, overflow="ellipsis", ratio=None, min_width=8 if position == flexible else None
        )
    for row in rows:
        # Text objects: what a model or a person has written is no markup.
        table.add_row(*(Text(visible(cell).replace("\n", " ")) for cell in row))
    if terminal:
        room = width() - sum(
            max(len(head[index]), *(len(row[index]) for row in rows), 0) + 2
            for index in range(len(head))
            if index != flexible
        )
        table.columns[flexible].max_width = max(8, room)
    console = Console(
        file=sys.stdout,
        width=width() if terminal else 100_000,
        no_color=not colours(sys.stdout),
        color_system="standard" if colours(sys.stdout) else None,
        highlight=False,
    )
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def ago(time: str) -> str:
    """How long ago an RFC 3339 time was, in the largest unit that fits."""
    from datetime import UTC, datetime

    seconds = max(0, int((datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"
