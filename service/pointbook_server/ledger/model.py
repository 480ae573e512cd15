"""The points ledger as pure functions: what an account is, and how events move it.

The state of an account is the fold over its entries in their order. Nothing here reads a clock or a database; times
are whole milliseconds since 1970 (UTC), amounts are points.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import groupby, takewhile

from pointbook_server.ledger.ordering import order_millisecond

POINTS_MAX = 10**15
DECREASING_SCENES = frozenset(
    {
        "REDEEM_COUPON_CODE",
        "REDEEM_COUPON",
        "REDEEM_PRODUCTS",
        "REDEEM_FREE_SHIPPING",
        "CASHBACK",
        "MANUALLY_DECREASE",
        "CUSTOMER_IMPORT_DECREASE",
        "POS_DECREASE",
        "POINTS_EXPIRED",
    }
)
"""The scenes that SHOPLINE describes as deducting points."""
INCREASING_SCENES = frozenset(
    {
        "FOLLOW_FB",
        "CUSTOMER_IMPORT_INCREASE",
        "FOLLOW_INS",
        "EMAIL_SUBSCRIPTION",
        "ORDER_RETURN",
        "SHARE_FB",
        "DAILY_ATTENDANCE",
        "ENTER_PHONE",
        "SUCCESSFUL_REFERRAL",
        "SUCCESSFUL_REGISTRATION",
        "TOP_REVIEWS",
        "CUSTOMERS_BIRTHDAY",
        "ENTER_BIRTHDAY",
        "MANUALLY_INCREASE",
        "PRODUCT_REVIEWS",
        "LEVEL_MEM_BENEFITS",
        "LOGIN_SUCCESS",
        "PAID_MEM_BENEFITS",
        "SUCCESSFUL_ORDERS",
        "CUSTOMIZED_RULE",
        "REFUND_POINT_BY_EXCHANGE",
    }
)
"""The scenes that SHOPLINE describes as adding points; a name in neither set says nothing of a direction."""
GIVEN_BACK_SCENES = frozenset({"ORDER_RETURN", "REFUND_POINT_BY_EXCHANGE"})
"""Increases that give spent points back, and so do not count as earned a second time."""


class UpdateType(StrEnum):
    """The sign of an event."""

    INCREASE = "INCREASE"
    DECREASE = "DECREASE"


class Outcome(StrEnum):
    """What became of an event that was sent; REFUSED is remembered, and raised as an error."""

    APPLIED = "APPLIED"
    DUPLICATE = "DUPLICATE"
    LATE = "LATE"
    REFUSED = "REFUSED"


@dataclass(frozen=True, slots=True, order=True)
class AccountKey:
    """Whose points: one buyer of one store. It sorts in the order in which accounts are locked."""

    store_id: str
    buyer_id: str


@dataclass(frozen=True, slots=True)
class Webhook:
    """How an event reached us. It is not part of the event's content."""

    webhook_id: str = ""
    shop_domain: str = ""
    api_version: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """One points update of one account."""

    event_id: str
    account: AccountKey
    update_type: UpdateType
    scene: str
    value: int
    balance: int | None
    expires_at_ms: int | None
    updated_at_ms: int

    @property
    def delta(self) -> int:
        """The signed change: the sign comes from the update type alone, never from the scene."""
        return self.value if self.update_type is UpdateType.INCREASE else -self.value

    @property
    def content(self) -> tuple[object, ...]:
        """What tells events apart besides their id."""
        return (self.account, self.updated_at_ms, self.delta, self.balance, self.expires_at_ms, self.scene)


@dataclass(frozen=True, slots=True)
class Lot:
    """Points that came in together and expire together; `remaining` is at least 1 in a stored lot."""

    remaining: int
    original: int
    expires_at_ms: int | None
    event_id: str

    def is_expired(self, at_ms: int) -> bool:
        """Tell whether the lot has stopped counting: at the very millisecond of its expiry it has."""
        return self.expires_at_ms is not None and self.expires_at_ms <= at_ms


@dataclass(frozen=True, slots=True)
class Draw:
    """Points that an entry took from one lot."""

    points: int
    expires_at_ms: int | None
    event_id: str


