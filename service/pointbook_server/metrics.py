"""The server's Prometheus metrics.

No label contains an id, and each has only a few values.
"""

import math

from prometheus_client import CollectorRegistry, Counter, Gauge


class Metrics:
    """Counters of one server process, and gauges of the shared database's contents."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.guesses = self._counter("code_guesses", "Guesses of codes, by outcome.", "outcome")
        self.comparisons = self._counter("code_comparisons", "Compared codes, by result.", "outcome")
        self.issues = self._counter("code_issues", "Requests for codes, by outcome.", "channel", "outcome")
        self.duplicates_with_other_webhook_id = self._counter(
            "duplicates_with_other_webhook_id",
            "Points updates that are already in the ledger, received again under another webhook id.",
        )
        self.refusals = self._counter("refusals", "Refused calls, by whether they were stored.", "outcome")
        self.missed_calls = self._counter(
            "missed_calls", "Missed calls, by whether they matched a challenge.", "outcome"
        )

        self.clock_skew_seconds = self._gauge(
            "clock_skew_seconds", "Seconds by which the server's clock is ahead of the database's; negative: behind."
        )
        self.store_erasures_open = self._gauge("store_erasures_open", "Open requests to erase a store.")
        self.store_erasures_overdue = self._gauge(
            "store_erasures_overdue", "Requests to erase a store that are still open after 30 days."
        )
        self.tls_certificate_expiry = self._gauge(
            "tls_certificate_expiry_timestamp_seconds", "When the server's TLS certificate expires; NaN without TLS."
        )
        self.quarantine_webhooks = self._gauge("quarantine_webhooks", "Webhooks in all quarantines.")
        self.quarantine_bytes = self._gauge("quarantine_bytes", "Bytes of headers and bodies in all quarantines.")

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(f"pointbook_{name}", documentation, labels, registry=self.registry)

    def _gauge(self, name: str, documentation: str) -> Gauge:
        """Return a gauge that is NaN until it is first set, because 0 would be a value."""
        gauge = Gauge(f"pointbook_{name}", documentation, registry=self.registry)
        gauge.set(math.nan)
        return gauge
