"""Challenges: when one is valid, and when a new code may be sent."""

from pointbook_server.programs.model import Channel
from pointbook_server.validation_codes.key_ring import KeyRing
from pointbook_server.validation_codes.model import (
    ATTEMPTS_MAX,
    COOLDOWN_MS,
    Challenge,
    Delivery,
    Purpose,
    Route,
    new_challenge_id,
)
from pointbook_server.validation_codes.rules import can_be_used, is_valid_for

PURPOSE = Purpose("m", "buyer s b", 1, 100)
ROUTE = Route(Channel.SMS)
KEYS = KeyRing({"k1": b"k" * 32})
CHALLENGE = Challenge(
    "c",
    PURPOSE,
    Channel.SMS,
    "k1",
    KEYS.destination_digest("k1", "m", ""),
    b"d" * 32,
    Delivery.SENT,
    sent_at_ms=0,
    resend_at_ms=60_000,
    expires_at_ms=300_000,
)


def test_challenge_is_valid_for_its_purpose_and_route_until_it_expires() -> None:
    assert is_valid_for(CHALLENGE, PURPOSE, ROUTE, KEYS, 299_999)
    assert not is_valid_for(CHALLENGE, PURPOSE, ROUTE, KEYS, 300_000)
    assert not is_valid_for(CHALLENGE, PURPOSE._replace(points=110), ROUTE, KEYS, 0)
    assert not is_valid_for(CHALLENGE, PURPOSE, Route(Channel.EMAIL), KEYS, 0)
    assert not is_valid_for(CHALLENGE, PURPOSE, Route(Channel.SMS, "+8613812345678"), KEYS, 0)
    assert not is_valid_for(CHALLENGE, PURPOSE, ROUTE, KeyRing({"k2": b"k" * 32}), 0)


def test_challenge_can_be_used_until_it_expires_unless_its_code_was_renewed() -> None:
    assert can_be_used(CHALLENGE._replace(attempts=2), CHALLENGE, 299_999)
    assert not can_be_used(CHALLENGE, CHALLENGE, 300_000)
    assert not can_be_used(CHALLENGE._replace(code_digest=b"e" * 32), CHALLENGE, 0)


def test_missed_call_can_be_used_once_it_is_confirmed() -> None:
    call = CHALLENGE._replace(channel=Channel.MISSED_CALL)

    assert can_be_used(call._replace(confirmed_at_ms=1), call, 2)
    assert not can_be_used(call, call, 2)


def test_new_code_may_be_sent_after_the_cooldown_unless_locked() -> None:
    assert COOLDOWN_MS == 60_000
    assert CHALLENGE.may_resend_at_ms == 60_000
    assert CHALLENGE._replace(attempts=ATTEMPTS_MAX - 1).may_resend_at_ms == 60_000
    assert CHALLENGE._replace(attempts=ATTEMPTS_MAX).may_resend_at_ms == 300_000


def test_pending_delivery_is_uncertain_after_its_timeout() -> None:
    assert not CHALLENGE.is_uncertain(59_999)
    assert CHALLENGE._replace(delivery=Delivery.UNCERTAIN).is_uncertain(0)
    assert not CHALLENGE._replace(delivery=Delivery.FAILED).is_uncertain(59_999)
    assert not CHALLENGE._replace(delivery=Delivery.PENDING).is_uncertain(4_999)
    assert CHALLENGE._replace(delivery=Delivery.PENDING).is_uncertain(5_000)


def test_challenge_ids_are_unique_and_long() -> None:
    ids = {new_challenge_id() for _ in range(1_000)}

    assert len(ids) == 1_000
    assert all(len(challenge_id) >= 24 for challenge_id in ids)
