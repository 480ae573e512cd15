"""BenefitsService on a real database: benefits are kept as they were put, replaced, listed and deleted."""

from typing import Any

import grpc

from harness import Client, Shop, refused, unique
from pointbook.v1 import benefits_pb2


def benefit_of(shop: Shop, **changes: Any) -> benefits_pb2.Benefit:
    """Make a benefit that says nothing but who it is, and what is changed."""
    values: dict[str, Any] = {"merchant_id": shop.merchant_id, "benefit_id": "gold:1"}
    return benefits_pb2.Benefit(**{**values, **changes})


async def put(client: Client, benefit: benefits_pb2.Benefit, etag: str = "") -> benefits_pb2.PutBenefitResponse:
    """Put a benefit."""
    request = benefits_pb2.PutBenefitRequest(benefit=benefit, etag=etag)
    answer: benefits_pb2.PutBenefitResponse = await client.benefits.PutBenefit(request)
    return answer


async def get(client: Client, merchant_id: str, benefit_id: str) -> benefits_pb2.GetBenefitResponse:
    """Get a benefit."""
    request = benefits_pb2.GetBenefitRequest(merchant_id=merchant_id, benefit_id=benefit_id)
    answer: benefits_pb2.GetBenefitResponse = await client.benefits.GetBenefit(request)
    return answer


async def test_a_plain_benefit_says_nothing_that_it_was_not_told(client: Client, shop: Shop) -> None:
    """SHOPLINE leaves most fields out, and what was left out stays left out."""
    answer = await put(client, benefit_of(shop))
    kept = await get(client, shop.merchant_id, "gold:1")

    assert answer.benefit == kept.benefit == benefit_of(shop)
    assert answer.etag == kept.etag != ""


async def test_a_full_benefit_is_kept_as_it_was_put(client: Client, shop: Shop) -> None:
    """A birthday benefit of a paid membership has all but what contradicts it."""
    benefit = benefit_of(
        shop,
        store_ids=[shop.store_id],
        level_code="MLC17",
        membership_type=benefits_pb2.MEMBERSHIP_TYPE_PAID,
        reward_scene=benefits_pb2.REWARD_SCENE_BIRTH_BENEFITS,
        auto_stack_limit=False,
        benefits_description="Line one\nLine two: 生日",
        benefits_details="12.50",
        benefits_expiry_date_type=benefits_pb2.BENEFITS_EXPIRY_DATE_TYPE_SPECIFIC_DATE,
        benefits_expiry_date_value=30,
        benefits_icon="https://img.example/cake.png",
        benefits_issurance_type=benefits_pb2.BENEFITS_ISSURANCE_TYPE_PERIODICALLY,
        benefits_name="Birthday",
        benefits_status=benefits_pb2.BENEFITS_STATUS_ACTIVE,
        benefits_usage_instruction_type=benefits_pb2.BENEFITS_USAGE_INSTRUCTION_TYPE_MIN_PURCHASE_AMOUNT,
        benefits_usage_instruction_value="100.00",
        birth_benefits_release_type=benefits_pb2.BIRTH_BENEFITS_RELEASE_TYPE_FIXED_BEFORE,
        code_stack_limit=True,
        days_before=7,
        periodically_days=10,
        periodically_months="3",
        products_applicable_type=benefits_pb2.PRODUCTS_APPLICABLE_TYPE_SPECIFIC_CATEGORY,
        reward_type=benefits_pb2.REWARD_TYPE_PERCENTAGE_DISCOUNT,
        specific_category_list=["c-2", "c-1"],
        usage_limits_times=3,
        usage_limits_type=benefits_pb2.USAGE_LIMITS_TYPE_LIMITS,
        irrelevant_values={"fixed_date": "15", "specific_product_ids": ["p", None], "specific_date": 2.5},
    )
    answer = await put(client, benefit)
    kept = await get(client, shop.merchant_id, "gold:1")

    assert benefit == answer.benefit == kept.benefit


async def test_an_unknown_benefit(client: Client, shop: Shop) -> None:
    """Another merchant's is unknown too."""
    await put(client, benefit_of(shop))
    for merchant_id, benefit_id in ((shop.merchant_id, "gold:2"), (unique("merchant"), "gold:1")):
        found = await refused(get(client, merchant_id, benefit_id))
        assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "BENEFIT_NOT_FOUND")
        assert found.metadata == {"benefit_id": benefit_id}
