"""Error codes of the protocol, and the exceptions that become them at the edge."""

from __future__ import annotations

from enum import StrEnum
from typing import Any


class ErrorCode(StrEnum):
    """Every code that a response's `error.code`, a failed run or a failed tool call may carry."""

    UNAUTHORIZED = "UNAUTHORIZED"
    INVALID_REQUEST = "INVALID_REQUEST"
    METHOD_NOT_FOUND = "METHOD_NOT_FOUND"
    IDEMPOTENCY_CONFLICT = "IDEMPOTENCY_CONFLICT"
    SESSION_BUSY = "SESSION_BUSY"
    POLICY_DENIED = "POLICY_DENIED"
    APPROVAL_REQUIRED = "APPROVAL_REQUIRED"
    MODEL_UNAVAILABLE = "MODEL_UNAVAILABLE"
    TOOL_EXEC_FAILED = "TOOL_EXEC_FAILED"
    INTERNAL_ERROR = "INTERNAL_ERROR"
    FORBIDDEN = "FORBIDDEN"
    NOT_FOUND = "NOT_FOUND"
    CONFLICT = "CONFLICT"
    RATE_LIMITED = "RATE_LIMITED"
    BUDGET_EXCEEDED = "BUDGET_EXCEEDED"
    LIMIT_REACHED = "LIMIT_REACHED"
    ABORTED = "ABORTED"
    SANDBOX_UNAVAILABLE = "SANDBOX_UNAVAILABLE"
    SYNC_CONFLICT = "SYNC_CONFLICT"
    UNAVAILABLE = "UNAVAILABLE"


class CorralError(Exception):
    """An error that a client may see.

    `message` is shown to the client as it is: it names the field or the remedy and carries
    no path of the server, no secret and no trace. `details` is a JSON object or None.
    """

    code: ErrorCode = ErrorCode.INTERNAL_ERROR
    retryable: bool = False

    def __init__(self, message: str, *, details: dict[str, Any] | None = None, retryable: bool | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.details = details
        if retryable is not None:
            self.retryable = retryable


class Unauthorized(CorralError):
    code = ErrorCode.UNAUTHORIZED


class InvalidRequest(CorralError):
    code = ErrorCode.INVALID_REQUEST


class MethodNotFound(CorralError):
    code = ErrorCode.METHOD_NOT_FOUND


class IdempotencyConflict(CorralError):
    code = ErrorCode.IDEMPOTENCY_CONFLICT


class SessionBusy(CorralError):
    code = ErrorCode.SESSION_BUSY
    retryable = True


class PolicyDenied(CorralError):
    code = ErrorCode.POLICY_DENIED


class ApprovalRequired(CorralError):
    code = ErrorCode.APPROVAL_REQUIRED


class ModelUnavailable(CorralError):
    code = ErrorCode.MODEL_UNAVAILABLE
    retryable = True


class ToolExecFailed(CorralError):
    code = ErrorCode.TOOL_EXEC_FAILED


class InternalError(CorralError):
    code = ErrorCode.INTERNAL_ERROR


class Forbidden(CorralError):
    code = ErrorCode.FORBIDDEN


class NotFound(CorralError):
    code = ErrorCode.NOT_FOUND


class Conflict(CorralError):
    code = ErrorCode.CONFLICT


class RateLimited(CorralError):
    code = ErrorCode.RATE_LIMITED
    retryable = True


class BudgetExceeded(CorralError):
    code = ErrorCode.BUDGET_EXCEEDED


class LimitReached(CorralError):
    code = ErrorCode.LIMIT_REACHED


class Aborted(CorralError):
    code = ErrorCode.ABORTED


class SandboxUnavailable(CorralError):
    code = ErrorCode.SANDBOX_UNAVAILABLE


class SyncConflict(CorralError):
    code = ErrorCode.SYNC_CONFLICT


class Unavailable(CorralError):
    """The gateway drains, or its store cannot write; nothing was done and it may be tried again."""

    code = ErrorCode.UNAVAILABLE
    retryable = True
