"""Prometheus metrics of the shim."""

from prometheus_client import CollectorRegistry, Counter, Histogram


class Metrics:
    """The metrics of `/metrics`. Labels hold no ids, and each has few values."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.webhooks = Counter(
            "pointbook_webhooks",
            "Webhooks by topic (missing: no topic; other: a topic that is not handled) and outcome.",
            ("topic", "outcome"),
            registry=self.registry,
        )
        self.quarantined = Counter(
            "pointbook_webhooks_quarantined",
            "Quarantined webhooks by reason.",
            ("reason",),
            registry=self.registry,
        )
        self.identifiers_skipped = Counter(
            "pointbook_customer_identifiers_skipped",
            "Identifiers of customer webhooks that were not applied, by type and cause.",
            ("type", "cause"),
            registry=self.registry,
        )
        self.duplicates_with_other_webhook_id = Counter(
            "pointbook_webhook_duplicates_with_other_id",
            "Points webhooks whose event was already applied from a webhook with another id.",
            registry=self.registry,
        )
        self.shop_id_mismatches = Counter(
            "pointbook_webhook_shop_id_mismatches",
            "Authentic webhooks whose X-Shopline-Shop-Id differs from the store in the body.",
            registry=self.registry,
        )
        self.connections_evicted = Counter(
            "pointbook_connections_evicted",
            "Connections that were closed because a limit was reached, by limit.",
            ("bound",),
            registry=self.registry,
        )
        self.missed_calls = Counter(
            "pointbook_missed_call_callbacks",
            "Callbacks of the telephony provider by outcome.",
            ("outcome",),
            registry=self.registry,
        )
        self.seconds = Histogram(
            "pointbook_webhook_duration_seconds",
            "Time from a webhook's headers to its response. SHOPLINE waits 5 seconds.",
            ("topic",),
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
            registry=self.registry,
        )
