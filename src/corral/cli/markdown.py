"""Markdown as it is being written: what is finished is printed for good, the rest is drawn again and again.

A message is cut where its top-level blocks begin. Only the last block may still change, so only that one
is redrawn, as much of it as the terminal has lines; all before it scrolls away like any other output.
"""

from __future__ import annotations

import time
from typing import TextIO

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment

from corral.cli.show import Transcript, visible

REDRAW_S = 0.08


class MarkdownWriter:
    """Writes one message after another to a terminal."""

    def __init__(self, out: TextIO, *, colour: bool) -> None:
        self._console = Console(file=out, no_color=not colour, highlight=False, legacy_windows=False)
        self._parser = MarkdownIt().enable("table").enable("strikethrough")
        self._pending = ""
        self._live: Live | None = None
        self._drawn = 0.0
        self._tail = _Safe("")

    def write(self, text: str) -> None:
        self._pending += visible(text)
        if "\n" in text:
            self._print_finished()
        if time.monotonic() - self._drawn >= REDRAW_S:
            self._draw()

    def end(self) -> None:
        """The message is whole."""
        self._clear_reflowed()
        if self._live is not None:
            self._live.update(_Safe(""), refresh=False)
            self._live.stop()
            self._live = None
        if self._pending.strip():
            self._console.print(_Safe(self._pending))
        self._pending = ""

    def _print_finished(self) -> None:
        starts = [token.map[0] for token in self._parser.parse(self._pending) if token.level == 0 and token.map]
        if not starts or starts[-1] == 0:
            return
        lines = self._pending.splitlines(keepends=True)
        finished, self._pending = "".join(lines[: starts[-1]]), "".join(lines[starts[-1] :])
        self._clear_reflowed()
        if self._live is not None:
            # Before the finished part is printed above it, which draws it once more.
            self._live.update(self._made_tail(), refresh=False)
        self._console.print(_Safe(finished))

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        self._clear_reflowed()
        if self._live is None:
            self._live = Live(
                console=self._console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
                vertical_overflow="crop",
            )
            self._live.start()
        self._live.update(self._made_tail(), refresh=True)

    def _made_tail(self) -> _Safe:
        self._tail = _Safe(self._pending, last=max(3, self._console.size.height - 2))
        return self._tail

    def _clear_reflowed(self) -> None:
        """Take away the rows that a terminal which was made narrower has made of what was drawn.

        It folds each line that is now too long, and what is drawn next goes back over as many rows as there were.
        """
        columns = self._console.size.width
        more = sum(max(0, -(-length // columns) - 1) for length in self._tail.drawn)
        if self._live is not None and more:
            self._console.file.write("\r" + "\x1b[2K\x1b[1A" * more)
        self._tail.drawn = []


class _Safe:
    """Markdown whose text cannot drive the terminal, also where an entity (`&#x202e;`) stood for it."""

    def __init__(self, text: str, last: int | None = None) -> None:
        self._text = text
        self._last = last
        self.drawn: list[int] = []
        """How long the lines were, as they were last drawn."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # No links that hide where they lead: their address is written behind them.
        made = Markdown(self._text, hyperlinks=False, code_theme="ansi_dark", justify="left")
        lines = console.render_lines(made, options, pad=False)
        shown = lines if self._last is None else lines[-self._last :]
        self.drawn = [Segment.get_line_length(line) for line in shown]
        for line in shown:
            for segment in line:
                yield segment if segment.control else Segment(visible(segment.text), segment.style)
            yield Segment.line()


class MarkdownTranscript(Transcript):
    """A transcript on a terminal whose messages are shown as the Markdown that they are."""

    def __init__(self, out: TextIO, err: TextIO, *, colour: bool, unfold: str = "") -> None:
        super().__init__(out, err, unfold=unfold)
        self._writer = MarkdownWriter(out, colour=colour)

    def _text(self, text: str) -> None:
        if text:
            self._shown += text
            self._writer.write(text)

    def _close_line(self) -> None:
        if self._shown:
            self._writer.end()
            if not self._shown.endswith("\n"):
                self._shown += "\n"