@dataclass(frozen=True, slots=True)
class Account:
    """The state of an account after its entries. `newest_at_ms` is None while no event has opened it.

    `lots` stand in the order in which the fold made them. Always: balance = opening + the deltas - silently_expired
    + drift, and the lots hold max(balance, 0).
    """

    opening: int = 0
    balance: int = 0
    drift: int = 0
    silently_expired: int = 0
    lifetime_points: int = 0
    newest_at_ms: int | None = None
    lots: tuple[Lot, ...] = ()

    @property
    def is_storable(self) -> bool:
        """Whether every sum fits into 64 bits, as nothing but an attack could prevent."""
        sums = (self.opening, self.balance, self.drift, self.silently_expired, self.lifetime_points)
        return all(abs(points) < 2**63 for points in sums)

    def active_points(self, at_ms: int) -> int:
        """Points that may be redeemed: those of unexpired lots."""
        return sum(lot.remaining for lot in self.lots if not lot.is_expired(at_ms))

    def expired_points(self, at_ms: int) -> int:
        """Points that stand in the balance but have passed their expiry time."""
        return sum(lot.remaining for lot in self.lots if lot.is_expired(at_ms))

    def lots_by_expiry(self) -> list[Lot]:
        """Return the lots, soonest expiry first, never-expiring last, earlier ones first on a tie."""
        return sorted(self.lots, key=_soonest_first)


@dataclass(frozen=True, slots=True)
class Entry:
    """An accepted event with what the fold derives from its place; `ordinal` counts inside its millisecond."""

    event: Event
    ordinal: int
    balance_before: int
    balance_after: int
    drift: int
    silently_expired: int
    draws: tuple[Draw, ...]

    @property
    def scene_disagrees(self) -> bool:
        """Whether the scene describes the other direction than the update type says."""
        others = INCREASING_SCENES if self.event.update_type is UpdateType.DECREASE else DECREASING_SCENES
        return self.event.scene in others


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of one event: the outcome, the account after it, and the entries that it makes or moves.

    `entry` is the event's own entry (for a DUPLICATE the one that is in the book already, for a REFUSED event the one
    it would have made), `moved` are earlier accepted entries whose derived values changed.
    """

    outcome: Outcome
    account: Account
    entry: Entry
    moved: tuple[Entry, ...] = ()


def judge(account: Account, history: Sequence[Entry], event: Event) -> Verdict:
    """Decide about an event whose event_id is new.

    `history` has all entries of the account; it may be empty when the event is later than the account's newest entry,
    which is the direct way. An equal or earlier time folds again from the beginning. Another event with the same
    content is the same event when both carry SHOPLINE's balance. An event without a balance is refused when it would
    take the account below zero, at its place or after it.
    """
    if account.newest_at_ms is None or event.updated_at_ms > account.newest_at_ms:
        after, entries = fold(account, [event])
    else:
        if event.balance is not None:
            for entry in history:
                if entry.event.content == event.content:
                    return Verdict(Outcome.DUPLICATE, account, entry)
        after, entries = fold(Account(), [*(entry.event for entry in history), event])
    index = next(i for i, entry in enumerate(entries) if entry.event is event)
    if _overdraws(entries[index:]):
        return Verdict(Outcome.REFUSED, account, entries[index])
    outcome = Outcome.APPLIED if index == len(entries) - 1 else Outcome.LATE
    known = set(history)
    moved = tuple(entry for entry in entries if entry.event is not event and entry not in known)
    return Verdict(outcome, after, entries[index], moved)


def _overdraws(entries: Sequence[Entry]) -> bool:
    """Tell whether the first entry, when it has no balance, leaves less than zero up to the next one that has."""
    if entries[0].event.balance is not None:
        return False
    unbalanced = takewhile(lambda entry: entry.event.balance is None, entries)
    return any(entry.balance_after < 0 for entry in unbalanced)


def fold(account: Account, events: Iterable[Event]) -> tuple[Account, list[Entry]]:
    """Apply events, all later than the account's newest entry, in the order of the book."""
    entries: list[Entry] = []
    in_time = sorted(events, key=lambda event: event.updated_at_ms)
    for _, same_time in groupby(in_time, key=lambda event: event.updated_at_ms):
        group = list(same_time)
        if len(group) == 1:
            account, entry = _step(account, group[0], 0)
            entries.append(entry)
            continue
        account, stepped = _fold_millisecond(account, group)
        entries += stepped
    return account, entries


