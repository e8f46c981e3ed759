"""The published contract as JSON Schema (2020-12), made from the registry and nothing else."""

from __future__ import annotations

import inspect
from typing import Any

import msgspec

from corral.protocol import PROTOCOL_VERSION
from corral.protocol.errors import CorralError, ErrorCode
from corral.protocol.events import EVENTS, TERMINAL_EVENTS, TRANSIENT_EVENTS
from corral.protocol.frames import Event, Request, Response, RpcAnswer
from corral.protocol.methods import METHODS

_REF = "#/$defs/{name}"


def protocol_schema() -> dict[str, Any]:
    """Every frame, method, event, type and error code of the wire.

    The document is itself a schema: it accepts a frame. `methods` and `events` name the schema of
    each one's params, result and payload among the `$defs`; `errorCodes` says of each code
    whether the same request may succeed later.
    """
    params = [method.params for method in METHODS.values()]
    results = [method.result for method in METHODS.values()]
    _, asked = msgspec.json.schema_components([Request, *params], ref_template=_REF)
    sent = [Response, Event, RpcAnswer, *results, *EVENTS.values()]
    _, defs = msgspec.json.schema_components([Request, *params, *sent], ref_template=_REF)
    for name, schema in defs.items():
        if "description" in schema:
            # Before Python 3.13 a class keeps its docstring with the indentation of the source.
            schema["description"] = inspect.cleandoc(schema["description"])
        if name not in asked:
            _require_what_is_always_sent(schema)
        if "required" in schema and not schema["required"]:
            del schema["required"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:corral:protocol:{PROTOCOL_VERSION}",
        "title": "The Corral wire contract",
        "protocolVersion": PROTOCOL_VERSION,
        "oneOf": [_ref(Request), _ref(Response), _ref(Event)],
        "methods": {
            method.name: {
                "summary": method.summary,
                "sideEffect": method.side_effect,
                "idempotencyScope": (method.scope or "workspaceId") if method.side_effect else None,
                "roles": sorted(method.roles),
                "params": _ref(method.params),
                "result": _ref(method.result),
            }
            for method in METHODS.values()
        },
        "events": {
            name: {
                "durable": name not in TRANSIENT_EVENTS,
                "endsRun": name in TERMINAL_EVENTS,
                "payload": _ref(payload),
            }
            for name, payload in EVENTS.items()
        },
        "errorCodes": {code.value: {"retryable": _retryable().get(code, False)} for code in ErrorCode},
        "$defs": dict(sorted(defs.items())),
    }


def _require_what_is_always_sent(schema: dict[str, Any]) -> None:
    """A field with a default may be left out by a client; the server never leaves it out."""
    required = schema.get("required", [])
    schema["required"] = [
        name for name, prop in schema.get("properties", {}).items() if name in required or "default" in prop
    ]
    for prop in schema.get("properties", {}).values():
        prop.pop("default", None)


def _retryable() -> dict[ErrorCode, bool]:
    """By code; other rooms' subclasses of these errors do not change what a code means."""
    here = CorralError.__module__
    return {kind.code: kind.retryable for kind in CorralError.__subclasses__() if kind.__module__ == here}


def _ref(kind: type) -> dict[str, str]:
    return {"$ref": _REF.format(name=kind.__name__)}
