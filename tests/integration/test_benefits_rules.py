"""Every field, enum value and relevance rule of BenefitsInfo, through PutBenefit.

Source: docs/reference/shopline-benefits.md#relevance
"""

import math
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct

from pointbook.v1 import benefits_pb2
from support.clients import Client
from support.refusals import refused
from support.shops import Shop

ENUMS = {
    "membership_type": "LEVEL PAID BASIC DUAL",
    "reward_scene": "BIRTH_BENEFITS ENTERED_PHONE FOLLOW_FB POINTS_REDEMPTION SUCCESSFUL_BEING_REFERRED "
    "SUCCESSFUL_REFERRAL EMAIL_SUBSCRIPTION ENTERED_BIRTHDAY FOLLOW_INS LEVEL_UPGRADE MEMBERSHIP_BENEFITS SHARE_FB "
    "SUCCESSFUL_ORDERS",
    "benefits_expiry_date_type": "SPECIFIC_DATE FOLLOW_MEMBERSHIP",
    "benefits_issurance_type": "AFTER_PURCHASE PERIODICALLY SPECIFIC_DATE",
    "benefits_status": "ACTIVE INACTIVE",
    "benefits_usage_instruction_type": "MAX_POINTS MIN_ITEM_QUANTITY MIN_PURCHASE_AMOUNT NONE",
    "birth_benefits_release_type": "EXACTLY_BIRTH FIXED_BEFORE FIXED_DATE",
    "products_applicable_type": "SPECIFIC_CATEGORY SPECIFIC_PRODUCT",
    "reward_type": "PERCENTAGE_DISCOUNT POINTS CASHBACK CASH_VOUCHER FREE_PRODUCT FREE_SHIPPING",
    "usage_limits_type": "LIMITS UNLIMITED",
}
"""SHOPLINE's names of all values, copied from its reference."""
PAID = {"membership_type": "PAID"}
BIRTHDAY = {"reward_scene": "BIRTH_BENEFITS"}
DISCOUNTS = tuple({"reward_type": name} for name in ("PERCENTAGE_DISCOUNT", "CASH_VOUCHER", "FREE_SHIPPING"))
EVERYTHING: dict[str, Any] = {
    "auto_stack_limit": True,
    "benefits_description": "d",
    "benefits_details": "10",
    "benefits_expiry_date_type": "SPECIFIC_DATE",
    "benefits_expiry_date_value": 30,
    "benefits_icon": "https://img.example/i.png",
    "benefits_issurance_type": "PERIODICALLY",
    "benefits_name": "n",
    "benefits_status": "ACTIVE",
    "benefits_usage_instruction_type": "MAX_POINTS",
    "benefits_usage_instruction_value": "5",
    "birth_benefits_release_type": "FIXED_BEFORE",
    "code_stack_limit": False,
    "days_before": 3,
    "fixed_date": 31,
    "periodically_days": 7,
    "periodically_months": "12",
    "products_applicable_type": "SPECIFIC_CATEGORY",
    "reward_type": "CASHBACK",
    "specific_category_list": ["c"],
    "specific_date": "02-29",
    "specific_product_ids": ["p"],
    "usage_limits_times": 2,
    "usage_limits_type": "LIMITS",
}
"""A right value of each of the 24 fields."""
RELEVANT: dict[str, tuple[dict[str, str], ...]] = {
    "auto_stack_limit": ({},),
    "benefits_description": (PAID,),
    "benefits_details": ({},),
    "benefits_expiry_date_type": (PAID,),
    "benefits_expiry_date_value": ({**PAID, "benefits_expiry_date_type": "SPECIFIC_DATE"},),
    "benefits_icon": ({},),
    "benefits_issurance_type": (PAID,),
    "benefits_name": (PAID,),
    "benefits_status": ({},),
    "benefits_usage_instruction_type": ({},),
    "benefits_usage_instruction_value": DISCOUNTS,
    "birth_benefits_release_type": (BIRTHDAY,),
    "code_stack_limit": ({},),
    "days_before": ({**BIRTHDAY, "birth_benefits_release_type": "FIXED_BEFORE"},),
    "fixed_date": ({**BIRTHDAY, "birth_benefits_release_type": "FIXED_DATE"},),
    "periodically_days": ({**PAID, "benefits_issurance_type": "PERIODICALLY"},),
    "periodically_months": ({**PAID, "benefits_issurance_type": "PERIODICALLY"},),
    "products_applicable_type": (BIRTHDAY, *DISCOUNTS),
    "reward_type": ({},),
    "specific_category_list": tuple(
        {**when, "products_applicable_type": "SPECIFIC_CATEGORY"} for when in (BIRTHDAY, *DISCOUNTS)
    ),
    "specific_date": ({**PAID, "benefits_issurance_type": "SPECIFIC_DATE"},),
    "specific_product_ids": tuple(
        {**when, "products_applicable_type": "SPECIFIC_PRODUCT"} for when in (BIRTHDAY, *DISCOUNTS)
    ),
    "usage_limits_times": ({"usage_limits_type": "LIMITS"},),
    "usage_limits_type": ({},),
}
"""The contexts in which each field is relevant.

Source: docs/reference/shopline-benefits.md#relevance
"""
CONDITIONAL = {name for name, contexts in RELEVANT.items() if contexts != ({},)}
ELSEWHERE = {"membership_type": "LEVEL", "reward_scene": "LEVEL_UPGRADE"}
"""A context in which no field is relevant because of the membership type or the scene."""


