"""One-time codes as pure functions: how they are made, what they are bound to, where and when they go."""

import hmac
import secrets
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from string import Template, ascii_lowercase, ascii_uppercase
from typing import NamedTuple

import phonenumbers

from pointbook_common.text import ascii_digits, without_invisible
from pointbook_server.customers import phones
from pointbook_server.customers.model import Customer, IdentifierKind
from pointbook_server.errors import PointbookError, Reason, key_not_configured
from pointbook_server.programs.model import Channel, PhoneNumberType, Program, ValidationSettings, language_key

ATTEMPTS_MAX = 5
COOLDOWN_MS = 60_000
DELIVERY_MS_MAX = 5_000
DIGITS = "0123456789"
LETTERS_AND_DIGITS = "23456789ABCDEFGHJKLMNPQRSTUVWXYZ"
FULL_WIDTH_LETTERS = "".join(map(chr, (*range(0xFF41, 0xFF5B), *range(0xFF21, 0xFF3B))))
TO_UPPER_CASE = str.maketrans(ascii_lowercase + FULL_WIDTH_LETTERS, ascii_uppercase * 3)
OTHER_DASHES = "\u2053\u207b\u208b\u2212\u30fc\uff70"
"""Dashes outside of category Pd: swung, superscript, subscript and minus; Japanese keyboards type U+30FC for one."""
DIGEST_BYTES = 32
CODE_DOMAIN = "pointbook.code.v1"
DESTINATION_DOMAIN = "pointbook.destination.v1"
DEFAULT_TEMPLATE = "$code is your code to redeem $points points. It is valid for $minutes minutes."
CONTACT_KINDS = {
    Channel.SMS: IdentifierKind.MOBILE,
    Channel.EMAIL: IdentifierKind.EMAIL,
    Channel.MISSED_CALL: IdentifierKind.MOBILE,
}
MASK = "*" * 6
RETRY_AFTER_SECONDS = 1.0
REGION_RETRY_SECONDS = 86_400.0
"""When to ask again for a code to a region that the program does not allow: not before somebody has changed that."""


class Delivery(StrEnum):
    """What is known about a code's message."""

    PENDING = "PENDING"
    SENT = "SENT"
    FAILED = "FAILED"
    UNCERTAIN = "UNCERTAIN"


class ChallengeState(StrEnum):
    """Whether a challenge waits for its code, or why it does not any more."""

    LIVE = "LIVE"
    REPLACED = "REPLACED"
    USED = "USED"
    ENDED = "ENDED"


class Family(StrEnum):
    """The two kinds of challenges. A customer has one live challenge of each at most; neither replaces the other."""

    CODE = "CODE"
    MISSED_CALL = "MISSED_CALL"

    @classmethod
    def of(cls, channel: Channel) -> "Family":
        """Return the family of a channel's challenges."""
        return cls.MISSED_CALL if channel is Channel.MISSED_CALL else cls.CODE


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
class ChallengeSubject:
    """Who must prove that it is them and what for, and who asks: the id of a token."""

    purpose: Purpose
    program: Program
    customer: Customer | None
    actor: str


@dataclass(frozen=True, slots=True)
class Route:
    """How a code reaches the customer; the code is bound to it too.

    `key` is what the destination is compared by, where that is another text: a new spelling ends no code, and has no
    limits of its own.
    """

    channel: Channel
    destination: str = ""
    key: str = ""

    @property
    def bound_to(self) -> str:
        """What codes and limits are bound to."""
        return self.key or self.destination


