"""Sends spans to a collector by OTLP over HTTP. Imports OpenTelemetry, so it is imported where an endpoint is set.

The SDK is used for what it is good at (resource, sampling, batches, the wire); the ids of traces and spans come
out of Corral's own.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
from collections.abc import Sequence

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState
from opentelemetry.util.types import Attributes

from corral import __version__
from corral.tracing import Span

log = logging.getLogger(__name__)

_KINDS = {"server": SpanKind.SERVER, "client": SpanKind.CLIENT, "internal": SpanKind.INTERNAL}
_HEX = re.compile(r"[0-9a-f]{32}\Z")
_CLOSE_S = 2.0
"""How long the end of the process waits for a collector that does not take what is left."""


class Traces:
    """Sends what is recorded, in batches from a thread of its own; what does not fit its queue is dropped.

    Nothing here raises or waits, whatever the collector does: a failure is told to the log when
    it begins and when it is over. Use `record` on one thread.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        named = os.environ.get("OTEL_SERVICE_NAME") or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        about = {"service.version": __version__} | ({} if named else {"service.name": "corral"})
        self._ids = _Ids()
        self._exporter = _Watched(exporter)
        self._processor = BatchSpanProcessor(self._exporter)
        # Ended by `close`, which knows when to stop waiting; at the exit of the process it would wait for ever.
        provider = TracerProvider(resource=Resource.create(about), id_generator=self._ids, shutdown_on_exit=False)
        provider.sampler = _Spread(provider.sampler)
        provider.add_span_processor(self._processor)
        self._sampler = provider.sampler
        self._tracer = provider.get_tracer("corral", __version__)
        self._failed = False

    def record(self, span: Span) -> None:
        """See `corral.tracing.Record`."""
        try:
            self._record(span)
        except Exception:
            if not self._failed:
                self._failed = True
                log.exception("a span was not recorded", extra={"action": "traces.record_failed"})

    def _record(self, span: Span) -> None:
        trace_id = trace_number(span.trace_id)
        self._ids.trace_id = trace_id
        self._ids.span_id = span_number(span.own) if span.own else None
        made = self._tracer.start_span(
            span.name,
            context=self._parent(trace_id, span.parent) if span.parent else Context(),
            kind=_KINDS[span.kind],
            attributes={name: value for name, value in span.attributes.items() if value is not None},
            links=[Link(_context(trace_number(span.link), span_number(span.link), sampled=True))] if span.link else (),
            start_time=span.started_ns,
        )
        if span.error:
            made.set_attribute("error.type", span.error)
            made.set_status(Status(StatusCode.ERROR, span.error))
        made.end(end_time=span.ended_ns)

    def _parent(self, trace_id: int, parent: str) -> Context:
        """The context of a span that may have been sent by another process; sampled if the trace is."""
        sampled = self._sampler.should_sample(None, trace_id, "").decision is Decision.RECORD_AND_SAMPLE
        context = _context(trace_id, span_number(parent), sampled=sampled)
        return trace.set_span_in_context(trace.NonRecordingSpan(context), Context())

    def close(self) -> None:
        """Send what is left, for as long as that is worth waiting for. Blocks: call it in a thread."""
        # The processor alone would wait for half a minute.
        closing = threading.Thread(target=self._processor.shutdown, name="traces-close", daemon=True)
        closing.start()
        closing.join(_CLOSE_S)
        if closing.is_alive():
            self._exporter.shutdown()
            log.info("traces left unsent", extra={"action": "traces.close_timeout"})


def open_traces() -> Traces:
    """Traces to where the OTEL_* variables of this process say."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    # Each failed attempt would be a line, with a stack; `_Watched` says it once.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    return Traces(OTLPSpanExporter())


def trace_number(trace_id: str) -> int:
    """The 128 bits of a trace: the UUID of Corral's id as it stands, so that either is found by the other."""
    return int(_digits(trace_id), 16)


def span_number(name: str) -> int:
    """64 bits for what `name` stands for: the random half of the UUID."""
    return int(_digits(name)[16:], 16)


def _digits(name: str) -> str:
    found = _HEX.search(name)
    return found[0] if found is not None else hashlib.sha256(name.encode()).hexdigest()[:32]


def _context(trace_id: int, span_id: int, *, sampled: bool) -> SpanContext:
    flags = TraceFlags(TraceFlags.SAMPLED if sampled else TraceFlags.DEFAULT)
    return SpanContext(trace_id, span_id, is_remote=True, trace_flags=flags)


class _Ids(RandomIdGenerator):
    """The ids of the span that is started next."""

    trace_id = 0
    span_id: int | None = None

    def generate_trace_id(self) -> int:
        return self.trace_id

    def generate_span_id(self) -> int:
        return super().generate_span_id() if self.span_id is None else self.span_id


class _Spread(Sampler):
    """The sampler that is configured, shown a trace id whose lower half is spread over all 64 bits.

    Samplers by ratio compare those bits with a bound, and a UUID has the same two bits at their top in every id.
    """

    def __init__(self, inner: Sampler) -> None:
        self._inner = inner

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        low = trace_id & ((1 << 64) - 1)
        shown = (trace_id >> 64 << 64) | (low << 2 & ((1 << 64) - 1)) | low >> 62
        return self._inner.should_sample(parent_context, shown, name, kind, attributes, links, trace_state)

    def get_description(self) -> str:
        return self._inner.get_description()


class _Watched(SpanExporter):
    """An exporter of whose failures the first is told, and the first success after them."""

    def __init__(self, inner: SpanExporter) -> None:
        self._inner = inner
        self._lost = 0
        self._lock = threading.Lock()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            result = self._inner.export(spans)
        except Exception:
            log.debug("exporting spans failed", exc_info=True, extra={"action": "traces.export_error"})
            result = SpanExportResult.FAILURE
        with self._lock:
            self._tell(result, len(spans))
        return result

    def _tell(self, result: SpanExportResult, count: int) -> None:
        if result is not SpanExportResult.SUCCESS:
            if not self._lost:
                text = "traces are not taken by their collector; what it does not take is dropped, runs go on"
                log.warning(text, extra={"action": "traces.export_failed"})
            self._lost += count
        elif self._lost:
            lost, self._lost = self._lost, 0
            log.info(
                "traces are taken again; dropped: %d", lost, extra={"action": "traces.export_mended", "lost": lost}
            )

    def shutdown(self) -> None:
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._inner.force_flush(timeout_millis)
