"""A customer's timeline: pages of entries from several sources, merged by time.

Each source reads at most one page before the same position; the merge keeps the newest entries.
"""

from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

from pointbook.v1 import points_pb2, redemption_pb2
from pointbook_server.ledger.model import AccountKey
from pointbook_server.redemption.assessment import RedemptionContext, own_sources
from pointbook_server.redemption.messages import write_redemption, write_reversal
from pointbook_server.redemption.model import Closing, Redemption, StoredReversal
from pointbook_server.redemption.refusal import Refusal
from pointbook_server.rpc.pagination import PageQuery
from pointbook_server.rpc.request_fields import TIME_MS_MAX, to_timestamp
from pointbook_server.support.messages import write_closing, write_refusal
from pointbook_server.support.model import EntryRank, TimelinePosition
from pointbook_server.validation_codes.messages import write_validation_event
from pointbook_server.validation_codes.model import ValidationEvent


class TimelineItem(NamedTuple):
    """An entry of the timeline with its position."""

    position: TimelinePosition
    entry: redemption_pb2.TimelineEntry


class PointsEntries(Protocol):
    """The part of the ledger that reads entries."""

    async def newest_entries(
        self, merchant_id: str, keys: Collection[AccountKey], query: PageQuery
    ) -> list[points_pb2.PointsEntry]:
        """Return a page of the entries of some accounts, the newest first."""


class Redemptions(Protocol):
    """The part of redemption that reads its history."""

    async def redemptions(self, merchant_id: str, redeemers: Iterable[str], query: PageQuery) -> list[Redemption]:
        """Return a page of redemptions, the newest first."""

    async def reversals(self, merchant_id: str, redeemers: Iterable[str], query: PageQuery) -> list[StoredReversal]:
        """Return a page of reversals, the newest first."""

    async def closings(self, merchant_id: str, redeemers: Iterable[str], query: PageQuery) -> list[Closing]:
        """Return a page of closed holds, the newest first."""


class Codes(Protocol):
    """The part of one-time codes that reads their events."""

    async def events(
        self, merchant_id: str, customers: Iterable[str], challenge_id: str, query: PageQuery
    ) -> list[ValidationEvent]:
        """Return a page of the validation events of some customer names, the newest first."""


class Refusals(Protocol):
    """The stored refusals."""

    async def list_by_customers(
        self, merchant_id: str, customers: Iterable[str], reference: str, query: PageQuery
    ) -> list[Refusal]:
        """Return a page of the refusals of some customer names, the newest first."""


class Timeline:
    """A reader of a customer's timeline, which takes one statement for each source."""

    def __init__(self, entries: PointsEntries, redemptions: Redemptions, codes: Codes, refusals: Refusals) -> None:
        self._entries = entries
        self._redemptions = redemptions
        self._codes = codes
        self._refusals = refusals

    async def page(
        self, merchant_id: str, context: RedemptionContext, *, start_ms: int, before: TimelinePosition, limit: int
    ) -> list[TimelineItem]:
        """Return the newest items before a position.

        Redemptions are in their state at the context's time.
        """
        names = context.redeemers
        accounts = {source.key for source in own_sources(context.key, context.customer)}

        def query(rank: EntryRank) -> PageQuery:
            return source_query(rank, before, start_ms, limit)

        sources = (
            await self._read_points_entries(merchant_id, accounts, query(EntryRank.POINTS_ENTRY)),
            await self._read_closings(merchant_id, names, query(EntryRank.CLOSING)),
            await self._read_reversals(merchant_id, names, query(EntryRank.REVERSAL)),
            await self._read_redemptions(merchant_id, names, query(EntryRank.REDEMPTION), context.now_ms),
            await self._read_validation_events(merchant_id, names, query(EntryRank.VALIDATION_EVENT)),
            await self._read_refusals(merchant_id, names, query(EntryRank.REFUSAL)),
        )
        return merge(sources, limit)

    async def _read_points_entries(
        self, merchant_id: str, accounts: Collection[AccountKey], query: PageQuery
    ) -> list[TimelineItem]:
        return [
            _item(EntryRank.POINTS_ENTRY, _time_ms(entry), entry.update.event_id, points_entry=entry)
            for entry in await self._entries.newest_entries(merchant_id, accounts, query)
        ]

    async def _read_closings(self, merchant_id: str, names: Iterable[str], query: PageQuery) -> list[TimelineItem]:
        return [
            _item(EntryRank.CLOSING, closing.at_ms, closing.closing_id, closing=write_closing(closing))
            for closing in await self._redemptions.closings(merchant_id, names, query)
        ]

    async def _read_reversals(self, merchant_id: str, names: Iterable[str], query: PageQuery) -> list[TimelineItem]:
        return [
            _item(EntryRank.REVERSAL, reversal.created_at_ms, reversal.reference, reversal=write_reversal(reversal))
            for reversal in await self._redemptions.reversals(merchant_id, names, query)
        ]

    async def _read_redemptions(
        self, merchant_id: str, names: Iterable[str], query: PageQuery, now_ms: int
    ) -> list[TimelineItem]:
        return [
            _item(
                EntryRank.REDEMPTION,
                redemption.created_at_ms,
                redemption.redemption_id,
                redemption=write_redemption(redemption, now_ms),
            )
            for redemption in await self._redemptions.redemptions(merchant_id, names, query)
        ]

    async def _read_validation_events(
        self, merchant_id: str, names: Iterable[str], query: PageQuery
    ) -> list[TimelineItem]:
        return [
            _item(
                EntryRank.VALIDATION_EVENT, event.at_ms, event.event_id, validation_event=write_validation_event(event)
            )
            for event in await self._codes.events(merchant_id, names, "", query)
        ]

    async def _read_refusals(self, merchant_id: str, names: Iterable[str], query: PageQuery) -> list[TimelineItem]:
        return [
            _item(EntryRank.REFUSAL, refusal.at_ms, refusal.refusal_id, refusal=write_refusal(refusal))
            for refusal in await self._refusals.list_by_customers(merchant_id, names, "", query)
        ]


def source_query(rank: EntryRank, before: TimelinePosition, start_ms: int, limit: int) -> PageQuery:
    """Return the query for the rows of a source before a position.

    Pages neither repeat nor skip a row.
    """
    at_ms = min(before.at_ms, TIME_MS_MAX + 1)
    if rank < before.rank:
        return PageQuery(start_ms, at_ms + 1, "", limit)
    return PageQuery(start_ms, at_ms, before.entry_id if rank == before.rank else "", limit)


def merge(sources: Iterable[Sequence[TimelineItem]], limit: int) -> list[TimelineItem]:
    """Return the newest items of all sources, sorted by time and rank.

    The order within a source is kept.
    """
    items = sorted(chain.from_iterable(sources), key=lambda item: item.position[:2], reverse=True)
    return items[:limit]


def _item(rank: EntryRank, at_ms: int, entry_id: str, **entry: Any) -> TimelineItem:
    position = TimelinePosition(at_ms, rank, entry_id)
    return TimelineItem(position, redemption_pb2.TimelineEntry(time=to_timestamp(at_ms), **entry))


def _time_ms(entry: points_pb2.PointsEntry) -> int:
    return entry.update.updated_at.ToMilliseconds()
