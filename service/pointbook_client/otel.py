"""Spans of calls by OpenTelemetry, which is the extra `otel`.

Attributes follow OpenTelemetry's conventions for RPC; none contains personal data.
"""

from collections.abc import Sequence
from importlib.metadata import version

import grpc
from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, TracerProvider

from pointbook_client.observers import CallObserver, ObservedCall


class OpenTelemetry(CallObserver):
    """Makes each call a span of the current trace.

    The trace goes on in the server. It uses the global provider of tracers unless one is given.
    """

    def __init__(self, tracer_provider: TracerProvider | None = None) -> None:
        self._tracer = trace.get_tracer("pointbook_client", version("pointbook-client"), tracer_provider)

    def start(self, method: str) -> "TracedCall":
        """Start the span of a call."""
        name = method.removeprefix("/")
        service, _, short = name.partition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": short}
        return TracedCall(self._tracer.start_span(name, kind=SpanKind.CLIENT, attributes=attributes))


class TracedCall(ObservedCall):
    """A running call with its span."""

    def __init__(self, span: Span) -> None:
        self._span = span

    def metadata(self) -> Sequence[tuple[str, str]]:
        """Return the headers of the trace, such as `traceparent`."""
        headers: dict[str, str] = {}
        propagate.inject(headers, trace.set_span_in_context(self._span))
        return tuple((key.lower(), value) for key, value in headers.items())

    def end(self, code: grpc.StatusCode) -> None:
        """End the span with the gRPC code."""
        self._span.set_attribute("rpc.grpc.status_code", code.value[0])
        if code is not grpc.StatusCode.OK:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()