@dataclass(frozen=True, slots=True)
class Challenge:
    """A code that was issued, without the code and where it went: only their digests are kept.

    That of a missed call has a digest that no code has. `attempts` are the wrong guesses that named it, and
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
    def family(self) -> Family:
        """Which live challenges this one replaces."""
        return Family.of(self.channel)

    def is_for(self, purpose: Purpose, route: Route, keys: "KeyRing", now_ms: int) -> bool:
        """Tell whether this challenge is the one for the same purpose and route, within its life."""
        return (
            self.purpose == purpose
            and self.channel is route.channel
            and self.key_id in keys
            and self.destination_digest == keys.destination_digest(self.key_id, purpose.merchant_id, route.bound_to)
            and now_ms < self.expires_at_ms
        )

    def is_uncertain(self, now_ms: int) -> bool:
        """Tell whether nobody knows if the message arrived; the call that sent it may have ended without a word."""
        unheard = self.delivery is Delivery.PENDING and now_ms >= self.resend_at_ms - COOLDOWN_MS + DELIVERY_MS_MAX
        return unheard or self.delivery is Delivery.UNCERTAIN

    @property
    def may_resend_at_ms(self) -> int:
        """From when a new code may be sent: a locked challenge gets none, since no guess could use it."""
        return self.resend_at_ms if self.attempts < ATTEMPTS_MAX else self.expires_at_ms


class MissedCall(NamedTuple):
    """A call that a telephony provider tells of, its numbers in E.164 form."""

    merchant_id: str
    caller_number: str
    called_number: str
    provider_call_id: str
    call_ms: int


@dataclass(frozen=True, slots=True)
class Issued:
    """A challenge that waits for its code, where that went, and whether this call sent a message."""

    challenge: Challenge
    route: Route
    sent: bool


class ValidationEvent(NamedTuple):
    """A line of the audit: what was done to a customer's code, by whom, how it ended and how often.

    `at_ms` and all that it was about are those of the first time, `last_at_ms` is that of the last one.
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
    """Make an id that nobody can guess."""
    return secrets.token_urlsafe(18)


def new_code(validation: ValidationSettings) -> str:
    """Make a code of which every one is equally likely, leading zeros included."""
    alphabet = LETTERS_AND_DIGITS if validation.alphanumeric else DIGITS
    length, code = validation.code_length_or_default, ""
    # One choice of all codes there are: that every one is equally likely needs no further argument.
    rest = secrets.randbelow(len(alphabet) ** length)
    for _ in range(length):
        rest, place = divmod(rest, len(alphabet))
        code += alphabet[place]
    return code


def normalised_code(typed: str) -> str:
    """Return a code as it was issued, from what a person typed or pasted.

    Digits of every script and full-width letters become ASCII, ASCII letters upper case; blanks, dashes and invisible
    characters are dropped. Nothing else is: a character that no code has, such as a dotless i, or 0, O, 1 and I among
    letters, makes a wrong code. It suits both alphabets, so that it needs no knowledge of the challenge.
    """
    visible = ascii_digits(without_invisible(typed)).translate(TO_UPPER_CASE)
    return "".join(character for character in visible if not _is_separator(character))


def _is_separator(character: str) -> bool:
    """Return whether a character only groups those around it: a blank or a dash."""
    return character.isspace() or character in OTHER_DASHES or unicodedata.category(character) == "Pd"


