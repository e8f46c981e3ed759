"""A scripted model server: speaks real HTTP over a real socket, as well or as badly as it is told.

It speaks Chat Completions (`/v1/chat/completions`), Messages (`/v1/messages`) and generateContent
(`/v1beta/models/NAME:streamGenerateContent`), all with the same scripts: what a script's callable is given is
the request in the form of Chat Completions, whatever it came in.

In a test::

    async with ModelServer([CallTools([("bash_exec", {"command": "ls"})]), Say("Done.")]) as server:
        env = {"OPENAI_BASE_URL": server.base_url, "OPENAI_API_KEY": "k"}
        …
        assert server.requests[0].json["stream"] is True

As a process of its own (prints its port; `GET /_state` tells what it has seen)::

    python -m tests.support.model_server --port 0 --script FILE.py    # FILE.py sets `script = …`

A *script* is one of

- a list of steps: the n-th request gets the n-th, requests beyond the end the last one;
- a callable from the request to a step (it may itself return a list or another callable).

Three ready-made callables keep no count of requests where they need not, so that concurrent sessions, and a
gateway that was killed and started again, get what belongs to their conversation:

- `conversation(steps)`: the step is chosen by how many assistant messages follow the last user message. Where
  an entry is itself a list, the first attempt at that place gets its first step, the next its second, and so on;
- `script_for({"marker": script, …})`: the script whose marker stands in any user message ("" matches all);
- `default_brain`: lists the folder, then says what it saw. It is what runs without a script.

A *step* is one of the dataclasses below. `Say`, `CallTools` and `LengthInToolCall` are answers; their `wire`
says how they are written. The others are what goes wrong instead of, or around, an answer.
"""

from __future__ import annotations

from tests.support.model_server.choose import (
    conversation,
    default_brain,
    script_for,
    tool_results,
    turns_since_user,
    user_texts,
)
from tests.support.model_server.server import (
    ModelServer,
    Recorded,
)
from tests.support.model_server.steps import (
    CallTools,
    CloseKeepAlive,
    CutAfter,
    Drop,
    ErrorInStream,
    Hang,
    LengthInToolCall,
    Malformed,
    NoHttp,
    NoUsage,
    Raw,
    Say,
    Script,
    Slow,
    Status,
    Step,
    Wire,
    content_filter,
)

__all__ = [
    "CallTools",
    "CloseKeepAlive",
    "CutAfter",
    "Drop",
    "ErrorInStream",
    "Hang",
    "LengthInToolCall",
    "Malformed",
    "ModelServer",
    "NoHttp",
    "NoUsage",
    "Raw",
    "Recorded",
    "Say",
    "Script",
    "Slow",
    "Status",
    "Step",
    "Wire",
    "content_filter",
    "conversation",
    "default_brain",
    "script_for",
    "tool_results",
    "turns_since_user",
    "user_texts",
]
