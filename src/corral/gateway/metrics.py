"""What the gateway counts, and how `/metrics` tells it.

Counting is adding to a dict; the Prometheus library is imported when somebody asks, as it takes
longer to import than all else that a start does. No label holds anything that a client
or a model can make up: what is not in a registry counts as `other`.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import msgspec
from msgspec import Struct

from corral import __version__
from corral.executor.catalogue import spec
from corral.protocol.errors import ErrorCode
from corral.protocol.events import EVENTS
from corral.protocol.methods import METHODS
from corral.storage.rows import JournalEntry

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

logger = logging.getLogger(__name__)

OTHER = "other"
OK = "ok"
CANCELLED = "cancelled"
"""The outcome of a request whose connection ended before its answer."""

LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
"""Upper bounds in seconds."""


class _Result(Struct, rename="camel"):
    tool_name: str
    status: str


class _Failed(Struct):
    code: str


class _Tokens(Struct, rename="camel"):
    input_tokens: int = 0
    output_tokens: int = 0


class _Message(Struct):
    usage: _Tokens


_result = msgspec.json.Decoder(_Result)
_failed = msgspec.json.Decoder(_Failed)
_message = msgspec.json.Decoder(_Message)


class _Latency:
    """One method's histogram: how many requests fell between two bounds, and their seconds together."""

    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(LATENCY_BUCKETS) + 1)
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(LATENCY_BUCKETS, seconds)] += 1
        self.seconds += seconds

    def cumulative(self) -> list[tuple[str, float]]:
        total, found = 0, []
        for bound, count in zip((*map(str, LATENCY_BUCKETS), "+Inf"), self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


class GatewayMetrics:
    """The counters of one gateway, from its start on. `gauges` are asked when somebody looks: name -> (help, value)."""

    def __init__(self, gauges: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        self._gauges = gauges
        self._requests: Counter[tuple[str, str]] = Counter()
        self._latency: dict[str, _Latency] = {}
        self._answers: Counter[tuple[str, str]] = Counter()
        self._closed: Counter[tuple[str, str]] = Counter()
        self._entries: Counter[str] = Counter()
        self._commits = 0
        self._tools: Counter[tuple[str, str]] = Counter()
        self._runs: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        """Events that left, by name; outboxes count here."""

    # ---- counting

    def request(self, method: str, outcome: str, seconds: float) -> None:
        """A request was answered; `outcome` is `ok`, an error code or `cancelled`."""
        name = method if method in METHODS else OTHER
        self._requests[name, outcome] += 1
        latency = self._latency.get(name)
        if latency is None:
            latency = self._latency[name] = _Latency()
        latency.add(seconds)

    def answer(self, route: str, status: int) -> None:
        """An HTTP request to one of the routes was answered, or an upgrade or a stream begun."""
        self._answers[route, str(status)] += 1

    def closed(self, transport: str, code: int) -> None:
        """A WebSocket or stream was closed by one of CloseCode."""
        self._closed[transport, str(code)] += 1

    def committed(self, entries: Sequence[JournalEntry]) -> None:
        """A unit of work was committed. The store's listener: does not raise."""
        self._commits += 1
        for entry in entries:
            self._entries[entry.event if entry.event in EVENTS else OTHER] += 1
            try:
                self._look_into(entry)
            except msgspec.DecodeError:
                about = {"action": "metrics.unreadable", "tenant": entry.tenant_id, "session": entry.session_id}
                logger.exception("an event that cannot be counted", extra={**about, "version": entry.version})

    def _look_into(self, entry: JournalEntry) -> None:
        if entry.event == "agent.tool_result":
            result = _result.decode(entry.payload)
            # A model may call tools that there are not.
            self._tools[result.tool_name if spec(result.tool_name) is not None else OTHER, result.status] += 1
        elif entry.event == "agent.message":
            usage = _message.decode(entry.payload).usage
            self._tokens["input"] += usage.input_tokens
            self._tokens["output"] += usage.output_tokens
        elif entry.event == "agent.completed":
            self._runs[OK] += 1
        elif entry.event == "agent.failed":
            code = _failed.decode(entry.payload).code
            self._runs[code if code in ErrorCode.__members__ else OTHER] += 1

    # ---- telling

    def page(self) -> tuple[bytes, str]:
        """What there is, in Prometheus's text format, and that format's content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
        from prometheus_client.registry import Collector

        families = self._families

        class Counted(Collector):
            def collect(self) -> Iterable[Metric]:
                return families()

        registry = CollectorRegistry(auto_describe=False)
        registry.register(Counted())
        return generate_latest(registry), CONTENT_TYPE_LATEST

    def _families(self) -> Iterator[Metric]:
        from prometheus_client.metrics_core import GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily

        yield InfoMetricFamily("corral_build", "The version that runs.", value={"version": __version__})
        yield _counted("corral_requests", "Requests answered.", ("method", "outcome"), self._requests)
        latency = HistogramMetricFamily(
            "corral_request_duration_seconds", "From a request's arrival to its answer.", labels=("method",)
        )
        for method, found in sorted(self._latency.items()):
            latency.add_metric((method,), buckets=found.cumulative(), sum_value=found.seconds)
        yield latency
        yield _counted("corral_http_responses", "HTTP answers begun.", ("route", "status"), self._answers)
        yield _counted("corral_closed", "Connections closed, by close code.", ("transport", "code"), self._closed)
        yield _counted("corral_events_sent", "Events written to connections.", ("event",), _single(self.sent))
        yield _counted("corral_journal_entries", "Durable events committed.", ("event",), _single(self._entries))
        yield _counted("corral_journal_commits", "Units of work committed that made events.", (), {(): self._commits})
        yield _counted("corral_runs_ended", "Runs ended: ok, or why not.", ("outcome",), _single(self._runs))
        yield _counted("corral_tool_calls", "Tool calls with a result.", ("tool", "status"), self._tools)
        calls = self._entries["agent.message"]
        yield _counted("corral_model_calls", "Model calls that gave a message.", (), {(): calls})
        yield _counted("corral_model_tokens", "Tokens used by models.", ("direction",), _single(self._tokens))
        for name, (text, value) in self._gauges.items():
            yield GaugeMetricFamily(name, text, value=value())


_Labels = TypeVar("_Labels", bound=tuple[str, ...])


def _single(counts: Mapping[str, int]) -> dict[tuple[str, ...], int]:
    return {(name,): count for name, count in counts.items()}


def _counted(name: str, text: str, labels: Sequence[str], counts: Mapping[_Labels, int]) -> Metric:
    from prometheus_client.metrics_core import CounterMetricFamily

    family = CounterMetricFamily(name, text, labels=labels)
    for values, count in sorted(counts.items()):
        family.add_metric(values, count)
    return family