class KeyRing:
    """The keys that sign codes, by their ids: the first signs, all verify."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._keys = dict(keys)

    @property
    def signing_id(self) -> str:
        """The id of the key that signs. Raises KEY_NOT_CONFIGURED where there is none."""
        if not self._keys:
            raise key_not_configured("POINTBOOK_CODE_KEYS", "to sign codes with")
        return next(iter(self._keys))

    def __contains__(self, key_id: str) -> bool:
        """Tell whether there is a key of an id."""
        return key_id in self._keys

    def code_digest(self, key_id: str, code: str, challenge_id: str, purpose: Purpose, route: Route) -> bytes:
        """Digest a code with all that it is bound to. Source: validation-codes.md, kept as."""
        return _digest(
            self._keys[key_id],
            CODE_DOMAIN,
            key_id,
            challenge_id,
            purpose.merchant_id,
            purpose.customer,
            str(purpose.program_id),
            str(purpose.points),
            str(purpose.group_redemption),
            purpose.group_id,
            route.channel.value,
            route.bound_to,
            code,
        )

    def destination_digest(self, key_id: str, merchant_id: str, destination: str) -> bytes:
        """Digest a destination, which is kept in no other form."""
        return _digest(self._keys[key_id], DESTINATION_DOMAIN, key_id, merchant_id, destination)

    def destination_digests(self, merchant_id: str, destination: str) -> list[bytes]:
        """Digest a destination under every key, the signing one first."""
        return [self.destination_digest(key_id, merchant_id, destination) for key_id in self._keys]


def _digest(key: bytes, *parts: str) -> bytes:
    """Digest fields, each prefixed by its length so that none can slide."""
    encoded = [part.encode() for part in parts]
    return hmac.digest(key, b"".join(len(part).to_bytes(4, "big") + part for part in encoded), "sha256")


def new_challenge(
    proving: ChallengeSubject, route: Route, keys: KeyRing, *, key_id: str, challenge_id: str, code: str, now_ms: int
) -> Challenge:
    """Make a challenge that waits for a code, or for a missed call, which no code can stand in for."""
    purpose, validation = proving.purpose, proving.program.validation
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


def choose_route(
    program: Program,
    customer: Customer | None,
    channel: Channel | None,
    needs_destination: Mapping[Channel, bool],
    *,
    points: int,
    pause_ms: int,
    now_ms: int,
) -> Route:
    """Choose how a code goes: by the channel asked for, or by the program's first one that can reach the customer.

    `needs_destination` are the channels that this server has senders for. A contact that has changed in the last
    `pause_ms` gets no code. Raises CHANNEL_NOT_ENABLED, NO_DESTINATION, also for a number of a type that the program
    sends no SMS to, CONTACT_CHANGED, and SEND_LIMIT_REACHED for a region that the program does not allow. Source:
    validation-codes.md.
    """
    troubles = []
    for each in (channel,) if channel is not None else program.validation.enabled_channels:
        try:
            _check_channel(program, each, needs_destination, points, asked_for=channel is not None)
            route = _route_by(each, customer, needs_destination)
            if customer is not None and route.destination:
                _check_destination(program, customer, route, pause_ms, now_ms)
        except PointbookError as error:
            troubles.append(error)
        else:
            return route
    # The most useful error: first one that ends by itself, then one about a contact of the wrong type, then any other.
    raise max(troubles, key=lambda trouble: (trouble.retry_after_seconds is not None, bool(trouble.metadata)))


def _check_channel(
    program: Program, channel: Channel, needs_destination: Mapping[Channel, bool], points: int, *, asked_for: bool
) -> None:
    """Raise CHANNEL_NOT_ENABLED where the program, or this server, does not use a channel for so many points."""
    validation = program.validation
    if channel is Channel.MISSED_CALL:
        is_used = not validation.max_points_missed_call or points <= validation.max_points_missed_call
    else:
        is_used = channel in needs_destination
    if asked_for and (not is_used or channel not in validation.enabled_channels):
        raise PointbookError(
            Reason.CHANNEL_NOT_ENABLED,
            "Codes do not go by this channel here.",
            metadata={"validation_type": channel.value},
        )
    if not is_used:
        raise _no_destination()


def _route_by(channel: Channel, customer: Customer | None, needs_destination: Mapping[Channel, bool]) -> Route:
    """Find out where a code goes by a channel. Raises NO_DESTINATION."""
    route = route_to(customer, channel)
    if not route.destination and needs_destination.get(channel, True):
        raise _no_destination()
    return route


def route_to(customer: Customer | None, channel: Channel) -> Route:
    """Return how a channel reaches a customer, without a destination where it does not."""
    kind = CONTACT_KINDS[channel]
    for contact in () if customer is None else customer.contacts:
        if contact.kind is kind:
            return Route(channel, contact.written_form, contact.value if contact.written else "")
    return Route(channel)


def _check_destination(program: Program, customer: Customer, route: Route, pause_ms: int, now_ms: int) -> None:
    """Raise NO_DESTINATION, CONTACT_CHANGED or SEND_LIMIT_REACHED where a customer's contact gets no code now."""
    if route.channel is Channel.SMS:
        _check_number_type(program.validation, route.destination)
    kind = CONTACT_KINDS[route.channel]
    free_at_ms = customer.contacts_since_ms.get(kind, 0) + pause_ms
    if now_ms < free_at_ms:
        raise PointbookError(
            Reason.CONTACT_CHANGED,
            "The customer's contact has changed lately; for a while it gets no codes.",
            metadata={"validation_type": route.channel.value},
            retry_after_seconds=(free_at_ms - now_ms) / 1_000,
        )
    if kind is IdentifierKind.MOBILE and program.allowed_regions:
        region = phonenumbers.region_code_for_number(phonenumbers.parse(route.destination))
        if region not in program.allowed_regions:
            raise send_limit_reached("allowed_regions", REGION_RETRY_SECONDS)


