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


def _normal(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _normal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_normal(item) for item in value]
    return value
