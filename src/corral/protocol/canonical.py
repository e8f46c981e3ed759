"""Canonical JSON, for comparing and hashing what callers sent.

Objects are written with sorted keys and without spaces, and a number that is integral is
written as an integer, so that two texts which mean the same JSON value have the same bytes
(the aim of RFC 8785; unlike there, integers beyond 2**53 keep all their digits).
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec


def canonical_json(value: Any) -> bytes:
    """`value` (JSON types, or Structs of them) as canonical JSON in UTF-8."""
    return msgspec.json.encode(_normal(msgspec.to_builtins(value)), order="sorted")


def canonical_hash(value: Any) -> str:
    """The SHA-256 of `canonical_json(value)`, in hexadecimal."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


MAX_DEPTH = 100
"""How deep lists and objects may lie in each other in what callers and models send."""


def is_too_deep(value: Any) -> bool:
    """Whether lists and objects (JSON types) lie in each other more than `MAX_DEPTH` deep.

    How deep a decoder goes by itself differs between versions of Python, and what it lets through must
    not be too deep for the code behind it. Walks level by level, so that it has no such bound itself.
    """
    level = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                inner += each.values()
            elif isinstance(each, list):
                inner += each
        level = [each for each in inner if isinstance(each, dict | list)]
        if not level:
            return False
    return True


def _normal(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _normal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_normal(item) for item in value]
    return value