def _check_number_type(validation: ValidationSettings, number: str) -> None:
    """Raise NO_DESTINATION where the program sends no SMS to numbers of this type."""
    name = phonenumbers.PhoneNumberType.to_string(phones.number_type(number))
    if PhoneNumberType(name) not in validation.sms_number_types_or_default:
        raise PointbookError(
            Reason.NO_DESTINATION,
            "The program sends no SMS to phone numbers of this type.",
            metadata={"validation_type": Channel.SMS.value, "number_type": name},
        )


def masked(route: Route) -> str:
    """Show where a code goes without telling: +86******5678 or b***@example.com."""
    if route.channel is Channel.EMAIL and route.destination:
        local_part, _, domain = route.destination.rpartition("@")
        return f"{local_part[:1]}***@{domain}"
    if route.destination:
        number = phonenumbers.parse(route.destination)
        # Of the shortest numbers there are, four digits would be all.
        shown = min(4, len(str(number.national_number)) // 2)
        return f"+{number.country_code}{MASK}{route.destination[-shown:]}"
    return ""


def message_text(validation: ValidationSettings, language: str, code: str, points: int, program_name: str) -> str:
    """Return the message of a code in a language: from the program's templates, or our own."""
    return Template(_template(validation.message_templates, language)).safe_substitute(
        code=code, points=points, program=program_name, minutes=validation.code_life_ms // 60_000
    )


def _template(templates: Mapping[str, str], language: str) -> str:
    """Return the template for a language: the best match, else that for every language, else the English one."""
    by_tag = {language_key(tag): template for tag, template in templates.items()}
    tags = (*_lookup_tags(language), "", "en")
    return next((by_tag[tag] for tag in tags if tag in by_tag), DEFAULT_TEMPLATE)


def _lookup_tags(language: str) -> Iterator[str]:
    """Build the tags that match a language, best first. Source: RFC 4647, section 3.4 (Lookup).

    The last subtag is removed each time, together with single characters before it, which only introduce it.
    """
    subtags = language_key(language).split("-")
    while subtags:
        yield "-".join(subtags)
        subtags.pop()
        while subtags and len(subtags[-1]) == 1:
            subtags.pop()


def send_limit_reached(limit: str, retry_after_seconds: float) -> PointbookError:
    """Tell that no more codes are sent there for now."""
    return PointbookError(
        Reason.SEND_LIMIT_REACHED,
        "No more codes are sent there for now.",
        metadata={"limit": limit},
        retry_after_seconds=retry_after_seconds,
    )


def key_unknown() -> PointbookError:
    """Tell that this server lacks the key of a code."""
    return PointbookError(
        Reason.CODE_KEY_UNKNOWN,
        "This server lacks the key of the code; see POINTBOOK_CODE_KEYS.",
        retry_after_seconds=RETRY_AFTER_SECONDS,
    )


def delivery_failed(retry_after_seconds: float) -> PointbookError:
    """Tell that a code did not reach the provider, or that nobody knows."""
    return PointbookError(
        Reason.DELIVERY_FAILED,
        "The code could not be delivered.",
        retry_after_seconds=max(retry_after_seconds, 0.0),
    )


def _no_destination() -> PointbookError:
    return PointbookError(Reason.NO_DESTINATION, "There is nowhere to send a code to for this customer.")
