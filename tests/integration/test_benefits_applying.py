"""ListApplicableBenefits: benefits, a cart, and the obstacles."""

from typing import Any

import grpc
import pytest

from pointbook.v1 import benefits_pb2
from support.clients import Client
from support.refusals import refused
from support.shops import Shop
from support.unique_names import unique

ACTIVE, INACTIVE = benefits_pb2.BENEFITS_STATUS_ACTIVE, benefits_pb2.BENEFITS_STATUS_INACTIVE
DISCOUNT = benefits_pb2.REWARD_TYPE_PERCENTAGE_DISCOUNT
BY_CATEGORY, BY_PRODUCT = (
    benefits_pb2.PRODUCTS_APPLICABLE_TYPE_SPECIFIC_CATEGORY,
    benefits_pb2.PRODUCTS_APPLICABLE_TYPE_SPECIFIC_PRODUCT,
)
MAX_POINTS, MIN_QUANTITY, MIN_AMOUNT, NO_CONDITION = (
    benefits_pb2.BENEFITS_USAGE_INSTRUCTION_TYPE_MAX_POINTS,
    benefits_pb2.BENEFITS_USAGE_INSTRUCTION_TYPE_MIN_ITEM_QUANTITY,
    benefits_pb2.BENEFITS_USAGE_INSTRUCTION_TYPE_MIN_PURCHASE_AMOUNT,
    benefits_pb2.BENEFITS_USAGE_INSTRUCTION_TYPE_NONE,
)
LIMITS, UNLIMITED = benefits_pb2.USAGE_LIMITS_TYPE_LIMITS, benefits_pb2.USAGE_LIMITS_TYPE_UNLIMITED
APPLIES, DOES_NOT_APPLY, UNCERTAIN = (
    benefits_pb2.BENEFIT_APPLICABILITY_APPLIES,
    benefits_pb2.BENEFIT_APPLICABILITY_DOES_NOT_APPLY,
    benefits_pb2.BENEFIT_APPLICABILITY_UNCERTAIN,
)
VALUE, SCOPE = "benefits_usage_instruction_value", "products_applicable_type"
CART: dict[str, Any] = {
    "products": [
        {"product_id": "tea", "category_ids": ["drinks", "leaves"], "quantity": 2},
        {"product_id": "cup", "category_ids": ["china"], "quantity": 1},
    ],
    "amount": "99.99",
    "points": 500,
}


def condition(kind: Any, value: str | None) -> dict[str, Any]:
    """Return a condition of using a discount."""
    return {
        "benefits_usage_instruction_type": kind,
        "benefits_usage_instruction_value": value,
    }


def limited(times: int | None) -> dict[str, Any]:
    """Return a limit of uses."""
    return {"usage_limits_type": LIMITS, "usage_limits_times": times}


async def put_discount(client: Client, shop: Shop, benefit_id: str = "gold:1", **values: Any) -> None:
    """Put an active discount."""
    values = {"benefits_status": ACTIVE, "reward_type": DISCOUNT, "benefits_details": "10", **values}
    benefit = benefits_pb2.Benefit(merchant_id=shop.merchant_id, benefit_id=benefit_id, **values)
    await client.benefits.PutBenefit(benefits_pb2.PutBenefitRequest(benefit=benefit))


async def list_for_cart(client: Client, shop: Shop, **values: Any) -> benefits_pb2.ListApplicableBenefitsResponse:
    """List the benefits for a cart."""
    request = benefits_pb2.ListApplicableBenefitsRequest(**{"merchant_id": shop.merchant_id, **values})
    answer: benefits_pb2.ListApplicableBenefitsResponse = await client.benefits.ListApplicableBenefits(request)
    return answer


def described(obstacles: Any) -> list[tuple[str, str, str, str]]:
    """Return obstacles as texts."""
    name = benefits_pb2.BenefitObstacleReason.Name
    return [
        (name(each.reason).removeprefix("BENEFIT_OBSTACLE_REASON_"), each.field, each.limit, each.actual)
        for each in obstacles
    ]


