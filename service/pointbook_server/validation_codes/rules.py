"""Rules of challenges: how they are made, and for what they are valid."""

import secrets

from pointbook_server.programs.model import Channel
from pointbook_server.validation_codes.key_ring import KeyRing
from pointbook_server.validation_codes.model import (
    COOLDOWN_MS,
    Challenge,
    ChallengeKind,
    ChallengeSubject,
    Delivery,
    Purpose,
    Route,
)

DIGEST_BYTES = 32


def new_challenge(
    subject: ChallengeSubject, route: Route, keys: KeyRing, *, key_id: str, challenge_id: str, code: str, now_ms: int
) -> Challenge:
    """Return a challenge for a code, or for a missed call, which no code matches."""
    purpose, validation = subject.purpose, subject.program.validation
    is_call = route.channel is Channel.MISSED_CALL
    expires_at_ms = now_ms + validation.code_life_ms
    return Challenge(
        challenge_id=challenge_id,
        purpose=purpose,
        channel=route.channel,
        key_id=key_id,
        destination_digest=keys.destination_digest(key_id, purpose.merchant_id, route.bound_to),
        code_digest=secrets.token_bytes(DIGEST_BYTES)
        if is_call
        else keys.code_digest(key_id, code, challenge_id, purpose, route),
        delivery=Delivery.SENT if is_call else Delivery.PENDING,
        sent_at_ms=now_ms,
        resend_at_ms=expires_at_ms if is_call else now_ms + COOLDOWN_MS,
        expires_at_ms=expires_at_ms,
        called_number=validation.missed_call_number if is_call else "",
    )


def is_valid_for(challenge: Challenge, purpose: Purpose, route: Route, keys: KeyRing, now_ms: int) -> bool:
    """Return whether a challenge is of this purpose and route, and has not expired."""
    return (
        challenge.purpose == purpose
        and challenge.channel is route.channel
        and challenge.key_id in keys
        and challenge.destination_digest
        == keys.destination_digest(challenge.key_id, purpose.merchant_id, route.bound_to)
        and now_ms < challenge.expires_at_ms
    )


def can_be_used(live: Challenge, challenge: Challenge, now_ms: int) -> bool:
    """Return whether a checked challenge can be used, as it is under its lock.

    The code may have been renewed since it was compared. A missed call needs no code, but must be confirmed.
    """
    return (
        live.code_digest == challenge.code_digest
        and now_ms < live.expires_at_ms
        and (live.kind is ChallengeKind.CODE or live.confirmed_at_ms is not None)
    )
