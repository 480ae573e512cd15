"""ValidateRedemption on a real database: the seed's example, every status, exact money, and that nothing changes."""

from typing import Any

import asyncpg
import grpc
import pytest

from pointbook.v1 import identity_pb2, points_pb2, redemption_pb2
from pointbook_server.access.model import Scope
from support.harness import NOW_MS, Client, Refusal, Service, Shop, at, make_token, refused, unique
from support.redemption import order, redeem

DECREASE = points_pb2.POINTS_UPDATE_TYPE_DECREASE
SMS = redemption_pb2.VALIDATION_TYPE_SMS
INVALID = redemption_pb2.VALIDATION_TYPE_INVALID
MISSED_CALL = redemption_pb2.VALIDATION_TYPE_MISSED_CALL


def customer_of(shop: Shop, buyer_id: str = "buyer") -> identity_pb2.CustomerRef:
    """Name a buyer of a shop."""
    return identity_pb2.CustomerRef(
        merchant_id=shop.merchant_id, buyer=identity_pb2.Buyer(store_id=shop.store_id, buyer_id=buyer_id)
    )


def ask(shop: Shop, points: int = 10, **changes: Any) -> redemption_pb2.ValidateRedemptionRequest:
    """Ask whether points may be redeemed in program 1."""
    values: dict[str, Any] = {"customer": customer_of(shop), "program_id": 1, "points": points}
    return redemption_pb2.ValidateRedemptionRequest(**{**values, **changes})


def ask_currency(shop: Shop, value: str, **changes: Any) -> redemption_pb2.ValidateRedemptionRequest:
    """Ask whether points of some worth may be redeemed."""
    return ask(shop, 0, currency_input=True, currency_value=value, **changes)


async def validate(
    client: Client, request: redemption_pb2.ValidateRedemptionRequest
) -> redemption_pb2.ValidateRedemptionResponse:
    """Ask, and check what holds of every answer."""
    answer: redemption_pb2.ValidateRedemptionResponse = await client.redemption.ValidateRedemption(request)
    found = findings(answer)
    assert found == sorted(found)
    assert answer.redeemable is (not found)
    assert (answer.status.code, answer.status.reason) == (found[0] if found else (800, "REDEEMABLE"))
    assert all(status.message for status in (answer.status, *answer.violations, *answer.warnings))
    return answer


def findings(answer: redemption_pb2.ValidateRedemptionResponse) -> list[tuple[int, str]]:
    """Read all that an answer has against the redemption."""
    return [(found.code, found.reason) for found in answer.violations]


async def earn(client: Client, shop: Shop, points: int, buyer_id: str = "buyer", **changes: Any) -> None:
    """Give a new account its points."""
    await client.apply(shop.update(buyer_id, updated_value=points, points_balance=points, **changes))


def wrong_fields(found: Refusal) -> set[str]:
    """Tell which fields a refusal names."""
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS")
    return set(found.fields)


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
async def test_the_seeds_example(client: Client, shop: Shop, points: int, expected: list[tuple[int, str]]) -> None:
    """Multiples of 10, at most 200 at a time, out of 500 points: every violation by code, the first is the status."""
    await client.put_program(shop.merchant_id, shop.store_id)
    await earn(client, shop, 500)

    answer = await validate(client, ask(shop, points))

    assert expected == findings(answer)
    assert points == answer.points
    assert answer.active_points == 500


async def test_an_answer_tells_what_the_points_are_worth(client: Client, shop: Shop) -> None:
    """In the base currency unrounded, in the local one rounded, and one point's worth."""
    await client.put_program(
        shop.merchant_id,
        shop.store_id,
        criteria={},
        point_value="0.015",
        local_currency_code="JPY",
        local_currency_rate="100",
    )
    await earn(client, shop, 500)

    answer = await validate(client, ask(shop, 5))

    assert (answer.redeem_value, answer.redeem_local_value, answer.points_currency_ratio) == ("0.075", "8", "0.015")
    assert not answer.warnings
    assert not answer.HasField("issued_code")


async def test_three_decimals_of_a_dinar(client: Client, shop: Shop) -> None:
    """The minor unit is the currency's own."""
    await client.put_program(
        shop.merchant_id,
        shop.store_id,
        criteria={},
        point_value="0.01",
        local_currency_code="BHD",
        local_currency_rate="0.376",
    )
    await earn(client, shop, 500)

    answer = await validate(client, ask(shop, 7))

    assert (answer.redeem_value, answer.redeem_local_value) == ("0.07", "0.026")


