"""The server's Prometheus metrics.

Each label has a bounded number of values, and none identifies a person.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from time import monotonic

from prometheus_client import Counter, Histogram, Summary

from pointbook_common.metric_registry import MetricRegistry
from pointbook_common.tracing import Tracing
from pointbook_server.logs import CallRecord

BATCH_SIZE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
KNOWN_CAUSES = (
    "25006",
    "53100",
    "53300",
    "55P03",
    "57P01",
    "57P03",
    "ConnectionRefusedError",
    "PoolRefusalError",
    "TimeoutError",
)
"""Frequent causes of database errors, counted from 0: Prometheus does not see the increase to a first value."""
SEND_SECONDS_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """The metrics of one server process, and of the database that all processes share.

    With `tracing`, batches and statements are also spans of the calls that they serve.
    """

    def __init__(self, tracing: Tracing | None = None) -> None:
        self.tracing = tracing
        new = MetricRegistry()
        new.add_process("server")
        self.registry, self.definitions = new.registry, new.definitions
        self._add_calls(new)
        self._add_batches(new)
        self._add_database(new)
        self._add_ledger(new)
        self._add_quarantine(new)
        self._add_redemption(new)
        self._add_codes(new)
        self._add_maintenance(new)
        self._add_expiry(new)

    def _add_calls(self, new: MetricRegistry) -> None:
        """Add the metrics of calls, and of the event loop that serves them."""
        self.call_seconds = new.histogram(
            "grpc_call_duration_seconds",
            "Time from the start of a call's handler to its status, by method. Its count is the number of calls.",
            "method",
        )
        self.call_errors = new.counter(
            "grpc_call_errors",
            "Calls that did not end with OK, by method, gRPC code and reason.",
            "method",
            "code",
            "reason",
        )
        self.calls_running = new.gauge("grpc_calls_running", "Calls that have not ended.")
        self.serving = new.gauge("serving", "1 while health is SERVING, otherwise 0.")
        self.loop_lag_seconds = new.histogram(
            "event_loop_lag_seconds", "How late the event loop runs what is due, measured four times a second."
        )

    def _add_batches(self, new: MetricRegistry) -> None:
        """Add the metrics of batches."""
        self.batch_size = new.histogram(
            "batch_size", "Items that left in one batch, by kind.", "kind", buckets=BATCH_SIZE_BUCKETS
        )
        self.batch_wait_seconds = new.histogram(
            "batch_wait_seconds", "How long the oldest item of a batch waited until the batch left, by kind.", "kind"
        )
        self.batch_duration_seconds = new.histogram(
            "batch_duration_seconds", "Time from a batch's departure to its results, by kind.", "kind"
        )
        self.batch_items_waiting = new.gauge("batch_items_waiting", "Items that wait for a batch, by kind.", "kind")

    def _add_database(self, new: MetricRegistry) -> None:
        """Add the metrics of the database's connections, statements and clock."""
        self.database_connections_in_use = new.gauge(
            "database_connections_in_use", "Database connections that calls are using."
        )
        self.database_connections_max = new.gauge(
            "database_connections_max", "Database connections that calls can use at once."
        )
        self.database_connection_wait_seconds = new.histogram(
            "database_connection_wait_seconds",
            "How long calls waited for a connection that was not idle: for a slot of the pool, or to be opened.",
        )
        self.database_statement_seconds = new.summary(
            "database_statement_duration_seconds", "Time of statements that succeeded, by name.", "statement"
        )
        self.database_retries = new.counter(
            "database_retries", "Transactions that were run again after a conflict, by its SQLSTATE.", "sqlstate"
        )
        self.database_errors = new.counter(
            "database_errors", "Failures that callers got as DATABASE_UNAVAILABLE, by SQLSTATE or kind.", "cause"
        )
        self.clock_skew_seconds = new.gauge(
            "clock_skew_seconds", "Seconds by which the server's clock is ahead of the database's; negative: behind."
        )

    def _add_ledger(self, new: MetricRegistry) -> None:
        """Add the metrics of points updates, drift and silent stores."""
        self.points_events = new.counter(
            "points_events", "Points updates that were processed, by scene and outcome.", "scene", "outcome"
        )
        self.duplicates_with_other_webhook_id = new.counter(
            "duplicates_with_other_webhook_id",
            "Points updates that are already in the ledger, received again under another webhook id.",
        )
        self.drifting_accounts = new.gauge_table(
            "drifting_accounts", "Accounts with a drift, by merchant; the merchants with the most.", "merchant_id"
        )
        self.drift_points = new.gauge_table(
            "drift_points", "Sum of the absolute drifts of accounts, by merchant; as above.", "merchant_id"
        )
        self.store_last_webhook = new.gauge_table(
            "store_last_webhook_timestamp_seconds",
            "When a webhook of a store was last accepted; the stores that have been silent the longest in 30 days.",
            "merchant_id",
            "store_id",
        )

    def _add_quarantine(self, new: MetricRegistry) -> None:
        """Add the metrics of the quarantine, and of requests to erase stores."""
        self.quarantine_webhooks = new.gauge("quarantine_webhooks", "Webhooks in all quarantines.")
        self.quarantine_bytes = new.gauge("quarantine_bytes", "Bytes of headers and bodies in all quarantines.")
        self.quarantine_fullest_ratio = new.gauge(
            "quarantine_fullest_ratio",
            "Used share of the limit that is nearest: of webhooks or bytes, of a merchant, of the shared or of all "
            "quarantines.",
        )
        self.quarantine_reasons = new.gauge_table(
            "quarantine_webhooks_by_reason",
            "Webhooks in all quarantines that wait for a decision, by reason.",
            "reason",
        )
        self.quarantine_oldest = new.gauge(
            "quarantine_oldest_timestamp_seconds", "When the oldest webhook that waits for a decision arrived; 0: none."
        )
        self.store_erasures_open = new.gauge("store_erasures_open", "Open requests to erase a store.")
        self.store_erasures_overdue = new.gauge(
            "store_erasures_overdue", "Requests to erase a store that are still open after 30 days."
        )

    def _add_redemption(self, new: MetricRegistry) -> None:
        """Add the metrics of holds and of refused calls."""
        self.holds_open = new.gauge("redemption_holds_open", "Redemptions whose points are held.")
        self.holds_overdue = new.gauge(
            "redemption_holds_overdue", "Redemptions whose points are held beyond the time for settling them."
        )
        self.holds_released = new.counter(
            "redemption_holds_released", "Redemptions that this process released, because they were overdue."
        )
        self.refusals = new.counter("refusals", "Refused calls, by whether they were stored.", "outcome")

    def _add_codes(self, new: MetricRegistry) -> None:
        """Add the metrics of one-time codes."""
        self.issues = new.counter("code_issues", "Requests for codes, by outcome.", "channel", "outcome")
        self.send_seconds = new.histogram(
            "code_send_duration_seconds",
            "Time that a provider took to accept or refuse a message, by channel.",
            "channel",
            buckets=SEND_SECONDS_BUCKETS,
        )
        self.guesses = new.counter("code_guesses", "Guesses of codes, by outcome.", "outcome")
        self.comparisons = new.counter("code_comparisons", "Compared codes, by result.", "outcome")
        self.missed_calls = new.counter("missed_calls", "Missed calls, by whether they matched a challenge.", "outcome")

    def _add_maintenance(self, new: MetricRegistry) -> None:
        """Add the metrics of maintenance."""
        self.task_seconds = new.summary("maintenance_duration_seconds", "Time of maintenance, by task.", "task")
        self.task_failures = new.counter("maintenance_failures", "Maintenance that failed, by task.", "task")
        self.rows_deleted = new.counter("maintenance_rows_deleted", "Old rows that were deleted, by task.", "task")
        self.rows_overdue = new.gauge(
            "maintenance_rows_overdue", "Old rows that are not deleted yet, by task; counted up to a limit.", "task"
        )

    def _add_expiry(self, new: MetricRegistry) -> None:
        """Add when the certificate and tokens expire."""
        self.tls_certificate_expiry = new.gauge(
            "tls_certificate_expiry_timestamp_seconds", "When the server's TLS certificate expires; NaN without TLS."
        )
        self.token_expiry = new.gauge(
            "token_expiry_timestamp_seconds",
            "When the next token expires that was used in the last 7 days, or a rotated one in the last hour; NaN: "
            "none does.",
        )


