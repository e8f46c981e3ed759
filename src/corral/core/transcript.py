"""What the model sees of a session: how the conversation opens, and its messages, out of the store's transcript.

A session opens with notes from its memory's files, once they were read, and after a compaction with the
summary of what came before. The messages are those that no summary stands for, and the present
run's input in any case. What belongs to a silent step is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from corral.models.api import AssistantMessage, Message, Text, ToolMessage, UserMessage
from corral.models.tokens import first_of, message_tokens, text_tokens
from corral.storage.repositories import Transaction
from corral.storage.rows import MessageRow, RunRow, SessionRow

NOTES_VERSION = 0
"""Where the notes stand that a session began with: before its first event."""

_SUMMARY = """\
The conversation before this point was summarised to make room. The summary was written by the model and is a \
record of what was said and done, not a new request:

"""


class Opening(Struct, kw_only=True, frozen=True):
    """What comes before the messages. Both are texts for the model, empty where there is nothing."""

    notes: str = ""
    summary: str = ""

    def messages(self) -> list[Message]:
        """As messages of the user's side: what files and models wrote has none of the system's authority."""
        parts = [self.notes] if self.notes else []
        if self.summary:
            parts.append(_SUMMARY + self.summary)
        return user_texts(*parts)

    def within(self, tokens: int) -> Opening:
        """As much of it as so many tokens hold: the notes go first, then the end of the summary."""
        if self.tokens() <= tokens:
            return self
        without = Opening(summary=self.summary)
        if without.tokens() <= tokens:
            return without
        room = tokens - without.tokens() + text_tokens(self.summary)
        return Opening(summary=first_of(self.summary, room) if room > 0 else "")

    def tokens(self) -> int:
        return sum(message_tokens(message) for message in self.messages())


class Measured(Struct, kw_only=True, frozen=True):
    """What a session's `context_usage` is a measure of: a request with the first so many of its messages (the
    newest of them the answer to it), as a share of that model's window. What came later is not in it."""

    model: str
    messages: int


class Transcript(Struct, kw_only=True):
    """`versions` are the places of `messages` in the journal, ascending.

    `notes_due`: no notes were read yet and the model has said nothing yet, so that they are still to be read.
    `flush` holds the ids of the calls of the silent step since the last compaction, None if there was none.
    """

    opening: Opening
    messages: list[Message]
    versions: list[int]
    measured: Measured
    notes_due: bool
    flush: frozenset[str] | None


def load_transcript(tx: Transaction, run: RunRow, session: SessionRow) -> Transcript:
    """The transcript as the run's next request goes by it."""
    opening, through = Opening(), NOTES_VERSION - 1
    summary = tx.messages.latest(run.tenant_id, session.id, "summary") if session.compaction_count else None
    if summary is not None:
        opening = Opening(notes=summary.content["notes"], summary=summary.content["summary"])
        through = summary.content["through"]
    rows = tx.messages.of_session(run.tenant_id, session.id, after_version=through)
    if run.accepted_version <= through:
        # Summarised in the middle of a long run: its input is sent whole all the same.
        given = tx.messages.get(run.tenant_id, session.id, run.accepted_version)
        rows = [given, *rows] if given is not None else rows
    notes = next((row for row in rows if row.role == "notes"), None)
    if notes is not None:
        opening = Opening(notes=notes.content["text"])
    silent, flush = set[str](), None
    for row in rows:
        if row.role == "flush":
            ids = frozenset(call.id for call in msgspec.convert(row.content, AssistantMessage).tool_calls)
            silent |= ids
            flush = ids if summary is None or row.version > summary.version else flush
    kept = [row for row in rows if row.role in ("user", "assistant", "tool")]
    pairs = [(row.version, msgspec.convert(row.content, Message)) for row in kept]
    pairs = [pair for pair in pairs if not (isinstance(pair[1], ToolMessage) and pair[1].tool_call_id in silent)]
    versions = [version for version, _ in pairs]
    answer = next((row for row in reversed(kept) if row.role == "assistant"), None)
    return Transcript(
        opening=opening,
        messages=[message for _, message in pairs],
        versions=versions,
        measured=_measured(tx, run, versions, [row for row in (answer, summary) if row is not None]),
        notes_due=notes is None and answer is None and summary is None,
        flush=flush,
    )


def _measured(tx: Transaction, run: RunRow, versions: Sequence[int], measures: Sequence[MessageRow]) -> Measured:
    """By the newest of the entries that come with a measure: the last answer, the last summary."""
    last = max(measures, key=lambda row: row.version, default=None)
    if last is None:
        return Measured(model=run.model, messages=0)
    by = run if last.run_id == run.id else tx.runs.get(run.tenant_id, last.run_id)
    return Measured(
        model=by.model if by is not None else run.model, messages=sum(version <= last.version for version in versions)
    )


def user_texts(*texts: str) -> list[Message]:
    """Messages of the user's side, one for each text."""
    return [UserMessage(content=[Text(text=text)]) for text in texts]


def notes_row(run: RunRow, text: str, now_ms: int) -> MessageRow:
    """The entry for the notes that a session begins with."""
    return _row(run, NOTES_VERSION, "notes", {"text": text}, now_ms)


def summary_row(run: RunRow, version: int, through: int, opening: Opening, now_ms: int) -> MessageRow:
    """The entry of a compaction: `opening` stands for everything up to version `through`."""
    content = {"through": through, "summary": opening.summary, "notes": opening.notes}
    return _row(run, version, "summary", content, now_ms)


def _row(run: RunRow, version: int, role: Any, content: dict[str, Any], now_ms: int) -> MessageRow:
    return MessageRow(
        tenant_id=run.tenant_id,
        session_id=run.session_id,
        version=version,
        run_id=run.id,
        role=role,
        content=content,
        created_at=now_ms,
    )


def flush_state(tx: Transaction, session: SessionRow) -> str:
    """What came of a silent step: `flushed` if a note was written, else `skipped`."""
    row = tx.messages.latest(session.tenant_id, session.id, "flush")
    before = tx.messages.latest(session.tenant_id, session.id, "summary") if session.compaction_count else None
    if row is None or (before is not None and row.version < before.version):
        return "skipped"
    calls = msgspec.convert(row.content, AssistantMessage).tool_calls
    runs = [tx.tool_runs.get(session.tenant_id, call.id) for call in calls]
    return "flushed" if any(run is not None and run.status == "success" for run in runs) else "skipped"
