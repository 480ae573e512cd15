"""The requests of the clients, for asyncio and for threads alike."""

import uuid
from datetime import datetime
from decimal import Decimal
from typing import Any, Protocol, TypedDict, TypeVar

from google.protobuf.message import Message

from pointbook.v1 import identity_pb2, points_pb2, redemption_pb2
from pointbook_client.identity import Buyer, CustomerRef
from pointbook_client.keywords import check_names, check_type
from pointbook_client.models import PointsUpdateType, RedemptionState, ValidationType, to_timestamp

PLAIN_DIGITS_MAX = 30
"""How far from the point an amount's first digit may be to be written without an exponent."""
PAGE_SIZE = 500
"""The items of a page that an iterator asks for: half of what the server returns at most."""


class AmountOptions(TypedDict, total=False):
    """What a redemption is about, beside its points."""

    currency_value: Decimal
    """The amount in the program's currency, in place of points."""
    group_redemption: bool
    """Whether the points of other programs count."""
    user_group: identity_pb2.UserGroupRef
    """The group whose points are pooled."""
    validation_type: ValidationType
    """How the customer is validated. Default: the program's first channel that the customer can use."""


class CodeOptions(AmountOptions, total=False):
    """How a redemption proves that it is the customer."""

    validation_code: str
    challenge_id: str
    skip_validation: bool
    """Whether to redeem without a code, which needs the scope `redeem.skip`."""


class ValidateOptions(CodeOptions, total=False):
    """What `validate` may be told."""

    issue_code: bool
    """Whether a redeemable answer also sends a one-time code."""


class RedeemOptions(CodeOptions, total=False):
    """What `redeem` may be told."""

    transaction_number: str
    notes: str


class EntryFilter(TypedDict, total=False):
    """Which entries of an account are listed."""

    update_type: PointsUpdateType
    scenes: list[str]
    start_time: datetime
    end_time: datetime


class RedemptionFilter(TypedDict, total=False):
    """Which redemptions are listed."""

    customer: CustomerRef
    state: RedemptionState
    start_time: datetime
    end_time: datetime


class PagedRequest(Protocol):
    """A request of a List method."""

    page_token: str


class PagedResponse(Protocol):
    """A response of a List method."""

    next_page_token: str


M = TypeVar("M")


def copy_of(request: M) -> M:
    """Return a copy of a message."""
    if not isinstance(request, Message):
        raise TypeError(f"{type(request).__name__} is no message")
    copied = type(request)()
    copied.CopyFrom(request)
    return copied


def new_reference() -> str:
    """Return a new reference, unique everywhere.

    >>> len(new_reference())
    36
    """
    return str(uuid.uuid4())


def validate(
    customer: CustomerRef, program_id: int, points: int | None, options: ValidateOptions
) -> redemption_pb2.ValidateRedemptionRequest:
    """Build the request of ValidateRedemption.

    Raises ValueError unless there is exactly one amount.
    """
    check_names(options, ValidateOptions)
    return redemption_pb2.ValidateRedemptionRequest(
        **_amount(customer, program_id, points, options),
        issue_otp=options.get("issue_code", False),
        **_code(options),
    )


def issue_code(
    customer: CustomerRef, program_id: int, points: int | None, options: AmountOptions
) -> redemption_pb2.IssueValidationCodeRequest:
    """Build the request of IssueValidationCode.

    Raises ValueError unless there is exactly one amount.
    """
    check_names(options, AmountOptions)
    return redemption_pb2.IssueValidationCodeRequest(
        **_amount(customer, program_id, points, options),
    )


def redeem(
    customer: CustomerRef, program_id: int, points: int | None, reference: str | None, options: RedeemOptions
) -> redemption_pb2.RedeemPointsRequest:
    """Build the request of RedeemPoints.

    It has a new reference unless one is given. Raises ValueError unless there is exactly one amount.
    """
    check_names(options, RedeemOptions)
    return redemption_pb2.RedeemPointsRequest(
        **_amount(customer, program_id, points, options),
        **_code(options),
        transaction_number=options.get("transaction_number", ""),
        notes=options.get("notes", ""),
        external_reference_number=_reference(reference),
    )


def reverse(
    merchant_id: str,
    *,
    redemption_id: str | None,
    redeemed_reference: str | None,
    points: int | None,
    reference: str | None,
    notes: str,
) -> redemption_pb2.ReverseRedemptionRequest:
    """Build the request of ReverseRedemption.

    It has a new reference unless one is given. Raises ValueError unless the redemption is named once, and for less than
    one point.
    """
    _check_one(redemption_id=redemption_id, redeemed_reference=redeemed_reference)
    return redemption_pb2.ReverseRedemptionRequest(
        merchant_id=merchant_id,
        **_given(redemption_id=redemption_id, redeemed_reference_number=redeemed_reference),
        points=0 if points is None else _at_least_one(points),
        external_reference_number=_reference(reference),
        notes=notes,
    )


def get_redemption(
    merchant_id: str, *, redemption_id: str | None, reference: str | None
) -> redemption_pb2.GetRedemptionRequest:
    """Build the request of GetRedemption.

    Raises ValueError unless the redemption is named once.
    """
    _check_one(redemption_id=redemption_id, reference=reference)
    return redemption_pb2.GetRedemptionRequest(
        merchant_id=merchant_id, **_given(redemption_id=redemption_id, external_reference_number=reference)
    )


