"""Every parameter and status code of Capillary's points/isredeemable.

Source: docs/reference/capillary-isredeemable.md#request-parameters
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest

from pointbook.v1 import identity_pb2, redemption_pb2
from pointbook_server.delivery.sender import DeliveryFailedError
from pointbook_server.redemption.transactions import RedemptionTransactions
from support.clients import Client
from support.clocks import NOW_MS
from support.redemption import booking, earn, redeem, redeem_request, reverse
from support.refusals import refused
from support.servers import Service
from support.shops import Shop
from support.unique_names import unique

SMS = redemption_pb2.VALIDATION_TYPE_SMS
EMAIL = redemption_pb2.VALIDATION_TYPE_EMAIL
MISSED_CALL = redemption_pb2.VALIDATION_TYPE_MISSED_CALL
INVALID = redemption_pb2.VALIDATION_TYPE_INVALID
MOBILE = "+8613812345678"
REQUIRING, RESTRICTED, STRICT, OTHER_VALUE, DISABLED = 3, 4, 5, 6, 7
"""The ids of the other programs, each named after its special setting."""
Response = redemption_pb2.ValidateRedemptionResponse


@pytest.fixture
async def merchant(service: Service, client: Client, shop: Shop) -> AsyncIterator[Shop]:
    """Create a merchant with seven programs, and a group of Ada and Bea.

    Ada has 100 points in program 1 and 40 in program 2, Bea 30 in program 1.
    """
    merchant_id, store_id = shop.merchant_id, shop.store_id
    other = replace(shop, store_id=unique("store"))
    await client.put_store(merchant_id, other.store_id)
    permissions: dict[str, Any] = {
        "criteria": {},
        "default_region": "CN",
        "allow_group_redemption": True,
        "allow_cross_program_redemption": True,
        "validation": {"allow_skip": True},
    }
    await client.put_program(merchant_id, store_id, **permissions)
    await client.put_program(merchant_id, other.store_id, **permissions | {"program_id": 2})
    requires = {"required": True, "allow_skip": True}
    await client.put_program(merchant_id, store_id, program_id=REQUIRING, criteria={}, validation=requires)
    await client.put_program(merchant_id, store_id, program_id=RESTRICTED, criteria={})
    limits = {
        "multiples_of": 10,
        "min_points_per_redemption": 20,
        "max_points_per_redemption": 50,
        "min_balance_required": 200,
        "min_lifetime_points": 300,
        "max_points_per_day": 40,
        "max_points_per_week": 40,
        "max_points_per_month": 40,
    }
    await client.put_program(merchant_id, store_id, program_id=STRICT, criteria=limits)
    await client.put_program(merchant_id, store_id, program_id=DISABLED, criteria={}, redemption_enabled=False)
    await earn(client, shop, 100, "ada")
    await earn(client, other, 40, "ada-2")
    await earn(client, shop, 30, "bea")
    buyers = [{"store_id": store_id, "buyer_id": "ada"}, {"store_id": other.store_id, "buyer_id": "ada-2"}]
    await client.put_customer(
        merchant_id,
        "ada",
        mobile=MOBILE,
        email="ada@example.com",
        external_id="crm-1",
        card_numbers=["card-1"],
        card_external_ids=["card-x-1"],
        buyers=buyers,
    )
    wechat = {
        "source": identity_pb2.USER_SOURCE_WECHAT,
        "account_id": "account-1",
        "identifier_type": identity_pb2.IDENTIFIER_TYPE_CUSTOMER_ID,
        "value": "wx-bea",
    }
    bea = [{"store_id": store_id, "buyer_id": "bea"}]
    await client.put_customer(merchant_id, "bea", mobile="+8613800000001", buyers=bea, source_identities=[wechat])
    blocked = [{"store_id": store_id, "buyer_id": "eve"}]
    await client.put_customer(merchant_id, "eve", external_id="crm-eve", fraud_blocked=True, buyers=blocked)
    members = [
        {"customer_id": "ada", "can_redeem": True, "is_default": True},
        {"customer_id": "bea", "can_redeem": True},
    ]
    await client.put_group(merchant_id, "family", external_id="family-x", primary_customer_id="bea", members=members)
    yield shop
    service.outbox.error = None
    service.clock.now_ms = NOW_MS


def customer_by(merchant: Shop, **identifier: Any) -> identity_pb2.CustomerRef:
    """Build the reference of a customer by one identifier; Ada's by default."""
    return identity_pb2.CustomerRef(merchant_id=merchant.merchant_id, **identifier or {"external_id": "crm-1"})


