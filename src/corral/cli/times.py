"""Times as a person gives them at the terminal."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

_AGO = re.compile(r"(\d{1,6})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def given_time(text: str) -> str:
    """An RFC 3339 time as it is, `2h` as the time two hours ago, a day as its beginning in UTC."""
    if ago := _AGO.fullmatch(text):
        when = datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
        return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return f"{text}T00:00:00Z" if re.fullmatch(r"\d{4}-\d\d-\d\d", text) else text
