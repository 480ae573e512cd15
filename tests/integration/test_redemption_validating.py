"""ValidateRedemption: criteria, every status, and exact monetary values."""

from typing import Any

import asyncpg
import grpc
import pytest

from pointbook.v1 import identity_pb2, points_pb2, redemption_pb2
from pointbook_server.access.model import Scope
from support.clients import Client
from support.clocks import NOW_MS, at
from support.redemption import customer_ref, earn, redeem, redeem_request, validate_request
from support.refusals import refused, wrong_fields
from support.servers import Service
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique

DECREASE = points_pb2.POINTS_UPDATE_TYPE_DECREASE
SMS = redemption_pb2.VALIDATION_TYPE_SMS
INVALID = redemption_pb2.VALIDATION_TYPE_INVALID
MISSED_CALL = redemption_pb2.VALIDATION_TYPE_MISSED_CALL


def currency_request(shop: Shop, value: str, **changes: Any) -> redemption_pb2.ValidateRedemptionRequest:
    """Build a request for points of a currency value."""
    return validate_request(shop, 0, currency_input=True, currency_value=value, **changes)


async def validate(
    client: Client, request: redemption_pb2.ValidateRedemptionRequest
) -> redemption_pb2.ValidateRedemptionResponse:
    """Validate a redemption, and check what holds for every response."""
    response: redemption_pb2.ValidateRedemptionResponse = await client.redemption.ValidateRedemption(request)
    violations = statuses(response)
    assert violations == sorted(violations)
    assert response.redeemable is (not violations)
    assert (response.status.code, response.status.reason) == (violations[0] if violations else (800, "REDEEMABLE"))
    assert all(status.message for status in (response.status, *response.violations, *response.warnings))
    return response


def statuses(response: redemption_pb2.ValidateRedemptionResponse) -> list[tuple[int, str]]:
    """Return the code and reason of each violation of a response."""
    return [(violation.code, violation.reason) for violation in response.violations]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        (10, []),
        (200, []),
        (15, [(807, "NOT_A_MULTIPLE")]),
        (210, [(819, "ABOVE_MAX_PER_REDEMPTION")]),
        (0, [(801, "POINTS_NOT_POSITIVE")]),
        (-10, [(801, "POINTS_NOT_POSITIVE")]),
        (510, [(803, "INSUFFICIENT_POINTS"), (819, "ABOVE_MAX_PER_REDEMPTION")]),
        (505, [(803, "INSUFFICIENT_POINTS"), (807, "NOT_A_MULTIPLE"), (819, "ABOVE_MAX_PER_REDEMPTION")]),
        (
            2**63 - 1,
            [(803, "INSUFFICIENT_POINTS"), (807, "NOT_A_MULTIPLE"), (819, "ABOVE_MAX_PER_REDEMPTION")],
        ),
        (-(2**63), [(801, "POINTS_NOT_POSITIVE"), (807, "NOT_A_MULTIPLE")]),
    ],
)
async def test_capillarys_example_of_criteria(
    client: Client, shop: Shop, points: int, expected: list[tuple[int, str]]
) -> None:
    """Multiples of 10, at most 200 at a time, out of 500 points.

    Source: docs/reference/capillary-isredeemable.md#criteria-example
    """
    await client.put_program(shop.merchant_id, shop.store_id)
    await earn(client, shop, 500)

    response = await validate(client, validate_request(shop, points))

    assert expected == statuses(response)
    assert points == response.points
    assert response.active_points == 500


async def test_response_has_value_of_points_in_base_and_local_currency(client: Client, shop: Shop) -> None:
    await client.put_program(
        shop.merchant_id,
        shop.store_id,
        criteria={},
        point_value="0.015",
        local_currency_code="JPY",
        local_currency_rate="100",
    )
    await earn(client, shop, 500)

    response = await validate(client, validate_request(shop, 5))

    assert (response.redeem_value, response.redeem_local_value, response.points_currency_ratio) == (
        "0.075",
        "8",
        "0.015",
    )
    assert not response.warnings
    assert not response.HasField("issued_code")