def ada_request(merchant: Shop, **changes: Any) -> redemption_pb2.ValidateRedemptionRequest:
    """Build a request to validate a redemption of 10 of Ada's points in program 1."""
    values: dict[str, Any] = {"customer": customer_by(merchant), "program_id": 1, "points": 10}
    return redemption_pb2.ValidateRedemptionRequest(**values | changes)


def by_group(**selector: Any) -> dict[str, Any]:
    """Return changes that select the group by a parameter."""
    return {"user_group2": identity_pb2.UserGroupRef(**selector)}


def has_active(active_points: int) -> Callable[[Response], bool]:
    """Return a check for redeemable points, with a number of active points."""
    return lambda response: response.redeemable and response.active_points == active_points


def has_codes(*codes: int) -> Callable[[Response], bool]:
    """Return a check for exactly these status codes."""
    return lambda response: [violation.code for violation in response.violations] == list(codes)


SOURCE = {
    "primary_user_source": identity_pb2.USER_SOURCE_WECHAT,
    "primary_user_account_id": "account-1",
    "primary_user_identifier_type": identity_pb2.IDENTIFIER_TYPE_CUSTOMER_ID,
    "primary_user_identifier_value": "wx-bea",
}
OWN = {
    "primary_user_source": identity_pb2.USER_SOURCE_INSTORE,
    "primary_user_identifier_type": identity_pb2.IDENTIFIER_TYPE_MOBILE,
    "primary_user_identifier_value": "138 0000 0001",
}
PARAMETERS: list[tuple[str, Callable[[Shop], dict[str, Any]], Callable[[Response], bool]]] = [
    ("mobile", lambda w: {"customer": customer_by(w, mobile="138 1234 5678")}, has_active(100)),
    ("email", lambda w: {"customer": customer_by(w, email="ADA@Example.com")}, has_active(100)),
    ("external_id", lambda w: {"customer": customer_by(w, external_id="crm-1")}, has_active(100)),
    ("card_number", lambda w: {"customer": customer_by(w, card_number="card-1")}, has_active(100)),
    ("card_external_id", lambda w: {"customer": customer_by(w, card_external_id="card-x-1")}, has_active(100)),
    ("program_id", lambda _: {"program_id": 2}, has_active(40)),
    ("group_redemption", lambda _: {"group_redemption": True}, has_active(140)),
    ("points", lambda _: {"points": 101}, has_codes(803)),
    ("issue_otp", lambda _: {"issue_otp": True}, lambda response: response.issued_code.sent),
    ("validation_code", lambda _: {"validation_code": "wrong"}, has_codes(808)),
    ("skip_validation", lambda _: {"program_id": REQUIRING, "skip_validation": True}, has_active(100)),
    ("validation_type", lambda _: {"validation_type": MISSED_CALL, "issue_otp": True}, has_codes(823)),
    (
        "validation_type",
        lambda _: {"validation_type": SMS, "issue_otp": True},
        lambda response: response.issued_code.sent,
    ),
    (
        "validation_type",
        lambda _: {"validation_type": EMAIL, "issue_otp": True},
        lambda response: response.issued_code.sent,
    ),
    (
        "validation_type",
        lambda _: {"program_id": REQUIRING, "validation_type": INVALID, "skip_validation": True},
        has_active(100),
    ),
    ("user_group2_primary_user_id", lambda _: by_group(primary_user_id="bea"), has_active(130)),
    ("user_group2_id", lambda _: by_group(id="family"), has_active(130)),
    ("user_group2_primary_user_source", lambda _: by_group(**SOURCE), has_active(130)),
    (
        "user_group2_primary_user_accountId",
        lambda _: by_group(**SOURCE | {"primary_user_account_id": "account-2"}),
        has_codes(1632),
    ),
    ("user_group2_primary_user_identifier_type", lambda _: by_group(**OWN), has_active(130)),
    (
        "user_group2_primary_user_identifier_value",
        lambda _: by_group(**OWN | {"primary_user_identifier_value": MOBILE}),
        has_codes(1632),
    ),
    ("user_group2_external_id", lambda _: by_group(external_id="family-x"), has_active(130)),
    ("use_default_user_group2", lambda _: by_group(use_default=True), has_active(130)),
    (
        "currency_input",
        lambda _: {"points": 0, "currency_input": True, "currency_value": "0.5"},
        lambda response: response.redeemable and response.points == 50,
    ),
]
CAPILLARY_PARAMETERS = {
    *("mobile", "email", "external_id", "card_number", "card_external_id", "program_id", "group_redemption", "points"),
    *("issue_otp", "validation_code", "skip_validation", "validation_type", "user_group2_primary_user_id"),
    *("user_group2_id", "user_group2_primary_user_source", "user_group2_primary_user_accountId"),
    *("user_group2_primary_user_identifier_type", "user_group2_primary_user_identifier_value"),
    *("user_group2_external_id", "use_default_user_group2", "currency_input"),
}


