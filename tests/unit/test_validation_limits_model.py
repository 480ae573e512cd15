"""Counts over sliding windows: what they keep, and how they are taken back."""

import pytest

from pointbook_server.programs.model import Channel
from pointbook_server.validation_codes.commands import MERCHANT_SENDS, Deliver, LockedState, SendCounter
from pointbook_server.validation_codes.model import Challenge, Delivery, KeyRing, Purpose
from pointbook_server.validation_codes.rate_limits import (
    DAY_MS,
    MERCHANT_GRAIN_MS,
    MERCHANT_WINDOW_MS,
    SlidingWindowCounter,
)

NOW_MS = 1_780_000_000_000
KEYS = KeyRing({"new": b"n" * 32, "old": b"o" * 32})


def test_a_busy_merchant_is_counted_in_little_room() -> None:
    """A merchant who sends all day long: the row is read and written with every message."""
    tally = SlidingWindowCounter()
    for passed_ms in range(0, DAY_MS, MERCHANT_GRAIN_MS):
        tally = tally.after(NOW_MS + passed_ms, window_ms=MERCHANT_WINDOW_MS, grain_ms=MERCHANT_GRAIN_MS)

    assert len(tally.counts) <= MERCHANT_WINDOW_MS / MERCHANT_GRAIN_MS + 1


def test_what_a_window_reaches_is_kept() -> None:
    """To the millisecond, also where the clock went back meanwhile."""
    tally = SlidingWindowCounter().after(NOW_MS)
    assert len(tally.after(NOW_MS + DAY_MS - 1).counts) == 2
    assert len(tally.after(NOW_MS + DAY_MS).counts) == 1
    assert len(tally.after(NOW_MS - DAY_MS).counts) == 2


@pytest.mark.parametrize("delivery", list(Delivery))
def test_a_message_that_was_not_sent_is_taken_back_once(delivery: Delivery) -> None:
    """Where it was counted: while keys are rotated, another server may count by the older one at the same moment."""
    sends = SendCounter.to(KEYS, "m", "+8613812345678")
    one = SlidingWindowCounter(((NOW_MS, 1),), 1)
    challenge = Challenge(
        "c", Purpose("m", "customer c", 1, 10), Channel.SMS, "new", b"d" * 32, b"c" * 32, Delivery.PENDING, NOW_MS, 0, 0
    )
    board = LockedState(NOW_MS, {}, dict.fromkeys([*sends.subjects, MERCHANT_SENDS], one))
    Deliver(challenge, sends, delivery, "actor").run(board)

    left = sum(count for subject in sends.subjects for _, count in board.tallies[subject].counts)
    assert left == (1 if delivery is Delivery.FAILED else 2)