FITTING: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"products_applicable_type": BY_PRODUCT, "specific_product_ids": ["pot", "cup"]}, {}),
    ({"products_applicable_type": BY_CATEGORY, "specific_category_list": ["leaves"]}, {}),
    (condition(MIN_AMOUNT, "99.99"), {}),
    (condition(MIN_AMOUNT, "99.990000000000"), {}),
    (condition(MIN_QUANTITY, "3"), {}),
    (condition(MAX_POINTS, "500"), {}),
    (condition(MAX_POINTS, "1"), {"points": 0}),
    (condition(NO_CONDITION, "1000"), {}),
    (
        {"auto_stack_limit": True, "code_stack_limit": True},
        {"automatic_discount_used": True, "discount_code_used": True},
    ),
    ({"auto_stack_limit": False, "code_stack_limit": False}, {}),
    (limited(3), {}),
    ({"usage_limits_type": UNLIMITED}, {}),
]


@pytest.mark.parametrize(("values", "changes"), FITTING)
async def test_a_benefit_applies_at_each_limit(
    client: Client, shop: Shop, values: dict[str, Any], changes: dict[str, Any]
) -> None:
    await put_discount(client, shop, **values)
    answer = await list_for_cart(client, shop, cart=CART | changes, uses={"gold:1": 2})

    assert [
        (each.applicability, described(each.obstacles), described(each.uncertainties)) for each in answer.benefits
    ] == [(APPLIES, [], [])]


OBSTACLES: list[tuple[dict[str, Any], dict[str, Any], tuple[str, str, str, str]]] = [
    ({"benefits_status": INACTIVE}, {}, ("INACTIVE", "benefits_status", "ACTIVE", "INACTIVE")),
    (
        {"products_applicable_type": BY_PRODUCT, "specific_product_ids": ["pot", "drinks"]},
        {},
        ("PRODUCT_SCOPE", "specific_product_ids", "pot, drinks", "tea, cup"),
    ),
    (
        {"products_applicable_type": BY_CATEGORY, "specific_category_list": ["food", "tea"]},
        {},
        ("PRODUCT_SCOPE", "specific_category_list", "food, tea", "drinks, leaves, china"),
    ),
    (
        {"products_applicable_type": BY_PRODUCT, "specific_product_ids": [f"p-{n}" for n in range(1_000)]},
        {"products": []},
        ("PRODUCT_SCOPE", "specific_product_ids", ", ".join(f"p-{n}" for n in range(10)), ""),
    ),
    (condition(MIN_AMOUNT, "100.00"), {}, ("MIN_PURCHASE_AMOUNT", VALUE, "100.00", "99.99")),
    (condition(MIN_AMOUNT, "0.000000000001"), {"amount": "0"}, ("MIN_PURCHASE_AMOUNT", VALUE, "0.000000000001", "0")),
    (condition(MIN_QUANTITY, "4"), {}, ("MIN_ITEM_QUANTITY", VALUE, "4", "3")),
    (condition(MIN_QUANTITY, "1"), {"products": []}, ("MIN_ITEM_QUANTITY", VALUE, "1", "0")),
    (condition(MAX_POINTS, "499"), {}, ("MAX_POINTS", VALUE, "499", "500")),
    (
        {"auto_stack_limit": False},
        {"automatic_discount_used": True},
        ("AUTOMATIC_DISCOUNT", "auto_stack_limit", "false", "true"),
    ),
    ({"code_stack_limit": False}, {"discount_code_used": True}, ("DISCOUNT_CODE", "code_stack_limit", "false", "true")),
    (limited(2), {}, ("USAGE_LIMIT", "usage_limits_times", "2", "2")),
    (limited(1), {}, ("USAGE_LIMIT", "usage_limits_times", "1", "2")),
]


@pytest.mark.parametrize(("values", "changes", "expected"), OBSTACLES)
async def test_each_obstacle_names_field_limit_and_actual_value(
    client: Client, shop: Shop, values: dict[str, Any], changes: dict[str, Any], expected: tuple[str, str, str, str]
) -> None:
    await put_discount(client, shop, **values)
    [found] = (await list_for_cart(client, shop, cart=CART | changes, uses={"gold:1": 2})).benefits

    assert (found.applicability, described(found.obstacles), described(found.uncertainties)) == (
        DOES_NOT_APPLY,
        [expected],
        [],
    )


