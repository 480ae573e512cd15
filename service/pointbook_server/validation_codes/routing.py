"""The choice of the channel and destination of a code.

Source: docs/reference/validation-codes.md#channels-and-destinations
"""

from collections.abc import Mapping

import phonenumbers

from pointbook_common.durations import DAY_MS
from pointbook_server.customers import phones
from pointbook_server.customers.model import Customer, IdentifierKind
from pointbook_server.errors import PointbookError
from pointbook_server.programs.model import Channel, PhoneNumberType, Program, ValidationSettings
from pointbook_server.reasons import Reason
from pointbook_server.validation_codes.code_errors import no_destination, send_limit_reached
from pointbook_server.validation_codes.model import Route

CONTACT_KINDS = {
    Channel.SMS: IdentifierKind.MOBILE,
    Channel.EMAIL: IdentifierKind.EMAIL,
    Channel.MISSED_CALL: IdentifierKind.MOBILE,
}
MASK = "*" * 6
SHOWN_DIGITS_MAX = 4
REGION_RETRY_SECONDS = DAY_MS / 1_000
"""Only a change of the program's settings allows another region."""


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
    """Return the route by the requested channel, or by the first usable one.

    `needs_destination` has the channels for which this server has senders. A contact that changed less than `pause_ms`
    ago gets no code.

    Raises CHANNEL_NOT_ENABLED, NO_DESTINATION (also for numbers of a type to which the program sends no SMS),
    CONTACT_CHANGED, and SEND_LIMIT_REACHED for a region that the program does not allow.
    """
    errors = []
    for candidate in (channel,) if channel is not None else program.validation.enabled_channels:
        try:
            _check_channel(program, candidate, needs_destination, points, is_requested=channel is not None)
            route = _route_with_destination(customer, candidate, needs_destination)
            if customer is not None and route.destination:
                _check_destination(program, customer, route, pause_ms, now_ms)
        except PointbookError as error:
            errors.append(error)
        else:
            return route
    # The most helpful error first: one that passes with time, then one about the contact, then any other.
    raise max(errors, key=lambda error: (error.retry_after_seconds is not None, bool(error.metadata)))


def _check_channel(
    program: Program, channel: Channel, needs_destination: Mapping[Channel, bool], points: int, *, is_requested: bool
) -> None:
    """Raise CHANNEL_NOT_ENABLED if a channel is not used for so many points.

    A channel that was not requested raises NO_DESTINATION instead.
    """
    validation = program.validation
    if channel is Channel.MISSED_CALL:
        is_usable = not validation.max_points_missed_call or points <= validation.max_points_missed_call
    else:
        is_usable = channel in needs_destination
    if is_requested and (not is_usable or channel not in validation.enabled_channels):
        raise PointbookError(
            Reason.CHANNEL_NOT_ENABLED,
            "This channel is not enabled for codes.",
            metadata={"validation_type": channel.value},
        )
    if not is_usable:
        raise no_destination()


def _route_with_destination(
    customer: Customer | None, channel: Channel, needs_destination: Mapping[Channel, bool]
) -> Route:
    """Return the route by a channel.

    Raises NO_DESTINATION if the channel needs a destination and the customer has none.
    """
    route = route_by(customer, channel)
    if not route.destination and needs_destination.get(channel, True):
        raise no_destination()
    return route


def route_by(customer: Customer | None, channel: Channel) -> Route:
    """Return the route to a customer by a channel.

    It has no destination if the customer has no such contact.
    """
    kind = CONTACT_KINDS[channel]
    for contact in () if customer is None else customer.contacts:
        if contact.kind is kind:
            return Route(channel, contact.written_form, contact.value if contact.written else "")
    return Route(channel)


def _check_destination(program: Program, customer: Customer, route: Route, pause_ms: int, now_ms: int) -> None:
    """Raise NO_DESTINATION, CONTACT_CHANGED or SEND_LIMIT_REACHED for a contact."""
    if route.channel is Channel.SMS:
        _check_number_type(program.validation, route.destination)
    kind = CONTACT_KINDS[route.channel]
    pause_ends_at_ms = customer.contacts_since_ms.get(kind, 0) + pause_ms
    if now_ms < pause_ends_at_ms:
        raise PointbookError(
            Reason.CONTACT_CHANGED,
            "The customer's contact changed recently and gets no codes for a while.",
            metadata={"validation_type": route.channel.value},
            retry_after_seconds=(pause_ends_at_ms - now_ms) / 1_000,
        )
    if kind is IdentifierKind.MOBILE and program.allowed_regions:
        region = phonenumbers.region_code_for_number(phonenumbers.parse(route.destination))
        if region not in program.allowed_regions:
            raise send_limit_reached("allowed_regions", REGION_RETRY_SECONDS)


def _check_number_type(validation: ValidationSettings, number: str) -> None:
    """Raise NO_DESTINATION if the program sends no SMS to numbers of this type."""
    name = phonenumbers.PhoneNumberType.to_string(phones.number_type(number))
    if PhoneNumberType(name) not in validation.sms_number_types_or_default:
        raise PointbookError(
            Reason.NO_DESTINATION,
            "The program sends no SMS to phone numbers of this type.",
            metadata={"validation_type": Channel.SMS.value, "number_type": name},
        )


def mask_destination(route: Route) -> str:
    """Return a masked destination, such as +86******5678 or b***@example.com."""
    if route.channel is Channel.EMAIL and route.destination:
        local_part, _, domain = route.destination.rpartition("@")
        return f"{local_part[:1]}***@{domain}"
    if route.destination:
        number = phonenumbers.parse(route.destination)
        # The shortest numbers have four digits, so at most half of the digits are shown.
        shown = min(SHOWN_DIGITS_MAX, len(str(number.national_number)) // 2)
        return f"+{number.country_code}{MASK}{route.destination[-shown:]}"
    return ""
