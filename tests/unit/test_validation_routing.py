"""The choice of the channel and destination of a code."""

from typing import Any

import pytest

from pointbook_common.durations import DAY_MS
from pointbook_server.customers.model import Customer, Identifier, IdentifierKind
from pointbook_server.errors import PointbookError
from pointbook_server.programs.model import Channel, PhoneNumberType, Program, ValidationSettings
from pointbook_server.reasons import Reason
from pointbook_server.validation_codes.model import Route
from pointbook_server.validation_codes.routing import choose_route, mask_destination

NOW_MS = 1_780_000_000_000
NUMBER, ADDRESS = (
    Identifier(IdentifierKind.MOBILE, "+8613812345678"),
    Identifier(IdentifierKind.EMAIL, "buyer@example.com"),
)
LANDLINE = Identifier(IdentifierKind.MOBILE, "+862112345678")
BOTH = {Channel.SMS: True, Channel.EMAIL: True}
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
"""A phone number of every type, and its type as libphonenumber names it."""


def choose(
    customer: Customer | None,
    channel: Channel | None = None,
    senders: dict[Channel, bool] | None = None,
    **changes: Any,
) -> Route:
    """Return the route for 100 points in a program."""
    validation = ValidationSettings(**changes.pop("validation", {}))
    program = Program("m", 1, ("s",), validation=validation, **changes)
    return choose_route(
        program, customer, channel, BOTH if senders is None else senders, points=100, pause_ms=DAY_MS, now_ms=NOW_MS
    )


def build_customer(*identifiers: Identifier, **changed_at_ms: int) -> Customer:
    """Build a customer with contacts, some of which have changed."""
    since_ms = {IdentifierKind[name.upper()]: at_ms for name, at_ms in changed_at_ms.items()}
    return Customer("m", "c", identifiers=identifiers, contacts_since_ms=since_ms)


def test_mask_shows_at_most_half_of_a_short_number() -> None:
    assert mask_destination(Route(Channel.SMS, "+8613812345678")) == "+86******5678"
    assert mask_destination(Route(Channel.SMS, "+6834002")) == "+683******02"
    assert mask_destination(Route(Channel.EMAIL, "buyer@example.com")) == "b***@example.com"


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
def test_destination_is_masked(channel: Channel, destination: str, expected: str) -> None:
    assert mask_destination(Route(channel, destination)) == expected


def test_first_channel_that_reaches_the_customer_is_chosen() -> None:
    everything = build_customer(NUMBER, ADDRESS)
    assert choose(everything) == Route(Channel.SMS, NUMBER.value)
    assert choose(everything, validation={"channels": (Channel.EMAIL, Channel.SMS)}) == Route(
        Channel.EMAIL, ADDRESS.value
    )
    assert choose(build_customer(ADDRESS)) == Route(Channel.EMAIL, ADDRESS.value)
    assert choose(everything, senders={Channel.EMAIL: True}) == Route(Channel.EMAIL, ADDRESS.value)
    assert choose(everything, Channel.EMAIL) == Route(Channel.EMAIL, ADDRESS.value)
    assert choose(None, senders={Channel.SMS: False}) == Route(Channel.SMS)
    assert choose(everything, senders={Channel.SMS: False}) == Route(Channel.SMS, NUMBER.value)
    assert choose(build_customer(NUMBER, ADDRESS, mobile=NOW_MS)) == Route(Channel.EMAIL, ADDRESS.value)
    assert choose(everything, allowed_regions=("HK",)) == Route(Channel.EMAIL, ADDRESS.value)


@pytest.mark.parametrize(
    ("arguments", "changes", "reason", "retry_seconds"),
    [
        ((None,), {}, Reason.NO_DESTINATION, None),
        ((build_customer(),), {}, Reason.NO_DESTINATION, None),
        ((build_customer(ADDRESS), Channel.SMS), {}, Reason.NO_DESTINATION, None),
        ((build_customer(NUMBER), None, {}), {}, Reason.NO_DESTINATION, None),
        ((build_customer(NUMBER), Channel.SMS, {Channel.EMAIL: True}), {}, Reason.CHANNEL_NOT_ENABLED, None),
        (
            (build_customer(NUMBER), Channel.SMS),
            {"validation": {"channels": (Channel.EMAIL,)}},
            Reason.CHANNEL_NOT_ENABLED,
            None,
        ),
        ((build_customer(NUMBER, mobile=NOW_MS - 1_000),), {}, Reason.CONTACT_CHANGED, 86_399.0),
        ((build_customer(NUMBER, mobile=NOW_MS - DAY_MS + 1),), {}, Reason.CONTACT_CHANGED, 0.001),
        ((build_customer(NUMBER),), {"allowed_regions": ("HK",)}, Reason.SEND_LIMIT_REACHED, 86_400.0),
        ((build_customer(ADDRESS), Channel.MISSED_CALL), {}, Reason.CHANNEL_NOT_ENABLED, None),
    ],
)
def test_most_helpful_error_is_raised_if_no_channel_is_usable(
    arguments: tuple[Any, ...], changes: dict[str, Any], reason: Reason, retry_seconds: float | None
) -> None:
    """An error that passes with time is more helpful than a missing contact."""
    with pytest.raises(PointbookError) as caught:
        choose(*arguments, **changes)
    assert (caught.value.reason, caught.value.retry_after_seconds) == (reason, retry_seconds)


@pytest.mark.parametrize(("number", "number_type"), NUMBERS)
def test_sms_go_to_mobile_numbers_unless_the_program_names_other_types(number: str, number_type: str) -> None:
    contact_owner = build_customer(Identifier(IdentifierKind.MOBILE, number))

    own = PhoneNumberType(number_type)
    others = tuple(set(PhoneNumberType) - {own})
    for types, is_sent in (
        ((), own in {PhoneNumberType.MOBILE, PhoneNumberType.FIXED_LINE_OR_MOBILE}),
        ((own,), True),
        (others, False),
    ):
        if is_sent:
            assert choose(contact_owner, validation={"sms_number_types": types}) == Route(Channel.SMS, number)
            continue
        with pytest.raises(PointbookError) as caught:
            choose(contact_owner, validation={"sms_number_types": types})
        assert (caught.value.reason, caught.value.retry_after_seconds) == (Reason.NO_DESTINATION, None)
        assert caught.value.metadata == {"validation_type": "SMS", "number_type": number_type}


def test_number_that_gets_no_sms_leaves_the_other_channels() -> None:
    """A missed call may come from any phone.

    A sender without destinations checks the type too.
    """
    call = {"channels": (Channel.SMS, Channel.MISSED_CALL), "missed_call_number": "+8613800000000"}

    assert choose(build_customer(LANDLINE, ADDRESS)) == Route(Channel.EMAIL, ADDRESS.value)
    assert choose(build_customer(LANDLINE), validation=call) == Route(Channel.MISSED_CALL, LANDLINE.value)
    with pytest.raises(PointbookError, match="of this type"):
        choose(build_customer(LANDLINE), senders={Channel.SMS: False})


def test_number_type_is_reported_before_a_changed_contact_or_region() -> None:
    other_region: dict[str, Any] = {"allowed_regions": ("HK",)}
    for changes in ({}, other_region):
        with pytest.raises(PointbookError) as caught:
            choose(build_customer(LANDLINE, mobile=NOW_MS), **changes)
        assert caught.value.metadata["number_type"] == "FIXED_LINE"


def test_contact_gets_codes_again_when_the_pause_ends() -> None:
    assert choose(build_customer(NUMBER, mobile=NOW_MS - DAY_MS)) == Route(Channel.SMS, NUMBER.value)