UNCERTAINTIES: list[tuple[dict[str, Any], dict[str, Any], tuple[str, str, str, str]]] = [
    ({"benefits_status": 0}, {}, ("INACTIVE", "benefits_status", "ACTIVE", "")),
    (
        {"benefits_status": 0, "unrecognized_values": {"benefits_status": "PAUSED"}},
        {},
        ("INACTIVE", "benefits_status", "ACTIVE", "PAUSED"),
    ),
    (
        {"unrecognized_values": {SCOPE: "ALL_PRODUCTS"}},
        {},
        ("PRODUCT_SCOPE", SCOPE, "ALL_PRODUCTS", "tea, cup"),
    ),
    ({SCOPE: BY_PRODUCT}, {}, ("PRODUCT_SCOPE", "specific_product_ids", "", "tea, cup")),
    ({SCOPE: BY_CATEGORY}, {"products": []}, ("PRODUCT_SCOPE", "specific_category_list", "", "")),
    (condition(MIN_AMOUNT, "100"), {"amount": ""}, ("MIN_PURCHASE_AMOUNT", VALUE, "100", "")),
    (condition(MAX_POINTS, "100"), {"points": None}, ("MAX_POINTS", VALUE, "100", "")),
    (condition(MIN_AMOUNT, None), {}, ("USAGE_INSTRUCTION", VALUE, "", "")),
    (
        {"unrecognized_values": {"benefits_usage_instruction_type": "ON_MONDAYS"}},
        {},
        ("USAGE_INSTRUCTION", "benefits_usage_instruction_type", "ON_MONDAYS", ""),
    ),
    ({}, {"automatic_discount_used": True}, ("AUTOMATIC_DISCOUNT", "auto_stack_limit", "", "true")),
    ({}, {"discount_code_used": True}, ("DISCOUNT_CODE", "code_stack_limit", "", "true")),
    (limited(None), {}, ("USAGE_LIMIT", "usage_limits_times", "", "2")),
    (
        {"unrecognized_values": {"usage_limits_type": "DAILY"}},
        {},
        ("USAGE_LIMIT", "usage_limits_type", "DAILY", "2"),
    ),
]


@pytest.mark.parametrize(("values", "changes", "expected"), UNCERTAINTIES)
async def test_unknown_facts_are_uncertainties(
    client: Client, shop: Shop, values: dict[str, Any], changes: dict[str, Any], expected: tuple[str, str, str, str]
) -> None:
    await put_discount(client, shop, **values)
    [found] = (await list_for_cart(client, shop, cart=CART | changes, uses={"gold:1": 2})).benefits

    assert (found.applicability, described(found.obstacles), described(found.uncertainties)) == (
        UNCERTAIN,
        [],
        [expected],
    )


def test_every_reason_is_tested() -> None:
    names = {
        name.removeprefix("BENEFIT_OBSTACLE_REASON_")
        for name in benefits_pb2.BenefitObstacleReason.DESCRIPTOR.values_by_name
    }

    assert {expected[0] for *_, expected in OBSTACLES} == names - {"UNSPECIFIED", "USAGE_INSTRUCTION"}
    assert {expected[0] for *_, expected in UNCERTAINTIES} == names - {"UNSPECIFIED", "MIN_ITEM_QUANTITY"}


async def test_all_obstacles_are_returned_at_once(client: Client, shop: Shop) -> None:
    await put_discount(
        client,
        shop,
        benefits_status=INACTIVE,
        products_applicable_type=BY_PRODUCT,
        specific_product_ids=["pot"],
        code_stack_limit=False,
        **condition(MIN_AMOUNT, "100"),
        **limited(1),
    )
    cart = {"automatic_discount_used": True, "discount_code_used": True}
    [found] = (await list_for_cart(client, shop, cart=cart, uses={"gold:1": 1})).benefits

    assert found.applicability == DOES_NOT_APPLY
    assert [reason for reason, *_ in described(found.obstacles)] == [
        "INACTIVE",
        "PRODUCT_SCOPE",
        "DISCOUNT_CODE",
        "USAGE_LIMIT",
    ]
    assert [reason for reason, *_ in described(found.uncertainties)] == ["MIN_PURCHASE_AMOUNT", "AUTOMATIC_DISCOUNT"]


