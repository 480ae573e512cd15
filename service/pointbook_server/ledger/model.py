"""The points ledger as pure functions: what an account is, and how events move it.

The state of an account is the fold over its entries in their order. Nothing here reads a clock or a database; times
are whole milliseconds since 1970 (UTC), amounts are points.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import groupby
from typing import NamedTuple

from pointbook_server.ledger.holds import Hold, held_at
from pointbook_server.ledger.lots import Draw, Lot, LotPool, OverflowLots, points_at
from pointbook_server.ledger.ordering import order_millisecond

POINTS_MAX = 10**15
EXPIRED_SCENE = "POINTS_EXPIRED"
SUM_MAX = 2**63 - 1
"""Sums stop here. Nothing but an attack comes near, and even then every event that carries a balance is accepted."""
CHECKPOINT_ENTRIES = 128
"""After how many entries the state is kept, so that a late event need not be folded from the beginning."""
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
        EXPIRED_SCENE,
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


class ApplyOutcome(StrEnum):
    """What became of an event that was sent; REFUSED is remembered, and raised as an error."""

    APPLIED = "APPLIED"
    DUPLICATE = "DUPLICATE"
    LATE = "LATE"
    REFUSED = "REFUSED"


class AccountKey(NamedTuple):
    """Whose points: one buyer of one store. It sorts in the order in which accounts are locked."""

    store_id: str
    buyer_id: str


class WebhookOrigin(NamedTuple):
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


class Expiry(NamedTuple):
    """Points of an account that expire at the same moment."""

    at_ms: int
    points: int


class Points(NamedTuple):
    """An account's points at a moment: what may be redeemed, what is held, and what has expired but is not booked."""

    active: int
    held: int
    expired: int


@dataclass(frozen=True, slots=True)
class Account:
    """The state of an account after its entries.

    `opening` is None until an entry that counts has opened it, and `newest_at_ms` until there is any entry. `lots` are
    the first open lots in the order in which they are drawn, `far_lots` what lies beyond (lots.py). Always: balance =
    opening + the deltas - silently_expired + drift, and the lots hold max(balance, 0). `uncheckpointed` counts the
    entries since the last checkpoint; it says nothing of the points. Neither that nor the `holds` are of the fold.
    """

    opening: int | None = None
    balance: int = 0
    drift: int = 0
    silently_expired: int = 0
    lifetime_points: int = 0
    newest_at_ms: int | None = None
    lots: tuple[Lot, ...] = ()
    far_lots: OverflowLots | None = None
    drawn_to_ms: int = 0
    uncheckpointed: int = field(default=0, compare=False)
    holds: tuple[Hold, ...] = field(default=(), compare=False)

    def is_before(self, at_ms: int) -> bool:
        """Tell whether all entries are before a moment, so that an event of then is applied directly."""
        return self.newest_at_ms is None or self.newest_at_ms < at_ms

    def with_unexpired(self, points: int, event_id: str) -> "Account":
        """Return the account with additional points that never expire: only good for asking what is active."""
        return replace(self, lots=(*self.lots, Lot(points, points, None, event_id)))

    def points_at(self, at_ms: int) -> Points:
        """Tell the points at a moment. Raises FarLotsNeededError.

        A hold keeps no point alive: SHOPLINE does not know it, and lets the points of its lots expire all the same.
        """
        unexpired, expired = points_at(self.lots, self.far_lots, at_ms)
        held = held_at(self.holds, at_ms)
        return Points(max(0, unexpired - held), held, expired)

    def free_lots(self, at_ms: int) -> list[Lot]:
        """Return the lots that are kept with the account, less what is held at a moment, without those held wholly.

        Holds take from unexpired lots, soonest expiry first, as redemptions draw.
        """
        held = held_at(self.holds, at_ms)
        free = []
        for lot in self.lots:
            taken = min(held, lot.remaining) if lot.order_ms > at_ms else 0
            held -= taken
            if taken < lot.remaining:
                free.append(lot._replace(remaining=lot.remaining - taken) if taken else lot)
        return free

    def expiries(self, at_ms: int) -> dict[int, int]:
        """Return the points of the free lots at a moment by when they expire, soonest first, expired ones included."""
        points: dict[int, int] = {}
        for lot in self.free_lots(at_ms):
            if lot.expires_at_ms is not None:
                points[lot.expires_at_ms] = points.get(lot.expires_at_ms, 0) + lot.remaining
        return points

    def next_expiry(self, at_ms: int) -> Expiry | None:
        """Return what expires soonest after a moment, of the lots that are kept with the account; None where none."""
        return next((Expiry(*item) for item in self.expiries(at_ms).items() if item[0] > at_ms), None)


@dataclass(frozen=True, slots=True)
class Entry:
    """An accepted event with what the fold derives from its place; `ordinal` counts inside its millisecond.

    A void entry has a place, and moves nothing.
    """

    event: Event
    ordinal: int
    balance_before: int
    balance_after: int
    drift: int
    silently_expired: int
    draws: tuple[Draw, ...]
    is_void: bool = False

    @property
    def scene_disagrees(self) -> bool:
        """Whether the scene describes the other direction than the update type says."""
        others = INCREASING_SCENES if self.event.update_type is UpdateType.DECREASE else DECREASING_SCENES
        return self.event.scene in others


class ApplyResult(NamedTuple):
    """What became of one event: the outcome, the account then, and its entry.

    For a DUPLICATE the entry is the one that was in the book already, for a REFUSED event the one it would have made.
    `entry_webhook_id` is the webhook that brought that entry, where another webhook brought the DUPLICATE.
    """

    outcome: ApplyOutcome
    account: Account
    entry: Entry
    entry_webhook_id: str = ""


