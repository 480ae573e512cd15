"""What the shim counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Histogram


class Metrics:
    """What `/metrics` shows: no label holds an id, and every label has a handful of values."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.webhooks = Counter(
            "pointbook_webhooks",
            "Webhooks by topic (missing: none; other: one that Pointbook does not know) and by what became of them.",
            ("topic", "outcome"),
            registry=self.registry,
        )
        self.quarantined = Counter(
            "pointbook_webhooks_quarantined",
            "Webhooks that were quarantined, by reason.",
            ("reason",),
            registry=self.registry,
        )
        self.identifiers_skipped = Counter(
            "pointbook_customer_identifiers_skipped",
            "Identifiers of customer webhooks that were left out, by type and cause.",
            ("type", "cause"),
            registry=self.registry,
        )
        self.duplicates_with_other_webhook_id = Counter(
            "pointbook_webhook_duplicates_with_other_id",
            "Points webhooks whose event was in the book already, brought by a webhook with another id.",
            registry=self.registry,
        )
        self.shop_id_mismatches = Counter(
            "pointbook_webhook_shop_id_mismatches",
            "Authentic webhooks whose X-Shopline-Shop-Id is not their body's store.",
            registry=self.registry,
        )
        self.connections_evicted = Counter(
            "pointbook_connections_evicted",
            "Connections that were cut to make room, by the bound that was reached.",
            ("bound",),
            registry=self.registry,
        )
        self.missed_calls = Counter(
            "pointbook_missed_call_callbacks",
            "Callbacks of the telephony provider by what became of them.",
            ("outcome",),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "pointbook_webhook_duration_seconds",
            "Time from a webhook's headers to its answer. SHOPLINE waits 5 seconds.",
            ("topic",),
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
            registry=self.registry,
        )