def list_redemptions(merchant_id: str, selected: RedemptionFilter) -> redemption_pb2.ListRedemptionsRequest:
    """Build the request of the first page of ListRedemptions."""
    check_names(selected, RedemptionFilter)
    customer, state = selected.get("customer"), selected.get("state")
    return redemption_pb2.ListRedemptionsRequest(
        merchant_id=merchant_id,
        customer=customer.to_message() if customer else None,
        state=RedemptionState(state).to_number() if state else redemption_pb2.REDEMPTION_STATE_UNSPECIFIED,
        start_time=to_timestamp(selected.get("start_time")),
        end_time=to_timestamp(selected.get("end_time")),
        page_size=PAGE_SIZE,
    )


def get_customer_points(customer: CustomerRef, program_id: int) -> redemption_pb2.GetCustomerPointsRequest:
    """Build the request of GetCustomerPoints."""
    return redemption_pb2.GetCustomerPointsRequest(customer=customer.to_message(), program_id=program_id)


def get_points_account(
    merchant_id: str, buyer: Buyer, *, at_time: datetime | None, with_lots: bool
) -> points_pb2.GetPointsAccountRequest:
    """Build the request of GetPointsAccount."""
    return points_pb2.GetPointsAccountRequest(
        merchant_id=merchant_id,
        store_id=buyer.store_id,
        buyer_id=buyer.buyer_id,
        at_time=to_timestamp(at_time),
        with_lots=with_lots,
    )


def list_points_entries(merchant_id: str, buyer: Buyer, selected: EntryFilter) -> points_pb2.ListPointsEntriesRequest:
    """Build the request of the first page of ListPointsEntries."""
    check_names(selected, EntryFilter)
    update_type = selected.get("update_type")
    return points_pb2.ListPointsEntriesRequest(
        merchant_id=merchant_id,
        store_id=buyer.store_id,
        buyer_id=buyer.buyer_id,
        update_type=PointsUpdateType(update_type).to_number()
        if update_type
        else points_pb2.POINTS_UPDATE_TYPE_UNSPECIFIED,
        scenes=selected.get("scenes", ()),
        start_time=to_timestamp(selected.get("start_time")),
        end_time=to_timestamp(selected.get("end_time")),
        page_size=PAGE_SIZE,
    )


def list_expiring_points(
    merchant_id: str,
    *,
    store_id: str | None,
    program_id: int | None,
    until_time: datetime,
    from_time: datetime | None,
) -> points_pb2.ListExpiringPointsRequest:
    """Build the request of the first page of ListExpiringPoints.

    Raises ValueError unless the stores are named once.
    """
    _check_one(store_id=store_id, program_id=program_id)
    return points_pb2.ListExpiringPointsRequest(
        merchant_id=merchant_id,
        **_given(store_id=store_id, program_id=program_id),
        from_time=to_timestamp(from_time),
        until_time=to_timestamp(until_time),
        page_size=PAGE_SIZE,
    )


def _reference(given: str | None) -> str:
    """Return a reference, or a new one without it.

    Raises ValueError if it is empty: in place of a lost one, a new reference would redeem again.
    """
    if given is None:
        return new_reference()
    check_type(str, reference=given)
    if not given:
        raise ValueError("the reference is empty")
    return given


def _at_least_one(points: int) -> int:
    """Return points.

    Raises ValueError for zero, which stands for all points in the API.
    """
    if points < 1:
        raise ValueError("reverse at least one point; without `points`, all that is left is reversed")
    return points


def _amount(customer: CustomerRef, program_id: int, points: int | None, options: AmountOptions) -> dict[str, Any]:
    """Return the fields that all requests about a redemption have.

    Raises ValueError unless there is exactly one amount.
    """
    value, kind = options.get("currency_value"), options.get("validation_type")
    _check_one(points=points, currency_value=value)
    return {
        "customer": customer.to_message(),
        "program_id": program_id,
        "points": points,
        "currency_input": value is not None,
        "currency_value": None if value is None else _decimal(value),
        "group_redemption": options.get("group_redemption"),
        "user_group2": options.get("user_group"),
        "validation_type": kind and ValidationType(kind).to_number(),
    }


def _decimal(value: Decimal) -> str:
    """Return a decimal as text without an exponent, unless that would be long.

    The server refuses a long one anyway; that of 1E+999999999, a user's input, would fill the memory. Raises TypeError
    for a float, which is not the amount that it shows.
    """
    check_type(Decimal, currency_value=value)
    return f"{value:f}" if abs(value.adjusted()) <= PLAIN_DIGITS_MAX else str(value)


def _code(options: CodeOptions) -> dict[str, Any]:
    """Return the fields of requests that may have a code.

    Raises TypeError for a code that is a number, which has lost its leading zeros.
    """
    if (code := options.get("validation_code")) is not None:
        check_type(str, validation_code=code)
    return {name: options.get(name) for name in ("validation_code", "challenge_id", "skip_validation")}


def _given(**named: Any) -> dict[str, Any]:
    """Return the arguments that are given, for the fields of a oneof."""
    return {name: value for name, value in named.items() if value is not None}


def _check_one(**named: object) -> None:
    """Raise ValueError unless exactly one argument is given."""
    if sum(value is not None for value in named.values()) != 1:
        raise ValueError(f"set exactly one of {', '.join(named)}")
