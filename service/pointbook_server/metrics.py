"""What the server counts, for Prometheus: no label holds an id, and every label has a handful of values."""

import math

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server


class Metrics:
    """The counters of one server process, and gauges of what the database holds for all of them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.guesses = self._counter("code_guesses", "Guesses of codes, by what became of them.", "outcome")
        self.comparisons = self._counter("code_comparisons", "Codes that were compared, by the result.", "outcome")
        self.issues = self._counter("code_issues", "Codes asked for, by what became of that.", "channel", "outcome")
        self.duplicates_with_other_webhook_id = self._counter(
            "duplicates_with_other_webhook_id",
            "Points updates that were in the book already, and came again under another webhook id.",
        )
        self.refusals = self._counter("refusals", "Refused calls, by whether they are stored.", "outcome")
        self.missed_calls = self._counter("missed_calls", "Missed calls, by whether they met a challenge.", "outcome")

        self.clock_skew_seconds = self._gauge(
            "clock_skew_seconds", "How far the server's clock is ahead of the database's; negative: behind."
        )
        self.store_erasures_open = self._gauge("store_erasures_open", "Requests to erase a store that are open.")
        self.store_erasures_overdue = self._gauge("store_erasures_overdue", "Those that are open after 30 days.")
        self.tls_certificate_expiry = self._gauge(
            "tls_certificate_expiry_timestamp_seconds", "When the server's TLS certificate expires; NaN without TLS."
        )

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(f"pointbook_{name}", documentation, labels, registry=self.registry)

    def _gauge(self, name: str, documentation: str) -> Gauge:
        """Build a gauge that is NaN until it is first set, since 0 would be a count."""
        gauge = Gauge(f"pointbook_{name}", documentation, registry=self.registry)
        gauge.set(math.nan)
        return gauge


class MetricsEndpoint:
    """Answers `GET /metrics` on an address of its own, in a thread, so that a busy loop is seen too."""

    def __init__(self, metrics: Metrics, address: str) -> None:
        host, _, port = address.rpartition(":")
        try:
            self._server, self._thread = start_http_server(int(port), host.strip("[]"), metrics.registry)
        except OSError as error:
            raise OSError(f"POINTBOOK_METRICS_ADDRESS: cannot listen on {address}") from error
        self.port = self._server.server_port

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