def test_every_parameter_is_covered() -> None:
    assert {name for name, _, _ in PARAMETERS} == CAPILLARY_PARAMETERS


@pytest.mark.parametrize(("changes", "shows"), [pytest.param(*each[1:], id=each[0]) for each in PARAMETERS])
async def test_every_parameter_has_its_effect(
    client: Client, merchant: Shop, changes: Callable[[Shop], dict[str, Any]], shows: Callable[[Response], bool]
) -> None:
    assert has_active(100)(await client.redemption.ValidateRedemption(ada_request(merchant)))

    response = await client.redemption.ValidateRedemption(ada_request(merchant, **changes(merchant)))
    assert shows(response), response


ANSWERED: dict[int, tuple[str, Callable[[Shop], dict[str, Any]]]] = {
    800: ("REDEEMABLE", lambda _: {}),
    801: ("POINTS_NOT_POSITIVE", lambda _: {"points": 0}),
    802: ("IDENTIFIER_INVALID", lambda w: {"customer": customer_by(w, mobile="not a number")}),
    803: ("INSUFFICIENT_POINTS", lambda _: {"points": 101}),
    804: ("BALANCE_BELOW_REQUIRED", lambda _: {"program_id": STRICT, "points": 20}),
    805: ("LIFETIME_POINTS_BELOW_REQUIRED", lambda _: {"program_id": STRICT, "points": 20}),
    807: ("NOT_A_MULTIPLE", lambda _: {"program_id": STRICT, "points": 25}),
    808: ("CODE_INVALID", lambda _: {"validation_code": "wrong"}),
    809: ("CUSTOMER_BLOCKED", lambda w: {"customer": customer_by(w, external_id="crm-eve")}),
    816: ("CUSTOMER_NOT_FOUND", lambda w: {"customer": customer_by(w, external_id="unknown")}),
    819: ("ABOVE_MAX_PER_DAY", lambda _: {"program_id": STRICT, "points": 50}),
    821: ("BELOW_MIN_PER_REDEMPTION", lambda _: {"program_id": STRICT, "points": 10}),
    822: ("MISSED_CALL_NOT_SEEN", lambda _: {"challenge_id": "unknown"}),
    823: ("MISSED_CALL_NOT_ENABLED", lambda _: {"validation_type": MISSED_CALL, "issue_otp": True}),
    824: ("VALIDATION_REQUIRED", lambda _: {"program_id": REQUIRING}),
    827: ("REDEMPTION_DISABLED", lambda _: {"program_id": DISABLED}),
    828: ("GROUP_REDEMPTION_NOT_ALLOWED", lambda _: {"program_id": RESTRICTED} | by_group(id="family")),
    1101: ("PROGRAM_NOT_FOUND", lambda _: {"program_id": 99}),
    1620: ("NOT_A_GROUP_MEMBER", lambda w: {"customer": customer_by(w, external_id="crm-zoe")} | by_group(id="family")),
    1632: ("GROUP_NOT_FOUND", lambda _: by_group(id="strangers")),
    3316: ("CROSS_PROGRAM_MISCONFIGURED", lambda _: {"group_redemption": True}),
}
RAISED = {817, 860, 876, 3802}
"""The codes of other calls, and of a warning."""


