"""The open lots of an account, one small example each: which are drawn, and which are kept."""

from collections.abc import Iterator
from unittest.mock import patch

import pytest

from pointbook_server.ledger import lots
from pointbook_server.ledger.lots import NEVER_MS, Draw, Lot, LotPool, OverflowLots, OverflowLotsNeededError, points_at


@pytest.fixture(autouse=True)
def _few_lots() -> Iterator[None]:
    """Of more than three lots two are kept."""
    with patch.object(lots, "NEAR_LOTS_MAX", 3), patch.object(lots, "NEAR_LOTS_KEPT", 2):
        yield


def lot(points: int, expires_at_ms: int | None, event_id: str = "e") -> Lot:
    """A lot that nobody has drawn from."""
    return Lot(points, points, expires_at_ms, event_id)


def pool_of(*near: Lot, far: OverflowLots | None = None, drawn_to_ms: int = 0) -> LotPool:
    """A pool with some lots."""
    return LotPool(near, far, drawn_to_ms)


def names(pool: LotPool) -> list[str]:
    """Which lots are near, in the order in which they are drawn."""
    return [each.event_id for each in pool.all()[0]]


def test_lots_stand_in_the_order_in_which_they_are_drawn() -> None:
    """Soonest expiry first, never-expiring last, older ones first on a tie."""
    pool = pool_of()
    for points, expires_at_ms, event_id in ((1, None, "n"), (1, 30, "b"), (1, 20, "a"), (1, 30, "c"), (1, None, "o")):
        pool.add(points, expires_at_ms, event_id)

    assert names(pool) == ["a", "b", "c", "n", "o"]
    assert pool.held == 5


def test_a_lot_of_nothing_is_none() -> None:
    """It could never be drawn."""
    pool = pool_of()
    pool.add(0, 30, "e")

    assert pool.all() == ((), None, 0)


def test_unexpired_lots_are_drawn_first() -> None:
    """A purchase takes what would expire next, and what has expired only when nothing else is left."""
    pool = pool_of(lot(5, 10, "expired"), lot(5, 20, "soon"), lot(5, None, "never"))
    draws: list[Draw] = []

    assert pool.take(12, 10, draws, expired_first=False) == 2
    assert draws == [Draw(5, 20, "soon"), Draw(5, None, "never"), Draw(2, 10, "expired")]
    assert pool.all() == ((Lot(3, 5, 10, "expired"),), None, NEVER_MS)
    assert pool.held == 3


def test_an_expiry_takes_expired_lots_first() -> None:
    """How many came from them is told; what is missing comes from the soonest of the others."""
    pool = pool_of(lot(5, 10, "expired"), lot(5, 20, "soon"), lot(5, None, "never"))
    draws: list[Draw] = []

    assert pool.take(7, 10, draws, expired_first=True) == 5
    assert draws == [Draw(5, 10, "expired"), Draw(2, 20, "soon")]
    assert pool.all() == ((Lot(3, 5, 20, "soon"), lot(5, None, "never")), None, 20)


@pytest.mark.parametrize("expired_first", [True, False])
def test_no_more_is_taken_than_there_is(*, expired_first: bool) -> None:
    """And nothing where nothing is wanted."""
    pool = pool_of(lot(5, 20))
    draws: list[Draw] = []

    assert pool.take(0, 10, draws, expired_first=expired_first) == 0
    assert pool.take(-3, 10, draws, expired_first=expired_first) == 0
    assert pool.all() == ((lot(5, 20),), None, 0)
    assert pool.take(9, 10, draws, expired_first=expired_first) == 0
    assert draws == [Draw(5, 20, "e")]
    assert (pool.held, pool.all()[0]) == (0, ())


def test_a_lot_expires_at_its_very_millisecond() -> None:
    """Not one earlier."""
    pool = pool_of(lot(5, 20), lot(3, 21))

    assert [pool.expired(at_ms) for at_ms in (19, 20, 21)] == [0, 5, 8]
    assert [points_at(pool.all()[0], None, at_ms) for at_ms in (19, 20, 21)] == [(8, 0), (3, 5), (0, 8)]


def test_of_many_lots_the_first_are_kept() -> None:
    """The others are a sum, and the first of them is named; as many as there may be are all kept."""
    four = [lot(1, 10, "a"), lot(2, 20, "b"), lot(3, 30, "c"), lot(4, None, "d")]

    assert pool_of(*four[:3]).kept() == (tuple(four[:3]), None, 0)
    assert pool_of(*four).kept() == (tuple(four[:2]), OverflowLots(7, 30, "c"), 0)
    assert pool_of(*four).all() == (tuple(four), None, 0)


