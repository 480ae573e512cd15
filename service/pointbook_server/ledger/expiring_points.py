"""Whose points expire when: pages over the accounts of some stores, on one unchanging state of the database.

The index of entries by expiry finds candidates: accounts that ever got points of an expiry. What is left of those
points stands in the account's row, or for lots beyond it with their entries. What a candidate costs does not grow with
the book.
"""

from collections import defaultdict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple

from pointbook_server.db.database import Connection
from pointbook_server.ledger import queries
from pointbook_server.ledger.account_repository import AccountRepository
from pointbook_server.ledger.model import AccountKey

CANDIDATES_MAX = 5_000
"""How many candidates one page looks at: it ends there where most of them have nothing left."""
PORTION_MAX = 250
"""How many candidates' accounts are in memory at a time."""
AHEAD = (16, 1_000)
"""How many candidates are read of a store at first, and at most at a time."""


class Place(NamedTuple):
    """Where something stands in the list: soonest expiry first, then by account."""

    at_ms: int
    store_id: str
    buyer_id: str

    @property
    def key(self) -> AccountKey:
        """The account."""
        return AccountKey(self.store_id, self.buyer_id)


class ExpiringPoints(NamedTuple):
    """Points of an account that expire at the same moment."""

    place: Place
    points: int


@dataclass(frozen=True, slots=True)
class ExpiryWindow:
    """The stores whose points are listed, between which moments they expire, and the moment to count holds at."""

    store_ids: tuple[str, ...]
    start_ms: int
    end_ms: int
    now_ms: int


class ExpiringPage(NamedTuple):
    """A page, and the place behind which the next one begins; None where this is the last one."""

    items: list[ExpiringPoints]
    end: Place | None


class ExpiryReader:
    """Reads one page on a connection inside a snapshot, behind a place or from the beginning."""

    def __init__(self, connection: Connection, merchant_id: str, window: ExpiryWindow, after: Place | None) -> None:
        self._connection = connection
        self._merchant_id = merchant_id
        self._window = window
        self._after = {store_id: _start(window, store_id, after) for store_id in window.store_ids}
        """Behind which expiry and buyer to read on, of each store that may have more."""
        self._ahead: defaultdict[str, deque[Place]] = defaultdict(deque)
        self._ahead_count = 0

    async def page(self, size: int) -> ExpiringPage:
        """Read so many items, or fewer where most candidates have nothing left."""
        items: list[ExpiringPoints] = []
        examined = 0
        self._ahead_count = max(AHEAD[0], (size + 1) // len(self._window.store_ids))
        async with aclosing(self._candidates()) as candidates:
            while examined < CANDIDATES_MAX:
                # As many as the rest of the page probably takes, by how many of those before had points left.
                count = (size + 1 - len(items)) * (examined + 1) // (len(items) + 1)
                count = min(count, PORTION_MAX, CANDIDATES_MAX - examined)
                portion = await _take(candidates, count)
                items += await self._weigh(portion)
                examined += len(portion)
                if len(items) > size:
                    return ExpiringPage(items[:size], items[size - 1].place)
                if len(portion) < count:
                    return ExpiringPage(items, None)
        return ExpiringPage(items, portion[-1])

    async def _candidates(self) -> AsyncGenerator[Place]:
        """Merge the candidates of all stores, reading on where a store has none ahead."""
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
        """Read the next candidates of those stores that have none ahead, and may have more."""
        store_ids = [store_id for store_id in store_ids if store_id in self._after and not self._ahead[store_id]]
        if not store_ids:
            return
        count = min(self._ahead_count, AHEAD[1])
        self._ahead_count *= 2
        rows = [(store_id, *self._after[store_id]) for store_id in store_ids]
        values = queries.to_columns({"store_id": "", "after_ms": "", "after_buyer_id": ""}, rows)
        values |= {"merchant_id": self._merchant_id, "end_ms": self._window.end_ms, "count": count}
        for row in await self._connection.fetch(queries.FIND_EXPIRIES, values):
            self._ahead[row.store_id].append(Place(row.expires_at_ms, row.store_id, row.buyer_id))
        for store_id in store_ids:
            ahead = self._ahead[store_id]
            if len(ahead) < count:
                del self._after[store_id]
            else:
                self._after[store_id] = (ahead[-1].at_ms, ahead[-1].buyer_id)

    async def _weigh(self, places: Sequence[Place]) -> list[ExpiringPoints]:
        """Return the candidates that have points left beside what is held, and how many."""
        now_ms = self._window.now_ms
        book = AccountRepository(self._connection, self._merchant_id)
        await book.read({place.key for place in places})
        for key, account in book.accounts.items():
            # Holds may take of lots that are not kept with the account.
            book.accounts[key] = await book.with_free_points(key, account, now_ms, 0)
        far_points = await book.far_points(
            book.accounts, [(place.key, place.at_ms) for place in places if place.key in book.accounts]
        )
        near_points = {key: account.expiries(now_ms) for key, account in book.accounts.items()}
        items = []
        for place in places:
            points = near_points.get(place.key, {}).get(place.at_ms, 0) + far_points.get((place.key, place.at_ms), 0)
            if points:
                items.append(ExpiringPoints(place, points))
        return items


async def _take(candidates: AsyncIterator[Place], count: int) -> list[Place]:
    """Return the next candidates: `count` of them, or all that are left."""
    taken: list[Place] = []
    while len(taken) < count and (place := await anext(candidates, None)) is not None:
        taken.append(place)
    return taken


def _start(window: ExpiryWindow, store_id: str, after: Place | None) -> tuple[int, str]:
    """Return the expiry and buyer behind which a store's part of the list begins."""
    if after is None or after.at_ms < window.start_ms:
        return window.start_ms, ""
    if store_id == after.store_id:
        return after.at_ms, after.buyer_id
    # Of the same expiry come first the stores before, which are done, and then those behind.
    return (after.at_ms + (store_id < after.store_id), "")
