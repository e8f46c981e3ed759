"""Text in the columns of a terminal, where a Chinese character takes two and an accent none."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator


def width() -> int:
    """Columns of the terminal, whichever of the three streams it is on, or of COLUMNS; 100 where there is none."""
    if (said := os.environ.get("COLUMNS", "")).isdigit() and int(said):
        return int(said)
    for descriptor in (1, 2, 0):  # of `corral run … | cat` only standard error is on it
        try:
            return os.get_terminal_size(descriptor).columns or 100
        except OSError:
            continue
    return 100


def cells(text: str) -> int:
    """How many columns a terminal gives to `text`, which holds no control characters."""
    return len(text) if text.isascii() else sum(_cells(letter) for letter in text)


def cut(text: str, columns: int) -> str:
    """`text`, or as much of it as so many columns hold, with an ellipsis."""
    if cells(text) <= columns:
        return text
    room, kept = max(1, columns - 1), 0
    for end, letter in enumerate(text):
        kept += _cells(letter)
        if kept > room:
            return text[:end] + "…"
    return text


def pad(text: str, columns: int) -> str:
    """`text` with blanks behind it to the end of so many columns."""
    return text + " " * (columns - cells(text))


def fold(text: str, columns: int, indent: str = "  ") -> list[str]:
    """Prose in lines of so many columns, all but the first indented.

    A line ends between words, or between characters where they take two columns, as those scripts are written
    without blanks. What is longer than a line otherwise (an id, a path) stays whole, to be copied.
    """
    words = text.lstrip()
    lines, line, blank = [], text[: len(text) - len(words)], ""
    for word in _words(words):
        if word.isspace():
            blank = "" if not line.strip() else " " if "\n" in word else word
        elif not line.strip() or cells(line) + len(blank) + cells(word) <= columns:
            line, blank = line + blank + word, ""
        else:
            lines.append(line)
            line, blank = indent + word, ""
    return [*lines, line]


def _words(text: str) -> Iterator[str]:
    """The pieces that a line may end between. A mark that closes something does not begin one."""
    piece = ""
    for letter in text:
        wide = _cells(letter) == 2
        opens = not piece or piece[-1].isspace() != letter.isspace()
        after_wide = bool(piece) and _cells(piece[-1]) == 2 and not letter.isspace()
        closes = unicodedata.category(letter) in ("Pe", "Pf", "Po", "Mn", "Lm")
        if piece and (opens or ((wide or after_wide) and not closes)):
            yield piece
            piece = ""
        piece += letter
    if piece:
        yield piece


def _cells(letter: str) -> int:
    if letter < "\u0300":
        return 1
    from rich.cells import get_character_cell_size  # here, as most of what is shown needs none of its tables

    return get_character_cell_size(letter)
