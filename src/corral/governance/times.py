"""Times that callers give."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from corral.protocol.errors import InvalidRequest

_RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?(?:Z|[+-]\d\d:\d\d)", re.ASCII | re.IGNORECASE)


def read_time(field: str, value: str) -> int:
    """Milliseconds since the epoch, rounded up. Raises InvalidRequest, naming `$.params.<field>`, for no RFC 3339."""
    try:
        if not _RFC3339.fullmatch(value):
            raise ValueError(value)
        moment = datetime.fromisoformat(value.upper()).astimezone(UTC)
        seconds = int(moment.replace(microsecond=0).timestamp())
        return seconds * 1000 + -(-moment.microsecond // 1000)
    except (ValueError, OverflowError):
        raise InvalidRequest(f"$.params.{field} is no RFC 3339 time: write it like 2026-01-31T12:00:00Z") from None
