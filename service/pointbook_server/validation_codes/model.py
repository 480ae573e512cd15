"""Entities of one-time codes: challenges, their purpose and their route.

Source: docs/reference/validation-codes.md#binding
"""

import secrets
from enum import StrEnum
from typing import NamedTuple

from pointbook_common.durations import MINUTE_MS, SECOND_MS
from pointbook_server.customers.model import Customer
from pointbook_server.programs.model import Channel, Program

ATTEMPTS_MAX = 5
"""Wrong guesses after which a challenge is locked. Source: docs/reference/validation-codes.md#attempt-limits"""
COOLDOWN_MS = MINUTE_MS
"""Time between two codes of a challenge. Source: docs/reference/validation-codes.md#issuing-again"""
DELIVERY_TIMEOUT_MS = 5 * SECOND_MS


class Delivery(StrEnum):
    """The outcome of a code's message."""

    PENDING = "PENDING"
    SENT = "SENT"
    FAILED = "FAILED"
    UNCERTAIN = "UNCERTAIN"


class ChallengeState(StrEnum):
    """Whether a challenge is live, or how it ended."""

    LIVE = "LIVE"
    REPLACED = "REPLACED"
    USED = "USED"
    ENDED = "ENDED"


class ChallengeKind(StrEnum):
    """The two kinds of challenges.

    A customer has at most one live challenge of each; neither replaces the other.
    """

    CODE = "CODE"
    MISSED_CALL = "MISSED_CALL"

    @classmethod
    def of(cls, channel: Channel) -> "ChallengeKind":
        """Return the kind of a channel's challenges."""
        return cls.MISSED_CALL if channel is Channel.MISSED_CALL else cls.CODE


class Purpose(NamedTuple):
    """The redemption that a code is for. A code is wrong for any other purpose."""

    merchant_id: str
    customer: str
    program_id: int
    points: int
    group_redemption: bool = False
    group_id: str = ""


class ChallengeSubject(NamedTuple):
    """A customer to be validated, the purpose, and the actor: the id of a token."""

    purpose: Purpose
    program: Program
    customer: Customer | None
    actor: str


class Route(NamedTuple):
    """The channel and destination of a code, to which the code is bound too.

    `key` is the form in which destinations are compared, if it differs from the destination. A new spelling of the same
    destination neither ends a code nor gets limits of its own.
    """

    channel: Channel
    destination: str = ""
    key: str = ""

    @property
    def bound_to(self) -> str:
        """The text to which codes and limits are bound."""
        return self.key or self.destination


class Challenge(NamedTuple):
    """An issued code, or a request for a missed call.

    Only the digests of code and destination are stored.

    The code_digest of a missed call matches no code. `attempts` counts the wrong guesses that named the challenge_id,
    `unnamed_attempts` those that did not.
    """

    challenge_id: str
    purpose: Purpose
    channel: Channel
    key_id: str
    destination_digest: bytes
    code_digest: bytes
    delivery: Delivery
    sent_at_ms: int
    resend_at_ms: int
    expires_at_ms: int
    attempts: int = 0
    unnamed_attempts: int = 0
    called_number: str = ""
    confirmed_at_ms: int | None = None
    state: ChallengeState = ChallengeState.LIVE

    @property
    def kind(self) -> ChallengeKind:
        """The kind of this challenge; a new challenge replaces the live one of its kind."""
        return ChallengeKind.of(self.channel)

    def is_uncertain(self, now_ms: int) -> bool:
        """Return whether the message may or may not have arrived.

        A delivery that is pending after its timeout is uncertain: the call that sent it has ended without a result.
        """
        delivery_ends_at_ms = self.resend_at_ms - COOLDOWN_MS + DELIVERY_TIMEOUT_MS
        has_timed_out = self.delivery is Delivery.PENDING and now_ms >= delivery_ends_at_ms
        return has_timed_out or self.delivery is Delivery.UNCERTAIN

    @property
    def may_resend_at_ms(self) -> int:
        """The time from which a new code may be sent.

        A locked challenge gets none, because no guess could use it.
        """
        return self.resend_at_ms if self.attempts < ATTEMPTS_MAX else self.expires_at_ms


class MissedCall(NamedTuple):
    """A missed call reported by a telephony provider, with its numbers in E.164 form."""

    merchant_id: str
    caller_number: str
    called_number: str
    provider_call_id: str
    call_ms: int


class IssuedChallenge(NamedTuple):
    """A live challenge, its route, and whether this call sent a message."""

    challenge: Challenge
    route: Route
    sent: bool


class ValidationEvent(NamedTuple):
    """An entry of the audit of a customer's codes.

    All fields describe the first occurrence, except `event_count` and `last_at_ms`, the time of the last one.
    """

    event_id: str
    at_ms: int
    action: str
    outcome: str
    customer: str
    challenge_id: str
    program_id: int
    points: int
    channel: str
    actor: str
    reason: str
    event_count: int
    last_at_ms: int


def new_challenge_id() -> str:
    """Return a new random id that cannot be guessed."""
    return secrets.token_urlsafe(18)