async def test_local_value_has_decimals_of_its_currency(client: Client, shop: Shop) -> None:
    await client.put_program(
        shop.merchant_id,
        shop.store_id,
        criteria={},
        point_value="0.01",
        local_currency_code="BHD",
        local_currency_rate="0.376",
    )
    await earn(client, shop, 500)

    response = await validate(client, validate_request(shop, 7))

    assert (response.redeem_value, response.redeem_local_value) == ("0.07", "0.026")


async def test_local_currency_decimals_apply_to_later_calls_only(client: Client, shop: Shop) -> None:
    taiwan: dict[str, Any] = {
        "criteria": {},
        "point_value": "0.01",
        "local_currency_code": "TWD",
        "local_currency_rate": "31.5",
    }
    await client.put_program(shop.merchant_id, shop.store_id, **taiwan)
    await earn(client, shop, 500)
    request = redeem_request(shop, 10)
    before = await redeem(client, request)
    await client.put_program(shop.merchant_id, shop.store_id, **taiwan, local_currency_decimals=0)

    assert (await validate(client, validate_request(shop, 10))).redeem_local_value == "3"
    assert (await redeem(client, redeem_request(shop, 10))).redeem_local_value == "3"
    again = await redeem(client, request)
    assert (again.redeem_local_value, again) == ("3.15", before)


@pytest.mark.parametrize("currency", ["XAU", "CLF", "UYW", "USD"])
async def test_every_currency_that_a_program_accepts_can_be_rounded_to(
    client: Client, shop: Shop, currency: str
) -> None:
    """Gold, for one, has no minor unit."""
    await client.put_program(shop.merchant_id, shop.store_id, currency_code=currency)
    await earn(client, shop, 500)

    assert (await validate(client, validate_request(shop, 10))).redeem_local_value != ""


async def test_program_without_point_value_has_no_monetary_values(client: Client, shop: Shop) -> None:
    await client.put_program(shop.merchant_id, shop.store_id, point_value="", currency_code="")
    await earn(client, shop, 500)

    response = await validate(client, validate_request(shop, 10))
    assert (response.redeemable, response.redeem_value, response.points_currency_ratio) == (True, "", "")
    response = await validate(client, currency_request(shop, "1"))
    assert statuses(response) == [(801, "CURRENCY_VALUE_NOT_WHOLE_POINTS")]


@pytest.mark.parametrize(
    ("point_value", "currency_value", "points"),
    [("0.03", "0.09", 3), ("0.1", "0.3", 3), ("0.007", "0.7", 100), ("2.5", "5", 2), ("0.01", "1.000", 100)],
)
async def test_currency_value_converts_to_points_exactly(
    client: Client, shop: Shop, point_value: str, currency_value: str, points: int
) -> None:
    await client.put_program(shop.merchant_id, shop.store_id, criteria={}, point_value=point_value)
    await earn(client, shop, 500)

    response = await validate(client, currency_request(shop, currency_value))

    assert (response.redeemable, response.points) == (True, points)


async def test_fractional_points_are_801_with_all_other_violations(client: Client, shop: Shop) -> None:
    await client.put_program(
        shop.merchant_id, shop.store_id, redemption_enabled=False, criteria={"min_balance_required": 501}
    )
    await earn(client, shop, 500)

    response = await validate(client, currency_request(shop, "0.015"))

    assert statuses(response) == [
        (801, "CURRENCY_VALUE_NOT_WHOLE_POINTS"),
        (804, "BALANCE_BELOW_REQUIRED"),
        (827, "REDEMPTION_DISABLED"),
    ]
    assert dict(response.status.metadata) == {
        "currency_value": "0.015",
        "point_value": "0.01",
        "lower_currency_value": "0.01",
        "lower_points": "1",
        "higher_currency_value": "0.02",
        "higher_points": "2",
    }
    assert (response.points, response.redeem_value) == (0, "")


async def test_refusal_metadata_have_nearest_redeemable_currency_values(client: Client, shop: Shop) -> None:
    await client.put_program(shop.merchant_id, shop.store_id)
    await earn(client, shop, 500)
    by_value: dict[str, Any] = {"points": 0, "currency_input": True}

    refusal = await refused(redeem(client, redeem_request(shop, currency_value="0.125", **by_value)))
    assert (refusal.code, refusal.metadata["status_code"]) == (grpc.StatusCode.INVALID_ARGUMENT, "801")
    for name, points in (("lower", 10), ("higher", 20)):
        assert refusal.metadata[f"{name}_points"] == str(points)
        value = refusal.metadata[f"{name}_currency_value"]
        assert (await redeem(client, redeem_request(shop, currency_value=value, **by_value))).points == points


