"""The HTTP side of the contract as OpenAPI 3.1, made from the registry and nothing else."""

from __future__ import annotations

from typing import Any

from corral import __version__
from corral.protocol.schema import protocol_schema

_SCHEMAS = "#/components/schemas/"
_DEFS = "#/$defs/"
_TEXT = {"type": "string"}
_VERSION = {"type": "integer", "minimum": 0}

_RPC_STATUSES = {
    "400": "The body is no request frame.",
    "401": "No good token. Decided before anything else.",
    "403": "The Host or Origin header is foreign.",
    "405": "Another verb than POST.",
    "413": "The body is longer than `limits.maxFrameBytes`.",
    "415": "The Content-Type is not application/json, or the Content-Encoding is none of gzip and deflate.",
    "429": "Too many requests: Retry-After, and `retryAfterMs` in the error's details, say how long to wait.",
    "503": "The server is shutting down, or its store cannot be used.",
}
_PLAIN_STATUSES = {code: _RPC_STATUSES[code] for code in ("401", "403", "429", "503")}


def openapi() -> dict[str, Any]:
    """The document. Every method of the registry is one of the request bodies of `/rpc`."""
    contract = _referring_to_components(protocol_schema())
    schemas: dict[str, Any] = dict(contract["$defs"])
    schemas["HttpError"] = _object({"error": _ref("ErrorBody")})
    for name, method in contract["methods"].items():
        schemas[f"request.{name}"] = _request(name, method)
        schemas[f"answer.{name}"] = _answer(method)
    for name, event in contract["events"].items():
        schemas[f"event.{name}"] = _event(name, event)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Corral",
            "version": __version__,
            "summary": "A self-hosted control plane for AI agents.",
            "description": f"Protocol {contract['protocolVersion']}. The live interface is the WebSocket at /ws, "
            "which speaks the same frames.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"token": []}],
        "paths": {
            "/rpc": {"post": _rpc(list(contract["methods"]))},
            "/v1/sessions/{sessionId}/events": {"get": _events(list(contract["events"]))},
            "/healthz": {"get": _health("Whether the process lives.", {"200": "It does."})},
            "/readyz": {
                "get": _health(
                    "Whether it takes work: store writable, not draining.", {"200": "It does.", "503": "Not now."}
                )
            },
            "/metrics": {"get": _page("readMetrics", "Counters in Prometheus's text format.", "text/plain", _TEXT)},
            "/schema/protocol.json": {
                "get": _page(
                    "readSchema", "The wire contract as JSON Schema.", "application/schema+json", {"type": "object"}
                )
            },
            "/openapi.json": {"get": _page("readOpenapi", "This document.", "application/json", {"type": "object"})},
        },
        "components": {"schemas": schemas, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    }


def _rpc(methods: list[str]) -> dict[str, Any]:
    mapping = {name: f"{_SCHEMAS}request.{name}" for name in methods}
    return {
        "operationId": "call",
        "summary": "Send one request frame and get its answer.",
        "description": "The answer of a method has the payload of `answer.METHOD` among the schemas. `agent.run` "
        "answers when the run has ended or waits for an approval, or after `waitMs`, with its durable events.",
        "requestBody": {
            "required": True,
            "content": _json(
                {
                    "oneOf": [{"$ref": ref} for ref in mapping.values()],
                    "discriminator": {"propertyName": "method", "mapping": mapping},
                }
            ),
        },
        "responses": {
            "200": _said(
                "A well-formed frame from a known caller; `response.ok` says how it went.",
                _json({"anyOf": [_ref(f"answer.{name}") for name in methods]}),
            ),
            **{code: _said(text, _json(_ref("RpcAnswer"))) for code, text in _RPC_STATUSES.items()},
        },
    }


def _events(events: list[str]) -> dict[str, Any]:
    return {
        "operationId": "followSession",
        "summary": "One session's events as server-sent events.",
        "description": "`event` is the event's name, `data` the event frame (`event.NAME` among the schemas), `id` its "
        "stateVersion; a transient event has no id. Every 15 seconds comes a comment. The stream stays open after a "
        "run; when the server ends it, the last comment is `closed` with the WebSocket close code. With both "
        "`Last-Event-ID` and `after`, the former holds. With neither, events come from now on.",
        "parameters": [
            _parameter("sessionId", "path", {"type": "string", "pattern": "^[A-Za-z0-9_.:-]{1,128}$"}, required=True),
            _parameter("after", "query", _VERSION),
            _parameter("Last-Event-ID", "header", _VERSION),
        ],
        "responses": {
            "200": _said(
                "The stream.",
                {"text/event-stream": {"schema": _TEXT, "x-data": [f"{_SCHEMAS}event.{name}" for name in events]}},
            ),
            "400": _said("`after` or `Last-Event-ID` is wrong or has not happened yet.", _json(_ref("HttpError"))),
            "404": _said("No such session that the caller may see.", _json(_ref("HttpError"))),
            "405": _said("Another verb than GET.", _json(_ref("HttpError"))),
            **_refusals(),
        },
    }


def _page(operation: str, summary: str, kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    said = _said(summary, {kind: {"schema": schema}})
    return {"operationId": operation, "summary": summary, "responses": {"200": said, **_refusals()}}


def _health(summary: str, statuses: dict[str, str]) -> dict[str, Any]:
    body = _json(_object({"status": _TEXT}))
    return {
        "summary": summary,
        "security": [],
        "responses": {code: _said(text, body) for code, text in statuses.items()},
    }


def _request(name: str, method: dict[str, Any]) -> dict[str, Any]:
    schema = _object(
        {
            "type": {"const": "req"},
            "id": {"type": "string", "minLength": 1, "maxLength": 128},
            "method": {"const": name},
            "params": method["params"],
        },
        optional=() if method["sideEffect"] else ("params",),
    )
    return {"description": method["summary"], **schema}


def _answer(method: dict[str, Any]) -> dict[str, Any]:
    response: dict[str, Any] = {"type": {"const": "res"}, "id": _TEXT}
    good = _object({**response, "ok": {"const": True}, "payload": method["result"]})
    bad = _object({**response, "ok": {"const": False}, "error": _ref("ErrorBody")})
    return _object({"response": {"oneOf": [good, bad]}, "events": {"type": "array", "items": _ref("Event")}})


def _event(name: str, event: dict[str, Any]) -> dict[str, Any]:
    fields = {"type": {"const": "event"}, "event": {"const": name}, "payload": event["payload"]}
    return _object({**fields, "stateVersion": _VERSION})


def _refusals() -> dict[str, Any]:
    return {code: _said(text, _json(_ref("HttpError"))) for code, text in _PLAIN_STATUSES.items()}


def _parameter(name: str, place: str, schema: dict[str, Any], *, required: bool = False) -> dict[str, Any]:
    return {"name": name, "in": place, "required": required, "schema": schema}


def _object(properties: dict[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required}


def _said(description: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": content}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _SCHEMAS + name}


def _referring_to_components(value: Any) -> Any:
    """The same with every reference, in `$ref` and in discriminators, led to where OpenAPI keeps schemas."""
    if isinstance(value, dict):
        return {key: _referring_to_components(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_referring_to_components(item) for item in value]
    if isinstance(value, str) and value.startswith(_DEFS):
        return _SCHEMAS + value.removeprefix(_DEFS)
    return value
