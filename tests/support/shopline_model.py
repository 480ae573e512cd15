"""A model of SHOPLINE, and the true histories of points that it sends."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations

from hypothesis import strategies as st

from pointbook_server.ledger.model import Event, UpdateType
from pointbook_server.ledger.scenes import EXPIRED_SCENE
from support.ledger_events import ACCOUNT

NEVER = float("inf")


@dataclass
class Shopline:
    """A model of SHOPLINE: its points by expiry, and the events that it has sent."""

    balance: int
    points: Counter[float]
    events: list[Event]
    silently_expired: int = 0
    lifetime_points: int = 0

    @classmethod
    def opened(cls, opening: int) -> "Shopline":
        """Build an account with points from before the first event."""
        points = max(opening, 0)
        return cls(opening, Counter({NEVER: points}), [], lifetime_points=points)

    def expired_points(self, at_ms: int) -> int:
        """Return the points that have expired and are still in the balance."""
        return sum(points for expiry, points in self.points.items() if expiry <= at_ms)

    def expire_silently(self, by_ms: int) -> None:
        """Remove expired points without an event."""
        expired = self.expired_points(by_ms)
        self.points = Counter({expiry: points for expiry, points in self.points.items() if expiry > by_ms})
        self.balance -= expired
        self.silently_expired += expired

    def send(self, event: Event) -> None:
        """Apply an event to the points, and send it."""
        self.balance += event.delta
        at_ms = event.updated_at_ms
        if event.update_type is UpdateType.INCREASE:
            self.points[NEVER if event.expires_at_ms is None else event.expires_at_ms] += event.value
            self.lifetime_points += event.value
        else:
            self._draw(event.value, at_ms, expired_first=event.scene == EXPIRED_SCENE)
        self._draw(self.points.total() - max(self.balance, 0), at_ms, expired_first=True)
        self.events.append(event)

    def points_by_expiry(self, at_ms: int) -> Counter[float]:
        """Return the points by expiry, with all expired points as one."""
        points: Counter[float] = Counter()
        for expiry, remaining in self.points.items():
            points[max(expiry, at_ms)] += remaining
        return +points

    def _draw(self, points: int, at_ms: int, *, expired_first: bool) -> None:
        for expiry in sorted(self.points, key=lambda expiry: ((expiry <= at_ms) != expired_first, expiry)):
            drawn = max(min(points, self.points[expiry]), 0)
            self.points[expiry] -= drawn
            points -= drawn


@dataclass(frozen=True)
class Move:
    """A change in points before its balance is known."""

    update_type: UpdateType
    value: int
    life_ms: int | None
    scene: str


moves = st.one_of(
    st.builds(
        Move,
        st.just(UpdateType.INCREASE),
        st.integers(0, 12),
        st.sampled_from([None, 0, 1, 2, 3, 5, 9]),
        st.sampled_from(["SUCCESSFUL_ORDERS", "LUCKY_DRAW"]),
    ),
    st.builds(
        Move,
        st.just(UpdateType.DECREASE),
        st.integers(0, 16),
        st.none(),
        st.sampled_from(["REDEEM_COUPON", EXPIRED_SCENE]),
    ),
)


@dataclass(frozen=True)
class Millisecond:
    """The events of one millisecond: silent expiry, then changes.

    With `returns`, a last change leads back to the balance at the start.
    """

    moves: tuple[Move, ...]
    after_ms: int
    silent_until_ms: int | None
    returns: bool


milliseconds = st.builds(
    Millisecond,
    st.lists(moves, min_size=1, max_size=5).map(tuple),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(0, 2)),
    st.booleans(),
)


def smallest_trail(events: Sequence[Event], start: int) -> list[Event]:
    """Return the defined order, by trying all orders that fit the balances."""

    def content(event: Event) -> tuple[object, ...]:
        expiry = NEVER if event.expires_at_ms is None else event.expires_at_ms
        return (event.delta, event.balance, expiry, event.scene)

    def follows(order: Sequence[Event]) -> bool:
        balances = [start, *(event.balance for event in order)]
        return all(
            before is not None and before + event.delta == event.balance
            for before, event in zip(balances, order, strict=False)
        )

    orders = [order for order in permutations(events) if follows(order)]
    return list(min(orders, key=lambda order: [content(event) for event in order]))


def apply_millisecond(shop: Shopline, millisecond: Millisecond, at_ms: int) -> Shopline | None:
    """Return the model after a millisecond; None for a known limit of the ledger."""
    after = replace(shop, points=shop.points.copy(), events=[*shop.events])
    if millisecond.silent_until_ms is not None:
        after.expire_silently(at_ms - millisecond.silent_until_ms)
    is_silent = after.balance < shop.balance
    start = balance = after.balance
    events: list[Event] = []
    for number, move in enumerate(millisecond.moves):
        is_expiry = move.scene == EXPIRED_SCENE
        value = min(move.value, after.expired_points(at_ms)) if is_expiry else move.value
        expires_at_ms = None if move.life_ms is None else at_ms + move.life_ms
        event_id = f"{at_ms}-{number}"
        event = Event(event_id, ACCOUNT, move.update_type, move.scene, value, None, expires_at_ms, at_ms)
        balance += event.delta
        events.append(event._replace(balance=balance))
    if millisecond.returns:
        update_type = UpdateType.INCREASE if start >= balance else UpdateType.DECREASE
        back = abs(start - balance)
        events.append(Event(f"{at_ms}-back", ACCOUNT, update_type, "MANUALLY", back, start, None, at_ms))
        balance = start
    if len({event.content for event in events}) < len(events):
        return None  # Two identical events of one millisecond count once: ledger.md#indistinguishable-events.
    trail = smallest_trail(events, start)
    is_loop = len(trail) > 1 and balance == start
    if is_loop and not shop.events:
        return None  # If the first millisecond is a loop, its order is unknown.
    if is_silent:
        # Only the balance before a loop determines its start, and that has changed without an event.
        is_partial = after.expired_points(at_ms) > 0
        if is_loop and (is_partial or shop.balance in {event.balance for event in trail}):
            return None
        # Expired points are gone before the event, but the fold draws them for the event.
        first = trail[0]
        if first.update_type is UpdateType.DECREASE and (first.scene == EXPIRED_SCENE or first.value > start):
            return None
    for event in trail:
        after.send(event)
    return after


@st.composite
def true_histories(draw: st.DrawFn, count_max: int = 5) -> Shopline:
    """Generate histories in which every event was sent with the right balance."""
    shop = Shopline.opened(draw(st.integers(-10, 30)))
    at_ms = 1_000
    for millisecond in draw(st.lists(milliseconds, min_size=1, max_size=count_max)):
        at_ms += millisecond.after_ms
        alone = replace(millisecond, moves=millisecond.moves[:1], silent_until_ms=None, returns=False)
        after = apply_millisecond(shop, millisecond, at_ms) or apply_millisecond(shop, alone, at_ms)
        assert after is not None, "a single event is never a known limit"
        shop = after
    return shop
