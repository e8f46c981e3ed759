"""What a trace is made of, for whoever records one; and where the work that is done now belongs, for the log.

Nothing here knows OpenTelemetry: `corral.otel` sends what it is told by `Record`, and where no
endpoint is set there is no `Record` and nothing is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Literal

from msgspec import Struct

Value = str | int | float | bool | list[str]


class Span(Struct, kw_only=True, frozen=True):
    """A piece of work that has ended, told once.

    `trace_id` is Corral's (`tr_…`, `conn_…`). `own` and `parent` are ids of what the spans stand for (a request, a
    run), from which the spans' own ids are made: so a process that takes a run up after another's death names
    the same parent without having been told. `own` is empty for a span that has no children. `link` is
    the `conn_…` of the connection that it came on. `error` is a code of the protocol. Attributes hold ids, names
    and counts, never what somebody wrote, a model answered or a tool was given.
    """

    name: str
    kind: Literal["server", "client", "internal"]
    trace_id: str
    started_ns: int
    ended_ns: int
    attributes: Mapping[str, Value | None]
    own: str = ""
    parent: str = ""
    link: str = ""
    error: str = ""


Record = Callable[[Span], None]
"""Takes a span over. Does not wait and does not raise."""


class Stopwatch:
    """Started when it is made. Its times come from the clock's two functions: when it began, and how long it took."""

    __slots__ = ("_began", "_monotonic", "started_ns")

    def __init__(self, now_ms: Callable[[], int], monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._began = monotonic()
        self.started_ns = now_ms() * 1_000_000

    def ended_ns(self) -> int:
        """Now, in nanoseconds since the Unix epoch."""
        return self.started_ns + int((self._monotonic() - self._began) * 1e9)


WHERE: ContextVar[Mapping[str, str]] = ContextVar("where", default=MappingProxyType({}))
"""Ids of the work under way in this task (`tenant`, `session`, `run`, `trace_id`), which the log adds to its lines."""


def wanted(environ: Mapping[str, str]) -> bool:
    """Whether OpenTelemetry's own variables ask for traces: an endpoint is set, and nothing says no."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if environ.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() != "otlp":
        return False
    return any(
        environ.get(name, "").strip() for name in ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    )
