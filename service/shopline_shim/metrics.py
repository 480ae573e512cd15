"""Prometheus metrics of the shim."""

from pointbook_common.metric_registry import MetricRegistry

LAG_BUCKETS = (0.5, 1, 2, 5, 10, 30, 60, 300, 1_800, 7_200, 28_800, 86_400)
UPDATES_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """The metrics of `/metrics`. Labels hold no ids, and each has few values."""

    def __init__(self) -> None:
        new = MetricRegistry()
        new.add_process("shim")
        self.registry, self.definitions = new.registry, new.definitions
        self._add_webhooks(new)
        self._add_process(new)

    def _add_webhooks(self, new: MetricRegistry) -> None:
        """Add the metrics of webhooks and callbacks."""
        self.webhooks = new.counter(
            "webhooks",
            "Webhooks by topic (missing: no topic; other: a topic that is not handled) and outcome.",
            "topic",
            "outcome",
        )
        self.seconds = new.histogram(
            "webhook_duration_seconds",
            "Time from a webhook's headers to its response, by topic. SHOPLINE waits 5 seconds.",
            "topic",
        )
        self.lag_seconds = new.histogram(
            "webhook_lag_seconds",
            "How long before its arrival the event of an authentic webhook happened, by topic.",
            "topic",
            buckets=LAG_BUCKETS,
        )
        self.last_authentic = new.gauge(
            "webhook_last_authentic_timestamp_seconds",
            "When this process last received an authentic webhook; NaN: never.",
        )
        self.quarantined = new.counter("webhooks_quarantined", "Quarantined webhooks by reason.", "reason")
        self.identifiers_skipped = new.counter(
            "customer_identifiers_skipped",
            "Identifiers of customer webhooks that were not applied, by type and cause.",
            "type",
            "cause",
        )
        self.duplicates_with_other_webhook_id = new.counter(
            "webhook_duplicates_with_other_id",
            "Points webhooks whose event was already applied from a webhook with another id.",
        )
        self.shop_id_mismatches = new.counter(
            "webhook_shop_id_mismatches",
            "Authentic webhooks whose X-Shopline-Shop-Id differs from the store in the body.",
        )
        self.missed_calls = new.counter(
            "missed_call_callbacks", "Callbacks of the telephony provider by outcome.", "outcome"
        )

    def _add_process(self, new: MetricRegistry) -> None:
        """Add the metrics of connections, calls to the server, and the process."""
        self.requests_running = new.gauge("shim_requests_running", "Webhooks that have no response yet.")
        self.requests_running.set(0)
        self.connections_evicted = new.counter(
            "connections_evicted", "Connections that were closed because a limit was reached, by limit.", "bound"
        )
        self.updates_of_call = new.histogram(
            "shim_updates_per_call",
            "Points updates that were sent to the server in one call.",
            buckets=UPDATES_BUCKETS,
        )
        self.call_seconds = new.histogram(
            "shim_call_duration_seconds", "Time of the shim's calls to the server, by gRPC code.", "code"
        )
        self.tls_certificate_expiry = new.gauge(
            "shim_tls_certificate_expiry_timestamp_seconds", "When the shim's TLS certificate expires; NaN without TLS."
        )
        self.loop_lag_seconds = new.histogram(
            "event_loop_lag_seconds", "How late the event loop runs what is due, measured four times a second."
        )
