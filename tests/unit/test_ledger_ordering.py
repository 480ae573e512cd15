"""The order inside a millisecond: the smallest trail of balances."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pointbook_server.ledger.ordering import order_millisecond
from support.examples import examples

SECONDS_MAX = 0.5
"""Ten times the target for 1,000 events of one millisecond, because test machines are shared."""


@dataclass(frozen=True, slots=True)
class Change:
    """The attributes of an event that determine the order."""

    delta: int
    balance: int
    expires_at_ms: int | None = None
    scene: str = "SUCCESSFUL_ORDERS"

    @property
    def before(self) -> int:
        """The balance before the change."""
        return self.balance - self.delta

    @property
    def content(self) -> tuple[int, int, float, str]:
        """The sort key: no expiry sorts last."""
        expiry = float("inf") if self.expires_at_ms is None else self.expires_at_ms
        return (self.delta, self.balance, expiry, self.scene)


def is_trail(changes: Sequence[Change]) -> bool:
    """Return whether each change starts at the balance after the previous one."""
    return all(change.balance == after.before for change, after in pairwise(changes))


def smallest(trails: Sequence[Sequence[Change]]) -> list[Change]:
    """Return the trail whose sequence of contents is smallest."""
    return list(min(trails, key=lambda trail: [change.content for change in trail]))


def order_by_brute_force(changes: Sequence[Change], balance: int | None, expired: int) -> list[Change]:
    """Return the defined order by trying all permutations.

    Source: docs/reference/ledger.md#trail-of-balances.
    """
    trails = [trail for trail in permutations(changes) if is_trail(trail)]
    for start in [] if balance is None else [balance, balance - expired]:
        starting_trails = [trail for trail in trails if trail[0].before == start]
        if starting_trails:
            return smallest(starting_trails)
    if not trails:
        return sorted(changes, key=lambda change: change.content)
    # All open trails have the same start, so the smallest start is also the only possible one.
    start = min(trail[0].before for trail in trails)
    return smallest([trail for trail in trails if trail[0].before == start])


def distinct(changes: Sequence[Change]) -> list[Change]:
    """Return the changes without duplicates."""
    return list(dict.fromkeys(changes))


free_changes = st.builds(
    Change,
    delta=st.integers(-2, 2),
    balance=st.integers(-2, 3),
    expires_at_ms=st.sampled_from([None, 1, 2]),
    scene=st.sampled_from(["A", "B"]),
)


@st.composite
def walks(draw: st.DrawFn, count_max: int = 6) -> list[Change]:
    """Generate changes that have at least one trail.

    There are few balances, so loops and parallel changes are common.
    """
    balance = draw(st.integers(-1, 2))
    changes: list[Change] = []
    for _ in range(draw(st.integers(1, count_max))):
        after = draw(st.integers(-1, 2))
        expiry = draw(st.sampled_from([None, 1, 2]))
        changes.append(Change(after - balance, after, expiry, draw(st.sampled_from(["A", "B"]))))
        balance = after
    return changes


def test_the_trail_avoids_dead_ends() -> None:
    """+10, -10, +20 from 0: starting with the smallest step omits the others."""
    changes = [Change(20, 20), Change(-10, 0), Change(10, 10)]

    ordered = order_millisecond(changes, balance=0, expired=0)

    assert [change.delta for change in ordered] == [10, -10, 20]


def test_the_trail_starts_at_the_balance_before() -> None:
    loop = [Change(10, 10), Change(10, 20), Change(-20, 0)]

    assert [change.delta for change in order_millisecond(loop, balance=10, expired=0)] == [10, -20, 10]
    assert [change.delta for change in order_millisecond(loop, balance=20, expired=0)] == [-20, 10, 10]


def test_the_trail_may_start_at_the_balance_without_expired_points() -> None:
    """SHOPLINE may have taken expired points without an event."""
    loop = [Change(10, 10), Change(10, 20), Change(-20, 0)]

    ordered = order_millisecond(loop, balance=40, expired=20)

    assert [change.delta for change in ordered] == [-20, 10, 10]


def test_the_balance_before_is_tried_before_the_balance_without_expired_points() -> None:
    loop = [Change(10, 10), Change(10, 20), Change(-20, 0)]

    ordered = order_millisecond(loop, balance=20, expired=10)

    assert [change.delta for change in ordered] == [-20, 10, 10]


@pytest.mark.parametrize("balance", [None, 7, 30])
def test_an_open_trail_starts_at_its_only_possible_start(balance: int | None) -> None:
    """Even if the balance before is unknown or does not fit."""
    changes = [Change(20, 20), Change(-10, 0), Change(10, 10)]

    ordered = order_millisecond(changes, balance=balance, expired=0)

    assert [change.delta for change in ordered] == [10, -10, 20]


@pytest.mark.parametrize("balance", [None, 7])
def test_a_closed_trail_without_a_known_start_starts_at_the_smallest_balance(balance: int | None) -> None:
    """The true start is unknown, so all servers use the same rule."""
    loop = [Change(-15, 5), Change(10, 15), Change(5, 20)]

    ordered = order_millisecond(loop, balance=balance, expired=0)

    assert [change.delta for change in ordered] == [10, 5, -15]


def test_parallel_changes_are_sorted_by_expiry_and_then_by_scene() -> None:
    back = Change(-10, 0)
    soon, late, never = Change(10, 10, 1), Change(10, 10, 2), Change(10, 10, None, "A")
    back_again = Change(-10, 0, None, "T")

    ordered = order_millisecond([never, back_again, late, back, soon], balance=0, expired=0)

    assert ordered == [soon, back, late, back_again, never]


@pytest.mark.parametrize("balance", [None, 0, 5])
def test_without_a_trail_events_are_sorted_by_content(balance: int | None) -> None:
    ordered = [
        Change(-5, 3),
        Change(10, 50, 7),
        Change(10, 50, None, "A"),
        Change(10, 50, None, "B"),
        Change(10, 90, 1),
    ]

    assert order_millisecond(ordered[::-1], balance=balance, expired=0) == ordered


def test_a_change_of_zero_is_placed_where_the_trail_passes_its_balance() -> None:
    changes = [Change(5, 15), Change(0, 10), Change(0, 15), Change(10, 10)]

    ordered = order_millisecond(changes, balance=0, expired=0)

    assert [change.delta for change in ordered] == [10, 0, 5, 0]


def test_no_event_and_one_event_have_only_one_order() -> None:
    assert order_millisecond([], balance=3, expired=1) == []
    assert order_millisecond([Change(1, 1)], balance=3, expired=1) == [Change(1, 1)]


@given(st.data())
@settings(max_examples=examples(500), deadline=None)
def test_the_order_is_the_smallest_of_all_permutations_that_form_a_trail(data: st.DataObject) -> None:
    changes = distinct(data.draw(walks()))
    balance = data.draw(st.one_of(st.none(), st.integers(-2, 4)))
    expired = data.draw(st.integers(0, 3))

    expected = order_by_brute_force(changes, balance, expired)

    assert order_millisecond(data.draw(st.permutations(changes)), balance=balance, expired=expired) == expected


@given(
    st.lists(free_changes, min_size=1, max_size=6, unique=True),
    st.one_of(st.none(), st.integers(-2, 4)),
    st.integers(0, 3),
)
@settings(max_examples=examples(300), deadline=None)
@example([Change(1, 1), Change(-1, 0), Change(1, 3), Change(-1, 2)], 0, 0)
def test_any_changes_have_the_defined_order(changes: list[Change], balance: int | None, expired: int) -> None:
    """Including changes without a trail, and separate loops."""
    expected = order_by_brute_force(changes, balance, expired)

    assert order_millisecond(changes, balance=balance, expired=expired) == expected


def test_a_thousand_events_of_one_millisecond_are_ordered_fast(
    record_property: Callable[[str, object], None],
) -> None:
    """They form loops over loops; trying all orders would never end."""
    changes = [Change(10, 10, expiry) for expiry in range(500)] + [Change(-10, 0, expiry) for expiry in range(500)]

    start = time.perf_counter()
    ordered = order_millisecond(changes, balance=0, expired=0)
    seconds = time.perf_counter() - start

    record_property("order_1000_ms", round(seconds * 1_000, 2))
    assert seconds < SECONDS_MAX
    assert len(ordered) == 1_000
    assert is_trail(ordered)
    assert [change.expires_at_ms for change in ordered] == [n // 2 for n in range(1_000)]