def test_every_status_code_is_covered() -> None:
    codes = {800, 801, 802, 803, 804, 805, 807, 808, 809, 816, 817, 819, 821, 822, 823, 824, 827, 828}
    assert codes | {860, 876, 1101, 1620, 1632, 3316, 3802} == ANSWERED.keys() | RAISED


@pytest.mark.parametrize("code", ANSWERED)
async def test_every_status_code_is_returned(client: Client, merchant: Shop, code: int) -> None:
    reason, changes = ANSWERED[code]
    await client.put_customer(merchant.merchant_id, "zoe", external_id="crm-zoe")
    if code == 3316:
        odd = {"program_id": OTHER_VALUE, "point_value": "0.02", "allow_cross_program_redemption": True, "criteria": {}}
        await client.put_program(merchant.merchant_id, merchant.store_id, **odd)

    response = await client.redemption.ValidateRedemption(ada_request(merchant, **changes(merchant)))
    statuses = [(each.code, each.reason) for each in (response.status, *response.violations)]
    assert (code, reason) in statuses
    assert response.redeemable is (code == 800)


async def raise_failed(_service: Service, client: Client, merchant: Shop) -> Any:
    """Redeem while the point value changes before the locks: 817."""
    request = redeem_request(merchant, 0, customer=customer_by(merchant), currency_input=True, currency_value="0.5")
    locked = RedemptionTransactions.redeem

    async def be_overtaken(self: RedemptionTransactions, *arguments: Any) -> Any:
        await client.put_program(merchant.merchant_id, merchant.store_id, criteria={}, point_value="0.05")
        return await locked(self, *arguments)

    with patch.object(RedemptionTransactions, "redeem", be_overtaken):
        return await refused(redeem(client, request))


async def raise_not_issued(service: Service, client: Client, merchant: Shop) -> Any:
    """Issue a code that the provider refuses: 860."""
    service.outbox.error = DeliveryFailedError("refused")
    request = redemption_pb2.IssueValidationCodeRequest(customer=customer_by(merchant), program_id=1, points=10)
    return await refused(client.redemption.IssueValidationCode(request))


async def raise_reversed(_service: Service, client: Client, merchant: Shop) -> Any:
    """Reverse a redemption twice: 3802."""
    redemption = await redeem(client, redeem_request(merchant, 10, customer=customer_by(merchant)))
    await reverse(client, redemption)
    return await refused(reverse(client, redemption))


@pytest.mark.parametrize(
    ("code", "fail"), [(817, raise_failed), (860, raise_not_issued), (3802, raise_reversed)], ids=["817", "860", "3802"]
)
async def test_status_codes_of_other_calls_are_in_error_metadata(
    service: Service, client: Client, merchant: Shop, code: int, fail: Callable[..., Awaitable[Any]]
) -> None:
    assert (await fail(service, client, merchant)).metadata["status_code"] == str(code)


async def test_code_that_is_not_issued_is_warning_876(service: Service, client: Client, merchant: Shop) -> None:
    service.outbox.error = DeliveryFailedError("refused")

    response = await client.redemption.ValidateRedemption(ada_request(merchant, issue_otp=True))
    assert (response.redeemable, response.status.code) == (True, 800)
    assert [(warning.code, warning.reason) for warning in response.warnings] == [(876, "CODE_NOT_ISSUED")]


async def test_decreases_by_shopline_do_not_count_for_caps(client: Client, merchant: Shop) -> None:
    criteria = {"max_points_per_day": 40}
    await client.put_program(merchant.merchant_id, merchant.store_id, criteria=criteria)
    await client.apply(booking(merchant, 40, 60, buyer_id="ada"))

    assert has_active(60)(await client.redemption.ValidateRedemption(ada_request(merchant, points=40)))