def fold(account: Account, events: Iterable[Event], void: Collection[str] = ()) -> tuple[Account, list[Entry]]:
    """Apply events, all later than the account's newest entry, in the order of the book.

    `void` names the events that count for nothing. Raises FarLotsNeededError.
    """
    folding = Fold(account)
    folding.run(events, void)
    return folding.account(), folding.entries


class Fold:
    """An account while events move it, with the entries that they make.

    `snapshots` has the account after each event that `run` was asked to remember, `checkpoints` the states to keep:
    each between two milliseconds, at least one every CHECKPOINT_ENTRIES unless a millisecond has more.
    """

    def __init__(self, account: Account) -> None:
        self.entries: list[Entry] = []
        self.checkpoints: list[Account] = []
        self.snapshots: dict[str, Account] = {}
        self._opening = account.opening
        self._balance = account.balance
        self._drift = account.drift
        self._silently_expired = account.silently_expired
        self._lifetime_points = account.lifetime_points
        self._newest_at_ms = account.newest_at_ms
        self._uncheckpointed = account.uncheckpointed
        self._pool = LotPool(account.lots, account.far_lots, account.drawn_to_ms)

    def is_before(self, at_ms: int) -> bool:
        """Tell whether all entries are before a moment."""
        return self._newest_at_ms is None or self._newest_at_ms < at_ms

    def account(self) -> Account:
        """Return the account as it stands, with all lots that the fold knows."""
        return self._state(*self._pool.all())

    def kept_account(self) -> Account:
        """Return the account as it is kept: of many lots the first ones alone."""
        return self._state(*self._pool.kept())

    def _state(self, lots: tuple[Lot, ...], far_lots: OverflowLots | None, drawn_to_ms: int) -> Account:
        return Account(
            opening=self._opening,
            balance=self._balance,
            drift=self._drift,
            silently_expired=self._silently_expired,
            lifetime_points=self._lifetime_points,
            newest_at_ms=self._newest_at_ms,
            lots=lots,
            far_lots=far_lots,
            drawn_to_ms=drawn_to_ms,
            uncheckpointed=self._uncheckpointed,
        )

    def run(self, events: Iterable[Event], void: Collection[str] = (), remembered: Collection[str] = ()) -> None:
        """Apply events, all later than the newest entry, in the order of the book. Raises FarLotsNeededError."""
        for at_ms, same_time in groupby(sorted(events, key=_time), key=_time):
            if self._uncheckpointed >= CHECKPOINT_ENTRIES:
                self._uncheckpointed = 0
                self.checkpoints.append(self.kept_account())
            group = list(same_time)
            if len(group) == 1 and not void:
                self._step(group[0], 0)
            else:
                self._run_millisecond(at_ms, group, void)
            self._uncheckpointed += len(group)
            for event in group:
                if event.event_id in remembered:
                    self.snapshots[event.event_id] = self.account()

    def _run_millisecond(self, at_ms: int, events: Sequence[Event], void: Collection[str]) -> None:
        """Apply the events of one millisecond: those without a balance by event_id, the trail, and the void ones."""
        counting = [event for event in events if event.event_id not in void]
        ordinal = 0
        for event in sorted((event for event in counting if event.balance is None), key=_id):
            self._step(event, ordinal)
            ordinal += 1
        balanced = [event for event in counting if event.balance is not None]
        if len(balanced) > 1:
            balance = None if self._opening is None else self._balance
            balanced = order_millisecond(balanced, balance=balance, expired=self._pool.expired(at_ms))
        for event in balanced:
            self._step(event, ordinal)
            ordinal += 1
        for event in sorted((event for event in events if event.event_id in void), key=_id):
            self._newest_at_ms = at_ms
            self.entries.append(Entry(event, ordinal, self._balance, self._balance, 0, 0, (), is_void=True))
            ordinal += 1

    def _step(self, event: Event, ordinal: int) -> None:
        """Apply one event at its place."""
        at_ms, value = event.updated_at_ms, event.value
        increases = event.update_type is UpdateType.INCREASE
        if self._opening is None:
            self._open(event)
        balance_before = self._balance
        expected = balance_before + (value if increases else -value)
        gap = 0 if event.balance is None else event.balance - expected

        pool = self._pool
        draws: list[Draw] = []
        if gap > 0:
            pool.add(gap, None, event.event_id)
        if increases:
            pool.add(value, event.expires_at_ms, event.event_id)
        else:
            pool.take(value, at_ms, draws, expired_first=event.scene == EXPIRED_SCENE)
        silently_expired = pool.take(-gap, at_ms, draws, expired_first=True) if gap < 0 else 0
        balance = bounded(expected + gap)
        pool.take(pool.held - max(balance, 0), at_ms, draws, expired_first=True)

        drift = bounded(gap + silently_expired)
        self._balance = balance
        self._drift = bounded(self._drift + drift)
        self._silently_expired = bounded(self._silently_expired + silently_expired)
        if increases and event.scene not in GIVEN_BACK_SCENES:
            self._lifetime_points = bounded(self._lifetime_points + value)
        self._newest_at_ms = at_ms
        self.entries.append(Entry(event, ordinal, balance_before, balance, drift, silently_expired, tuple(draws)))

    def _open(self, event: Event) -> None:
        """Open the account at its first event: what it held before is a lot that never expires."""
        opening = 0 if event.balance is None else event.balance - event.delta
        self._opening = self._balance = opening
        self._lifetime_points = max(opening, 0)
        self._pool.add(max(opening, 0), None, event.event_id)


def bounded(points: int) -> int:
    """Let a sum stop where the database's numbers end."""
    return max(-SUM_MAX, min(points, SUM_MAX))


def _time(event: Event) -> int:
    return event.updated_at_ms


def _id(event: Event) -> str:
    return event.event_id