def constant(field: str, name: str) -> int:
    """Return the number of an enum value."""
    enum: Any = benefits_pb2.Benefit.DESCRIPTOR.fields_by_name[field].enum_type
    prefix = enum.values[0].name.removesuffix("UNSPECIFIED")
    return int(enum.values_by_name[prefix + name].number)


def benefit_of(shop: Shop, **values: Any) -> benefits_pb2.Benefit:
    """Return a benefit with some values; enum values are SHOPLINE's names."""
    numbers: dict[str, Any] = {
        name: constant(name, value) if name in ENUMS and isinstance(value, str) else value
        for name, value in values.items()
    }
    return benefits_pb2.Benefit(merchant_id=shop.merchant_id, benefit_id="gold:1", **numbers)


async def put_and_get(client: Client, benefit: benefits_pb2.Benefit) -> benefits_pb2.Benefit:
    """Put a benefit, and return it as it is stored."""
    await client.benefits.PutBenefit(benefits_pb2.PutBenefitRequest(benefit=benefit))
    request = benefits_pb2.GetBenefitRequest(merchant_id=benefit.merchant_id, benefit_id=benefit.benefit_id)
    return (await client.benefits.GetBenefit(request)).benefit


async def put_wrong_fields(client: Client, benefit: benefits_pb2.Benefit) -> dict[str, str]:
    """Put an invalid benefit, and return its violations."""
    found = await refused(client.benefits.PutBenefit(benefits_pb2.PutBenefitRequest(benefit=benefit)))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS")
    return {path.removeprefix("benefit."): violations for path, violations in found.fields.items()}


def test_the_tables_have_every_field_and_enum_value() -> None:
    for field, names in ENUMS.items():
        enum: Any = benefits_pb2.Benefit.DESCRIPTOR.fields_by_name[field].enum_type
        assert len(enum.values) - 1 == len([constant(field, name) for name in names.split()])
    assert len(EVERYTHING) == len(RELEVANT) == 24
    assert EVERYTHING.keys() == RELEVANT.keys() < set(benefits_pb2.Benefit.DESCRIPTOR.fields_by_name)
    assert len(CONDITIONAL) == 16


def enum_values() -> Iterator[Any]:
    """Return every enum value, with a context in which it is relevant."""
    for field, names in ENUMS.items():
        for name in names.split():
            yield pytest.param(field, name, id=f"{field}-{name}")