async def test_unset_values_of_a_benefit_match_every_membership_and_store(client: Client, shop: Shop) -> None:
    outlet = unique("store")
    await client.put_store(shop.merchant_id, outlet)
    await client.put_program(shop.merchant_id, shop.store_id)
    paid, level = benefits_pb2.MEMBERSHIP_TYPE_PAID, benefits_pb2.MEMBERSHIP_TYPE_LEVEL
    await put_discount(client, shop, "birthday", reward_scene=benefits_pb2.REWARD_SCENE_BIRTH_BENEFITS)
    await put_discount(client, shop, "everyone")
    await put_discount(client, shop, "gold", level_code="gold", membership_type=level)
    await put_discount(client, shop, "outlet", store_ids=[outlet])
    await put_discount(client, shop, "paid", membership_type=paid)
    await put_discount(client, shop, "vip", unrecognized_values={"membership_type": "VIP"})

    async def ids(**values: Any) -> list[str]:
        return [each.benefit.benefit_id for each in (await list_for_cart(client, shop, **values)).benefits]

    assert await ids() == ["birthday", "everyone", "gold", "outlet", "paid", "vip"]
    assert await ids(membership_type=paid) == ["birthday", "everyone", "outlet", "paid"]
    assert await ids(level_code="gold", membership_type=level) == ["birthday", "everyone", "gold", "outlet"]
    assert await ids(level_code="silver") == ["birthday", "everyone", "outlet", "paid", "vip"]
    everyday = benefits_pb2.REWARD_SCENE_MEMBERSHIP_BENEFITS
    assert await ids(reward_scene=everyday, store_id=shop.store_id) == ["everyone", "gold", "paid", "vip"]
    assert await ids(program_id=1, membership_type=paid) == ["birthday", "everyone", "paid"]


async def test_a_page_token_is_valid_only_for_the_same_cart(client: Client, shop: Shop) -> None:
    for index in range(5):
        await put_discount(client, shop, f"b-{index}")
    first = await list_for_cart(client, shop, cart=CART, page_size=3)
    second = await list_for_cart(client, shop, cart=CART, page_size=3, page_token=first.next_page_token)

    assert [each.benefit.benefit_id for each in (*first.benefits, *second.benefits)] == [f"b-{n}" for n in range(5)]
    assert second.next_page_token == ""
    found = await refused(list_for_cart(client, shop, cart=CART | {"amount": "1"}, page_token=first.next_page_token))
    assert set(found.fields) == {"page_token"}


async def test_every_invalid_field_of_a_cart_is_named_at_once(client: Client, shop: Shop) -> None:
    cart = {
        "products": [
            {"product_id": "p", "category_ids": ["c"] * 2, "quantity": 1},
            {"product_id": "p", "category_ids": ["c c"], "quantity": 0},
            {"quantity": 1_000_001, "category_ids": [f"c-{n}" for n in range(101)]},
        ],
        "amount": "-1",
        "points": 10**15 + 1,
    }
    found = await refused(list_for_cart(client, shop, cart=cart, uses={"b": -1}, program_id=-1, page_size=-1))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS")
    assert set(found.fields) == {
        "cart.products",
        "cart.products[0].category_ids",
        "cart.products[1].category_ids[0]",
        "cart.products[1].quantity",
        "cart.products[2].product_id",
        "cart.products[2].category_ids",
        "cart.products[2].quantity",
        "cart.amount",
        "cart.points",
        "uses",
        "program_id",
        "page_size",
    }
    many: Any = [{"product_id": f"p-{n}", "quantity": 1} for n in range(1_001)]
    found = await refused(
        list_for_cart(client, shop, cart={"products": many}, uses={f"b-{n}": 1 for n in range(1_001)})
    )
    assert set(found.fields) == {"cart.products", "uses"}
