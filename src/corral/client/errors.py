"""What can go wrong between a client and its gateway, and the gateway's own errors as classes."""

from __future__ import annotations

from corral.protocol import errors
from corral.protocol.errors import CorralError, ErrorCode
from corral.protocol.frames import ErrorBody


class GatewayUnreachable(ConnectionError):
    """No gateway answers there (or none did again within the time given for reconnecting)."""


_CLASSES: dict[str, type[CorralError]] = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, CorralError) and kind is not CorralError
}


def error_from(body: ErrorBody) -> CorralError:
    """The exception that an error answer stands for; `traceId` goes into its notes."""
    kind = _CLASSES.get(body.code, CorralError)
    details = body.details if isinstance(body.details, dict) else None
    message = body.message if body.code in _CLASSES else f"{body.code}: {body.message}"
    error = kind(message, details=details, retryable=body.retryable)
    error.add_note(f"traceId {body.trace_id}")
    return error


def is_final(error: Exception) -> bool:
    """Whether trying to connect again would meet the same error."""
    return isinstance(error, CorralError) and error.code not in (
        ErrorCode.UNAVAILABLE,
        ErrorCode.RATE_LIMITED,
        ErrorCode.INTERNAL_ERROR,
    )
