"""What of a session's history is sent to the model.

Everything, while it fits. Past the window, for the request only and never in the journal:
old tool results are cut first, then the oldest turns are left out, then the current run's
own results are cut. The current input is always sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from msgspec import structs

from corral.models.api import AssistantMessage, Message, ToolDefinition, ToolMessage, UserMessage
from corral.models.tokens import message_tokens, text_tokens, tools_tokens

RECENT_RESULTS = 4
"""So many of the newest tool results are not among the old ones."""

_CUTS = (2000, 400, 80)
_RESERVED_SHARE = 0.15
_RESERVED_MOST = 16_000


def budget(window: int, system: str, tools: Sequence[ToolDefinition]) -> int:
    """Tokens that messages may take of a window, after the prompt, the tools and room for the answer."""
    reserved = min(int(window * _RESERVED_SHARE), _RESERVED_MOST)
    return window - reserved - text_tokens(system) - tools_tokens(tools)


def fit(messages: Sequence[Message], tokens: int) -> list[Message]:
    """The messages, or as much of them as `tokens` (estimated) hold, in order.

    A call and its result stay or go together, so that what is sent is a whole transcript.
    """
    kept = list(messages)
    if _total(kept) <= tokens:
        return kept
    results = [index for index, message in enumerate(kept) if isinstance(message, ToolMessage)]
    for index in results[:-RECENT_RESULTS]:
        kept[index] = _cut(kept[index], _CUTS[1])
    kept = _without_oldest_turns(kept, tokens)
    for length in _CUTS:
        if _total(kept) <= tokens:
            return kept
        kept = [_cut(message, length) for message in kept]
    return _without_oldest_steps(kept, tokens)


def _total(messages: Sequence[Message]) -> int:
    return sum(message_tokens(message) for message in messages)


def _cut(message: Message, length: int) -> Message:
    if not isinstance(message, ToolMessage) or len(message.output) <= length * 2:
        return message
    missing = len(message.output) - length
    text = f"{message.output[: length // 2]}\n[{missing} characters left out]\n{message.output[-(length // 2) :]}"
    return structs.replace(message, output=text)


def _without_oldest_turns(messages: list[Message], tokens: int) -> list[Message]:
    """Leave out whole turns (an input and all that followed from it) from the front; the last one stays."""
    starts = [index for index, message in enumerate(messages) if isinstance(message, UserMessage)]
    total = _total(messages)
    first = 0
    for start, end in pairwise(starts):
        if total <= tokens:
            break
        total -= _total(messages[start:end])
        first = end
    return messages[first:]


def _without_oldest_steps(messages: list[Message], tokens: int) -> list[Message]:
    """Leave out whole steps (a model message and its results) after the input; the last one stays."""
    total = _total(messages)
    starts = [index for index, message in enumerate(messages) if isinstance(message, AssistantMessage)]
    if not starts:
        return messages
    first = starts[0]
    for start, end in pairwise(starts):
        if total <= tokens:
            break
        total -= _total(messages[start:end])
        first = end
    return messages[: starts[0]] + messages[first:]
