"""The arguments of a tool call as a model wrote them: an object, or what is wrong in words that it can act on."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec

from corral.models.transcript import without_surrogates
from corral.protocol.canonical import MAX_DEPTH, is_too_deep

NO_NAME = "The call has no tool name. Name one of the tools that you were given."
CUT_OFF = (
    "Your answer ran into its token limit in the middle of this call, so it was not carried out. "
    "Make the call again with shorter arguments, or split the work over several calls."
)
_NO_JSON = "The arguments are not valid JSON. Make the call again with one JSON object as its arguments."


def parse(text: str, *, cut: bool) -> tuple[dict[str, Any] | None, str | None]:
    """The arguments out of their text, or None and the problem. `cut`: the answer ended in this call by its limit."""
    if not text.strip():
        return (None, CUT_OFF) if cut else ({}, None)
    value, valid = decode_json(text.encode("utf-8", "surrogatepass"))
    if not valid:
        return None, CUT_OFF if cut else _NO_JSON
    return check(value)


def check(value: Any) -> tuple[dict[str, Any] | None, str | None]:
    """Arguments that are decoded already: only an object will do."""
    if not isinstance(value, dict):
        kind = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}.get(
            type(value), "a number"
        )
        return None, f"The arguments must be one JSON object, but they are {kind}. Make the call again with an object."
    if is_too_deep(value):
        return None, f"The arguments nest more than {MAX_DEPTH} levels deep. Make the call again with flatter ones."
    return without_surrogates(value), None


def decode_json(text: bytes) -> tuple[Any, bool]:
    """A JSON value and True, or None and False. What msgspec is too strict for, the standard library may know."""
    try:
        return msgspec.json.decode(text), True
    except (msgspec.DecodeError, UnicodeError):
        try:
            # Lone halves of surrogate pairs, written as \\ud83d, which are no text but do occur.
            decoded = text.decode("utf-8", "surrogatepass")
            return json.loads(decoded, parse_constant=_no_constant, parse_float=_finite), True
        except (ValueError, RecursionError):
            return None, False
    except RecursionError:
        return None, False


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    """A number beyond what can be kept would be infinite here and null in the journal, and so in the hash."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is out of range")
    return number
