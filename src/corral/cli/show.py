"""A run as a person reads it: the answer on standard output, everything else on standard error."""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO

from msgspec import UNSET

from corral.cli.columns import cut, fold
from corral.cli.columns import width as width  # others take it from here
from corral.cli.visible import visible as visible  # others take it from here
from corral.protocol.events import (
    AgentCompleted,
    AgentDelta,
    AgentFailed,
    AgentMessage,
    AgentResumed,
    AgentToolCall,
    AgentToolResult,
    SessionCompacted,
)
from corral.protocol.frames import Event
from corral.protocol.types import Approval, Usage

FOLDED_LINES = 5
"""Lines of a tool's output that are shown; the rest is counted."""

_STYLES = {"dim": "2", "bold": "1", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


def colours(stream: TextIO) -> bool:
    """Whether to colour what goes to `stream`: a terminal that can, and NO_COLOR is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Transcript:
    """Shows the events of runs as they come. One instance for one terminal."""

    def __init__(
        self, out: TextIO = sys.stdout, err: TextIO = sys.stderr, *, unfold: str = "", unfold_cut: str | None = None
    ) -> None:
        """`unfold` says how to see what is folded, `unfold_cut` how where the journal too has only a part of it."""
        self._out = out
        self._err = err
        self._unfold = unfold
        self._unfold_cut = unfold if unfold_cut is None else unfold_cut
        self._question = False
        self.asked = False
        """Whether calls that need approval are shown by whoever asks for it."""
        self._colour = colours(err)
        self._plain_out = not out.isatty()
        self._marks = _marks(err)
        self._message_id: str | None = None
        self._shown = ""

    # ---- events

    def event(self, event: Event) -> None:
        payload = event.payload
        if isinstance(payload, AgentDelta):
            self._delta(payload)
        elif isinstance(payload, AgentMessage):
            self._message(payload)
        elif isinstance(payload, AgentToolCall):
            self._call(payload)
        elif isinstance(payload, AgentToolResult):
            self._result(payload)
        elif isinstance(payload, AgentResumed):
            self.note(f"the gateway was started again and has taken the run up (attempt {payload.attempt})")
        elif isinstance(payload, Approval):
            self._approval(payload)
        elif isinstance(payload, SessionCompacted):
            self.note(
                f"the older part of the conversation was summarised: {payload.before:,} tokens became {payload.after:,}"
            )
        elif isinstance(payload, AgentCompleted | AgentFailed):
            self._close_line()

    def _delta(self, delta: AgentDelta) -> None:
        if delta.message_id != self._message_id:
            self._begin(delta.message_id)
        if delta.offset <= len(self._shown):
            self._text(delta.delta[len(self._shown) - delta.offset :])

    def _message(self, message: AgentMessage) -> None:
        if message.message_id != self._message_id:
            self._begin(message.message_id)
        if not message.text.startswith(self._shown):
            self._close_line()
            self._shown = ""
        self._text(message.text[len(self._shown) :])
        self._close_line()
        self._message_id = None
        self._shown = ""

    def _begin(self, message_id: str) -> None:
        """A new message. One that was begun and did not end is void: a resumed step starts anew."""
        if self._shown:
            self._close_line()
            self.note("that message was cut off and is written again:")
        self._message_id = message_id
        self._shown = ""

    def _call(self, call: AgentToolCall) -> None:
        self._close_line()
        if call.decision == "allow":
            mark = self._paint(self._marks["call"], "cyan")
            self._say(f"{mark} {self._paint(call.tool_name, 'bold')} {_short(call.args)}".rstrip())
            return
        reason = f": {call.reason}" if call.reason is not UNSET else ""
        denied = call.decision == "deny"
        if self.asked and not denied:
            return
        mark = self._paint(self._marks["denied" if denied else "asked"], "yellow")
        self._say(f"{mark} {self._paint(call.tool_name, 'bold')} {_short(call.args)}")
        self._say(self._paint(f"  {'not allowed' if denied else 'needs approval'}{visible(reason)}", "yellow"))
        if denied:
            self._say(f"  to allow it in this workspace: corral run --allow {call.tool_name} …")

    def _approval(self, approval: Approval) -> None:
        """How a call was decided; that it is to be is told by the call and by whoever asks."""
        if approval.status == "pending":
            return
        comment = f": {approval.comment}" if approval.comment is not UNSET and approval.comment else ""
        by = f" by {approval.resolved_by}" if approval.resolved_by is not UNSET else ""
        style = "green" if approval.status == "approved" else "yellow"
        self._close_line()
        self._say(f"  {self._paint(str(approval.status), style)}{visible(by + comment)}")

    def _result(self, result: AgentToolResult) -> None:
        if result.status == "denied":
            return  # the call has said so
        lines = visible(result.output).expandtabs().splitlines()
        if lines and result.status == "interrupted":  # a sentence to be read, not output to be folded
            lines = fold(" ".join(lines), max(20, width() - 2), "")
        shown = lines[:FOLDED_LINES] if len(lines) > FOLDED_LINES + 1 else lines
        for line in shown:
            self._say(self._paint(f"  {cut(line, width() - 2)}", "dim"))
        if len(shown) < len(lines):
            more = f" and what was cut out{self._unfold_cut}" if result.truncated else self._unfold
            self._say(self._paint(f"  … {len(lines) - len(shown)} more lines{more}", "dim"))
        if result.status != "success":
            error = result.error.code if result.error is not UNSET else result.status
            # How long a call ran whose gateway died may be unknown.
            known = result.duration_ms > 0 or result.status != "interrupted"
            lasted = f", {duration(result.duration_ms)}" if known else ""
            self._say(self._paint(f"  {result.status} ({error}{lasted})", "red"))
        elif not lines:
            self._say(self._paint(f"  done ({duration(result.duration_ms)})", "dim"))

    # ---- the end

    def summary(self, event: Event, seconds: float, session_id: str) -> None:
        """The closing lines: how it ended, what it used, how to go on."""
        payload = event.payload
        time = duration(int(seconds * 1000))
        if isinstance(payload, AgentCompleted):
            steps = f"{payload.steps} step{'' if payload.steps == 1 else 's'}"
            self._ending("completed", "green", f": {steps}, {usage_words(payload.usage)}, {time}; session {session_id}")
        elif isinstance(payload, AgentFailed) and payload.code == "ABORTED":
            self._ending("aborted", "yellow", f" after {time}; session {session_id}")
        elif isinstance(payload, AgentFailed):
            again = " (trying again may help)" if payload.retryable else ""
            message = f": {payload.code}: {visible(payload.message)}{again}; session {session_id}"
            self._ending("failed", "red", message)
            if payload.code == "MODEL_UNAVAILABLE":
                self._say("  `corral doctor` asks the model too, and says what to look at")

    def _ending(self, word: str, style: str, rest: str) -> None:
        first, *more = self.folded(word + rest)
        for line in (self._paint(word, style) + first.removeprefix(word), *more):
            self._say(line)

    def note(self, text: str) -> None:
        """A line about the run that is no part of it."""
        self._close_line()
        for line in self.folded(f"{self._marks['note']} {visible(text)}"):
            self._say(self._paint(line, "yellow"))

    def say(self, line: str) -> None:
        """A line that is shown as it is; whoever gives it has made it safe for a terminal."""
        self._close_line()
        self._say(line)

    def ask(self, question: str) -> None:
        """A question in a line that stays open for `answered`; whatever is said before that goes below it."""
        self._question = True
        self._err.write(self._paint(question, "bold"))
        self._err.flush()

    def answered(self, answer: str) -> None:
        """End the line of the question, if it is still open."""
        if self._question:
            self._question = False
            self._err.write(answer + "\n")
            self._err.flush()

    def rewind(self) -> None:
        """Back to the start of the line, for the question to be asked again."""
        self._err.write("\r")
        self._err.flush()

    # ---- writing

    def _text(self, text: str) -> None:
        if text:
            self._shown += text
            # A pipe gets what the model wrote; a terminal gets nothing that would drive it.
            self._out.write(text if self._plain_out else visible(text))
            self._out.flush()

    def _close_line(self) -> None:
        if self._shown and not self._shown.endswith("\n"):
            self._out.write("\n")
            self._out.flush()
            self._shown += "\n"

    def _say(self, line: str) -> None:
        self.answered("")
        self._err.write(line + "\n")
        self._err.flush()

    def folded(self, text: str, indent: str = "  ") -> list[str]:
        """Prose in lines that fit the terminal; whole where there is none."""
        if not self._err.isatty():
            return [text]
        return fold(text, max(20, width() - 1), indent)

    def _paint(self, text: str, style: str) -> str:
        return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if self._colour else text


def usage_words(usage: Usage) -> str:
    """Tokens and, where the price is known, the cost."""
    cost = "" if not usage.cost_usd else f", ${usage.cost_usd:.4f}" if usage.cost_usd >= 0.0001 else ", under $0.0001"
    return f"{usage.input_tokens} tokens in, {usage.output_tokens} out{cost}"


def _marks(stream: TextIO) -> dict[str, str]:
    try:
        "●✗…".encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return {"call": "*", "denied": "x", "asked": "?", "note": "-"}
    return {"call": "●", "denied": "✗", "asked": "?", "note": "–"}


def _short(args: dict[str, Any]) -> str:
    """A call's arguments in one line: `command="ls -la" timeoutMs=1000`."""
    parts = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in args.items()]
    return cut(visible(" ".join(parts)), max(40, width() - 20))


def duration(ms: int) -> str:
    """Milliseconds for people."""
    return f"{ms} ms" if ms < 1000 else f"{ms / 1000:.1f} s"