async def test_a_program_rounds_as_its_country_does(client: Client, shop: Shop) -> None:
    """In questions and in redemptions; what is stored keeps the value that it was told with."""
    taiwan: dict[str, Any] = {
        "criteria": {},
        "point_value": "0.01",
        "local_currency_code": "TWD",
        "local_currency_rate": "31.5",
    }
    await client.put_program(shop.merchant_id, shop.store_id, **taiwan)
    await earn(client, shop, 500)
    request = order(shop, 10)
    before = await redeem(client, request)
    await client.put_program(shop.merchant_id, shop.store_id, **taiwan, local_currency_decimals=0)

    assert (await validate(client, ask(shop, 10))).redeem_local_value == "3"
    assert (await redeem(client, order(shop, 10))).redeem_local_value == "3"
    again = await redeem(client, request)
    assert (again.redeem_local_value, again) == ("3.15", before)


@pytest.mark.parametrize("currency", ["XAU", "CLF", "UYW", "USD"])
async def test_every_currency_of_a_program_can_be_told(client: Client, shop: Shop, currency: str) -> None:
    """Whatever PutProgram takes, ValidateRedemption can round to: gold has no minor unit."""
    await client.put_program(shop.merchant_id, shop.store_id, currency_code=currency)
    await earn(client, shop, 500)

    assert (await validate(client, ask(shop, 10))).redeem_local_value != ""


async def test_points_without_a_value(client: Client, shop: Shop) -> None:
    """A program without a point value tells no worth, and takes none."""
    await client.put_program(shop.merchant_id, shop.store_id, point_value="", currency_code="")
    await earn(client, shop, 500)

    answer = await validate(client, ask(shop, 10))
    assert (answer.redeemable, answer.redeem_value, answer.points_currency_ratio) == (True, "", "")
    answer = await validate(client, ask_currency(shop, "1"))
    assert findings(answer) == [(801, "CURRENCY_VALUE_NOT_WHOLE_POINTS")]


@pytest.mark.parametrize(
    ("point_value", "currency_value", "points"),
    [("0.03", "0.09", 3), ("0.1", "0.3", 3), ("0.007", "0.7", 100), ("2.5", "5", 2), ("0.01", "1.000", 100)],
)
async def test_currency_becomes_points_exactly(
    client: Client, shop: Shop, point_value: str, currency_value: str, points: int
) -> None:
    """No point is lost to binary fractions."""
    await client.put_program(shop.merchant_id, shop.store_id, criteria={}, point_value=point_value)
    await earn(client, shop, 500)

    answer = await validate(client, ask_currency(shop, currency_value))

    assert (answer.redeemable, answer.points) == (True, points)


async def test_currency_that_is_no_whole_number_of_points(client: Client, shop: Shop) -> None:
    """It is 801, and what else is wrong is told too: every check runs that can."""
    await client.put_program(
        shop.merchant_id, shop.store_id, redemption_enabled=False, criteria={"min_balance_required": 501}
    )
    await earn(client, shop, 500)

    answer = await validate(client, ask_currency(shop, "0.015"))

    assert findings(answer) == [
        (801, "CURRENCY_VALUE_NOT_WHOLE_POINTS"),
        (804, "BALANCE_BELOW_REQUIRED"),
        (827, "REDEMPTION_DISABLED"),
    ]
    assert dict(answer.status.metadata) == {
        "currency_value": "0.015",
        "point_value": "0.01",
        "lower_currency_value": "0.01",
        "lower_points": "1",
        "higher_currency_value": "0.02",
        "higher_points": "2",
    }
    assert (answer.points, answer.redeem_value) == (0, "")


async def test_a_refusal_names_the_nearest_redeemable_currency_values(client: Client, shop: Shop) -> None:
    """RedeemPoints tells them in the error's metadata, and each of them may be redeemed."""
    await client.put_program(shop.merchant_id, shop.store_id)
    await earn(client, shop, 500)
    by_value: dict[str, Any] = {"points": 0, "currency_input": True}

    found = await refused(redeem(client, order(shop, currency_value="0.125", **by_value)))
    assert (found.code, found.metadata["status_code"]) == (grpc.StatusCode.INVALID_ARGUMENT, "801")
    for name, points in (("lower", 10), ("higher", 20)):
        assert found.metadata[f"{name}_points"] == str(points)
        value = found.metadata[f"{name}_currency_value"]
        assert (await redeem(client, order(shop, currency_value=value, **by_value))).points == points


