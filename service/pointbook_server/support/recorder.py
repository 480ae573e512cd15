"""The recorder of refused calls.

A background task writes them in batches, so that no call waits for the write. Refusals above a limit, per merchant and
minute or in total, are counted and dropped. A crash loses the last seconds.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from contextvars import Context

import structlog

from pointbook_common.durations import DAY_MS
from pointbook_server.clock import Clock
from pointbook_server.errors import PointbookError
from pointbook_server.metrics import Metrics
from pointbook_server.redemption.refusal import Refusal
from pointbook_server.rpc.pagination import PageQuery
from pointbook_server.support.model import MinuteQuota
from pointbook_server.support.transactions import RefusalTransactions

WRITE_PAUSE_SECONDS = 1.0
"""How long the writer collects refusals before it writes them."""
REFUSALS_IN_BATCH_MAX = 500
REFUSALS_QUEUED_MAX = 10_000
REFUSALS_PER_MINUTE_MAX = 600
"""The most refusals of one merchant that a server stores in a minute."""

log = structlog.get_logger()


class RefusalRecorder:
    """A recorder of refusals, which also lists them and deletes old ones.

    With `keep_days=0`, it records none.
    """

    def __init__(self, transactions: RefusalTransactions, clock: Clock, metrics: Metrics, *, keep_days: int) -> None:
        self._transactions = transactions
        self._clock = clock
        self._metrics = metrics
        self._keep_ms = keep_days * DAY_MS
        self._quota = MinuteQuota(REFUSALS_PER_MINUTE_MAX)
        self._queued: defaultdict[str, list[Refusal]] = defaultdict(list)
        """The refusals of each merchant, the oldest first."""
        self._queued_count = 0
        self._writer: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()

    def record(self, refusal: Refusal) -> None:
        """Queue a refusal."""
        if not self._keep_ms:
            return
        if not self._quota.claim(refusal.merchant_id, refusal.at_ms):
            self._count("RATE_LIMITED")
        elif self._queued_count >= REFUSALS_QUEUED_MAX:
            self._count("BUFFER_FULL")
        else:
            self._queued[refusal.merchant_id].append(refusal)
            self._queued_count += 1
            if self._writer is None or self._writer.done():
                # The writer's log lines must not carry the context of the call that started it.
                self._writer = asyncio.create_task(self._write_until_empty(), context=Context())

    async def list_by_customers(
        self, merchant_id: str, customers: Iterable[str], reference: str, query: PageQuery
    ) -> list[Refusal]:
        """Return a page of the refusals of some customer names, the newest first.

        Queued refusals are written first. An empty reference matches any.
        """
        await self.flush()
        return await self._transactions.list_by_customers(merchant_id, customers, reference, query)

    async def list_by_reference(self, merchant_id: str, reference: str, query: PageQuery) -> list[Refusal]:
        """Return a page of the refusals of a reference, the newest first.

        Queued refusals are written first.
        """
        await self.flush()
        return await self._transactions.list_by_reference(merchant_id, reference, query)

    async def flush(self) -> None:
        """Write queued refusals; those that cannot be written now stay queued."""
        async with self._lock:
            for merchant_id in list(self._queued):
                while refusals := self._queued[merchant_id][:REFUSALS_IN_BATCH_MAX]:
                    outcome = await self._write(merchant_id, refusals)
                    if not outcome:
                        return
                    del self._queued[merchant_id][: len(refusals)]
                    self._queued_count -= len(refusals)
                    self._count(outcome, len(refusals))
                del self._queued[merchant_id]

    async def close(self) -> None:
        """Write queued refusals and stop.

        If the database is unavailable, they are lost, and their number is logged.
        """
        try:
            await self.flush()
        finally:
            if self._writer is not None:
                self._writer.cancel()
            if self._queued_count:
                log.warning("refusals lost", count=self._queued_count)

    async def _write_until_empty(self) -> None:
        while self._queued_count:
            await asyncio.sleep(WRITE_PAUSE_SECONDS)
            await self.flush()

    async def _write(self, merchant_id: str, refusals: list[Refusal]) -> str:
        """Write refusals; return the outcome for the metric, or "" to retry."""
        try:
            await self._transactions.insert(merchant_id, refusals)
        except PointbookError as error:
            log.warning("refusals not written, retrying later", reason=error.reason.value, count=self._queued_count)
            return ""
        except Exception:
            log.exception("refusals not written", count=len(refusals))
            return "FAILED"
        return "KEPT"

    def _count(self, outcome: str, count: int = 1) -> None:
        self._metrics.refusals.labels(outcome).inc(count)
