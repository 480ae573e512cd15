"""One-time codes as pure functions: how they look, what they are bound to, and when a new one is sent."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from pointbook_server.customers.model import Customer, Identifier, IdentifierKind
from pointbook_server.errors import PointbookError, Reason
from pointbook_server.programs.model import Channel, PhoneNumberType, Program, ValidationSettings
from pointbook_server.validation_codes.model import (
    ATTEMPTS_MAX,
    COOLDOWN_MS,
    LETTERS_AND_DIGITS,
    Challenge,
    Delivery,
    KeyRing,
    Purpose,
    Route,
    choose_route,
    masked,
    message_text,
    new_challenge_id,
    new_code,
    normalised_code,
)

NOW_MS = 1_780_000_000_000
PURPOSE = Purpose("m", "buyer s b", 1, 100)
ROUTE = Route(Channel.SMS)
KEY = b"k" * 32
KEYS = KeyRing({"k1": KEY})
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


def digest(
    *, key: bytes = KEY, code: str = "012345", key_id: str = "k1", challenge_id: str = "c", **changes: object
) -> bytes:
    """Digest a code whose binding differs in some way."""
    channel, destination = changes.pop("channel", Channel.SMS), changes.pop("destination", "")
    assert isinstance(channel, Channel)
    purpose = replace(PURPOSE, **changes)  # type: ignore[arg-type] # each test names a field and its own kind of value
    route = Route(channel, str(destination))
    return KeyRing({key_id: key}).code_digest(key_id, code, challenge_id, purpose, route)


def test_a_code_is_six_digits() -> None:
    """Digits that anyone can type, unless the program says otherwise; leading zeros are kept."""
    codes = [new_code(ValidationSettings()) for _ in range(2_000)]

    assert {6} == {len(code) for code in codes}
    assert all(code.isascii() and code.isdigit() for code in codes)
    assert any(code.startswith("0") for code in codes)


@pytest.mark.parametrize("length", [6, 7, 8, 9, 10])
def test_a_code_is_as_long_as_the_program_says(length: int) -> None:
    """Six to ten characters, of letters and digits where the program says so."""
    code = new_code(ValidationSettings(code_length=length, alphanumeric=True))

    assert length == len(code)
    assert set(code) <= set(LETTERS_AND_DIGITS)


def test_letters_that_look_like_digits_are_left_out() -> None:
    """Nobody has to tell 0 from O or 1 from I."""
    assert len(LETTERS_AND_DIGITS) == len(set(LETTERS_AND_DIGITS)) == 32
    assert not set("01IO") & set(LETTERS_AND_DIGITS)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("364862", "364862"),
        ("007", "007"),
        ("364 862", "364862"),
        (" 3 6 4 8 6 2 ", "364862"),
        ("364-862", "364862"),
        ("364862\r\n", "364862"),
        ("\t364\u00a0862\u3000", "364862"),
        ("364\u2009862\u202f", "364862"),
        ("364\u2028862\u2029", "364862"),
        ("364\u2010862", "364862"),
        ("364\u2014862", "364862"),
        ("364\uff0d862", "364862"),
        ("364\u2212862", "364862"),
        ("364\u30fc862", "364862"),
        ("\uff70364\u301c862", "364862"),
        ("364\u00ad862", "364862"),
        ("\u2066364862\u2069", "364862"),
        ("\ufeff364\u200b862\u200d", "364862"),
        ("3\ufe0f6\ufe0f4862", "364862"),
        ("\uff13\uff16\uff14\uff18\uff16\uff12", "364862"),
        ("\u0663\u0666\u0664\u0668\u0666\u0662", "364862"),
        ("\u06f3\u06f6\u06f4 \u06f8\u06f6\u06f2", "364862"),
        ("\u0969\u096c\u096a\u096e\u096c\u0968", "364862"),
        ("\U0001d7db\U0001d7de4862", "364862"),
        ("abc-234", "ABC234"),
        ("aBcXyZ", "ABCXYZ"),
        ("\uff21\uff42\uff3a\uff5a2", "ABZZ2"),
        ("0o1i", "0O1I"),
        ("364862a", "364862A"),
        ("364.862", "364.862"),
        ("\u0131", "\u0131"),
        ("\u0130", "\u0130"),
        ("\u00df", "\u00df"),
        ("\u017f", "\u017f"),
        ("\u212a", "\u212a"),
        ("\ufb01", "\ufb01"),
        ("\u0251\u0441", "\u0251\u0441"),
        ("\u2460\u00b2", "\u2460\u00b2"),
        ("- \u200b\u2003", ""),
        ("", ""),
    ],
)
def test_a_typed_code_is_read_as_it_was_issued(typed: str, expected: str) -> None:
    """What people and their keyboards do to a code is undone; no character is guessed or made to fit."""
    assert expected == normalised_code(typed)


@pytest.mark.parametrize("alphanumeric", [False, True])
def test_every_code_is_read_as_itself(*, alphanumeric: bool) -> None:
    """As it is, grouped, and in small letters."""
    for _ in range(200):
        code = new_code(ValidationSettings(alphanumeric=alphanumeric, code_length=10))
        assert {code} == {normalised_code(typed) for typed in (code, code.lower(), f"{code[:3]}-{code[3:]} ")}


def chi_square(seen: Counter[str], cells: int) -> float:
    """Tell how far counts of equally likely things are from alike, in standard deviations of their chi-square."""
    expected = seen.total() / cells
    unseen = expected * (cells - len(seen))
    square = sum((count - expected) ** 2 for count in seen.values()) / expected + unseen
    return float((square - (cells - 1)) / (2 * (cells - 1)) ** 0.5)


@pytest.mark.parametrize("alphanumeric", [False, True])
def test_every_code_is_equally_likely(*, alphanumeric: bool) -> None:
    """A million codes: each position has each character about as often, and of digits each code comes as often."""
    validation = ValidationSettings(alphanumeric=alphanumeric)
    codes = [new_code(validation) for _ in range(1_000_000)]
    characters = "".join(codes)

    for position in range(6):
        assert chi_square(Counter(characters[position::6]), 32 if alphanumeric else 10) < 8
    if not alphanumeric:
        assert abs(chi_square(Counter(codes), 10**6)) < 6


def test_a_mask_hides_most_of_a_number() -> None:
    """Of the shortest numbers there are, the last four digits would be all."""
    assert masked(Route(Channel.SMS, "+8613812345678")) == "+86******5678"
    assert masked(Route(Channel.SMS, "+6834002")) == "+683******02"
    assert masked(Route(Channel.EMAIL, "buyer@example.com")) == "b***@example.com"


def test_the_same_code_has_the_same_digest() -> None:
    """A guess is compared by its digest."""
    assert digest() == digest()
    assert len(digest()) == 32


@pytest.mark.parametrize(
    "change",
    [
        {"key": b"x" * 32},
        {"code": "012346"},
        {"code": "12345"},
        {"key_id": "k2"},
        {"challenge_id": "d"},
        {"merchant_id": "n"},
        {"customer": "buyer s c"},
        {"program_id": 2},
        {"points": 110},
        {"group_redemption": True},
        {"group_id": "g"},
        {"channel": Channel.EMAIL},
        {"destination": "+8613800000000"},
    ],
)
def test_a_code_is_bound_to_all_of_this(change: dict[str, object]) -> None:
    """Whatever differs makes it another code."""
    assert digest() != digest(**change)  # type: ignore[arg-type] # each case names a parameter and its kind of value


def test_no_field_can_slide_into_the_next() -> None:
    """Lengths are digested too: a character moved from one field to its neighbour makes another code."""
    assert digest(key_id="k", challenge_id="1c") != digest(key_id="k1", challenge_id="c")
    assert digest(merchant_id="mb", customer="uyer s b") != digest(merchant_id="m", customer="buyer s b")
    assert digest(program_id=11, points=0) != digest(program_id=1, points=10)
    assert digest(destination="+1", code="23456") != digest(destination="+12", code="3456")


def test_a_challenge_holds_for_its_purpose_and_life() -> None:
    """To the last millisecond of its life, and for nothing else."""
    assert CHALLENGE.is_for(PURPOSE, ROUTE, KEYS, 299_999)
    assert not CHALLENGE.is_for(PURPOSE, ROUTE, KEYS, 300_000)
    assert not CHALLENGE.is_for(replace(PURPOSE, points=110), ROUTE, KEYS, 0)
    assert not CHALLENGE.is_for(PURPOSE, Route(Channel.EMAIL), KEYS, 0)
    assert not CHALLENGE.is_for(PURPOSE, Route(Channel.SMS, "+8613812345678"), KEYS, 0)
    assert not CHALLENGE.is_for(PURPOSE, ROUTE, KeyRing({"k2": KEY}), 0)


def test_a_new_code_is_sent_after_the_cooldown() -> None:
    """A locked challenge gets none before it expires: no guess could use it."""
    assert COOLDOWN_MS == 60_000
    assert CHALLENGE.may_resend_at_ms == 60_000
    assert replace(CHALLENGE, attempts=ATTEMPTS_MAX - 1).may_resend_at_ms == 60_000
    assert replace(CHALLENGE, attempts=ATTEMPTS_MAX).may_resend_at_ms == 300_000


def test_a_delivery_that_nobody_reported_is_uncertain() -> None:
    """The call that sent the message may have ended without a word; until then it may still be under way."""
    assert not CHALLENGE.is_uncertain(59_999)
    assert replace(CHALLENGE, delivery=Delivery.UNCERTAIN).is_uncertain(0)
    assert not replace(CHALLENGE, delivery=Delivery.FAILED).is_uncertain(59_999)
    assert not replace(CHALLENGE, delivery=Delivery.PENDING).is_uncertain(4_999)
    assert replace(CHALLENGE, delivery=Delivery.PENDING).is_uncertain(5_000)


def test_challenge_ids_are_all_different() -> None:
    """Nobody guesses the id of somebody else's challenge."""
    ids = {new_challenge_id() for _ in range(1_000)}

    assert len(ids) == 1_000
    assert all(len(challenge_id) >= 24 for challenge_id in ids)


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        ({}, "012345 is your code to redeem 100 points. It is valid for 5 minutes."),
        ({"": "$code!"}, "012345!"),
        ({"en": "en $code", "zh": "zh $code"}, "en 012345"),
        ({"": "any $code", "en": "en $code"}, "any 012345"),
        ({"zh": "$code"}, "012345 is your code to redeem 100 points. It is valid for 5 minutes."),
        ({"": "$program: ${code} = $points, $minutes min, $$1"}, "Club $code: 012345 = 100, 5 min, $1"),
    ],
)
def test_the_message_says_what_the_code_is_for(templates: dict[str, str], expected: str) -> None:
    """The program's text, or our own; a name in a value is never replaced again."""
    assert expected == message_text(ValidationSettings(message_templates=templates), "", "012345", 100, "Club $code")


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        ("zh-TW", "tw"),
        ("zh_tw", "tw"),
        ("zh-HK", "zh"),
        ("ZH", "zh"),
        ("fr", "any"),
        ("", "any"),
    ],
)
def test_the_message_is_in_the_customers_language(language: str, expected: str) -> None:
    """The nearest there is: the tag, its language, the text for everybody."""
    templates = {"zh-TW": "tw", "zh": "zh", "": "any", "en": "en"}
    assert expected == message_text(ValidationSettings(message_templates=templates), language, "012345", 100, "")


