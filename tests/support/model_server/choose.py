"""Which step a request gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.support.model_server.steps import CallTools, Say, Script, Status


def user_texts(request: Mapping[str, Any]) -> list[str]:
    """The texts of all user messages of a request."""
    texts = []
    for message in request.get("messages", []):
        if message.get("role") == "user":
            content = message.get("content")
            parts = content if isinstance(content, list) else [{"text": content or ""}]
            texts.append("".join(part.get("text") or "" for part in parts))
    return texts


def turns_since_user(request: Mapping[str, Any]) -> int:
    """How many assistant messages follow the last user message: which step of its task the model is at."""
    turns = 0
    for message in request.get("messages", []):
        if message.get("role") == "user":
            turns = 0
        elif message.get("role") == "assistant":
            turns += 1
    return turns


def tool_results(request: Mapping[str, Any]) -> list[str]:
    """The contents of the tool messages since the last user message."""
    results: list[str] = []
    for message in request.get("messages", []):
        if message.get("role") == "user":
            results = []
        elif message.get("role") == "tool":
            results.append(str(message.get("content")))
    return results


def conversation(steps: Sequence[Any]) -> Callable[[dict[str, Any]], Any]:
    """The step belongs to the place in the conversation (see the module); beyond the end the last repeats."""
    attempts: dict[tuple[str, int], int] = {}

    def choose(request: dict[str, Any]) -> Any:
        place = turns_since_user(request)
        entry = steps[min(place, len(steps) - 1)]
        if not isinstance(entry, list):
            return entry
        key = ("\0".join(user_texts(request)), place)
        attempts[key] = attempts.get(key, 0) + 1
        return entry[min(attempts[key], len(entry)) - 1]

    return choose


def script_for(scripts: Mapping[str, Script]) -> Callable[[dict[str, Any]], Any]:
    """The script whose marker stands in one of the request's user messages, tried in the order given."""
    players = {marker: player(script) for marker, script in scripts.items()}

    def choose(request: dict[str, Any]) -> Any:
        text = "\n".join(user_texts(request))
        for marker, play in players.items():
            if marker in text:
                return play(request)
        return Status(400, message="no script for this conversation")

    return choose


def default_brain(request: dict[str, Any]) -> Any:
    """List the folder, then report; plain text where there are no tools."""
    if request.get("tools") and turns_since_user(request) == 0:
        return CallTools([("file_list", {})], text="I will look first.")
    return Say("Done. I saw: " + " | ".join(tool_results(request))[:200], chunks=5)


def player(script: Script) -> Callable[[dict[str, Any]], Any]:
    """A callable from request to step; what a script's callable returns may be a script again."""
    if callable(script):
        made: dict[int, tuple[Any, Callable[[dict[str, Any]], Any]]] = {}

        def call(request: dict[str, Any]) -> Any:
            step = script(request)
            if not isinstance(step, list) and not callable(step):
                return step
            # Kept by identity, so that a list which is returned again goes on where it was.
            _, play = made.setdefault(id(step), (step, player(step)))
            return play(request)

        return call
    remaining = list(script)

    def pop(_request: dict[str, Any]) -> Any:
        return remaining.pop(0) if len(remaining) > 1 else remaining[0]

    return pop
