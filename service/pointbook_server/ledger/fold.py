"""The fold: it computes an account's state from its entries, in ledger order.

Source: docs/reference/ledger.md#fold.
"""

from collections.abc import Collection, Sequence
from itertools import groupby

from pointbook_server.ledger.lots import Draw, Lot, LotPool, OverflowLots
from pointbook_server.ledger.model import Account, Entry, Event, UpdateType
from pointbook_server.ledger.ordering import order_millisecond
from pointbook_server.ledger.scenes import EXPIRED_SCENE, REFUND_SCENES

SUM_MAX = 2**63 - 1
"""The bound of all sums: the largest bigint. Only forged events reach it; sums are clamped, not refused."""
LONG_FOLD_ENTRIES = 1_000
"""The number of entries from which a fold runs in a thread, so that it does not block the event loop."""
CHECKPOINT_ENTRIES = 128
"""The number of entries between checkpoints, which spare late events a fold from the beginning."""
RECENT_ENTRIES = 16
"""A re-fold leaves a checkpoint this many entries before the newest: more late events are likely to follow soon."""


def fold(account: Account, events: Sequence[Event], void_ids: Collection[str] = ()) -> tuple[Account, list[Entry]]:
    """Return an account after more events, and their entries.

    All events must be later than the account's newest entry. Those in `void_ids` make void entries. Raises
    OverflowLotsNeededError.
    """
    folding = Fold(account)
    folding.apply(events, void_ids)
    return folding.account(), folding.entries


class Fold:
    """An account to which events are applied, with the entries that they make.

    `snapshots` has the accounts after the `snapshot_ids` of `apply`. `checkpoints` are the states to store. Each lies
    between two milliseconds, so they are more than CHECKPOINT_ENTRIES apart if a millisecond has many events.
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
        self._pool = LotPool(account.lots, account.overflow, account.drawn_to_ms)
        self._account: Account | None = None
        """The current account, once it was needed; None after a change."""

    def is_before(self, at_ms: int) -> bool:
        """Return whether all entries are before a time."""
        return self._newest_at_ms is None or self._newest_at_ms < at_ms

    def account(self) -> Account:
        """Return the current account with all loaded lots."""
        if self._account is None:
            self._account = self._state(*self._pool.loaded())
        return self._account

    def stored_account(self) -> Account:
        """Return the current account as its row stores it, with the first lots only."""
        return self._state(*self._pool.stored()) if self._pool.is_long else self.account()

    def _state(self, lots: tuple[Lot, ...], overflow: OverflowLots | None, drawn_to_ms: int) -> Account:
        return Account(
            self._opening,
            self._balance,
            self._drift,
            self._silently_expired,
            self._lifetime_points,
            self._newest_at_ms,
            lots,
            overflow,
            drawn_to_ms,
            self._uncheckpointed,
        )

    def apply(
        self,
        events: Sequence[Event],
        void_ids: Collection[str] = (),
        snapshot_ids: Collection[str] = (),
        *,
        is_refold: bool = False,
    ) -> None:
        """Apply events, all later than the newest entry, in ledger order.

        `snapshot_ids` are the event_ids after which to take a snapshot. A re-fold leaves a recent checkpoint. Raises
        OverflowLotsNeededError.
        """
        pending = len(events)
        for group in _group_by_millisecond(events):
            is_recent = is_refold and pending <= RECENT_ENTRIES <= self._uncheckpointed
            pending -= len(group)
            if is_recent or self._uncheckpointed >= CHECKPOINT_ENTRIES:
                self._uncheckpointed = 0
                self._account = None
                self.checkpoints.append(self.stored_account())
            if len(group) == 1 and not void_ids:
                self._apply_event(group[0], 0)
            else:
                self._apply_millisecond(group[0].updated_at_ms, group, void_ids)
            self._uncheckpointed += len(group)
            self._account = None
            for event in group:
                if event.event_id in snapshot_ids:
                    self.snapshots[event.event_id] = self.account()

    def _apply_millisecond(self, at_ms: int, events: Sequence[Event], void_ids: Collection[str]) -> None:
        """Apply the events of one millisecond in ledger order.

        Events without a balance come first by event_id, then the trail, then void events.
        Source: docs/reference/ledger.md#order-of-events.
        """
        counting = [event for event in events if event.event_id not in void_ids]
        ordinal = 0
        for event in sorted((event for event in counting if event.balance is None), key=_event_id):
            self._apply_event(event, ordinal)
            ordinal += 1
        balanced = [event for event in counting if event.balance is not None]
        if len(balanced) > 1:
            balance = None if self._opening is None else self._balance
            balanced = order_millisecond(balanced, balance=balance, expired=self._pool.sum_expired(at_ms))
        for event in balanced:
            self._apply_event(event, ordinal)
            ordinal += 1
        for event in sorted((event for event in events if event.event_id in void_ids), key=_event_id):
            self._newest_at_ms = at_ms
            self.entries.append(Entry(event, ordinal, self._balance, self._balance, 0, 0, (), is_void=True))
            ordinal += 1

    def _apply_event(self, event: Event, ordinal: int) -> None:
        """Apply one event. Source: docs/reference/ledger.md#gaps-and-drift."""
        at_ms, value = event.updated_at_ms, event.value
        increases = event.update_type is UpdateType.INCREASE
        if self._opening is None:
            self._open(event)
        balance_before = self._balance
        expected = balance_before + (value if increases else -value)
        gap = 0 if event.balance is None else event.balance - expected
        drift = silently_expired = 0

        pool = self._pool
        draws: list[Draw] = []
        if gap > 0:
            pool.add(gap, None, event.event_id)
        if increases:
            pool.add(value, event.expires_at_ms, event.event_id)
        else:
            pool.draw(value, at_ms, draws, expired_first=event.scene == EXPIRED_SCENE)
        if gap < 0:
            silently_expired = pool.draw(-gap, at_ms, draws, expired_first=True)
        balance = clamp(expected + gap)
        surplus = pool.total - max(balance, 0)
        if surplus:
            pool.draw(surplus, at_ms, draws, expired_first=True)

        if gap:
            drift = clamp(gap + silently_expired)
            self._drift = clamp(self._drift + drift)
            self._silently_expired = clamp(self._silently_expired + silently_expired)
        self._balance = balance
        if increases and event.scene not in REFUND_SCENES:
            self._lifetime_points = clamp(self._lifetime_points + value)
        self._newest_at_ms = at_ms
        self.entries.append(Entry(event, ordinal, balance_before, balance, drift, silently_expired, tuple(draws)))

    def _open(self, event: Event) -> None:
        """Open the account at its first event.

        The balance before it becomes a lot that never expires.
        """
        opening = 0 if event.balance is None else event.balance - event.delta
        self._opening = self._balance = opening
        self._lifetime_points = max(opening, 0)
        self._pool.add(max(opening, 0), None, event.event_id)


def clamp(points: int) -> int:
    """Return a sum limited to the range of the database's integers."""
    if -SUM_MAX <= points <= SUM_MAX:
        return points
    return SUM_MAX if points > 0 else -SUM_MAX


def _group_by_millisecond(events: Sequence[Event]) -> list[Sequence[Event]]:
    """Return events in order of time, those of one millisecond together."""
    if len(events) == 1:
        return [events]
    in_order = sorted(events, key=_updated_at_ms)
    return [list(same_time) for _, same_time in groupby(in_order, key=_updated_at_ms)]


def _updated_at_ms(event: Event) -> int:
    return event.updated_at_ms


def _event_id(event: Event) -> str:
    return event.event_id
