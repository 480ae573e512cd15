"""The client's requests and models: amounts, names, times, and newer servers."""

import re
import uuid
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from typing import Any, cast

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from pointbook.v1 import identity_pb2, points_pb2, redemption_pb2
from pointbook_client import (
    Buyer,
    CustomerRef,
    PointsEntry,
    PointsUpdateType,
    Redemption,
    RedemptionState,
    Validation,
    ValidationType,
    models,
    new_reference,
    requests,
)
from pointbook_client.client import PendingCall

MOBILE, CODE, TOKEN = "+8613812345678", "123456", "pb_abc.secret"
CUSTOMER = CustomerRef("2000001234", mobile=MOBILE)
WHEN = datetime(2026, 5, 1, 12, 30, tzinfo=UTC)
NAIVE = datetime(2026, 5, 1, 12, 30)  # noqa: DTZ001 - what is tested


class NoZone(tzinfo):
    """A time zone without an offset."""

    def utcoffset(self, dt: datetime | None) -> None:
        """Return no offset."""

    def dst(self, dt: datetime | None) -> None:
        """Return no offset."""

    def tzname(self, dt: datetime | None) -> None:
        """Return no name."""


def build_redeem(points: int | None = 10, reference: str | None = "r-1", **options: Any) -> Any:
    """Build the request of a redemption."""
    return requests.redeem(CUSTOMER, 1, points, reference, cast("requests.RedeemOptions", options))


def build_reverse(**changes: Any) -> Any:
    """Build the request of a reversal."""
    values: dict[str, Any] = {
        "redemption_id": "rd-1",
        "redeemed_reference": None,
        "points": None,
        "reference": "v-1",
        "notes": "",
    }
    return requests.reverse("m", **(values | changes))


def test_redemption_has_all_of_its_options() -> None:
    request = build_redeem(
        10,
        group_redemption=True,
        user_group=identity_pb2.UserGroupRef(id="g"),
        validation_type=ValidationType.MISSED_CALL,
        validation_code=CODE,
        challenge_id="c",
        skip_validation=True,
        transaction_number="t",
        notes="n",
    )

    assert request == redemption_pb2.RedeemPointsRequest(
        customer=CUSTOMER.to_message(),
        program_id=1,
        points=10,
        group_redemption=True,
        user_group2=identity_pb2.UserGroupRef(id="g"),
        validation_type=redemption_pb2.VALIDATION_TYPE_MISSED_CALL,
        validation_code=CODE,
        challenge_id="c",
        skip_validation=True,
        transaction_number="t",
        notes="n",
        external_reference_number="r-1",
    )


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        ("1.50", "1.50"),
        ("0.1", "0.1"),
        ("1E+3", "1000"),
        ("1E-7", "0.0000001"),
        ("0", "0"),
        ("12345678901234567890.01",) * 2,
    ],
)
def test_amount_in_currency_is_exact(value: str, sent: str) -> None:
    request = build_redeem(None, currency_value=Decimal(value))

    assert (request.currency_input, request.currency_value, request.points) == (True, sent, 0)


@pytest.mark.parametrize("options", [{}, {"points": 1, "currency_value": Decimal(1)}])
def test_redemption_has_exactly_one_amount(options: dict[str, Any]) -> None:
    points = options.pop("points", None)

    with pytest.raises(ValueError, match="exactly one of points, currency_value"):
        build_redeem(points, **options)
    with pytest.raises(ValueError, match="exactly one"):
        requests.validate(CUSTOMER, 1, points, options)  # type: ignore[arg-type] # a dictionary with its names
    with pytest.raises(ValueError, match="exactly one"):
        requests.issue_code(CUSTOMER, 1, points, options)  # type: ignore[arg-type] # as above


def test_zero_points_are_left_for_the_server_to_refuse() -> None:
    assert build_redeem(0).points == 0


