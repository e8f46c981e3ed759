"""What the scripted model says (`python -m tests.support.model_server --script bench/script.py`).

The user's text is a JSON object: `{"chunks": n}` is a text in n deltas; `{"steps": s, "calls": c}` are s steps
of c calls of a tool that there is none of, so that each makes two durable events and nothing runs, then a word;
`{"hang": 1}` is an answer that begins and never ends.
"""

from __future__ import annotations

import json
from typing import Any

from tests.support.model_server import CallTools, Hang, Say, turns_since_user, user_texts

WORDS = "a dozen of letters or two "
"""The text of one delta."""


def script(request: dict[str, Any]) -> Say | CallTools | Hang:
    wanted = json.loads(user_texts(request)[-1])
    if "hang" in wanted:
        return Hang(after=1)
    chunks = wanted.get("chunks", 1)
    if turns_since_user(request) < wanted.get("steps", 0):
        return CallTools([("no_such_tool", {"number": number}) for number in range(wanted["calls"])], fragments=1)
    return Say(WORDS * chunks, chunks=chunks)
