"""msgspec's complaints about params, as messages that name the field and say what it must be."""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec

from corral.protocol.errors import InvalidRequest

_TYPES = {
    "str": "a string",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "object": "an object",
    "array": "an array",
    "null": "null",
}

_AT = re.compile(r"(?P<problem>.*?)(?: - at `(?P<path>[^`]*)`)?", re.DOTALL)
_END_OF_TEXT = r"(?![\s\S])"


def params_problem(error: Exception, root: str = "$.params") -> InvalidRequest:
    """What to answer for params that did not decode. Never repeats a value: it could be a secret."""
    if isinstance(error, RecursionError):
        return InvalidRequest(f"{root} is nested too deeply")
    if not isinstance(error, msgspec.ValidationError):
        return InvalidRequest(f"{root} is not valid JSON text")
    found = _AT.fullmatch(str(error))
    problem, path = (found["problem"], found["path"] or "$") if found else ("", "$")
    field = root + path.removeprefix("$")
    for pattern, say in _SENTENCES:
        match = pattern.fullmatch(problem)
        if match is not None:
            return InvalidRequest(say(field, match))
    return InvalidRequest(f"{field} has a value that is not allowed")


def _kind(name: str) -> str:
    return " or ".join(_TYPES.get(part.strip(), part.strip()) for part in name.split("|"))


def _length(field: str, found: re.Match[str]) -> str:
    unit = "characters" if found["type"] == "str" else "items"
    bound = "at least" if found["op"] == ">=" else "at most"
    return f"{field} must be {_kind(found['type'])} of {bound} {found['n']} {unit}"


def _range(field: str, found: re.Match[str]) -> str:
    words = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}
    return f"{field} must be {_kind(found['type'])} of {words[found['op']]} {found['n']}"


def _pattern(field: str, found: re.Match[str]) -> str:
    readable = found["regex"].replace("\\\\", "\\").replace(_END_OF_TEXT, "$")
    return f"{field} must match {readable}"


_SENTENCES: list[tuple[re.Pattern[str], Callable[[str, re.Match[str]], str]]] = [
    (
        re.compile(r"Object missing required field `(?P<name>[^`]*)`.*"),
        lambda field, found: f"{field}.{found['name']} is required",
    ),
    (
        re.compile(r"Expected `(?P<type>[^`]*)`, got `(?P<got>[^`]*)`"),
        lambda field, found: f"{field} must be {_kind(found['type'])}, not {_kind(found['got'])}",
    ),
    (re.compile(r"Expected `(?P<type>[^`]*)` of length (?P<op>[<>]=) (?P<n>\d+)"), _length),
    (re.compile(r"Expected `(?P<type>[^`]*)` matching regex '(?P<regex>.*)'", re.DOTALL), _pattern),
    (re.compile(r"Expected `(?P<type>[^`]*)` (?P<op>[<>]=?) (?P<n>[-\d.e+]+)"), _range),
    (
        re.compile(r"Object contains unknown field `(?P<name>[^`]*)`"),
        lambda field, _found: f"{field} contains a field that it does not have",
    ),
    (
        re.compile(r"(Number|Integer value) out of range"),
        lambda field, _found: f"{field} is a number beyond what can be kept",
    ),
    (
        re.compile(r"Invalid (enum )?value .*", re.DOTALL),
        lambda field, _found: f"{field} has a value that is not one of those allowed",
    ),
]
