"""What servers trace, without a dependency on OpenTelemetry, which is an extra."""

import importlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

from pointbook_common.errors import SettingError

Attributes = Mapping[str, str | int]


class Span(Protocol):
    """A piece of work in a trace."""

    @property
    def trace_id(self) -> str:
        """The id of its trace: 32 hexadecimal digits."""

    @property
    def span_id(self) -> str:
        """Its own id: 16 hexadecimal digits."""

    def headers(self) -> Mapping[str, str]:
        """Return the W3C headers that make work elsewhere a part of this span."""

    def end(self, attributes: Attributes, *, is_error: bool) -> None:
        """End the span."""


class Tracing(Protocol):
    """Creates spans. No attribute may contain personal data."""

    def start_call(self, name: str, attributes: Attributes, headers: Mapping[str, str], started_at: float) -> Span:
        """Start the span of a received call, as the current one of this task.

        `headers` may have the W3C context of the caller. `started_at` is by the monotonic clock.
        """

    def start_request(self, name: str, attributes: Attributes, parent: Span | None) -> Span:
        """Start the span of a call to another process.

        By default it is a part of the current one.
        """

    def share(self, name: str, attributes: Attributes, calls: Iterable[Span]) -> AbstractContextManager[None]:
        """Trace work that several calls share.

        Its span is the current one during the block. It is a part of the first call's trace, and linked with the
        others in both directions.
        """

    def add(self, name: str, seconds: float) -> None:
        """Add work that has just ended to the current span."""

    def shutdown(self) -> None:
        """Export what is left, for a few seconds at most."""


def build_tracing(service: str) -> Tracing:
    """Return the tracing of a service, which the standard variables OTEL_* configure.

    Raises SettingError if OpenTelemetry is not installed.
    """
    try:
        otel = importlib.import_module("pointbook_common.otel")
    except ImportError:
        raise SettingError("POINTBOOK_TRACING: OpenTelemetry is not installed; pip install 'pointbook[otel]'") from None
    tracing: Tracing = otel.export_traces(service)
    return tracing
