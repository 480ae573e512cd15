"""One-time codes as pure functions: how a code is made, what it is bound to, and when a new one is sent."""

import hmac
import secrets
from dataclasses import dataclass
from enum import StrEnum
from string import Template

from pointbook_server.programs.model import Channel, Validation

ATTEMPTS_MAX = 5
COOLDOWN_MS = 60_000
DELIVERY_MS_MAX = 5_000
DIGITS = "0123456789"
LETTERS_AND_DIGITS = "23456789ABCDEFGHJKLMNPQRSTUVWXYZ"
DIGEST_DOMAIN = "pointbook.code.v1"
DEFAULT_TEMPLATE = "$code is your code to redeem $points points. It is valid for $minutes minutes."


class Delivery(StrEnum):
    """What is known about a code's message."""

    PENDING = "PENDING"
    SENT = "SENT"
    FAILED = "FAILED"
    UNCERTAIN = "UNCERTAIN"


@dataclass(frozen=True, slots=True)
class Purpose:
    """What a code is for. Anything different makes it a wrong code."""

    merchant_id: str
    customer: str
    program_id: int
    points: int
    group_redemption: bool = False
    group_id: str = ""


@dataclass(frozen=True, slots=True)
class Route:
    """How a code reaches the customer; the code is bound to it too."""

    channel: Channel
    destination: str = ""


@dataclass(frozen=True, slots=True)
class Challenge:
    """A code that was issued, without the code: only its digest is kept."""

    challenge_id: str
    purpose: Purpose
    route: Route
    key_id: str
    code_digest: bytes
    attempts: int
    delivery: Delivery
    resend_at_ms: int
    expires_at_ms: int

    def holds(self, purpose: Purpose, route: Route, now_ms: int) -> bool:
        """Tell whether this challenge is the one for the same purpose and route, within its life."""
        return self.purpose == purpose and self.route == route and now_ms < self.expires_at_ms

    def is_uncertain(self, now_ms: int) -> bool:
        """Tell whether nobody knows if the message arrived; the call that sent it may have ended without a word."""
        unheard = self.delivery is Delivery.PENDING and now_ms >= self.resend_at_ms - COOLDOWN_MS + DELIVERY_MS_MAX
        return unheard or self.delivery is Delivery.UNCERTAIN

    @property
    def may_resend_at_ms(self) -> int:
        """From when a new code may be sent: a locked challenge gets none, since no guess could use it."""
        return self.resend_at_ms if self.attempts < ATTEMPTS_MAX else self.expires_at_ms


@dataclass(frozen=True, slots=True)
class Issued:
    """A challenge that waits for its code, and whether this call sent a message."""

    challenge: Challenge
    sent: bool


def new_challenge_id() -> str:
    """Make an id that nobody can guess."""
    return secrets.token_urlsafe(18)


def new_code(validation: Validation) -> str:
    """Make a code of which every one is equally likely, leading zeros included."""
    alphabet = LETTERS_AND_DIGITS if validation.alphanumeric else DIGITS
    return "".join(secrets.choice(alphabet) for _ in range(validation.code_length_or_default))


def code_digest(key: bytes, code: str, *, key_id: str, challenge_id: str, purpose: Purpose, route: Route) -> bytes:
    """Digest a code with all that it is bound to, each field prefixed by its length so that none can slide."""
    parts = (
        DIGEST_DOMAIN,
        key_id,
        challenge_id,
        purpose.merchant_id,
        purpose.customer,
        str(purpose.program_id),
        str(purpose.points),
        str(purpose.group_redemption),
        purpose.group_id,
        route.channel.value,
        route.destination,
        code,
    )
    encoded = [part.encode() for part in parts]
    return hmac.digest(key, b"".join(len(part).to_bytes(4, "big") + part for part in encoded), "sha256")


def message_text(validation: Validation, code: str, points: int, program_name: str) -> str:
    """Write the message of a code, from the program's template for everybody or our own."""
    template = validation.message_templates.get("") or validation.message_templates.get("en") or DEFAULT_TEMPLATE
    return Template(template).safe_substitute(
        code=code, points=points, program=program_name, minutes=validation.code_life_ms // 60_000
    )