async def test_currency_is_held_to_the_criteria(client: Client, shop: Shop) -> None:
    """The computed points are checked as if they had been given."""
    await client.put_program(shop.merchant_id, shop.store_id)
    await earn(client, shop, 500)

    answer = await validate(client, ask_currency(shop, "2.15"))

    assert answer.points == 215
    assert findings(answer) == [(807, "NOT_A_MULTIPLE"), (819, "ABOVE_MAX_PER_REDEMPTION")]


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
    """A customer who earned 100 points and has 90 of them left."""
    await earn(client, shop, 100)
    spent = shop.update(update_type=DECREASE, updated_value=10, points_balance=90, updated_at=at(NOW_MS - 1))
    await client.apply(spent)
    await client.put_program(shop.merchant_id, shop.store_id, criteria=criteria)
    assert findings(await validate(client, ask(shop, points))) == [expected]

    (name,) = criteria
    bound = criteria[name] + (1 if name.startswith("max") else -1)
    await client.put_program(shop.merchant_id, shop.store_id, criteria={name: bound})
    assert findings(await validate(client, ask(shop, points))) == []


async def test_everything_at_once(client: Client, shop: Shop) -> None:
    """An answer tells all that speaks against a redemption, by ascending code, then reason."""
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
    request = ask(
        shop,
        100,
        group_redemption=True,
        validation_type=MISSED_CALL,
        user_group2=identity_pb2.UserGroupRef(use_default=True),
    )
    answer = await validate(client, request)

    assert findings(answer) == [
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
    found = await refused(client.redemption.IssueValidationCode(issue))
    assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "INSUFFICIENT_POINTS")
    assert found.metadata["status_code"] == "803"
    told = [f"{code} {reason}" for code, reason in findings(answer) if reason != "VALIDATION_REQUIRED"]
    assert told == found.metadata["violations"].split(", ")


@pytest.mark.parametrize(
    ("store_id", "buyer_id"), [("s" * 65, "b"), ("s s", "b"), ("s", "b" * 65), ("s", "é"), ("\x00", "b")]
)
async def test_a_malformed_buyer(client: Client, shop: Shop, store_id: str, buyer_id: str) -> None:
    """It is an answer, 802, which never quotes the id; what else is wrong is told too."""
    await client.put_program(shop.merchant_id, shop.store_id)
    customer = identity_pb2.CustomerRef(
        merchant_id=shop.merchant_id, buyer=identity_pb2.Buyer(store_id=store_id, buyer_id=buyer_id)
    )
    answer = await validate(client, ask(shop, 15, customer=customer))

    assert findings(answer) == [(802, "IDENTIFIER_INVALID"), (807, "NOT_A_MULTIPLE")]
    assert dict(answer.status.metadata) == {"identifier": "buyer"}
    issue = redemption_pb2.IssueValidationCodeRequest(customer=customer, program_id=1, points=10)
    found = await refused(client.redemption.IssueValidationCode(issue))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "IDENTIFIER_INVALID")
    assert found.metadata["status_code"] == "802"