class BatchMetrics:
    """The metrics of one kind of batches."""

    def __init__(self, metrics: Metrics, kind: str) -> None:
        self._tracing = metrics.tracing
        self._kind = kind
        self._observe_size = metrics.batch_size.labels(kind).observe
        self._observe_wait = metrics.batch_wait_seconds.labels(kind).observe
        self._duration_seconds = metrics.batch_duration_seconds.labels(kind)
        self._items_waiting = metrics.batch_items_waiting.labels(kind)

    def watch(self, count_waiting: Callable[[], int]) -> None:
        """Report how many items wait."""
        self._items_waiting.set_function(count_waiting)

    def batch(self, size: int, wait_seconds: float, calls: Iterable[CallRecord]) -> AbstractContextManager[None]:
        """Count a batch of these calls that leaves now, and measure its work in the block."""
        self._observe_size(size)
        self._observe_wait(wait_seconds)
        timer = Timer(self._duration_seconds)
        return timer if self._tracing is None else self._trace(self._tracing, timer, size, calls)

    @contextmanager
    def _trace(self, tracing: Tracing, timer: "Timer", size: int, calls: Iterable[CallRecord]) -> Iterator[None]:
        """Measure a batch, and trace it as work that its calls share."""
        spans = (call.span for call in calls if call.span is not None)
        with timer, tracing.share(f"batch {self._kind}", {"pointbook.batch.size": size}, spans):
            yield