@pytest.mark.parametrize(("field", "name"), list(enum_values()))
async def test_every_enum_value_is_stored_by_number_or_name(client: Client, shop: Shop, field: str, name: str) -> None:
    context = RELEVANT.get(field, ({},))[0]
    benefit = benefit_of(shop, **{**context, field: name})

    assert await put_and_get(client, benefit) == benefit
    assert await put_and_get(client, benefit_of(shop, **context, unrecognized_values={field: name})) == benefit


@pytest.mark.parametrize(("field", "context"), [(name, each) for name, all_ in RELEVANT.items() for each in all_])
async def test_every_field_is_stored_where_it_is_relevant(
    client: Client, shop: Shop, field: str, context: dict[str, str]
) -> None:
    benefit = benefit_of(shop, **{**ELSEWHERE, **context, field: EVERYTHING[field]})

    assert await put_and_get(client, benefit) == benefit


def irrelevant_contexts() -> Iterator[Any]:
    """Return every context in which a field with a rule is irrelevant."""
    for field in sorted(CONDITIONAL):
        relevant_contexts = RELEVANT[field]
        for relevant in relevant_contexts:
            for name in relevant:
                for value in (*ENUMS[name].split(), None):
                    context = {**ELSEWHERE, **relevant, name: value}
                    context = {key: item for key, item in context.items() if item is not None}
                    undecided = name in ELSEWHERE and value is None
                    if not undecided and not any(each.items() <= context.items() for each in relevant_contexts):
                        yield pytest.param(field, context, id=f"{field}-{name}-{value}")


@pytest.mark.parametrize(("field", "context"), list(irrelevant_contexts()))
async def test_a_field_is_refused_where_it_is_irrelevant(
    client: Client, shop: Shop, field: str, context: dict[str, str]
) -> None:
    """The same value may be in irrelevant_values."""
    violations = await put_wrong_fields(client, benefit_of(shop, **{**context, field: EVERYTHING[field]}))
    assert violations[field].startswith("must be absent: it is only relevant when ")

    others = {name: value for name, value in context.items() if name not in violations}
    benefit = benefit_of(shop, **others, irrelevant_values={field: EVERYTHING[field]})
    assert await put_and_get(client, benefit) == benefit


@pytest.mark.parametrize("field", sorted(CONDITIONAL))
async def test_a_value_that_may_be_relevant_is_refused_as_irrelevant(client: Client, shop: Shop, field: str) -> None:
    for context in RELEVANT[field]:
        values: Any = {field: EVERYTHING[field]}
        benefit = benefit_of(shop, **ELSEWHERE | context, irrelevant_values=values)
        assert list(await put_wrong_fields(client, benefit)) == [f"irrelevant_values.{field}"]
        benefit = benefit_of(shop, **{**ELSEWHERE, **context, field: EVERYTHING[field]}, irrelevant_values=values)
        assert list(await put_wrong_fields(client, benefit)) == [f"irrelevant_values.{field}"]


async def test_an_unset_context_leaves_rules_undecided(client: Client, shop: Shop) -> None:
    """SHOPLINE returns neither membership type nor scene with a benefit."""
    benefit = benefit_of(
        shop,
        benefits_name="n",
        benefits_description="d",
        benefits_issurance_type="AFTER_PURCHASE",
        benefits_expiry_date_type="FOLLOW_MEMBERSHIP",
        birth_benefits_release_type="FIXED_DATE",
        fixed_date=1,
        products_applicable_type="SPECIFIC_PRODUCT",
        specific_product_ids=["p"],
    )

    assert await put_and_get(client, benefit) == benefit


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("membership_type", ["benefits_description", "benefits_name", "benefits_issurance_type"]),
        ("reward_scene", ["birth_benefits_release_type", "products_applicable_type"]),
        ("benefits_expiry_date_type", ["benefits_expiry_date_value"]),
        ("benefits_issurance_type", ["periodically_days", "periodically_months", "specific_date"]),
        ("birth_benefits_release_type", ["days_before", "fixed_date"]),
        ("products_applicable_type", ["specific_category_list", "specific_product_ids"]),
        ("reward_type", ["benefits_usage_instruction_value", "products_applicable_type"]),
        ("usage_limits_type", ["usage_limits_times"]),
    ],
)
async def test_an_unlisted_name_leaves_rules_undecided(
    client: Client, shop: Shop, name: str, fields: list[str]
) -> None:
    context = {key: value for key, value in (PAID | BIRTHDAY).items() if key != name}
    values = {field: EVERYTHING[field] for field in fields}
    benefit = benefit_of(shop, **context, **values, unrecognized_values={name: "SOMETHING_NEW"})

    assert await put_and_get(client, benefit) == benefit


