"""The three frames: request, response, event. One JSON object a WebSocket text frame."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from corral.protocol.types import Wire

INVALID_ID = "invalid_req"
"""The id of an answer to a frame whose own id cannot be read."""

RequestId = Annotated[str, Meta(min_length=1, max_length=128)]


class Request(Wire, kw_only=True, frozen=True):
    """What a client sends. `params` left out counts as an empty object."""

    type: Literal["req"]
    id: RequestId
    method: Annotated[str, Meta(min_length=1, max_length=128)]
    params: dict[str, Any] = {}


class ErrorBody(Wire, kw_only=True, frozen=True):
    code: str
    message: str
    retryable: bool
    trace_id: str
    details: dict[str, Any] | UnsetType = UNSET


class Response(Wire, kw_only=True, frozen=True):
    """The one answer to a request: `payload` if `ok`, else `error`."""

    type: Literal["res"] = "res"
    id: str
    ok: bool
    payload: Any = UNSET
    error: ErrorBody | UnsetType = UNSET


class Event(Wire, kw_only=True, frozen=True):
    """`seq` counts one connection's events; `stateVersion` is the place in the session's journal."""

    type: Literal["event"] = "event"
    event: str
    payload: Any
    seq: int | UnsetType = UNSET
    state_version: int


class RpcAnswer(Wire, kw_only=True, frozen=True):
    """The body of every answer of `POST /rpc`."""

    response: Response
    events: list[Event]


class Features(Struct, rename="camel", kw_only=True, frozen=True):
    methods: list[str]
    events: list[str]