async def test_criteria_apply_to_points_of_currency_value(client: Client, shop: Shop) -> None:
    await client.put_program(shop.merchant_id, shop.store_id)
    await earn(client, shop, 500)

    response = await validate(client, currency_request(shop, "2.15"))

    assert response.points == 215
    assert statuses(response) == [(807, "NOT_A_MULTIPLE"), (819, "ABOVE_MAX_PER_REDEMPTION")]


@pytest.mark.parametrize(
    ("criteria", "points", "expected"),
    [
        ({"min_points_per_redemption": 50}, 49, (821, "BELOW_MIN_PER_REDEMPTION")),
        ({"max_points_per_day": 50}, 51, (819, "ABOVE_MAX_PER_DAY")),
        ({"max_points_per_week": 50}, 51, (819, "ABOVE_MAX_PER_WEEK")),
        ({"max_points_per_month": 50}, 51, (819, "ABOVE_MAX_PER_MONTH")),
        ({"min_balance_required": 91}, 10, (804, "BALANCE_BELOW_REQUIRED")),
        ({"min_lifetime_points": 101}, 10, (805, "LIFETIME_POINTS_BELOW_REQUIRED")),
    ],
)
async def test_each_criterion(
    client: Client, shop: Shop, criteria: dict[str, int], points: int, expected: tuple[int, str]
) -> None:
    """The customer earned 100 points and has 90 of them left."""
    await earn(client, shop, 100)
    spent = shop.update(update_type=DECREASE, updated_value=10, points_balance=90, updated_at=at(NOW_MS - 1))
    await client.apply(spent)
    await client.put_program(shop.merchant_id, shop.store_id, criteria=criteria)
    assert statuses(await validate(client, validate_request(shop, points))) == [expected]

    (name,) = criteria
    bound = criteria[name] + (1 if name.startswith("max") else -1)
    await client.put_program(shop.merchant_id, shop.store_id, criteria={name: bound})
    assert statuses(await validate(client, validate_request(shop, points))) == []


async def test_all_violations_are_listed_by_code_then_reason(client: Client, shop: Shop) -> None:
    await client.put_program(
        shop.merchant_id,
        shop.store_id,
        redemption_enabled=False,
        criteria={
            "multiples_of": 7,
            "max_points_per_redemption": 50,
            "max_points_per_day": 40,
            "max_points_per_week": 41,
            "max_points_per_month": 42,
            "min_balance_required": 1_000,
            "min_lifetime_points": 2_000,
        },
        validation={"required": True},
    )
    request = validate_request(
        shop,
        100,
        group_redemption=True,
        validation_type=MISSED_CALL,
        user_group2=identity_pb2.UserGroupRef(use_default=True),
    )
    response = await validate(client, request)

    assert statuses(response) == [
        (803, "INSUFFICIENT_POINTS"),
        (804, "BALANCE_BELOW_REQUIRED"),
        (805, "LIFETIME_POINTS_BELOW_REQUIRED"),
        (807, "NOT_A_MULTIPLE"),
        (819, "ABOVE_MAX_PER_DAY"),
        (819, "ABOVE_MAX_PER_MONTH"),
        (819, "ABOVE_MAX_PER_REDEMPTION"),
        (819, "ABOVE_MAX_PER_WEEK"),
        (823, "MISSED_CALL_NOT_ENABLED"),
        (824, "VALIDATION_REQUIRED"),
        (827, "REDEMPTION_DISABLED"),
        (828, "CROSS_PROGRAM_REDEMPTION_NOT_ALLOWED"),
        (828, "GROUP_REDEMPTION_NOT_ALLOWED"),
    ]
    issue = redemption_pb2.IssueValidationCodeRequest(
        customer=request.customer,
        program_id=1,
        points=100,
        group_redemption=True,
        validation_type=MISSED_CALL,
        user_group2=request.user_group2,
    )
    refusal = await refused(client.redemption.IssueValidationCode(issue))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "INSUFFICIENT_POINTS")
    assert refusal.metadata["status_code"] == "803"
    expected = [f"{code} {reason}" for code, reason in statuses(response) if reason != "VALIDATION_REQUIRED"]
    assert expected == refusal.metadata["violations"].split(", ")


