"""A customer's timeline: rows of several sources, merged by time, the newest first, by pages.

Each source reads at most a page behind the same place, and the merge keeps the first of them all.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from enum import IntEnum
from itertools import chain
from typing import Any, NamedTuple, Protocol

from pointbook.v1 import points_pb2, redemption_pb2
from pointbook_server.ledger.model import AccountKey
from pointbook_server.redemption.assessment import RedemptionContext, own_sources
from pointbook_server.redemption.messages import write_closing, write_event, write_refusal, write_reversal
from pointbook_server.redemption.model import Redemption
from pointbook_server.redemption.refusals import Refusals
from pointbook_server.redemption.timeline_store import TimelineStore
from pointbook_server.rpc.pagination import PageQuery
from pointbook_server.rpc.request_fields import TIME_MS_MAX, to_timestamp
from pointbook_server.validation_codes.model import ValidationEvent


class Rank(IntEnum):
    """What follows what inside one millisecond."""

    FIRST_PAGE = -1
    VALIDATION_EVENT = 0
    REFUSAL = 1
    REDEMPTION = 2
    REVERSAL = 3
    CLOSING = 4
    POINTS_ENTRY = 5


class Place(NamedTuple):
    """Where a page ends: at an item's time, the rank of its source, and its id there."""

    at_ms: int
    rank: int
    item_id: str


class Item(NamedTuple):
    """Something that happened, and its place in the timeline."""

    place: Place
    entry: redemption_pb2.TimelineEntry


class Entries(Protocol):
    """Reads the entries of accounts."""

    async def newest_entries(
        self, merchant_id: str, keys: Collection[AccountKey], query: PageQuery
    ) -> list[points_pb2.PointsEntry]:
        """Return a page of the entries of some accounts, the newest first."""


class Codes(Protocol):
    """Reads the events of one-time codes."""

    async def events(
        self, merchant_id: str, customers: Iterable[str], challenge_id: str, query: PageQuery
    ) -> list[ValidationEvent]:
        """Return a page of what happened to the codes under some names, the newest first."""


class Timeline:
    """Reads a customer's timeline from its sources, each in one statement."""

    def __init__(self, store: TimelineStore, entries: Entries, codes: Codes, refusals: Refusals) -> None:
        self._store = store
        self._entries = entries
        self._codes = codes
        self._refusals = refusals

    async def page(
        self,
        merchant_id: str,
        facts: RedemptionContext,
        write_redemption: Callable[[Redemption], redemption_pb2.Redemption],
        *,
        start_ms: int,
        before: Place,
        limit: int,
    ) -> list[Item]:
        """Return the newest items before a place."""
        names, store = facts.redeemers, self._store
        accounts = {source.key for source in own_sources(facts.key, facts.customer)}

        def query(rank: Rank) -> PageQuery:
            return query_of(rank, before, start_ms, limit)

        entries = await self._entries.newest_entries(merchant_id, accounts, query(Rank.POINTS_ENTRY))
        closings = await store.closings(merchant_id, names, query(Rank.CLOSING))
        reversals = await store.reversals(merchant_id, names, query(Rank.REVERSAL))
        redemptions = await store.redemptions(merchant_id, names, query(Rank.REDEMPTION))
        events = await self._codes.events(merchant_id, names, "", query(Rank.VALIDATION_EVENT))
        refusals = await self._refusals.of_customers(merchant_id, names, "", query(Rank.REFUSAL))
        sources = (
            [_item(Rank.POINTS_ENTRY, _time_ms(each), each.update.event_id, points_entry=each) for each in entries],
            [_item(Rank.CLOSING, each.at_ms, each.closing_id, closing=write_closing(each)) for each in closings],
            [
                _item(Rank.REVERSAL, each.created_at_ms, each.reference, reversal=write_reversal(each))
                for each in reversals
            ],
            [
                _item(Rank.REDEMPTION, each.created_at_ms, each.redemption_id, redemption=write_redemption(each))
                for each in redemptions
            ],
            [
                _item(Rank.VALIDATION_EVENT, each.at_ms, each.event_id, validation_event=write_event(each))
                for each in events
            ],
            [_item(Rank.REFUSAL, each.at_ms, each.refusal_id, refusal=write_refusal(each)) for each in refusals],
        )
        return merged(sources, limit)


def query_of(rank: Rank, before: Place, start_ms: int, limit: int) -> PageQuery:
    """Return what a source reads so that no item is read twice, and none is left out, behind a place."""
    at_ms = min(before.at_ms, TIME_MS_MAX + 1)
    if rank < before.rank:
        return PageQuery(start_ms, at_ms + 1, "", limit)
    return PageQuery(start_ms, at_ms, before.item_id if rank == before.rank else "", limit)


def merged(sources: Iterable[Sequence[Item]], limit: int) -> list[Item]:
    """Merge sources by time and rank, the newest first; inside a source the order stays."""
    items = sorted(chain.from_iterable(sources), key=lambda item: item.place[:2], reverse=True)
    return items[:limit]


def _item(rank: Rank, at_ms: int, item_id: str, **entry: Any) -> Item:
    return Item(Place(at_ms, rank, item_id), redemption_pb2.TimelineEntry(time=to_timestamp(at_ms), **entry))


def _time_ms(entry: points_pb2.PointsEntry) -> int:
    return entry.update.updated_at.ToMilliseconds()