@pytest.mark.parametrize(
    "build",
    [
        lambda: requests.validate(CUSTOMER, 1, 1, {"skip": True}),  # type: ignore[typeddict-unknown-key] # tested
        lambda: requests.issue_code(CUSTOMER, 1, 1, {"validation_code": CODE}),  # type: ignore[typeddict-unknown-key] # tested
        lambda: build_redeem(skip_validaton=True),
        lambda: requests.list_redemptions("m", {"since": WHEN}),  # type: ignore[typeddict-unknown-key] # tested
        lambda: requests.list_points_entries("m", Buyer("s", "b"), {"scene": "A"}),  # type: ignore[typeddict-unknown-key] # tested
    ],
)
def test_unknown_option_is_refused(build: Any) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        build()


def test_new_references_are_distinct_and_fit_the_server() -> None:
    references = {new_reference() for _ in range(1_000)}

    assert len(references) == 1_000
    assert all(re.fullmatch(r"[0-9a-f-]{36}", reference) for reference in references)
    assert (
        build_redeem(reference=None).external_reference_number != build_redeem(reference=None).external_reference_number
    )


@pytest.mark.parametrize("build", [lambda: build_redeem(reference=""), lambda: build_reverse(reference="")])
def test_empty_reference_is_not_replaced_by_a_new_one(build: Any) -> None:
    """Where the stored reference was lost, a new one would redeem again."""
    with pytest.raises(ValueError, match="reference is empty"):
        build()


def test_reversal_of_all_points_names_none() -> None:
    assert build_reverse() == redemption_pb2.ReverseRedemptionRequest(
        merchant_id="m", redemption_id="rd-1", external_reference_number="v-1"
    )
    assert build_reverse(points=5, redemption_id=None, redeemed_reference="r-1") == (
        redemption_pb2.ReverseRedemptionRequest(
            merchant_id="m", redeemed_reference_number="r-1", points=5, external_reference_number="v-1"
        )
    )


@pytest.mark.parametrize("points", [0, -1])
def test_reversal_of_no_points_is_not_one_of_all(points: int) -> None:
    with pytest.raises(ValueError, match="at least one point"):
        build_reverse(points=points)


@pytest.mark.parametrize("names", [{}, {"redemption_id": "a", "reference": "b"}])
def test_redemption_is_named_once(names: dict[str, str]) -> None:
    both = {"redemption_id": None, "reference": None} | names

    with pytest.raises(ValueError, match="exactly one of redemption_id, reference"):
        requests.get_redemption("m", **both)
    with pytest.raises(ValueError, match="exactly one of redemption_id, redeemed_reference"):
        build_reverse(redemption_id=names.get("redemption_id"), redeemed_reference=names.get("reference"))


@pytest.mark.parametrize("names", [{}, {"store_id": "s", "program_id": 1}])
def test_expiring_points_are_of_a_store_or_a_program(names: dict[str, Any]) -> None:
    both: dict[str, Any] = {"store_id": None, "program_id": None} | names

    with pytest.raises(ValueError, match="exactly one of store_id, program_id"):
        requests.list_expiring_points("m", until_time=WHEN, from_time=None, **both)


@pytest.mark.parametrize("time", [NAIVE, NAIVE.replace(tzinfo=NoZone())])
def test_time_without_a_zone_is_refused(time: datetime) -> None:
    with pytest.raises(ValueError, match="time zone"):
        requests.list_redemptions("m", {"start_time": time})


def test_time_of_any_zone_is_sent_as_the_same_moment() -> None:
    shanghai = WHEN.astimezone(timezone(timedelta(hours=8)))

    request = requests.list_redemptions(
        "m", {"start_time": shanghai, "customer": CUSTOMER, "state": RedemptionState.PENDING}
    )

    assert request.start_time == Timestamp(seconds=int(WHEN.timestamp()))
    assert not request.HasField("end_time")
    assert request.customer.mobile == MOBILE
    assert request.state == redemption_pb2.REDEMPTION_STATE_PENDING


