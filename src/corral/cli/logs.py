"""The gateway's log on standard error: lines for people, or one JSON object a line for machines.

A line carries what happened (`action`) and the ids of where it happened, never a payload.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from corral.cli.visible import harmless, visible
from corral.clock import rfc3339
from corral.config import Settings
from corral.tracing import WHERE

_FIELDS = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
"""What every record has; the rest was given as `extra`."""


def _place(record: logging.LogRecord) -> bool:
    """Add the ids of the work that the line is about where it does not say them itself."""
    for name, value in WHERE.get().items():
        if getattr(record, name, None) is None:
            setattr(record, name, value)
    return True


class JsonFormatter(logging.Formatter):
    """`{"time", "level", "logger", "message", "action"?, ids…, "error"?}`; `error` is the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": rfc3339(int(record.created * 1000)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in vars(record).items() if name not in _FIELDS and value is not None}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return harmless(json.dumps(line, ensure_ascii=False, default=str))


class TextFormatter(logging.Formatter):
    """A line for people. What is in it may come from a model or a command: it is one line, and drives no terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return visible(super().formatMessage(record)).replace("\n", "\\n")

    def formatException(self, ei: Any) -> str:
        # Set in, so that no line of it passes for one of the log.
        return "  " + visible(super().formatException(ei)).replace("\n", "\n  ")


def log_to_stderr(settings: Settings) -> None:
    """Set the process's logging up as the settings say."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_place)
    if settings.log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(TextFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=settings.log_level.upper())