@pytest.mark.parametrize(
    ("keys", "language", "expected"),
    [
        (("zh-Hant", ""), "zh-Hant-TW", "zh-Hant"),
        (("zh-hANT", ""), "ZH-HANT-tw", "zh-hANT"),
        (("zh-Hant", ""), "zh_Hant_TW", "zh-Hant"),
        (("zh_Hant", ""), "zh-Hant-TW", "zh_Hant"),
        (("zh-Hant-TW", "zh-Hant", "zh"), "zh-Hant-TW", "zh-Hant-TW"),
        (("zh-Hant-TW", "zh-Hant", "zh"), "zh-Hant-HK", "zh-Hant"),
        (("zh-Hant-TW", "zh"), "zh-Hant", "zh"),
        (("zh-Hant", ""), "zh-TW", ""),
        (("zh-Hant", ""), "zh", ""),
        (("zh-Hant-TW", ""), "zh-Hant", ""),
        (("zh-TW", ""), "zh-Hant-TW", ""),
        (("zh-Hant-CN-x-private1", "zh-Hant-CN", ""), "zh-Hant-CN-x-private1-private2", "zh-Hant-CN-x-private1"),
        (("zh-Hant-CN-x", "zh-Hant-CN", ""), "zh-Hant-CN-x-private1", "zh-Hant-CN"),
        (("de-DE", "de"), "de-DE-u-co-phonebk", "de-DE"),
        (("de-u-co-phonebk", "de"), "de-u-co-phonebk", "de-u-co-phonebk"),
        (("en-x-a", "en"), "en-x-a", "en-x-a"),
        (("en-x-a", "en"), "en-x-a-b", "en"),
        (("sl", "en"), "sl-rozaj-biske-1994", "sl"),
        (("es-419", "es"), "es-419", "es-419"),
        (("es-419", "es"), "es-MX", "es"),
        (("de", "en"), "fr-CA", "en"),
        (("de", "", "en"), "fr-CA", ""),
        (("de", ""), "", ""),
    ],
)
def test_the_language_of_a_message_is_looked_up(keys: tuple[str, ...], language: str, expected: str) -> None:
    """By RFC 4647, section 3.4: the tag loses its last subtag until it is one of the program's."""
    templates = {key: f"<{key}> $code" for key in keys}
    assert message_text(ValidationSettings(message_templates=templates), language, "1", 1, "") == f"<{expected}> 1"