def test_unknown_state_cannot_be_selected() -> None:
    with pytest.raises(ValueError, match="UNKNOWN"):
        requests.list_redemptions("m", {"state": RedemptionState.UNKNOWN})


@pytest.mark.parametrize("names", [{}, {"mobile": "1", "email": "2"}, {"buyer": Buyer("s", "b"), "external_id": "e"}])
def test_customer_has_exactly_one_identifier(names: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="exactly one of mobile"):
        CustomerRef("m", **names)


@pytest.mark.parametrize("name", ["mobile", "email", "external_id", "card_number", "card_external_id"])
def test_customer_is_sent_by_each_identifier(name: str) -> None:
    sent = CustomerRef("m", **{name: "value"}).to_message()  # type: ignore[arg-type] # a name of an identifier

    assert sent.WhichOneof("identifier") == name
    assert (sent.merchant_id, getattr(sent, name)) == ("m", "value")


def test_texts_contain_no_personal_data() -> None:
    async def send() -> Redemption:
        raise AssertionError(build_redeem(validation_code=CODE))

    texts = [
        f"{value!r} {value}"
        for value in (
            PendingCall("r-1", send, 1.0),
            CUSTOMER,
            CustomerRef("m", email="ada@example.com"),
            CustomerRef("m", card_number="4711"),
            CustomerRef("m", card_external_id="4711"),
            CustomerRef("m", external_id="4711"),
        )
    ]

    assert not re.search(r"\d{6}|@|4711", "\n".join(texts).replace("2000001234", ""))
    assert texts[0] == "PendingCall('r-1') PendingCall('r-1')"


def test_values_of_a_validation_are_decimals() -> None:
    validation = Validation.from_message(
        redemption_pb2.ValidateRedemptionResponse(redeemable=True, redeem_value="1.50", points_currency_ratio="0.01")
    )

    assert (validation.redeem_value, validation.points_currency_ratio) == (Decimal("1.50"), Decimal("0.01"))
    assert str(validation.redeem_value) == "1.50"
    assert validation.redeem_local_value is None
    assert validation.issued_code is None


def test_empty_messages_are_converted() -> None:
    redemption = Redemption.from_message(redemption_pb2.Redemption())

    assert redemption.state is RedemptionState.UNKNOWN
    assert (redemption.buyer, redemption.settle_by, redemption.current_active_points) == (None, None, None)
    assert redemption.create_time == datetime(1970, 1, 1, tzinfo=UTC)


def test_zero_is_a_number_of_points_that_are_active_now() -> None:
    assert Redemption.from_message(redemption_pb2.Redemption(current_active_points=0)).current_active_points == 0


def test_numbers_of_a_newer_server_are_unknown() -> None:
    redemption = Redemption.from_message(redemption_pb2.Redemption(state=99))  # type: ignore[arg-type] # of a newer server
    update = points_pb2.PointsUpdate(update_type=99, updated_scene=9_999)  # type: ignore[arg-type] # as above
    entry = PointsEntry.from_message(points_pb2.PointsEntry(update=update))

    assert redemption.state is RedemptionState.UNKNOWN
    assert entry.update_type is PointsUpdateType.UNKNOWN
    assert entry.scene == ""


def test_scene_that_the_server_does_not_know_has_its_name() -> None:
    update = points_pb2.PointsUpdate(unrecognized_scene="NEW_SCENE")

    assert PointsEntry.from_message(points_pb2.PointsEntry(update=update)).scene == "NEW_SCENE"