@pytest.mark.parametrize(
    ("store_id", "buyer_id"), [("s" * 65, "b"), ("s s", "b"), ("s", "b" * 65), ("s", "é"), ("\x00", "b")]
)
async def test_malformed_buyer_is_802_and_is_not_quoted(
    client: Client, shop: Shop, store_id: str, buyer_id: str
) -> None:
    await client.put_program(shop.merchant_id, shop.store_id)
    customer = identity_pb2.CustomerRef(
        merchant_id=shop.merchant_id, buyer=identity_pb2.Buyer(store_id=store_id, buyer_id=buyer_id)
    )
    response = await validate(client, validate_request(shop, 15, customer=customer))

    assert statuses(response) == [(802, "IDENTIFIER_INVALID"), (807, "NOT_A_MULTIPLE")]
    assert dict(response.status.metadata) == {"identifier": "buyer"}
    issue = redemption_pb2.IssueValidationCodeRequest(customer=customer, program_id=1, points=10)
    refusal = await refused(client.redemption.IssueValidationCode(issue))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "IDENTIFIER_INVALID")
    assert refusal.metadata["status_code"] == "802"


async def test_unregistered_store_and_store_of_another_merchant_are_816(client: Client, shop: Shop) -> None:
    await client.put_program(shop.merchant_id, shop.store_id)
    other = Shop(unique("merchant"), unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    await earn(client, other, 500)
    for store_id in (unique("store"), other.store_id):
        response = await validate(
            client, validate_request(shop, 10, customer=customer_ref(Shop(shop.merchant_id, store_id)))
        )
        assert statuses(response) == [(816, "CUSTOMER_NOT_FOUND")]
        assert response.active_points == 0


async def test_unknown_program_is_1101_and_may_come_with_816(client: Client, shop: Shop) -> None:
    other = Shop(unique("merchant"), unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    await client.put_program(other.merchant_id, other.store_id)
    for program_id in (1, -1, 2**63 - 1):
        response = await validate(client, validate_request(shop, 10, program_id=program_id))
        assert statuses(response) == [(1101, "PROGRAM_NOT_FOUND")]
        assert dict(response.status.metadata) == {"program_id": str(program_id)}
    response = await validate(
        client, validate_request(shop, 10, customer=customer_ref(Shop(shop.merchant_id, unique("store"))))
    )
    assert statuses(response) == [(816, "CUSTOMER_NOT_FOUND"), (1101, "PROGRAM_NOT_FOUND")]

    issue = redemption_pb2.IssueValidationCodeRequest(customer=customer_ref(shop), program_id=1, points=10)
    refusal = await refused(client.redemption.IssueValidationCode(issue))
    assert (refusal.code, refusal.metadata["status_code"]) == (grpc.StatusCode.NOT_FOUND, "1101")


async def test_buyer_without_events_has_zero_points(client: Client, shop: Shop) -> None:
    await client.put_program(shop.merchant_id, shop.store_id)

    response = await validate(client, validate_request(shop))

    assert statuses(response) == [(803, "INSUFFICIENT_POINTS")]
    assert dict(response.status.metadata) == {"points": "10", "active_points": "0"}


async def test_points_of_store_outside_of_program_do_not_count(client: Client, shop: Shop) -> None:
    outside = Shop(shop.merchant_id, unique("store"))
    await client.put_store(outside.merchant_id, outside.store_id)
    await client.put_program(shop.merchant_id, shop.store_id)
    await earn(client, outside, 500)

    response = await validate(client, validate_request(shop, 10, customer=customer_ref(outside)))

    assert statuses(response) == [(803, "INSUFFICIENT_POINTS")]
    assert response.active_points == 0


async def test_lot_expires_on_its_millisecond_without_webhook(service: Service, client: Client, shop: Shop) -> None:
    await client.put_program(shop.merchant_id, shop.store_id)
    now_ms = service.clock.now_ms
    await earn(client, shop, 100, points_expiry_time=at(now_ms + 1))
    assert (await validate(client, validate_request(shop, 100))).redeemable

    service.clock.move(0.001)
    response = await validate(client, validate_request(shop, 100))

    assert statuses(response) == [(803, "INSUFFICIENT_POINTS")]
    assert response.active_points == 0


async def test_disabled_redemption_is_827_alone(client: Client, shop: Shop) -> None:
    await client.put_program(shop.merchant_id, shop.store_id, redemption_enabled=False)
    await earn(client, shop, 500)

    assert statuses(await validate(client, validate_request(shop))) == [(827, "REDEMPTION_DISABLED")]


async def test_pools_that_program_does_not_allow_are_828(client: Client, shop: Shop) -> None:
    await client.put_program(shop.merchant_id, shop.store_id)
    await earn(client, shop, 500)
    group = identity_pb2.UserGroupRef(id="g-1")

    assert statuses(await validate(client, validate_request(shop, group_redemption=True))) == [
        (828, "CROSS_PROGRAM_REDEMPTION_NOT_ALLOWED")
    ]
    assert statuses(await validate(client, validate_request(shop, user_group2=group))) == [
        (828, "GROUP_REDEMPTION_NOT_ALLOWED")
    ]


async def test_identifier_is_required(client: Client, shop: Shop) -> None:
    customer = identity_pb2.CustomerRef(merchant_id=shop.merchant_id)
    refusal = await refused(client.redemption.ValidateRedemption(validate_request(shop, customer=customer)))
    assert wrong_fields(refusal) == {"customer.identifier"}


async def test_missed_call_that_program_does_not_enable_is_823(client: Client, shop: Shop) -> None:
    await client.put_program(shop.merchant_id, shop.store_id)
    await earn(client, shop, 500)

    response = await validate(client, validate_request(shop, issue_otp=True, validation_type=MISSED_CALL))

    assert statuses(response) == [(823, "MISSED_CALL_NOT_ENABLED")]
    assert not response.HasField("issued_code")


async def test_required_validation_is_824_unless_code_is_given_or_issued(
    service: Service, client: Client, shop: Shop
) -> None:
    await client.put_program(shop.merchant_id, shop.store_id, validation={"required": True})
    await earn(client, shop, 500)

    assert statuses(await validate(client, validate_request(shop))) == [(824, "VALIDATION_REQUIRED")]
    assert statuses(await validate(client, validate_request(shop, 15))) == [
        (807, "NOT_A_MULTIPLE"),
        (824, "VALIDATION_REQUIRED"),
    ]
    assert statuses(await validate(client, validate_request(shop, validation_type=SMS))) == [
        (824, "VALIDATION_REQUIRED")
    ]
    assert (await validate(client, validate_request(shop, issue_otp=True))).redeemable
    code = service.outbox.messages[-1].text[:6]
    assert (await validate(client, validate_request(shop, validation_code=code))).redeemable


async def test_skipping_validation_takes_program_permission_and_token_scope(
    service: Service, client: Client, shop: Shop
) -> None:
    await earn(client, shop, 500)
    merchants = [shop.merchant_id]
    plain = Client(service.server.port, await make_token(service.database_url, merchants, [Scope.REDEEM]))
    for allow_skip, caller, expected in (
        (True, client, []),
        (True, plain, [(824, "SKIP_NOT_ALLOWED")]),
        (False, client, [(824, "SKIP_NOT_ALLOWED")]),
        (False, plain, [(824, "SKIP_NOT_ALLOWED")]),
    ):
        validation = {"required": True, "allow_skip": allow_skip}
        await client.put_program(shop.merchant_id, shop.store_id, validation=validation)
        for validation_type in (redemption_pb2.VALIDATION_TYPE_UNSPECIFIED, INVALID):
            request = validate_request(shop, skip_validation=True, validation_type=validation_type)
            assert expected == statuses(await validate(caller, request))
    await plain.close()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"customer": None}, {"customer.merchant_id", "customer.identifier"}),
        ({"program_id": 0}, {"program_id"}),
        ({"currency_input": True}, {"points", "currency_value"}),
        ({"currency_value": "1"}, {"currency_value"}),
        ({"currency_input": True, "currency_value": "1"}, {"points"}),
        ({"points": 0, "currency_input": True, "currency_value": "1.0001"}, {"currency_value"}),
        ({"points": 0, "currency_input": True, "currency_value": "-1"}, {"currency_value"}),
        ({"points": 0, "currency_input": True, "currency_value": "1e2"}, {"currency_value"}),
        ({"points": 0, "currency_input": True, "currency_value": "1" * 13}, {"currency_value"}),
        ({"issue_otp": True, "validation_code": "123456"}, {"issue_otp"}),
        ({"skip_validation": True, "validation_code": "123456"}, {"skip_validation"}),
        ({"challenge_id": "c", "validation_type": SMS}, {"challenge_id"}),
        ({"validation_code": "1" * 33}, {"validation_code"}),
        ({"validation_code": "1\x00"}, {"validation_code"}),
        ({"validation_code": "1", "challenge_id": "c" * 65}, {"challenge_id"}),
        ({"validation_code": "1", "challenge_id": "c c"}, {"challenge_id"}),
        ({"validation_type": INVALID}, {"validation_type"}),
        ({"validation_type": 99}, {"validation_type"}),
        (
            {
                "program_id": 0,
                "currency_input": True,
                "issue_otp": True,
                "skip_validation": True,
                "validation_code": "1",
                "validation_type": 99,
            },
            {"program_id", "points", "currency_value", "issue_otp", "skip_validation", "validation_type"},
        ),
    ],
)
async def test_contradictory_fields_are_errors_that_name_every_field(
    client: Client, shop: Shop, changes: dict[str, Any], expected: set[str]
) -> None:
    await client.put_program(shop.merchant_id, shop.store_id)

    assert expected == wrong_fields(
        await refused(client.redemption.ValidateRedemption(validate_request(shop, **changes)))
    )