def _fold_millisecond(account: Account, events: Sequence[Event]) -> tuple[Account, list[Entry]]:
    """Apply the events of one millisecond: those without a balance first, by event_id, then the trail."""
    entries: list[Entry] = []
    for event in sorted((e for e in events if e.balance is None), key=lambda e: e.event_id):
        account, entry = _step(account, event, len(entries))
        entries.append(entry)
    balance = None if account.newest_at_ms is None else account.balance
    expired = account.expired_points(events[0].updated_at_ms)
    for event in order_millisecond(
        [e for e in events if e.balance is not None],
        balance=balance,
        expired=expired,
    ):
        account, entry = _step(account, event, len(entries))
        entries.append(entry)
    return account, entries


def _step(account: Account, event: Event, ordinal: int) -> tuple[Account, Entry]:
    """Apply one event at its place."""
    at_ms = event.updated_at_ms
    if account.newest_at_ms is None:
        account = _open(event)
    balance_before = account.balance
    expected = balance_before + event.delta
    gap = 0 if event.balance is None else event.balance - expected

    pool = _LotPool(account.lots, at_ms)
    if gap > 0:
        pool.add(gap, None, event.event_id)
    if event.update_type is UpdateType.INCREASE:
        pool.add(event.value, event.expires_at_ms, event.event_id)
    else:
        pool.take(event.value, expired_first=event.scene == "POINTS_EXPIRED")
    silently_expired = pool.take(-gap, expired_first=True) if gap < 0 else 0
    balance_after = expected + gap
    pool.take(pool.total() - max(balance_after, 0), expired_first=True)

    drift = gap + silently_expired
    earned = event.update_type is UpdateType.INCREASE and event.scene not in GIVEN_BACK_SCENES
    after = replace(
        account,
        balance=balance_after,
        drift=account.drift + drift,
        silently_expired=account.silently_expired + silently_expired,
        lifetime_points=account.lifetime_points + (event.value if earned else 0),
        newest_at_ms=at_ms,
        lots=pool.lots(),
    )
    return after, Entry(event, ordinal, balance_before, balance_after, drift, silently_expired, pool.draws())


def _open(event: Event) -> Account:
    """Open an account at its first event: what it held before is a lot that never expires."""
    opening = 0 if event.balance is None else event.balance - event.delta
    held = max(opening, 0)
    lots = (Lot(held, held, None, event.event_id),) if held else ()
    return Account(opening=opening, balance=opening, lifetime_points=held, lots=lots)


class _LotPool:
    """The lots of an account while one event moves them; it records what is drawn."""

    def __init__(self, lots: Iterable[Lot], at_ms: int) -> None:
        self._lots = list(lots)
        self._at_ms = at_ms
        self._draws: list[Draw] = []

    def add(self, points: int, expires_at_ms: int | None, event_id: str) -> None:
        if points:
            self._lots.append(Lot(points, points, expires_at_ms, event_id))

    def take(self, points: int, *, expired_first: bool) -> int:
        """Take points, as far as there are any, and return how many of them came from expired lots."""
        if points <= 0:
            return 0
        order = sorted(
            range(len(self._lots)),
            key=lambda i: (self._lots[i].is_expired(self._at_ms) != expired_first, _soonest_first(self._lots[i])),
        )
        from_expired = 0
        for index in order:
            if not points:
                break
            lot = self._lots[index]
            taken = min(points, lot.remaining)
            if not taken:
                continue
            points -= taken
            from_expired += taken if lot.is_expired(self._at_ms) else 0
            self._lots[index] = replace(lot, remaining=lot.remaining - taken)
            self._draws.append(Draw(taken, lot.expires_at_ms, lot.event_id))
        return from_expired

    def total(self) -> int:
        return sum(lot.remaining for lot in self._lots)

    def lots(self) -> tuple[Lot, ...]:
        return tuple(lot for lot in self._lots if lot.remaining)

    def draws(self) -> tuple[Draw, ...]:
        return tuple(self._draws)


def _soonest_first(lot: Lot) -> tuple[bool, int]:
    """Sort lots by expiry with never-expiring ones last; sorting is stable, so earlier ones win a tie."""
    return (lot.expires_at_ms is None, lot.expires_at_ms or 0)
