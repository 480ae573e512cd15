"""Pages of the points that expire in a window of time, on one snapshot.

The index of entries by expiry yields candidates: accounts that ever received points with an expiry. The points
that are left are in the account's row or, for overflow lots, in their entries. The cost of a candidate does not grow
with the ledger.
"""

from collections import defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple

from pointbook_server.db.database import Connection
from pointbook_server.ledger import queries, rows
from pointbook_server.ledger.account_repository import AccountRepository
from pointbook_server.ledger.model import AccountKey

CANDIDATES_MAX = 5_000
"""The most candidates that one page examines; it then ends even if it is not full."""
CHUNK_MAX = 250
"""The most candidates whose accounts are in memory at a time."""
READ_AHEAD_MIN = 16
"""The fewest candidates of a store that the first read fetches; each further read fetches twice as many."""
READ_AHEAD_MAX = 1_000


class ExpiringPosition(NamedTuple):
    """A position in the list, which is sorted by expiry, then by account."""

    at_ms: int
    store_id: str
    buyer_id: str

    @property
    def key(self) -> AccountKey:
        """The account."""
        return AccountKey(self.store_id, self.buyer_id)


class ExpiringPoints(NamedTuple):
    """Points of an account that expire at the same time."""

    position: ExpiringPosition
    points: int


@dataclass(frozen=True, slots=True)
class ExpiryWindow:
    """The stores and expiries to list; holds that are open at `now_ms` count."""

    store_ids: tuple[str, ...]
    start_ms: int
    end_ms: int
    now_ms: int


class ExpiringPage(NamedTuple):
    """A page, and the position after which the next page begins, if any."""

    items: list[ExpiringPoints]
    end: ExpiringPosition | None


class ExpiryReader:
    """A reader of one page on a connection with a snapshot."""

    def __init__(
        self, connection: Connection, merchant_id: str, window: ExpiryWindow, after: ExpiringPosition | None
    ) -> None:
        self._connection = connection
        self._merchant_id = merchant_id
        self._window = window
        self._read_to = {store_id: _start(window, store_id, after) for store_id in window.store_ids}
        """The expiry and buyer of the last candidate read, for each store that may have more."""
        self._ahead: defaultdict[str, deque[ExpiringPosition]] = defaultdict(deque)
        self._ahead_count = 0

    async def read_page(self, size: int) -> ExpiringPage:
        """Return up to `size` items; fewer if most candidates have no points left."""
        items: list[ExpiringPoints] = []
        examined = 0
        self._ahead_count = max(READ_AHEAD_MIN, (size + 1) // len(self._window.store_ids))
        async with aclosing(self._candidates()) as candidates:
            while examined < CANDIDATES_MAX:
                # Estimate how many candidates the rest of the page needs from how many so far had points left.
                count = (size + 1 - len(items)) * (examined + 1) // (len(items) + 1)
                count = min(count, CHUNK_MAX, CANDIDATES_MAX - examined)
                chunk = await _next_candidates(candidates, count)
                items += await self._find_points(chunk)
                examined += len(chunk)
                if len(items) > size:
                    return ExpiringPage(items[:size], items[size - 1].position)
                if len(chunk) < count:
                    return ExpiringPage(items, None)
        return ExpiringPage(items, chunk[-1])

    async def _candidates(self) -> AsyncGenerator[ExpiringPosition]:
        """Merge the candidates of all stores in list order."""
        heads: list[tuple[int, str]] = []
        without_head: Sequence[str] = self._window.store_ids
        while True:
            await self._read_ahead(without_head)
            for store_id in without_head:
                if self._ahead[store_id]:
                    heappush(heads, (self._ahead[store_id][0].at_ms, store_id))
            if not heads:
                return
            _, store_id = heappop(heads)
            yield self._ahead[store_id].popleft()
            without_head = [store_id]

    async def _read_ahead(self, store_ids: Sequence[str]) -> None:
        """Read the next candidates of the stores that have none left in memory."""
        store_ids = [store_id for store_id in store_ids if store_id in self._read_to and not self._ahead[store_id]]
        if not store_ids:
            return
        count = min(self._ahead_count, READ_AHEAD_MAX)
        self._ahead_count *= 2
        lookups = [(store_id, *self._read_to[store_id]) for store_id in store_ids]
        params = rows.to_columns({"store_id": "", "after_ms": "", "after_buyer_id": ""}, lookups)
        params |= {"merchant_id": self._merchant_id, "end_ms": self._window.end_ms, "count": count}
        for row in await self._connection.fetch(queries.FIND_EXPIRY_CANDIDATES, params):
            self._ahead[row.store_id].append(ExpiringPosition(row.expires_at_ms, row.store_id, row.buyer_id))
        for store_id in store_ids:
            ahead = self._ahead[store_id]
            if len(ahead) < count:
                del self._read_to[store_id]
            else:
                self._read_to[store_id] = (ahead[-1].at_ms, ahead[-1].buyer_id)

    async def _find_points(self, candidates: Sequence[ExpiringPosition]) -> list[ExpiringPoints]:
        """Return the candidates that have unheld points left, with those points."""
        now_ms = self._window.now_ms
        repository = AccountRepository(self._connection, self._merchant_id)
        await repository.read({candidate.key for candidate in candidates})
        accounts = {
            # Holds may cover overflow lots, so all lots that they may cover are loaded.
            key: await repository.load_points(key, account, now_ms, 0)
            for key, account in repository.accounts.items()
        }
        overflow_points = await repository.sum_overflow_points(
            accounts, [(candidate.key, candidate.at_ms) for candidate in candidates if candidate.key in accounts]
        )
        loaded_points = {key: account.unheld_points_by_expiry(now_ms) for key, account in accounts.items()}
        items = []
        for candidate in candidates:
            points = loaded_points.get(candidate.key, {}).get(candidate.at_ms, 0)
            points += overflow_points.get((candidate.key, candidate.at_ms), 0)
            if points:
                items.append(ExpiringPoints(candidate, points))
        return items


async def _next_candidates(candidates: AsyncIterator[ExpiringPosition], count: int) -> list[ExpiringPosition]:
    """Return the next `count` candidates, or all that are left."""
    chunk: list[ExpiringPosition] = []
    while len(chunk) < count and (candidate := await anext(candidates, None)) is not None:
        chunk.append(candidate)
    return chunk


def _start(window: ExpiryWindow, store_id: str, after: ExpiringPosition | None) -> tuple[int, str]:
    """Return the expiry and buyer after which a store's part of the list begins."""
    if after is None or after.at_ms < window.start_ms:
        return window.start_ms, ""
    if store_id == after.store_id:
        return after.at_ms, after.buyer_id
    # At the same expiry, smaller store_ids are already listed, and greater ones are not.
    return (after.at_ms + (store_id < after.store_id), "")