@pytest.mark.parametrize(
    ("channel", "destination", "expected"),
    [
        (Channel.SMS, "+8613812345678", "+86******5678"),
        (Channel.SMS, "+12025550123", "+1******0123"),
        (Channel.EMAIL, "buyer@example.com", "b***@example.com"),
        (Channel.EMAIL, '"a@b"@example.com', '"***@example.com'),
        (Channel.SMS, "", ""),
        (Channel.EMAIL, "", ""),
    ],
)
def test_a_destination_is_masked(channel: Channel, destination: str, expected: str) -> None:
    """Enough for the customer to know where to look, and too little for anybody to write to."""
    assert masked(Route(channel, destination)) == expected


NUMBER, ADDRESS = (
    Identifier(IdentifierKind.MOBILE, "+8613812345678"),
    Identifier(IdentifierKind.EMAIL, "buyer@example.com"),
)
BOTH = {Channel.SMS: True, Channel.EMAIL: True}
DAY_MS = 86_400_000


def choose(
    customer: Customer | None,
    channel: Channel | None = None,
    senders: dict[Channel, bool] | None = None,
    **changes: Any,
) -> Route:
    """Choose a route for 100 points in a program."""
    validation = ValidationSettings(**changes.pop("validation", {}))
    program = Program("m", 1, ("s",), validation=validation, **changes)
    return choose_route(
        program, customer, channel, BOTH if senders is None else senders, points=100, pause_ms=DAY_MS, now_ms=NOW_MS
    )


