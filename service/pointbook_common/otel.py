"""Tracing by OpenTelemetry, which is an extra.

Imported only if tracing is turned on.
"""

import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from pointbook_common.tracing import Attributes, Span

NANOS_PER_SECOND = 1_000_000_000
EXPORT_SECONDS_MAX = 2.0
"""How long a stopping process may take to export its last spans."""
W3C = TraceContextTextMapPropagator()


class OtelSpan:
    """A span of OpenTelemetry."""

    def __init__(self, span: trace.Span) -> None:
        self.span = span
        context = span.get_span_context()
        self.trace_id = trace.format_trace_id(context.trace_id)
        self.span_id = trace.format_span_id(context.span_id)

    def headers(self) -> Mapping[str, str]:
        """Return the W3C headers that make work elsewhere a part of this span."""
        headers: dict[str, str] = {}
        W3C.inject(headers, trace.set_span_in_context(self.span))
        return headers

    def end(self, attributes: Attributes, *, is_error: bool) -> None:
        """End the span."""
        self.span.set_attributes(attributes)
        if is_error:
            self.span.set_status(Status(StatusCode.ERROR))
        self.span.end()


class OtelTracing:
    """Creates spans by a provider of OpenTelemetry."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("pointbook", version("pointbook"))

    def start_call(self, name: str, attributes: Attributes, headers: Mapping[str, str], started_at: float) -> OtelSpan:
        """Start the span of a call that was received."""
        span = self._tracer.start_span(
            name,
            W3C.extract(headers, otel_context.Context()),
            SpanKind.SERVER,
            attributes,
            start_time=_nanos_before(time.monotonic() - started_at),
        )
        # Never detached: each call has a task, and so a context, of its own.
        otel_context.attach(trace.set_span_in_context(span))
        return OtelSpan(span)

    def start_request(self, name: str, attributes: Attributes, parent: Span | None) -> OtelSpan:
        """Start the span of a call to another process."""
        context = _context_of(parent)
        return OtelSpan(self._tracer.start_span(name, context, SpanKind.CLIENT, attributes))

    @contextmanager
    def share(self, name: str, attributes: Attributes, calls: Iterable[Span]) -> Iterator[None]:
        """Trace work that several calls share."""
        spans = [call.span for call in calls if isinstance(call, OtelSpan)]
        if not spans:
            yield
            return
        # Without a call that is recorded, the work must not begin a trace of its own.
        parent, *others = dict.fromkeys([span for span in spans if span.is_recording()] or spans[:1])
        links = [Link(span.get_span_context()) for span in others]
        context = trace.set_span_in_context(parent)
        with self._tracer.start_as_current_span(
            # Not its message, which may quote what a caller sent.
            name,
            context,
            attributes=attributes,
            links=links,
            record_exception=False,
            set_status_on_exception=False,
        ) as shared:
            for span in others:
                span.add_link(shared.get_span_context())
            try:
                yield
            except Exception:
                shared.set_status(Status(StatusCode.ERROR))
                raise

    def add(self, name: str, seconds: float) -> None:
        """Add work that has just ended to the current span."""
        if trace.get_current_span().is_recording():
            self._tracer.start_span(name, kind=SpanKind.CLIENT, start_time=_nanos_before(seconds)).end()

    def shutdown(self) -> None:
        """Export what is left, for EXPORT_SECONDS_MAX at most.

        A collector that hangs blocks the library for longer, so it runs in a thread that ends with the process.
        """
        exporting = threading.Thread(target=self._provider.shutdown, name="last export", daemon=True)
        exporting.start()
        exporting.join(EXPORT_SECONDS_MAX)


def export_traces(service: str) -> OtelTracing:
    """Return a tracing that exports by OTLP over HTTP."""
    resource = Resource.create(
        {
            "service.name": os.environ.get("OTEL_SERVICE_NAME", f"pointbook-{service}"),
            "service.version": version("pointbook"),
        }
    )
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return OtelTracing(provider)


def _context_of(span: Span | None) -> otel_context.Context:
    return trace.set_span_in_context(span.span) if isinstance(span, OtelSpan) else otel_context.get_current()


def _nanos_before(seconds: float) -> int:
    """Return the time of this many seconds ago, in nanoseconds since 1970."""
    return time.time_ns() - round(seconds * NANOS_PER_SECOND)