@pytest.mark.parametrize(
    ("enum", "descriptor", "prefix"),
    [
        (RedemptionState, redemption_pb2.RedemptionState.DESCRIPTOR, "REDEMPTION_STATE_"),
        (ValidationType, redemption_pb2.ValidationType.DESCRIPTOR, "VALIDATION_TYPE_"),
        (PointsUpdateType, points_pb2.PointsUpdateType.DESCRIPTOR, "POINTS_UPDATE_TYPE_"),
    ],
)
def test_enum_has_all_values_of_the_contract(enum: Any, descriptor: Any, prefix: str) -> None:
    names = {value.name.removeprefix(prefix) for value in descriptor.values if value.number} - {"INVALID"}

    assert set(enum.__members__) - {"UNKNOWN"} == names
    assert all(enum[name].to_number() == descriptor.values_by_name[prefix + name].number for name in names)


RENAMED = {"external_reference_number": "reference", "customer": "customer_id"}
"""The fields of the contract that the models name otherwise."""
OMITTED = {(redemption_pb2.RedemptionReversal, "redemption_id")}
"""The fields that the models lack: a reversal is a part of its redemption."""


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.Redemption, redemption_pb2.Redemption),
        (models.RedemptionDraw, redemption_pb2.RedemptionDraw),
        (models.RedemptionReversal, redemption_pb2.RedemptionReversal),
        (models.RedemptionStatus, redemption_pb2.RedemptionStatus),
        (models.Validation, redemption_pb2.ValidateRedemptionResponse),
        (models.IssuedCode, redemption_pb2.IssuedCode),
        (models.CustomerPoints, redemption_pb2.GetCustomerPointsResponse),
        (models.PointsLot, points_pb2.PointsLot),
        (models.PointsExpiry, points_pb2.PointsExpiry),
    ],
)
def test_model_has_the_fields_of_its_message(model: Any, message: Any) -> None:
    assert is_dataclass(model)
    names = {field.name for field in fields(model)}
    sent = [field.name for field in message.DESCRIPTOR.fields if (message, field.name) not in OMITTED]

    assert {RENAMED.get(name, name) for name in sent} <= names


def test_times_are_aware_and_in_utc() -> None:
    draw = redemption_pb2.RedemptionDraw(points_expiry_time=Timestamp(seconds=1, nanos=5_000_000))

    expiry = models.RedemptionDraw.from_message(draw).points_expiry_time

    assert expiry == datetime(1970, 1, 1, 0, 0, 1, 5_000, tzinfo=UTC)
    assert models.to_timestamp(None) is None


@pytest.mark.parametrize("text", ["1E+1000000", "-1E+1000000", "1E-1000000", "0E-1000000"])
def test_exponent_does_not_fill_the_memory(text: str) -> None:
    assert build_redeem(None, currency_value=Decimal(text)).currency_value == text


def test_enums_may_be_given_by_their_names() -> None:
    kind: Any = "SMS"

    assert build_redeem(10, validation_type=kind).validation_type == redemption_pb2.VALIDATION_TYPE_SMS
    with pytest.raises(ValueError, match="'TELEX' is not a valid ValidationType"):
        build_redeem(10, validation_type="TELEX")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Buyer(cast("str", 17182), "b"), "store_id must be a str, not int"),
        (lambda: Buyer("s", cast("str", None)), "buyer_id must be a str, not NoneType"),
        (lambda: CustomerRef(cast("str", 2000), mobile=MOBILE), "merchant_id must be a str, not int"),
        (lambda: CustomerRef("m", mobile=cast("str", 13812345678)), "mobile must be a str, not int"),
        (lambda: CustomerRef("m", buyer=cast("Buyer", "buyer-1")), "buyer must be a Buyer, not str"),
        (lambda: build_redeem(None, currency_value=1.1), "currency_value must be a Decimal, not float"),
        (lambda: build_redeem(1, validation_code=12345), "validation_code must be a str, not int"),
        (lambda: build_reverse(reference=uuid.uuid4()), "reference must be a str, not UUID"),
    ],
)
def test_argument_of_another_type_is_named_without_its_value(build: Any, message: str) -> None:
    with pytest.raises(TypeError) as caught:
        build()

    assert str(caught.value) == message
