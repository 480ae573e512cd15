"""The pool of an account's open lots."""

from collections.abc import Iterator
from unittest.mock import patch

import pytest

from pointbook_server.ledger import lots
from pointbook_server.ledger.lots import (
    NEVER_MS,
    Draw,
    Lot,
    LotPool,
    OverflowLots,
    OverflowLotsNeededError,
    sum_unexpired_and_expired,
)


@pytest.fixture(autouse=True)
def _few_lots() -> Iterator[None]:
    """Store two of more than three lots."""
    with patch.object(lots, "STORED_LOTS_MAX", 3), patch.object(lots, "STORED_LOTS_AFTER_TRIM", 2):
        yield


def lot(points: int, expires_at_ms: int | None, event_id: str = "e") -> Lot:
    """Build an untouched lot."""
    return Lot(points, points, expires_at_ms, event_id)


def pool_of(*loaded: Lot, overflow: OverflowLots | None = None, drawn_to_ms: int = 0) -> LotPool:
    """Build a pool with some lots."""
    return LotPool(loaded, overflow, drawn_to_ms)


def event_ids(pool: LotPool) -> list[str]:
    """Return the event_ids of the loaded lots in draw order."""
    return [lot.event_id for lot in pool.loaded()[0]]


def test_lots_are_sorted_in_draw_order() -> None:
    pool = pool_of()
    for points, expires_at_ms, event_id in ((1, None, "n"), (1, 30, "b"), (1, 20, "a"), (1, 30, "c"), (1, None, "o")):
        pool.add(points, expires_at_ms, event_id)

    assert event_ids(pool) == ["a", "b", "c", "n", "o"]
    assert pool.total == 5


def test_an_empty_lot_is_not_added() -> None:
    pool = pool_of()
    pool.add(0, 30, "e")

    assert pool.loaded() == ((), None, 0)


def test_a_draw_takes_unexpired_lots_first() -> None:
    pool = pool_of(lot(5, 10, "expired"), lot(5, 20, "soon"), lot(5, None, "never"))
    draws: list[Draw] = []

    assert pool.draw(12, 10, draws, expired_first=False) == 2
    assert draws == [Draw(5, 20, "soon"), Draw(5, None, "never"), Draw(2, 10, "expired")]
    assert pool.loaded() == ((Lot(3, 5, 10, "expired"),), None, NEVER_MS)
    assert pool.total == 3


def test_an_expiry_draw_takes_expired_lots_first() -> None:
    pool = pool_of(lot(5, 10, "expired"), lot(5, 20, "soon"), lot(5, None, "never"))
    draws: list[Draw] = []

    assert pool.draw(7, 10, draws, expired_first=True) == 5
    assert draws == [Draw(5, 10, "expired"), Draw(2, 20, "soon")]
    assert pool.loaded() == ((Lot(3, 5, 20, "soon"), lot(5, None, "never")), None, 20)


@pytest.mark.parametrize("expired_first", [True, False])
def test_a_draw_takes_no_more_than_the_total(*, expired_first: bool) -> None:
    pool = pool_of(lot(5, 20))
    draws: list[Draw] = []

    assert pool.draw(0, 10, draws, expired_first=expired_first) == 0
    assert pool.draw(-3, 10, draws, expired_first=expired_first) == 0
    assert pool.loaded() == ((lot(5, 20),), None, 0)
    assert pool.draw(9, 10, draws, expired_first=expired_first) == 0
    assert draws == [Draw(5, 20, "e")]
    assert (pool.total, pool.loaded()[0]) == (0, ())


def test_a_lot_expires_at_its_expiry_millisecond_and_not_before() -> None:
    pool = pool_of(lot(5, 20), lot(3, 21))

    assert [pool.sum_expired(at_ms) for at_ms in (19, 20, 21)] == [0, 5, 8]
    assert [sum_unexpired_and_expired(pool.loaded()[0], None, at_ms) for at_ms in (19, 20, 21)] == [
        (8, 0),
        (3, 5),
        (0, 8),
    ]


def test_only_the_first_of_many_lots_are_stored() -> None:
    """The rest is stored as a sum with the expiry and event of its first lot."""
    four = [lot(1, 10, "a"), lot(2, 20, "b"), lot(3, 30, "c"), lot(4, None, "d")]

    assert pool_of(*four[:3]).stored() == (tuple(four[:3]), None, 0)
    assert pool_of(*four).stored() == (tuple(four[:2]), OverflowLots(7, 30, "c"), 0)
    assert pool_of(*four).loaded() == (tuple(four), None, 0)


