"""One interface to every model: messages in, a stream of events out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any, Literal, Protocol

from msgspec import Struct

# ---- messages, in a neutral form that is also what the transcript keeps


class Text(Struct, kw_only=True, tag_field="type", tag="text"):
    text: str


class Image(Struct, kw_only=True, tag_field="type", tag="image"):
    """`data` is base64."""

    mime_type: str
    data: str


class UserMessage(Struct, kw_only=True, tag_field="role", tag="user"):
    content: list[Text | Image]


class ToolCall(Struct, kw_only=True):
    """A call as the model made it.

    `id` is unique within the session and ours to choose (the adapter maps it to what its wire
    wants); `name` is Corral's (`bash.exec`), or what the model invented. `args` is None when
    the arguments were no JSON object; `problem` then says what was wrong, and the broken text
    is never sent back.
    """

    id: str
    name: str
    args: dict[str, Any] | None
    problem: str | None = None


class AssistantMessage(Struct, kw_only=True, tag_field="role", tag="assistant"):
    """`extra` is what one provider alone understands and wants back, under the provider's name."""

    text: str
    tool_calls: list[ToolCall] = []
    extra: dict[str, Any] = {}


class ToolMessage(Struct, kw_only=True, tag_field="role", tag="tool"):
    """The result of one call. `is_error` for anything but success."""

    tool_call_id: str
    name: str
    output: str
    is_error: bool = False


Message = UserMessage | AssistantMessage | ToolMessage


class ToolDefinition(Struct, kw_only=True, frozen=True):
    """What the model is told of a tool. `name` is Corral's; `parameters` is a JSON Schema."""

    name: str
    description: str
    parameters: dict[str, Any]


class ModelRequest(Struct, kw_only=True):
    system: str
    messages: Sequence[Message]
    tools: Sequence[ToolDefinition]
    max_output_tokens: int | None = None


# ---- what comes back


class Usage(Struct, kw_only=True, frozen=True):
    """Tokens of one call, as the provider counted them or, where it did not, estimated.

    `cost_usd` is None where the model's price is not known. Of `input_tokens`, `cache_read_tokens` came out
    of the provider's cache and `cache_write_tokens` were put into it; `cost_usd` has their prices.
    """

    input_tokens: int
    output_tokens: int
    cost_usd: float | None
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0


class TextDelta(Struct, kw_only=True, frozen=True):
    text: str


class Restarted(Struct, kw_only=True, frozen=True):
    """The text so far is void: the call is made again (on `model`), because of `reason`."""

    model: str
    reason: str


class Finished(Struct, kw_only=True, frozen=True):
    """The whole message, the last event of a stream. `model` is `provider:name`, the one that answered.

    `stop` is `length` when the model ran into its token limit: calls cut off there carry a `problem`.
    """

    model: str
    message: AssistantMessage
    usage: Usage
    stop: Literal["end", "tool_calls", "length", "refused"]


ModelEvent = TextDelta | Restarted | Finished


class ModelInfo(Struct, kw_only=True, frozen=True):
    """What is known of a model beforehand. Prices are None where they are not known."""

    model: str
    context_window: int
    input_usd_per_million: float | None
    output_usd_per_million: float | None


class Models(Protocol):
    """All configured models behind one door: `corral.models.router` implements it."""

    def info(self, model: str) -> ModelInfo:
        """What is known of `provider:name`. Raises InvalidRequest for a provider there is none of."""
        ...

    def stream(self, request: ModelRequest, chain: Sequence[str]) -> AsyncGenerator[ModelEvent, None]:
        """Call the first model of `chain` that answers, with retries on each; the last event is Finished.

        Cancelling the iteration, or closing the generator (`contextlib.aclosing`), closes the
        provider's connection at once.
        Raises ModelUnavailable (with what was tried, no secrets) when all are out, and
        InvalidRequest-like CorralErrors for requests that no retry can mend.
        """
        ...

    async def close(self) -> None: ...
