"""The storing of refused calls: a call only notes its refusal in memory, and batches of them are written soon after.

No call waits for that. Notes are limited for each merchant and minute, and in total; those above a limit are counted
and dropped. A crash loses the last seconds.
"""

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from contextvars import Context

import structlog

from pointbook_common.durations import DAY_MS
from pointbook_server.clock import Clock
from pointbook_server.errors import PointbookError
from pointbook_server.maintenance import merchant_by_merchant
from pointbook_server.metrics import Metrics
from pointbook_server.redemption.refusals_store import RefusalTransactions
from pointbook_server.redemption.refused import Allowance, Refusal
from pointbook_server.rpc.pagination import PageQuery

WRITE_PAUSE_SECONDS = 1.0
"""How long a refusal waits for others to be written with."""
REFUSALS_IN_BATCH_MAX = 500
REFUSALS_WAITING_MAX = 10_000
REFUSALS_A_MINUTE_MAX = 600
"""How many refusals of one merchant a server stores in a minute."""

log = structlog.get_logger()


class Refusals:
    """Notes refusals, writes them in the background, lists them and deletes old ones; `keep_days` of 0 keeps none."""

    def __init__(self, store: RefusalTransactions, clock: Clock, metrics: Metrics, *, keep_days: int) -> None:
        self._store = store
        self._clock = clock
        self._metrics = metrics
        self._keep_ms = keep_days * DAY_MS
        self._allowance = Allowance(REFUSALS_A_MINUTE_MAX)
        self._waiting: defaultdict[str, list[Refusal]] = defaultdict(list)
        """What is to be written, by merchant, the oldest first."""
        self._waiting_count = 0
        self._writing: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()

    def note(self, refusal: Refusal) -> None:
        """Note a refusal, to be written soon."""
        if not self._keep_ms:
            return
        if not self._allowance.claim(refusal.merchant_id, refusal.at_ms):
            self._count("RATE_LIMITED")
        elif self._waiting_count >= REFUSALS_WAITING_MAX:
            self._count("BUFFER_FULL")
        else:
            self._waiting[refusal.merchant_id].append(refusal)
            self._waiting_count += 1
            if self._writing is None or self._writing.done():
                # Its log lines must not name the call that happened to begin it.
                self._writing = asyncio.create_task(self._write_soon(), context=Context())

    async def of_customers(
        self, merchant_id: str, customers: Iterable[str], reference: str, query: PageQuery
    ) -> list[Refusal]:
        """Return a page of refusals under some names, the newest first, with all that this server has noted."""
        await self.flush()
        return await self._store.of_customers(merchant_id, customers, reference, query)

    async def of_reference(self, merchant_id: str, reference: str, query: PageQuery) -> list[Refusal]:
        """Return a page of refusals under a reference, the newest first, with all that this server has noted."""
        await self.flush()
        return await self._store.of_reference(merchant_id, reference, query)

    async def clean_up(self, now_ms: int) -> int:
        """Delete what is older than it is kept by the database's time, and return how many that were."""
        before_ms, store = now_ms - self._keep_ms, self._store
        return await merchant_by_merchant(
            lambda: store.old_merchants(before_ms), lambda merchant_id: store.delete_old(merchant_id, before_ms)
        )

    async def flush(self) -> None:
        """Write what was noted. What the database does not accept now is written later."""
        async with self._lock:
            for merchant_id in list(self._waiting):
                while refusals := self._waiting[merchant_id][:REFUSALS_IN_BATCH_MAX]:
                    outcome = await self._write(merchant_id, refusals)
                    if not outcome:
                        return
                    del self._waiting[merchant_id][: len(refusals)]
                    self._waiting_count -= len(refusals)
                    self._count(outcome, len(refusals))
                del self._waiting[merchant_id]

    async def close(self) -> None:
        """Write what was noted, and nothing from then on. What the database does not accept now is lost, and logged."""
        try:
            await self.flush()
        finally:
            if self._writing is not None:
                self._writing.cancel()
            if self._waiting_count:
                log.warning("refusals are lost", count=self._waiting_count)

    async def _write_soon(self) -> None:
        while self._waiting_count:
            await asyncio.sleep(WRITE_PAUSE_SECONDS)
            await self.flush()

    async def _write(self, merchant_id: str, refusals: list[Refusal]) -> str:
        """Write refusals, and return what became of them; empty where they are to be written again."""
        try:
            await self._store.insert(merchant_id, refusals)
        except PointbookError as error:
            log.warning("refusals are written later", reason=error.reason.value, count=self._waiting_count)
            return ""
        except Exception:
            log.exception("refusals were not written", count=len(refusals))
            return "FAILED"
        return "KEPT"

    def _count(self, outcome: str, count: int = 1) -> None:
        self._metrics.refusals.labels(outcome).inc(count)