async def test_an_unknown_store(client: Client, shop: Shop) -> None:
    """A store that nobody registered, and another merchant's, have no customers of this merchant: 816."""
    await client.put_program(shop.merchant_id, shop.store_id)
    other = Shop(unique("merchant"), unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    await earn(client, other, 500)
    for store_id in (unique("store"), other.store_id):
        answer = await validate(client, ask(shop, 10, customer=customer_of(Shop(shop.merchant_id, store_id))))
        assert findings(answer) == [(816, "CUSTOMER_NOT_FOUND")]
        assert answer.active_points == 0


async def test_an_unknown_program(client: Client, shop: Shop) -> None:
    """1101, for a program that is not there and for another merchant's; it may come with 816."""
    other = Shop(unique("merchant"), unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    await client.put_program(other.merchant_id, other.store_id)
    for program_id in (1, -1, 2**63 - 1):
        answer = await validate(client, ask(shop, 10, program_id=program_id))
        assert findings(answer) == [(1101, "PROGRAM_NOT_FOUND")]
        assert dict(answer.status.metadata) == {"program_id": str(program_id)}
    answer = await validate(client, ask(shop, 10, customer=customer_of(Shop(shop.merchant_id, unique("store")))))
    assert findings(answer) == [(816, "CUSTOMER_NOT_FOUND"), (1101, "PROGRAM_NOT_FOUND")]

    issue = redemption_pb2.IssueValidationCodeRequest(customer=customer_of(shop), program_id=1, points=10)
    found = await refused(client.redemption.IssueValidationCode(issue))
    assert (found.code, found.metadata["status_code"]) == (grpc.StatusCode.NOT_FOUND, "1101")


async def test_a_buyer_without_an_account(client: Client, shop: Shop) -> None:
    """Whom no event has named yet has no points; that is no unknown customer."""
    await client.put_program(shop.merchant_id, shop.store_id)

    answer = await validate(client, ask(shop))

    assert findings(answer) == [(803, "INSUFFICIENT_POINTS")]
    assert dict(answer.status.metadata) == {"points": "10", "active_points": "0"}


async def test_points_of_a_store_outside_of_the_program(client: Client, shop: Shop) -> None:
    """They do not count in it."""
    outside = Shop(shop.merchant_id, unique("store"))
    await client.put_store(outside.merchant_id, outside.store_id)
    await client.put_program(shop.merchant_id, shop.store_id)
    await earn(client, outside, 500)

    answer = await validate(client, ask(shop, 10, customer=customer_of(outside)))

    assert findings(answer) == [(803, "INSUFFICIENT_POINTS")]
    assert answer.active_points == 0


async def test_a_lot_stops_counting_at_its_very_millisecond(service: Service, client: Client, shop: Shop) -> None:
    """No webhook needs to come for it."""
    await client.put_program(shop.merchant_id, shop.store_id)
    now_ms = service.clock.now_ms
    await earn(client, shop, 100, points_expiry_time=at(now_ms + 1))
    assert (await validate(client, ask(shop, 100))).redeemable

    service.clock.move(0.001)
    answer = await validate(client, ask(shop, 100))

    assert findings(answer) == [(803, "INSUFFICIENT_POINTS")]
    assert answer.active_points == 0


async def test_redemption_that_is_switched_off(client: Client, shop: Shop) -> None:
    """827 alone, where all else is right."""
    await client.put_program(shop.merchant_id, shop.store_id, redemption_enabled=False)
    await earn(client, shop, 500)

    assert findings(await validate(client, ask(shop))) == [(827, "REDEMPTION_DISABLED")]


async def test_pools_that_a_program_does_not_allow(client: Client, shop: Shop) -> None:
    """828, with a reason for each kind of pool."""
    await client.put_program(shop.merchant_id, shop.store_id)
    await earn(client, shop, 500)
    group = identity_pb2.UserGroupRef(id="g-1")

    assert findings(await validate(client, ask(shop, group_redemption=True))) == [
        (828, "CROSS_PROGRAM_REDEMPTION_NOT_ALLOWED")
    ]
    assert findings(await validate(client, ask(shop, user_group2=group))) == [(828, "GROUP_REDEMPTION_NOT_ALLOWED")]


async def test_a_customer_without_an_identifier(client: Client, shop: Shop) -> None:
    """Whose points are asked for must be said."""
    customer = identity_pb2.CustomerRef(merchant_id=shop.merchant_id)
    found = await refused(client.redemption.ValidateRedemption(ask(shop, customer=customer)))
    assert wrong_fields(found) == {"customer.identifier"}


async def test_a_missed_call_that_a_program_does_not_enable(client: Client, shop: Shop) -> None:
    """823."""
    await client.put_program(shop.merchant_id, shop.store_id)
    await earn(client, shop, 500)

    answer = await validate(client, ask(shop, issue_otp=True, validation_type=MISSED_CALL))

    assert findings(answer) == [(823, "MISSED_CALL_NOT_ENABLED")]
    assert not answer.HasField("issued_code")


async def test_validation_that_a_program_requires(service: Service, client: Client, shop: Shop) -> None:
    """824, unless a code is asked for, or given; the answer tells what else is wrong."""
    await client.put_program(shop.merchant_id, shop.store_id, validation={"required": True})
    await earn(client, shop, 500)

    assert findings(await validate(client, ask(shop))) == [(824, "VALIDATION_REQUIRED")]
    assert findings(await validate(client, ask(shop, 15))) == [(807, "NOT_A_MULTIPLE"), (824, "VALIDATION_REQUIRED")]
    assert findings(await validate(client, ask(shop, validation_type=SMS))) == [(824, "VALIDATION_REQUIRED")]
    assert (await validate(client, ask(shop, issue_otp=True))).redeemable
    code = service.outbox.messages[-1].text[:6]
    assert (await validate(client, ask(shop, validation_code=code))).redeemable


async def test_skipping_the_validation(service: Service, client: Client, shop: Shop) -> None:
    """It takes the program's permission and the token's scope, both."""
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
            request = ask(shop, skip_validation=True, validation_type=validation_type)
            assert expected == findings(await validate(caller, request))
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
async def test_contradictions(client: Client, shop: Shop, changes: dict[str, Any], expected: set[str]) -> None:
    """What makes no sense is an error of the request that names every field, not an answer."""
    await client.put_program(shop.merchant_id, shop.store_id)

    assert expected == wrong_fields(await refused(client.redemption.ValidateRedemption(ask(shop, **changes))))


@pytest.mark.parametrize(
    ("store_id", "buyer_id", "expected"),
    [
        ("", "b", {"customer.buyer.store_id"}),
        ("s", "", {"customer.buyer.buyer_id"}),
        ("", "", {"customer.buyer.store_id", "customer.buyer.buyer_id"}),
    ],
)
async def test_absent_ids_of_a_buyer(
    client: Client, shop: Shop, store_id: str, buyer_id: str, expected: set[str]
) -> None:
    """What is absent is an error of the request; only what is malformed is answered with 802."""
    buyer = identity_pb2.Buyer(store_id=store_id, buyer_id=buyer_id)
    request = ask(shop, customer=identity_pb2.CustomerRef(merchant_id=shop.merchant_id, buyer=buyer))

    assert expected == wrong_fields(await refused(client.redemption.ValidateRedemption(request)))


async def test_a_code_is_not_issued_without_a_channel(client: Client, shop: Shop) -> None:
    """IssueValidationCode names the channel, or leaves it to the program; INVALID is none."""
    request = redemption_pb2.IssueValidationCodeRequest(
        customer=customer_of(shop), program_id=1, points=10, validation_type=INVALID
    )

    assert wrong_fields(await refused(client.redemption.IssueValidationCode(request))) == {"validation_type"}


async def test_a_question_changes_nothing(client: Client, shop: Shop, database_url: str) -> None:
    """Neither accounts nor entries, however it is answered, and no account comes into being."""
    await client.put_program(shop.merchant_id, shop.store_id)
    await earn(client, shop, 500)
    connection = await asyncpg.connect(database_url)

    async def book() -> list[str]:
        queries = [
            f"SELECT t::text FROM {table} t WHERE merchant_id = $1 ORDER BY 1"  # noqa: S608 - names of ours
            for table in ("points_accounts", "points_entries")
        ]
        return [row[0] for query in queries for row in await connection.fetch(query, shop.merchant_id)]

    before = await book()
    for request in (
        ask(shop),
        ask(shop, 15),
        ask(shop, 10_000),
        ask(shop, issue_otp=True),
        ask(shop, validation_code="wrong"),
        ask(shop, customer=customer_of(shop, "nobody")),
        ask_currency(shop, "1"),
    ):
        await validate(client, request)
    assert len(before) == 2
    assert before == await book()
    await connection.close()


async def test_a_currency_value_of_zero_is_an_answer(client: Client, shop: Shop) -> None:
    """Zero points cannot be redeemed, however they are asked for."""
    await client.put_program(shop.merchant_id, shop.store_id)

    answer = await validate(client, ask_currency(shop, "0.00"))

    assert answer.status.code == 801
    assert answer.status.reason == "POINTS_NOT_POSITIVE"


async def test_a_program_without_a_point_value_says_so(client: Client, shop: Shop) -> None:
    """The answer tells the true reason why a currency value cannot be redeemed."""
    await client.put_program(shop.merchant_id, shop.store_id, point_value="", currency_code="")

    answer = await validate(client, ask_currency(shop, "1"))

    assert answer.status.code == 801
    assert answer.status.message == "The program gives points no value."