async def test_all_irrelevant_values_are_named_at_once(client: Client, shop: Shop) -> None:
    violations = await put_wrong_fields(client, benefit_of(shop, **ELSEWHERE, **EVERYTHING))

    assert set(violations) == CONDITIONAL - {"usage_limits_times"}
    assert (
        violations["days_before"]
        == "must be absent: it is only relevant when birth_benefits_release_type = FIXED_BEFORE"
    )
    assert violations["products_applicable_type"] == (
        "must be absent: it is only relevant when reward_scene = BIRTH_BENEFITS, "
        "or reward_type = PERCENTAGE_DISCOUNT, CASH_VOUCHER or FREE_SHIPPING"
    )


LIMITS: dict[str, tuple[list[Any], list[Any]]] = {
    "benefits_description": (["", "点" * 500, "two\r\n\tlines"], ["d" * 501, "\0", "\u2028"]),
    "benefits_expiry_date_value": ([1, 36_500], [0, -1, 36_501]),
    "benefits_icon": (["", "i" * 2_048], ["i" * 2_049, "a\nb"]),
    "benefits_name": (["", "点" * 25, "😀" * 25], ["n" * 26, "a\nb", "\0"]),
    "days_before": ([1, 366], [0, -1, 367]),
    "fixed_date": ([1, 31], [0, 32]),
    "periodically_days": ([1, 36_500], [0, 36_501]),
    "periodically_months": (["1", "1200"], ["0", "", "-1", "01", "1.0", "1e2", "1201", "\uff19", " 1"]),
    "specific_category_list": ([["c" * 64]], [["c c"], ["c" * 65], [""], ["c", "c"], ["点"]]),
    "specific_date": (
        ["02-29", "01-01", "12-31"],
        ["02-30", "13-01", "00-10", "1-1", "", "04-31", "2-029", "\uff101-01"],
    ),
    "specific_product_ids": ([[f"p-{n}" for n in range(1_000)]], [[f"p-{n}" for n in range(1_001)]]),
    "usage_limits_times": ([1, 10**9], [0, -1, 10**9 + 1]),
}
"""Values at the limits of each field, and beyond them."""


@pytest.mark.parametrize("field", sorted(LIMITS))
async def test_every_limit_of_a_field(client: Client, shop: Shop, field: str) -> None:
    right, wrong = LIMITS[field]
    context = RELEVANT[field][0]
    for value in right:
        benefit = benefit_of(shop, **{**context, field: value})
        assert await put_and_get(client, benefit) == benefit
    for value in wrong:
        violations = await put_wrong_fields(client, benefit_of(shop, **{**context, field: value}))
        assert {path.partition("[")[0] for path in violations} == {field}, value


