"""Counters over sliding windows: what they store, and how they shrink."""

import pytest

from pointbook_common.durations import DAY_MS
from pointbook_server.programs.model import Channel
from pointbook_server.validation_codes.commands import RecordDeliveryCommand
from pointbook_server.validation_codes.key_ring import KeyRing
from pointbook_server.validation_codes.locked_state import MERCHANT_SENDS, LockedState, SendCounter
from pointbook_server.validation_codes.model import Challenge, Delivery, Purpose
from pointbook_server.validation_codes.rate_limits import (
    MERCHANT_GRAIN_MS,
    MERCHANT_WINDOW_MS,
    SlidingWindowCounter,
)

NOW_MS = 1_780_000_000_000
KEYS = KeyRing({"new": b"n" * 32, "old": b"o" * 32})


def test_counter_of_a_busy_merchant_stays_small() -> None:
    """Its row is read and written with every message."""
    counter = SlidingWindowCounter()
    for passed_ms in range(0, DAY_MS, MERCHANT_GRAIN_MS):
        counter = counter.add(NOW_MS + passed_ms, window_ms=MERCHANT_WINDOW_MS, grain_ms=MERCHANT_GRAIN_MS)

    assert len(counter.counts) <= MERCHANT_WINDOW_MS / MERCHANT_GRAIN_MS + 1


def test_counter_drops_events_outside_the_longest_window() -> None:
    """To the millisecond, also if the clock goes back."""
    counter = SlidingWindowCounter().add(NOW_MS)
    assert len(counter.add(NOW_MS + DAY_MS - 1).counts) == 2
    assert len(counter.add(NOW_MS + DAY_MS).counts) == 1
    assert len(counter.add(NOW_MS - DAY_MS).counts) == 2


@pytest.mark.parametrize("delivery", list(Delivery))
def test_only_a_failed_message_is_removed_from_its_counter(delivery: Delivery) -> None:
    """Only the counter of the signing key changes.

    During a key rotation another server may count under the old key.
    """
    sends = SendCounter.of(KEYS, "m", "+8613812345678")
    one_event = SlidingWindowCounter(((NOW_MS, 1),), 1)
    challenge = Challenge(
        "c", Purpose("m", "customer c", 1, 10), Channel.SMS, "new", b"d" * 32, b"c" * 32, Delivery.PENDING, NOW_MS, 0, 0
    )
    state = LockedState(NOW_MS, {}, dict.fromkeys([*sends.names, MERCHANT_SENDS], one_event))
    RecordDeliveryCommand(challenge, sends, delivery, "actor").run(state)

    remaining = sum(count for name in sends.names for _, count in state.counters[name].counts)
    assert remaining == (1 if delivery is Delivery.FAILED else 2)