class Timer:
    """A context whose duration in seconds is observed by a metric."""

    __slots__ = ("_metric", "_started")

    def __init__(self, metric: Histogram | Summary) -> None:
        self._metric = metric

    def __enter__(self) -> None:
        """Start measuring."""
        self._started = monotonic()

    def __exit__(self, *_: object) -> None:
        """Observe the duration, even of a failure."""
        self._metric.observe(monotonic() - self._started)


class EventMetrics:
    """Counts points updates by scene and outcome.

    Scenes that are not listed count as OTHER: strangers can choose their names.
    """

    def __init__(self, metrics: Metrics, scenes: Iterable[str]) -> None:
        self._metrics = metrics
        self._scenes = frozenset(scenes)
        self._counters: dict[tuple[str, str], Counter] = {}

    def count(self, scene: str, outcome: str) -> None:
        """Count an update."""
        key = (scene if scene in self._scenes else "OTHER", outcome)
        counter = self._counters.get(key)
        if counter is None:
            counter = self._counters[key] = self._metrics.points_events.labels(*key)
        counter.inc()


class DatabaseMetrics:
    """The metrics of the pools of connections, and of what runs on them."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._tracing = metrics.tracing
        for cause in KNOWN_CAUSES:
            metrics.database_errors.labels(cause)
        self._statements: dict[str, Callable[[float], None]] = {}
        self.observe_wait = metrics.database_connection_wait_seconds.observe

    def watch_pool(self, count_in_use: Callable[[], int], size: int) -> None:
        """Report how many of a pool's connections are in use."""
        self._metrics.database_connections_in_use.set_function(count_in_use)
        self._metrics.database_connections_max.set(size)

    def observe_statement(self, name: str, seconds: float) -> None:
        """Observe the time of a statement."""
        observe = self._statements.get(name)
        if observe is None:
            observe = self._statements[name] = self._metrics.database_statement_seconds.labels(name).observe
        observe(seconds)
        if self._tracing is not None:
            self._tracing.add(name, seconds)

    def count_retry(self, sqlstate: str) -> None:
        """Count a transaction that is run again.

        An empty SQLSTATE means that this server noticed the conflict itself.
        """
        self._metrics.database_retries.labels(sqlstate or "noticed").inc()

    def count_error(self, cause: str) -> None:
        """Count a failure by its SQLSTATE, or by the class of its exception."""
        self._metrics.database_errors.labels(cause).inc()