def test_added_lots_join_the_overflow_unless_they_expire_sooner() -> None:
    pool = pool_of(lot(1, 10, "a"), overflow=OverflowLots(7, 30, "c"))
    pool.add(5, 30, "tie")
    pool.add(5, None, "never")
    pool.add(2, 29, "b")

    assert pool.loaded() == ((lot(1, 10, "a"), lot(2, 29, "b")), OverflowLots(17, 30, "c"), 0)
    pool.add(1, 11, "x")
    pool.add(1, 12, "y")
    assert pool.stored() == ((lot(1, 10, "a"), lot(1, 11, "x")), OverflowLots(20, 12, "y"), 0)
    assert pool.total == 22


def test_lots_up_to_the_latest_drawn_expiry_stay_stored() -> None:
    """A lot that was drawn from cannot be read back from the entry that made it."""
    loaded = [lot(1, 10 * number, f"at-{number}") for number in range(1, 6)]

    assert len(pool_of(*loaded, drawn_to_ms=40).stored()[0]) == 4
    assert pool_of(*loaded, drawn_to_ms=40).stored()[1] == OverflowLots(1, 50, "at-5")
    assert pool_of(*loaded, drawn_to_ms=50).stored() == (tuple(loaded), None, 50)


def test_lots_of_a_drawn_expiry_overflow_behind_the_oldest() -> None:
    """The oldest lot is drawn first, so the lots behind it are untouched."""
    loaded = [lot(1, 10, "a"), Lot(1, 2, 20, "b"), lot(1, 20, "c"), lot(1, 20, "d")]

    assert pool_of(*loaded, drawn_to_ms=20).stored() == (tuple(loaded[:2]), OverflowLots(2, 20, "c"), 20)
    with_earlier = [lot(1, 5, "z"), *loaded[:1], *loaded[1:]]
    assert pool_of(*with_earlier, drawn_to_ms=20).stored()[1] == OverflowLots(2, 20, "c")


def test_two_never_expiring_lots_of_one_event_stay_together() -> None:
    """A gap and the increase itself can make two such lots, which share an event_id."""
    loaded = [lot(1, None, "a"), lot(1, None, "b"), lot(2, None, "b"), lot(1, None, "c")]
    pair = [lot(1, 10, "a"), lot(1, 20, "b"), lot(2, None, "b"), lot(1, None, "c")]

    assert pool_of(*loaded).stored()[1] == OverflowLots(1, None, "c")
    # Two lots of different expiry may be separated.
    assert pool_of(*pair).stored()[1] == OverflowLots(3, None, "b")


@pytest.mark.parametrize(
    ("points", "at_ms", "expired_first"), [(4, 0, False), (4, 0, True), (1, 30, False), (1, 30, True), (2, 10, True)]
)
def test_a_draw_that_reaches_the_overflow_needs_it(points: int, at_ms: int, *, expired_first: bool) -> None:
    loaded = [] if points == 1 else [lot(1, 20, "a"), lot(2, 20, "b")] if points == 4 else [lot(1, 10, "a")]
    pool = pool_of(*loaded, overflow=OverflowLots(9, 30, "c"))

    with pytest.raises(OverflowLotsNeededError):
        pool.draw(points, at_ms, [], expired_first=expired_first)


@pytest.mark.parametrize("expired_first", [True, False])
def test_a_draw_that_loaded_lots_cover_does_not_need_the_overflow(*, expired_first: bool) -> None:
    pool = pool_of(lot(1, 10, "a"), lot(2, 20, "b"), overflow=OverflowLots(9, 30, "c"))
    draws: list[Draw] = []

    pool.draw(3, 9, draws, expired_first=expired_first)

    assert draws == [Draw(1, 10, "a"), Draw(2, 20, "b")]
    assert pool.stored() == ((), OverflowLots(9, 30, "c"), 20)


def test_a_sum_needs_the_overflow_once_its_first_lot_expires() -> None:
    loaded, overflow = [lot(1, 10, "a")], OverflowLots(9, 30, "c")

    assert sum_unexpired_and_expired(loaded, overflow, 29) == (9, 1)
    assert pool_of(*loaded, overflow=overflow).sum_expired(29) == 1
    with pytest.raises(OverflowLotsNeededError):
        sum_unexpired_and_expired(loaded, overflow, 30)
    with pytest.raises(OverflowLotsNeededError):
        pool_of(*loaded, overflow=overflow).sum_expired(30)
    assert sum_unexpired_and_expired(loaded, OverflowLots(9, None, "c"), NEVER_MS - 1) == (9, 1)
