"""The points that a redemption may draw on, and which of them it draws."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from pointbook_server.ledger.model import Account, AccountKey


class Source(NamedTuple):
    """An account that a redemption may draw on, and whose it is: empty for a buyer that nobody has registered."""

    key: AccountKey
    customer_id: str = ""


class Allocation(NamedTuple):
    """Points that a redemption takes from one lot of one account, and how many of them were given back since."""

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


class _Part(NamedTuple):
    """What one lot has for a redemption, with what it is sorted by."""

    order_ms: int
    made_at_ms: int
    customer_id: str
    key: AccountKey
    place: int
    points: int
    expires_at_ms: int | None
    event_id: str


def allocate(
    points: int,
    sources: Iterable[Source],
    accounts: Mapping[AccountKey, Account],
    made_at_ms: Mapping[str, int],
    now_ms: int,
) -> list[Allocation]:
    """Draw points that are there: soonest expiry first, then created earlier, then by customer id.

    What earlier redemptions hold of an account they hold of its first lots. `made_at_ms` tells by event_id when a lot
    was made, where several accounts are drawn on. Source: redemption.md, who and where.
    """
    parts = [part for source in sources for part in _parts(source, accounts.get(source.key), made_at_ms, now_ms)]
    draws = []
    for part in sorted(parts):
        taken = min(points, part.points)
        if taken:
            draws.append(Allocation(*part.key, taken, part.expires_at_ms, part.event_id))
        points -= taken
    if points:
        raise ValueError("more was to be drawn than there is")
    return draws


def event_ids_of(accounts: Iterable[Account]) -> list[str]:
    """Name the events that made the lots of some accounts."""
    return sorted({lot.event_id for account in accounts for lot in account.lots})


def _parts(source: Source, account: Account | None, made_at_ms: Mapping[str, int], now_ms: int) -> Iterator[_Part]:
    if account is None:
        return
    for place, lot in enumerate(account.free_lots(now_ms)):
        if lot.order_ms <= now_ms:
            continue
        yield _Part(
            order_ms=lot.order_ms,
            made_at_ms=made_at_ms.get(lot.event_id, 0),
            customer_id=source.customer_id,
            key=source.key,
            place=place,
            points=lot.remaining,
            expires_at_ms=lot.expires_at_ms,
            event_id=lot.event_id,
        )


def points_by_account(draws: Sequence[Allocation]) -> dict[AccountKey, int]:
    """Sum what is drawn, and was not given back, by account."""
    points: dict[AccountKey, int] = {}
    for draw in draws:
        points[draw.key] = points.get(draw.key, 0) + draw.points - draw.reversed_points
    return points