def customer(*identifiers: Identifier, **changed_at_ms: int) -> Customer:
    """A customer with contacts, some of which have changed."""
    since_ms = {IdentifierKind[name.upper()]: at_ms for name, at_ms in changed_at_ms.items()}
    return Customer("m", "c", identifiers=identifiers, contacts_since_ms=since_ms)


def test_a_code_goes_by_the_first_channel_that_reaches_the_customer() -> None:
    """In the program's order, as far as this server has senders and the customer contacts."""
    everything = customer(NUMBER, ADDRESS)
    assert choose(everything) == Route(Channel.SMS, NUMBER.value)
    assert choose(everything, validation={"channels": (Channel.EMAIL, Channel.SMS)}) == Route(
        Channel.EMAIL, ADDRESS.value
    )
    assert choose(customer(ADDRESS)) == Route(Channel.EMAIL, ADDRESS.value)
    assert choose(everything, senders={Channel.EMAIL: True}) == Route(Channel.EMAIL, ADDRESS.value)
    assert choose(everything, Channel.EMAIL) == Route(Channel.EMAIL, ADDRESS.value)
    assert choose(None, senders={Channel.SMS: False}) == Route(Channel.SMS)
    assert choose(everything, senders={Channel.SMS: False}) == Route(Channel.SMS, NUMBER.value)
    assert choose(customer(NUMBER, ADDRESS, mobile=NOW_MS)) == Route(Channel.EMAIL, ADDRESS.value)
    assert choose(everything, allowed_regions=("HK",)) == Route(Channel.EMAIL, ADDRESS.value)