MEASURED_BY = {
    "benefits_details": "reward_type",
    "benefits_usage_instruction_value": "benefits_usage_instruction_type",
}
MEASURES: dict[tuple[str, str], tuple[list[str], list[str]]] = {
    ("benefits_details", "PERCENTAGE_DISCOUNT"): (
        ["10", "100", "0.000000000001", "12.50", "007"],
        ["0", "100.000000000001", "", "-1", "1e1", "10%", "1,5", ".5", "5.", "1.0000000000001", "\uff11", "NaN"],
    ),
    ("benefits_details", "CASH_VOUCHER"): (["0.01", "999999999999.999999999999"], ["0", "1000000000000"]),
    ("benefits_details", "FREE_SHIPPING"): (["0", "15.00"], ["-1", "", "free"]),
    ("benefits_details", "POINTS"): (["1", "1000", "1000.00", "1" + "0" * 15], ["0", "1.5", "1" + "0" * 16]),
    ("benefits_details", "CASHBACK"): (["", "anything", "x" * 500], ["x" * 501, "\0"]),
    ("benefits_details", "FREE_PRODUCT"): (["p-1"], ["a\nb"]),
    ("benefits_usage_instruction_value", "MAX_POINTS"): (["1", "1" + "0" * 15], ["0", "0.5", "", "x"]),
    ("benefits_usage_instruction_value", "MIN_ITEM_QUANTITY"): (["1", "1000000000"], ["0", "1000000001", "1.5"]),
    ("benefits_usage_instruction_value", "MIN_PURCHASE_AMOUNT"): (["0.01", "100.00"], ["0", "-1", "1000000000000"]),
    ("benefits_usage_instruction_value", "NONE"): (["", "0", "x" * 64], ["x" * 65]),
}
"""What a text must be a number of, by the field and by what it counts: right and wrong ones."""


@pytest.mark.parametrize(("field", "name"), list(MEASURES))
async def test_quantities_are_stored_as_written(client: Client, shop: Shop, field: str, name: str) -> None:
    right, wrong = MEASURES[field, name]
    context = {"reward_type": "CASH_VOUCHER", MEASURED_BY[field]: name}
    for text in right:
        benefit = benefit_of(shop, **{**context, field: text})
        assert await put_and_get(client, benefit) == benefit
    for text in wrong:
        assert list(await put_wrong_fields(client, benefit_of(shop, **{**context, field: text}))) == [field], text


async def test_every_invalid_field_is_named_at_once(client: Client, shop: Shop) -> None:
    benefit = benefit_of(
        shop,
        membership_type="LEVEL",
        reward_type="PERCENTAGE_DISCOUNT",
        benefits_name="n",
        benefits_details="200",
        benefits_status=99,
        usage_limits_type="LIMITS",
        usage_limits_times=0,
        store_ids=["s", "s"],
        level_code="l l",
        unrecognized_values={"reward_type": "NEW", "usage_limits_type": "n n", "colour": "red"},
        irrelevant_values={"benefits_icon": "i", "benefits_name": "n"},
    )
    benefit.merchant_id, benefit.benefit_id = "m", "b" * 65

    assert set(await put_wrong_fields(client, benefit)) == {
        "benefit_id",
        "store_ids",
        "level_code",
        "benefits_status",
        "benefits_name",
        "benefits_details",
        "usage_limits_times",
        "unrecognized_values",
        "unrecognized_values['reward_type']",
        "unrecognized_values['usage_limits_type']",
        "irrelevant_values",
        "irrelevant_values.benefits_name",
    }
    found = await refused(client.benefits.PutBenefit(benefits_pb2.PutBenefitRequest()))
    assert set(found.fields) == {"benefit", "benefit.merchant_id", "benefit.benefit_id"}


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, "\0", {"\0": 1}, ["x", {"y": "\0"}], "x" * 65_536], ids=lambda value: repr(value)[:9]
)
async def test_irrelevant_values_must_fit_into_json_and_the_database(client: Client, shop: Shop, value: Any) -> None:
    values = Struct()
    values.update({"days_before": value})
    benefit = benefit_of(shop, **ELSEWHERE, irrelevant_values=values)

    assert set(await put_wrong_fields(client, benefit)) == {"irrelevant_values"}


async def test_any_other_irrelevant_value_is_stored(client: Client, shop: Shop) -> None:
    values = {"days_before": "\uff13 days\n\\u0000", "fixed_date": {"a": [1.5, None, True]}, "benefits_name": None}
    benefit = benefit_of(shop, **ELSEWHERE, irrelevant_values=values)

    assert await put_and_get(client, benefit) == benefit


async def test_a_level_is_stored_without_its_prefix(client: Client, shop: Shop) -> None:
    stored = await put_and_get(client, benefit_of(shop, level_code="gid://shopline/Membership/" + "M" * 128))

    assert stored.level_code == "M" * 128
