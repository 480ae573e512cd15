"""The accounts that a redemption draws on, and the allocation to their lots.

Source: docs/reference/redemption.md#order-of-drawing
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from pointbook_server.ledger.model import Account, AccountKey


class SourceAccount(NamedTuple):
    """An account that may be drawn on, with its customer; empty if unregistered."""

    key: AccountKey
    customer_id: str = ""


class Allocation(NamedTuple):
    """The points drawn from one lot of an account, and how many were reversed."""

    store_id: str
    buyer_id: str
    points: int
    expires_at_ms: int | None
    event_id: str
    reversed_points: int = 0

    @property
    def key(self) -> AccountKey:
        """The account drawn from."""
        return AccountKey(self.store_id, self.buyer_id)


class _FreeLot(NamedTuple):
    """The free points of a lot.

    The order of its fields is the order of drawing; a position is unique.
    """

    order_ms: int
    created_at_ms: int
    customer_id: str
    key: AccountKey
    position: int
    points: int
    expires_at_ms: int | None
    event_id: str


def allocate(
    points: int,
    sources: Iterable[SourceAccount],
    accounts: Mapping[AccountKey, Account],
    created_at_ms: Mapping[str, int],
    now_ms: int,
) -> list[Allocation]:
    """Draw points from lots by expiry, then age, then customer id.

    Earlier redemptions hold the points of an account's first lots. `created_at_ms` has the times of the lots by event
    id; it is needed only if several accounts are drawn on. Raises ValueError if the accounts have too few points.
    """
    lots = [lot for source in sources for lot in _free_lots(source, accounts.get(source.key), created_at_ms, now_ms)]
    draws = []
    for lot in sorted(lots):
        drawn = min(points, lot.points)
        if drawn:
            draws.append(Allocation(*lot.key, drawn, lot.expires_at_ms, lot.event_id))
        points -= drawn
    if points:
        raise ValueError("the accounts have fewer points than are to be drawn")
    return draws


def lot_event_ids(accounts: Iterable[Account]) -> list[str]:
    """Return the sorted ids of the events that created the lots of some accounts."""
    return sorted({lot.event_id for account in accounts for lot in account.lots})


def _free_lots(
    source: SourceAccount, account: Account | None, created_at_ms: Mapping[str, int], now_ms: int
) -> Iterator[_FreeLot]:
    if account is None:
        return
    for position, lot in enumerate(account.unheld_lots(now_ms)):
        if lot.expiry_or_never_ms <= now_ms:
            continue
        order = (lot.expiry_or_never_ms, created_at_ms.get(lot.event_id, 0), source.customer_id, source.key, position)
        yield _FreeLot(*order, lot.remaining, lot.expires_at_ms, lot.event_id)


def points_by_account(draws: Sequence[Allocation]) -> dict[AccountKey, int]:
    """Return the drawn points that were not reversed, by account."""
    points: dict[AccountKey, int] = {}
    for draw in draws:
        points[draw.key] = points.get(draw.key, 0) + draw.points - draw.reversed_points
    return points
