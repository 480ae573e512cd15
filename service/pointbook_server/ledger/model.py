"""The entities of the ledger: accounts, events and entries.

Times are whole milliseconds since 1970 (UTC), amounts are points.
"""

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

from pointbook_server.ledger.holds import Hold, sum_held
from pointbook_server.ledger.lots import Draw, Lot, OverflowLots, sum_unexpired_and_expired
from pointbook_server.ledger.scenes import DECREASING_SCENES, INCREASING_SCENES

POINTS_MAX = 10**15


class UpdateType(StrEnum):
    """The sign of an event."""

    INCREASE = "INCREASE"
    DECREASE = "DECREASE"


class ApplyOutcome(StrEnum):
    """The outcome of applying an event; REFUSED is stored, and reported as an error."""

    APPLIED = "APPLIED"
    DUPLICATE = "DUPLICATE"
    LATE = "LATE"
    REFUSED = "REFUSED"


class AccountKey(NamedTuple):
    """One buyer of one store.

    Accounts are locked in the sort order of their keys.
    """

    store_id: str
    buyer_id: str


class WebhookOrigin(NamedTuple):
    """The webhook that delivered an event. It is not part of the event's content."""

    webhook_id: str = ""
    shop_domain: str = ""
    api_version: str = ""


class Event(NamedTuple):
    """One points update of one account."""

    event_id: str
    account_key: AccountKey
    update_type: UpdateType
    scene: str
    value: int
    balance: int | None
    expires_at_ms: int | None
    updated_at_ms: int

    @property
    def delta(self) -> int:
        """The signed change. The update type alone gives the sign, never the scene.

        Source: docs/reference/shopline-webhooks.md#sign-of-an-update.
        """
        return self.value if self.update_type is UpdateType.INCREASE else -self.value

    @property
    def content(self) -> tuple[object, ...]:
        """The values that identify an event, without its event_id.

        Source: docs/reference/ledger.md#event-identity.
        """
        return (self.account_key, self.updated_at_ms, self.delta, self.balance, self.expires_at_ms, self.scene)


class ReceivedEvent(NamedTuple):
    """An event with its webhook and its time of receipt.

    With `forget_refusal`, a refusal is not stored.
    """

    event: Event
    webhook: WebhookOrigin
    received_at_ms: int
    forget_refusal: bool = False


class Expiry(NamedTuple):
    """Points of an account that expire at the same time."""

    at_ms: int
    points: int


class Points(NamedTuple):
    """An account's points at a time.

    Active points are redeemable. Expired points have not been deducted by an event yet.
    """

    active: int
    held: int
    expired: int


@dataclass(slots=True)
class Account:
    """The state of an account after its entries; never changed, only replaced.

    Every event makes several of these, and a frozen class would take several times longer to make.
    `opening` is None until the first entry that is not void, `newest_at_ms` until the first entry. `lots` are the first
    open lots in draw order, `overflow` is the rest (lots.py). Invariants: balance = opening + the deltas -
    silently_expired + drift, and the lots hold max(balance, 0) points. `uncheckpointed` counts the entries since the
    last checkpoint. Equality ignores `uncheckpointed` and `holds`, which events do not determine.
    Source: docs/reference/ledger.md#invariants.
    """

    opening: int | None = None
    balance: int = 0
    drift: int = 0
    silently_expired: int = 0
    lifetime_points: int = 0
    newest_at_ms: int | None = None
    lots: tuple[Lot, ...] = ()
    overflow: OverflowLots | None = None
    drawn_to_ms: int = 0
    uncheckpointed: int = field(default=0, compare=False)
    holds: tuple[Hold, ...] = field(default=(), compare=False)

    def is_before(self, at_ms: int) -> bool:
        """Return whether all entries are before a time.

        An event of that time then needs no new fold of earlier entries.
        """
        return self.newest_at_ms is None or self.newest_at_ms < at_ms

    def with_extra_points(self, points: int, event_id: str) -> "Account":
        """Return a copy with one more lot, valid only for computing active points."""
        return replace(self, lots=(*self.lots, Lot(points, points, None, event_id)))

    def points_at(self, at_ms: int) -> Points:
        """Return the active, held and expired points at a time.

        Held points expire like all others: SHOPLINE has no holds. Raises OverflowLotsNeededError.
        Source: docs/reference/ledger.md#active-points.
        """
        unexpired, expired = sum_unexpired_and_expired(self.lots, self.overflow, at_ms)
        held = sum_held(self.holds, at_ms)
        return Points(max(0, unexpired - held), held, expired)

    def unheld_lots(self, at_ms: int) -> list[Lot]:
        """Return the loaded lots without the points that are held at a time.

        Holds cover unexpired lots, soonest expiry first, as redemptions draw. Fully covered lots are left out.
        """
        held = sum_held(self.holds, at_ms)
        unheld = []
        for lot in self.lots:
            covered = min(held, lot.remaining) if lot.expiry_or_never_ms > at_ms else 0
            held -= covered
            if covered < lot.remaining:
                unheld.append(lot._replace(remaining=lot.remaining - covered) if covered else lot)
        return unheld

    def unheld_points_by_expiry(self, at_ms: int) -> dict[int, int]:
        """Return the unheld points at a time by expiry, soonest first, expired included."""
        points: dict[int, int] = {}
        for lot in self.unheld_lots(at_ms):
            if lot.expires_at_ms is not None:
                points[lot.expires_at_ms] = points.get(lot.expires_at_ms, 0) + lot.remaining
        return points

    def next_expiry(self, at_ms: int) -> Expiry | None:
        """Return the first expiry of unheld loaded lots after a time, if any."""
        expiries = self.unheld_points_by_expiry(at_ms).items()
        return next((Expiry(*expiry) for expiry in expiries if expiry[0] > at_ms), None)


class Entry(NamedTuple):
    """An accepted event with the values that the fold derives.

    `ordinal` is its position within the millisecond. A void entry has one too, but does not change the account.
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
        """Whether SHOPLINE documents the scene for the opposite direction."""
        opposite = INCREASING_SCENES if self.event.update_type is UpdateType.DECREASE else DECREASING_SCENES
        return self.event.scene in opposite


class ApplyResult(NamedTuple):
    """The outcome of applying one event, the account after it, and its entry.

    For a DUPLICATE, the entry is the one already in the ledger; for a REFUSED event, the one it would have made.
    `entry_webhook_id` is set if a different webhook delivered the entry of a DUPLICATE: the id of that webhook.
    """

    outcome: ApplyOutcome
    account: Account
    entry: Entry
    entry_webhook_id: str = ""


class Void(NamedTuple):
    """When and why an entry was voided."""

    at_ms: int
    reason: str


class StoredEntry(NamedTuple):
    """An entry with its receipt, its void, and the redemption that it settled."""

    entry: Entry
    webhook: WebhookOrigin
    received_at_ms: int
    outcome: ApplyOutcome
    void: Void | None = None
    settled_redemption_id: str | None = None


@dataclass(frozen=True, slots=True)
class EntryFilter:
    """The entries of an account to list; empty or None does not filter."""

    update_type: UpdateType | None = None
    scenes: tuple[str, ...] = ()
    start_ms: int | None = None
    end_ms: int | None = None
