"""The built-in model `demo`: no language model, but a fixed set of requests carried out with the real tools.

It exists so that the first minute works without a key and without a network. A request is a line of
the last user message:

    run: COMMAND               bash.exec
    read: FILE                 file.read
    list  or  list: FOLDER     file.list
    search: REGEX              file.search
    write: FILE :: CONTENT     file.write (or the content on the following lines, to the end)
    get: URL                   http.request

Several lines make several calls, one after another; then it tells what came back. Anything else gets an
explanation of what it is and how to set a real model.

What it says and does is a function of the messages alone, so that a turn goes on after a crash.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable
from typing import Any

from msgspec import Struct

from corral.models.api import AssistantMessage, ModelRequest, Text, TextDelta, ToolCall, ToolMessage, UserMessage
from corral.models.provider import Answer
from corral.models.tokens import message_tokens, request_tokens

ABOUT = """\
I am Corral's demo model. I am not an LLM: I follow a small fixed set of requests by calling the real tools, so \
that you can try the gateway without a key. One request a line:

    run: ls -la                  runs a shell command
    read: notes.txt              reads a file
    list: src                    lists a folder (`list` alone: this one)
    search: TODO|FIXME           searches files for a regular expression
    write: hello.txt :: Hello!   writes a file
    get: https://example.com/    fetches a URL

For a real model set CORRAL_MODEL=openai-chat:NAME, with OPENAI_API_KEY for its key and OPENAI_BASE_URL for any \
server that speaks Chat Completions, and start the gateway again."""

_SHOWN_CHARS = 1500
_PIECE = re.compile(r"\S+\s*|\s+")
_MOST_PIECES = 40
_REQUEST = re.compile(r"\s*(run|read|list|search|write|get)\s*(?::\s*(.*))?$", re.IGNORECASE)


class Wanted(Struct, frozen=True):
    """One request understood: which tool with which arguments."""

    tool: str
    args: dict[str, Any]


def parse(text: str) -> list[Wanted]:
    """The requests in a user message, in order; lines that are none are passed over."""
    wanted: list[Wanted] = []
    lines = text.split("\n")
    for number, line in enumerate(lines):
        match = _REQUEST.match(line.rstrip("\r"))
        if match is None:
            continue
        verb, rest = match[1].lower(), (match[2] or "").strip()
        if verb == "list":
            wanted.append(Wanted("file.list", {"path": rest} if rest else {}))
        elif not rest:
            continue
        elif verb == "write":
            path, separator, content = rest.partition(" :: ")
            if not separator:
                # The rest of the message is the file, whatever it looks like.
                content = "\n".join(lines[number + 1 :])
            wanted.append(Wanted("file.write", {"path": path.strip(), "content": content}))
            if not separator:
                break
        else:
            tool, field = _SIMPLE[verb]
            wanted.append(Wanted(tool, {field: rest}))
    return wanted


_SIMPLE = {
    "run": ("bash.exec", "command"),
    "read": ("file.read", "path"),
    "search": ("file.search", "pattern"),
    "get": ("http.request", "url"),
}


class DemoModel:
    """`delay` is the pause in seconds between two pieces of text, so that streaming is to be seen."""

    def __init__(self, *, new_id: Callable[[], str], delay: float = 0.01) -> None:
        self._new_id = new_id
        self._delay = delay

    async def stream(self, _name: str, request: ModelRequest) -> AsyncGenerator[TextDelta | Answer, None]:
        """The next step: a call, or the summary of what came back, or what this is."""
        text, call = _next_step(request)
        for number, piece in enumerate(_pieces(text)):
            if number:
                await asyncio.sleep(self._delay)
            yield TextDelta(text=piece)
        calls = [] if call is None else [ToolCall(id=self._new_id(), name=call.tool, args=call.args)]
        message = AssistantMessage(text=text, tool_calls=calls)
        yield Answer(
            message=message,
            input_tokens=request_tokens(request),
            output_tokens=message_tokens(message),
            stop="tool_calls" if calls else "end",
        )


def _pieces(text: str) -> list[str]:
    """The text word by word; of a long one several words at a time."""
    words = _PIECE.findall(text)
    step = len(words) // _MOST_PIECES + 1
    return ["".join(words[start : start + step]) for start in range(0, len(words), step)]


def _next_step(request: ModelRequest) -> tuple[str, Wanted | None]:
    """Text and, perhaps, a call: decided by the last user message and the results since."""
    text, results = _since_last_user(request)
    offered = {tool.name for tool in request.tools}
    requests = parse(text)
    wanted = [one for one in requests if one.tool in offered]
    refused = sorted({one.tool for one in requests} - offered)
    if not requests:
        return ABOUT, None
    if len(results) < len(wanted):
        one = wanted[len(results)]
        begun = f"({len(results) + 1} of {len(wanted)}) " if len(wanted) > 1 else ""
        return f"{begun}I call {one.tool}.", one
    parts = [_told(result) for result in results]
    if refused:
        parts.append(f"I was not given these tools, so I did not call them: {', '.join(refused)}.")
    return "\n\n".join(parts), None


def _since_last_user(request: ModelRequest) -> tuple[str, list[ToolMessage]]:
    text = ""
    results: list[ToolMessage] = []
    for message in request.messages:
        if isinstance(message, UserMessage):
            text = "\n".join(part.text for part in message.content if isinstance(part, Text))
            results = []
        elif isinstance(message, ToolMessage):
            results.append(message)
    return text, results


def _told(result: ToolMessage) -> str:
    output = result.output.strip("\n")
    if len(output) > _SHOWN_CHARS:
        output = f"{output[:_SHOWN_CHARS]}\n… ({len(output) - _SHOWN_CHARS} characters more)"
    if result.is_error:
        return f"{result.name} did not succeed:\n{output}"
    return f"{result.name} gave back:\n{output}" if output else f"{result.name} succeeded and gave back nothing."
