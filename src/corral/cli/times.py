"""Times as a person gives them at the terminal."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from corral.cli import USAGE, CliError

_AGO = re.compile(r"(\d{1,6})([smhd])")
_DAY = re.compile(r"\d{4}-\d\d-\d\d")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def given_time(text: str, option: str) -> str:
    """An RFC 3339 time as it is, `2h` as the time two hours ago, a day as its beginning in UTC.

    Raises CliError, which names `option`, for anything else.
    """
    if ago := _AGO.fullmatch(text):
        when = datetime.now(UTC) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
        return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    whole = f"{text}T00:00:00Z" if _DAY.fullmatch(text) else text
    try:
        zoned = datetime.fromisoformat(whole).tzinfo is not None
    except ValueError:
        zoned = False
    if not zoned:
        raise CliError(f"{option} {text} is no time", "give 2h, 7d, 2030-01-31 or 2030-01-31T12:00:00Z", code=USAGE)
    return whole
