"""What the router asks of a provider: one attempt at one call, with errors sorted by what to do next."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from enum import Enum
from typing import Literal, Protocol

from msgspec import Struct

from corral.models.api import AssistantMessage, ModelRequest, TextDelta

Stop = Literal["end", "tool_calls", "length", "refused"]


class Answer(Struct, kw_only=True, frozen=True):
    """The last event of a successful attempt. Tokens as counted by the provider, or estimated.

    `input_tokens` counts all that was sent; `cache_read_tokens` and `cache_write_tokens` are those of
    them that came out of the provider's cache and that were put into it.
    """

    message: AssistantMessage
    input_tokens: int
    output_tokens: int
    stop: Stop
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0


class Remedy(Enum):
    """What an error leaves to do."""

    RETRY = "retry"
    """The same model may answer next time."""
    NEXT = "next"
    """This model will not answer (no key, no such model); another may."""
    LONGER = "longer"
    """The request is too long for this model; one with a larger window may take it."""
    GIVE_UP = "give up"
    """The request itself is at fault; no model would take it."""


class ProviderError(Exception):
    """An attempt failed. `reason` is shown to people: it holds no key and no credentials of a URL.

    `retry_after` is how many seconds the provider asked to be left alone, if it did.
    """

    def __init__(self, reason: str, remedy: Remedy, *, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy
        self.retry_after = retry_after


class Provider(Protocol):
    """One configured provider: endpoint, credentials, dialect."""

    def stream(self, name: str, request: ModelRequest) -> AsyncGenerator[TextDelta | Answer, None]:
        """One attempt: text deltas, then the Answer.

        Raises ProviderError. Closing the iterator closes the connection at once.
        """
        ...