def test_far_lots_grow() -> None:
    """What is no sooner than the first of them joins them, also what comes from near; what is sooner is near."""
    pool = pool_of(lot(1, 10, "a"), far=OverflowLots(7, 30, "c"))
    pool.add(5, 30, "tie")
    pool.add(5, None, "never")
    pool.add(2, 29, "b")

    assert pool.all() == ((lot(1, 10, "a"), lot(2, 29, "b")), OverflowLots(17, 30, "c"), 0)
    pool.add(1, 11, "x")
    pool.add(1, 12, "y")
    assert pool.kept() == ((lot(1, 10, "a"), lot(1, 11, "x")), OverflowLots(20, 12, "y"), 0)
    assert pool.held == 22


def test_what_was_drawn_from_stays_near() -> None:
    """It cannot be read from the entry that made it; nor can what stands before it."""
    near = [lot(1, 10 * number, f"at-{number}") for number in range(1, 6)]

    assert len(pool_of(*near, drawn_to_ms=40).kept()[0]) == 4
    assert pool_of(*near, drawn_to_ms=40).kept()[1] == OverflowLots(1, 50, "at-5")
    assert pool_of(*near, drawn_to_ms=50).kept() == (tuple(near), None, 50)


def test_of_one_expiry_all_but_the_oldest_are_untouched() -> None:
    """The oldest that is left is drawn first: it may have been, those behind it have not."""
    near = [lot(1, 10, "a"), Lot(1, 2, 20, "b"), lot(1, 20, "c"), lot(1, 20, "d")]

    assert pool_of(*near, drawn_to_ms=20).kept() == (tuple(near[:2]), OverflowLots(2, 20, "c"), 20)
    three = [lot(1, 5, "z"), *near[:1], *near[1:]]
    assert pool_of(*three, drawn_to_ms=20).kept()[1] == OverflowLots(2, 20, "c")


def test_the_two_lots_of_one_event_stay_together() -> None:
    """What one event left unexplained and what it brought, both never expiring, are told by one id."""
    near = [lot(1, None, "a"), lot(1, None, "b"), lot(2, None, "b"), lot(1, None, "c")]
    pair = [lot(1, 10, "a"), lot(1, 20, "b"), lot(2, None, "b"), lot(1, None, "c")]

    assert pool_of(*near).kept()[1] == OverflowLots(1, None, "c")
    # Of different expiry, each of them is told.
    assert pool_of(*pair).kept()[1] == OverflowLots(3, None, "b")


@pytest.mark.parametrize(
    ("points", "at_ms", "expired_first"), [(4, 0, False), (4, 0, True), (1, 30, False), (1, 30, True), (2, 10, True)]
)
def test_a_draw_that_comes_to_the_far_lots_needs_them(points: int, at_ms: int, *, expired_first: bool) -> None:
    """Because the near ones are not enough, or because far ones might have to go first."""
    near = [] if points == 1 else [lot(1, 20, "a"), lot(2, 20, "b")] if points == 4 else [lot(1, 10, "a")]
    pool = pool_of(*near, far=OverflowLots(9, 30, "c"))

    with pytest.raises(OverflowLotsNeededError):
        pool.take(points, at_ms, [], expired_first=expired_first)


@pytest.mark.parametrize("expired_first", [True, False])
def test_a_draw_that_the_near_lots_serve_needs_no_others(*, expired_first: bool) -> None:
    """Down to the last of them, as long as no far lot has expired."""
    pool = pool_of(lot(1, 10, "a"), lot(2, 20, "b"), far=OverflowLots(9, 30, "c"))
    draws: list[Draw] = []

    pool.take(3, 9, draws, expired_first=expired_first)

    assert draws == [Draw(1, 10, "a"), Draw(2, 20, "b")]
    assert pool.kept() == ((), OverflowLots(9, 30, "c"), 20)


def test_a_question_that_comes_to_the_far_lots_needs_them() -> None:
    """Before the first of them expires nothing about them is asked."""
    near, far = [lot(1, 10, "a")], OverflowLots(9, 30, "c")

    assert points_at(near, far, 29) == (9, 1)
    assert pool_of(*near, far=far).expired(29) == 1
    with pytest.raises(OverflowLotsNeededError):
        points_at(near, far, 30)
    with pytest.raises(OverflowLotsNeededError):
        pool_of(*near, far=far).expired(30)
    assert points_at(near, OverflowLots(9, None, "c"), NEVER_MS - 1) == (9, 1)
