"""Records of the audit of one-time codes.

Source: docs/reference/validation-codes.md#keeping-codes-out-of-logs
"""

from enum import StrEnum
from typing import NamedTuple

from pointbook_common.durations import DAY_MS
from pointbook_server.validation_codes.model import Challenge, Purpose

HELD = "HELD"
"""The outcome of a request whose challenge is live and in its cooldown."""
OPENED = "OPENED"
RENEWED = "RENEWED"
DONE = "DONE"
USED = "USED"
ENDED = "ENDED"
SEEN = "SEEN"


class AuditAction(StrEnum):
    """The actions that are audited: the names of ValidationAction in redemption.proto."""

    ISSUE = "ISSUE"
    DELIVER = "DELIVER"
    GUESS = "GUESS"
    USE = "USE"
    CONFIRM = "CONFIRM"
    RESET = "RESET"
    END = "END"


class GuessOutcome(StrEnum):
    """The outcome of a guess. Callers learn only whether it was right."""

    RIGHT = "RIGHT"
    WRONG = "WRONG"
    OTHER_CHALLENGE = "OTHER_CHALLENGE"
    LOCKED = "LOCKED"
    EXPIRED = "EXPIRED"
    NO_CHALLENGE = "NO_CHALLENGE"
    KEY_UNKNOWN = "KEY_UNKNOWN"


COUNTED_ONE_BY_ONE = {GuessOutcome.RIGHT, GuessOutcome.WRONG, GuessOutcome.OTHER_CHALLENGE}
"""Guesses with a record each: wrong ones are limited, and right ones need the code."""


class AuditRecord(NamedTuple):
    """An action, its customer, purpose, actor and outcome, without code and contact.

    Records that callers can repeat without limit have a `period`. In a period, records of the same action, outcome,
    customer, challenge and actor are one row with a count, even for different programs and points.
    """

    action: AuditAction
    outcome: str
    customer: str
    challenge_id: str
    program_id: int
    points: int
    channel: str
    actor: str
    reason: str = ""
    period: str = ""

    @property
    def columns(self) -> tuple[str | int, ...]:
        """The values of the stored columns: all but the period."""
        return self[:-1]


def challenge_record(action: AuditAction, outcome: str, challenge: Challenge, actor: str) -> AuditRecord:
    """Return a record about a challenge."""
    return purpose_record(action, outcome, challenge.purpose, actor, challenge)


def purpose_record(
    action: AuditAction, outcome: str, purpose: Purpose, actor: str, challenge: Challenge | None, *, period: str = ""
) -> AuditRecord:
    """Return a record about a purpose, and about the challenge that was live."""
    challenge_id, channel = ("", "") if challenge is None else (challenge.challenge_id, challenge.channel.value)
    return AuditRecord(
        action,
        outcome,
        purpose.customer,
        challenge_id,
        purpose.program_id,
        purpose.points,
        channel,
        actor,
        period=period,
    )


def day_period(now_ms: int) -> str:
    """Return the day of a time: the period in which repeated records share a row."""
    return f"day {now_ms // DAY_MS}"