@pytest.mark.parametrize(
    ("store_id", "buyer_id", "expected"),
    [
        ("", "b", {"customer.buyer.store_id"}),
        ("s", "", {"customer.buyer.buyer_id"}),
        ("", "", {"customer.buyer.store_id", "customer.buyer.buyer_id"}),
    ],
)
async def test_absent_buyer_ids_are_request_errors(
    client: Client, shop: Shop, store_id: str, buyer_id: str, expected: set[str]
) -> None:
    buyer = identity_pb2.Buyer(store_id=store_id, buyer_id=buyer_id)
    request = validate_request(shop, customer=identity_pb2.CustomerRef(merchant_id=shop.merchant_id, buyer=buyer))

    assert expected == wrong_fields(await refused(client.redemption.ValidateRedemption(request)))


async def test_issuing_a_code_rejects_validation_type_invalid(client: Client, shop: Shop) -> None:
    request = redemption_pb2.IssueValidationCodeRequest(
        customer=customer_ref(shop), program_id=1, points=10, validation_type=INVALID
    )

    assert wrong_fields(await refused(client.redemption.IssueValidationCode(request))) == {"validation_type"}


async def test_validating_changes_no_accounts_or_entries(client: Client, shop: Shop, database_url: str) -> None:
    await client.put_program(shop.merchant_id, shop.store_id)
    await earn(client, shop, 500)
    connection = await asyncpg.connect(database_url)

    async def read_rows() -> list[str]:
        queries = [
            f"SELECT t::text FROM {table} t WHERE merchant_id = $1 ORDER BY 1"  # noqa: S608 - constant table names
            for table in ("points_accounts", "points_entries")
        ]
        return [row[0] for query in queries for row in await connection.fetch(query, shop.merchant_id)]

    before = await read_rows()
    for request in (
        validate_request(shop),
        validate_request(shop, 15),
        validate_request(shop, 10_000),
        validate_request(shop, issue_otp=True),
        validate_request(shop, validation_code="wrong"),
        validate_request(shop, customer=customer_ref(shop, "unknown")),
        currency_request(shop, "1"),
    ):
        await validate(client, request)
    assert len(before) == 2
    assert before == await read_rows()
    await connection.close()


async def test_currency_value_of_zero_is_801(client: Client, shop: Shop) -> None:
    await client.put_program(shop.merchant_id, shop.store_id)

    response = await validate(client, currency_request(shop, "0.00"))

    assert response.status.code == 801
    assert response.status.reason == "POINTS_NOT_POSITIVE"


async def test_violation_names_missing_point_value(client: Client, shop: Shop) -> None:
    await client.put_program(shop.merchant_id, shop.store_id, point_value="", currency_code="")

    response = await validate(client, currency_request(shop, "1"))

    assert response.status.code == 801
    assert response.status.message == "The program gives points no value."