@pytest.mark.parametrize(
    ("arguments", "changes", "reason", "retry_seconds"),
    [
        ((None,), {}, Reason.NO_DESTINATION, None),
        ((customer(),), {}, Reason.NO_DESTINATION, None),
        ((customer(ADDRESS), Channel.SMS), {}, Reason.NO_DESTINATION, None),
        ((customer(NUMBER), None, {}), {}, Reason.NO_DESTINATION, None),
        ((customer(NUMBER), Channel.SMS, {Channel.EMAIL: True}), {}, Reason.CHANNEL_NOT_ENABLED, None),
        (
            (customer(NUMBER), Channel.SMS),
            {"validation": {"channels": (Channel.EMAIL,)}},
            Reason.CHANNEL_NOT_ENABLED,
            None,
        ),
        ((customer(NUMBER, mobile=NOW_MS - 1_000),), {}, Reason.CONTACT_CHANGED, 86_399.0),
        ((customer(NUMBER, mobile=NOW_MS - DAY_MS + 1),), {}, Reason.CONTACT_CHANGED, 0.001),
        ((customer(NUMBER),), {"allowed_regions": ("HK",)}, Reason.SEND_LIMIT_REACHED, 86_400.0),
        ((customer(ADDRESS), Channel.MISSED_CALL), {}, Reason.CHANNEL_NOT_ENABLED, None),
    ],
)
def test_why_a_code_cannot_go(
    arguments: tuple[Any, ...], changes: dict[str, Any], reason: Reason, retry_seconds: float | None
) -> None:
    """What is in the way only for a while is told rather than what never was there."""
    with pytest.raises(PointbookError) as caught:
        choose(*arguments, **changes)
    assert (caught.value.reason, caught.value.retry_after_seconds) == (reason, retry_seconds)


NUMBERS = (
    ("+8613812345678", "MOBILE"),
    ("+85291236001", "MOBILE"),
    ("+819012345678", "MOBILE"),
    ("+12025550123", "FIXED_LINE_OR_MOBILE"),
    ("+525512345678", "FIXED_LINE_OR_MOBILE"),
    ("+862112345678", "FIXED_LINE"),
    ("+442079460000", "FIXED_LINE"),
    ("+18005551234", "TOLL_FREE"),
    ("+19005551234", "PREMIUM_RATE"),
    ("+491801234567", "SHARED_COST"),
    ("+815012345678", "VOIP"),
    ("+447011234567", "PERSONAL_NUMBER"),
    ("+447640123456", "PAGER"),
    ("+445555123456", "UAN"),
    ("+15623161234567", "UNKNOWN"),
    ("+8611111111111", "UNKNOWN"),
)
"""Phone numbers of every kind that a region has, and what libphonenumber says that they are."""


@pytest.mark.parametrize(("number", "number_type"), NUMBERS)
def test_sms_go_to_mobile_numbers_unless_the_program_names_other_types(number: str, number_type: str) -> None:
    """Any other number is no destination; a program that names types names all of them."""
    reached = customer(Identifier(IdentifierKind.MOBILE, number))

    own = PhoneNumberType(number_type)
    others = tuple(set(PhoneNumberType) - {own})
    for types, is_sent in (
        ((), own in {PhoneNumberType.MOBILE, PhoneNumberType.FIXED_LINE_OR_MOBILE}),
        ((own,), True),
        (others, False),
    ):
        if is_sent:
            assert choose(reached, validation={"sms_number_types": types}) == Route(Channel.SMS, number)
            continue
        with pytest.raises(PointbookError) as caught:
            choose(reached, validation={"sms_number_types": types})
        assert (caught.value.reason, caught.value.retry_after_seconds) == (Reason.NO_DESTINATION, None)
        assert caught.value.metadata == {"validation_type": "SMS", "number_type": number_type}


LANDLINE = Identifier(IdentifierKind.MOBILE, "+862112345678")


def test_a_number_that_gets_no_sms_leaves_the_other_channels() -> None:
    """The next one is used; a missed call may come from any phone, and a console is no excuse."""
    call = {"channels": (Channel.SMS, Channel.MISSED_CALL), "missed_call_number": "+8613800000000"}

    assert choose(customer(LANDLINE, ADDRESS)) == Route(Channel.EMAIL, ADDRESS.value)
    assert choose(customer(LANDLINE), validation=call) == Route(Channel.MISSED_CALL, LANDLINE.value)
    with pytest.raises(PointbookError, match="of this type"):
        choose(customer(LANDLINE), senders={Channel.SMS: False})


def test_waiting_is_not_proposed_for_a_number_that_gets_no_sms() -> None:
    """Its type is told, whatever else is in the way."""
    everywhere_else: dict[str, Any] = {"allowed_regions": ("HK",)}
    for changes in ({}, everywhere_else):
        with pytest.raises(PointbookError) as caught:
            choose(customer(LANDLINE, mobile=NOW_MS), **changes)
        assert caught.value.metadata["number_type"] == "FIXED_LINE"


def test_a_contact_that_changed_long_ago_gets_codes() -> None:
    """To the millisecond."""
    assert choose(customer(NUMBER, mobile=NOW_MS - DAY_MS)) == Route(Channel.SMS, NUMBER.value)
