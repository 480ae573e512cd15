"""BenefitsService on a real database: put, get, list and delete."""

import asyncio
from typing import Any

import grpc
import pytest

from pointbook.v1 import benefits_pb2
from pointbook_server.rpc import pagination
from support.clients import Client
from support.refusals import refused, wrong_fields
from support.shops import Shop
from support.unique_names import unique


def benefit_of(shop: Shop, **changes: Any) -> benefits_pb2.Benefit:
    """Return a benefit with only its ids and some values."""
    values: dict[str, Any] = {"merchant_id": shop.merchant_id, "benefit_id": "gold:1"}
    return benefits_pb2.Benefit(**{**values, **changes})


async def put_benefit(client: Client, benefit: benefits_pb2.Benefit, etag: str = "") -> benefits_pb2.PutBenefitResponse:
    """Put a benefit."""
    request = benefits_pb2.PutBenefitRequest(benefit=benefit, etag=etag)
    answer: benefits_pb2.PutBenefitResponse = await client.benefits.PutBenefit(request)
    return answer


async def get_benefit(client: Client, merchant_id: str, benefit_id: str) -> benefits_pb2.GetBenefitResponse:
    """Return a benefit."""
    request = benefits_pb2.GetBenefitRequest(merchant_id=merchant_id, benefit_id=benefit_id)
    answer: benefits_pb2.GetBenefitResponse = await client.benefits.GetBenefit(request)
    return answer


async def test_absent_fields_of_a_benefit_stay_absent(client: Client, shop: Shop) -> None:
    answer = await put_benefit(client, benefit_of(shop))
    stored = await get_benefit(client, shop.merchant_id, "gold:1")

    assert answer.benefit == stored.benefit == benefit_of(shop)
    assert answer.etag == stored.etag != ""


async def test_put_and_get_return_every_field_of_a_benefit(client: Client, shop: Shop) -> None:
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
    answer = await put_benefit(client, benefit)
    stored = await get_benefit(client, shop.merchant_id, "gold:1")

    assert benefit == answer.benefit == stored.benefit


async def test_an_unknown_benefit_is_not_found(client: Client, shop: Shop) -> None:
    await put_benefit(client, benefit_of(shop))
    for merchant_id, benefit_id in ((shop.merchant_id, "gold:2"), (unique("merchant"), "gold:1")):
        found = await refused(get_benefit(client, merchant_id, benefit_id))
        assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "BENEFIT_NOT_FOUND")
        assert found.metadata == {"benefit_id": benefit_id}


async def delete_benefit(client: Client, shop: Shop, benefit_id: str = "gold:1", etag: str = "") -> None:
    """Delete a benefit."""
    await client.benefits.DeleteBenefit(
        benefits_pb2.DeleteBenefitRequest(merchant_id=shop.merchant_id, benefit_id=benefit_id, etag=etag)
    )


async def test_putting_a_benefit_replaces_every_field(client: Client, shop: Shop) -> None:
    first = await put_benefit(client, benefit_of(shop, benefits_icon="a", reward_type=benefits_pb2.REWARD_TYPE_POINTS))
    second = await put_benefit(client, benefit_of(shop))

    assert first.etag != second.etag
    assert (await get_benefit(client, shop.merchant_id, "gold:1")).benefit == benefit_of(shop)


async def test_a_stale_etag_changes_nothing(client: Client, shop: Shop) -> None:
    first = await put_benefit(client, benefit_of(shop))
    second = await put_benefit(client, benefit_of(shop), first.etag)

    for etag in (first.etag, "x", "0", "9" * 30):
        for call in (
            put_benefit(client, benefit_of(shop, benefits_icon="lost"), etag),
            delete_benefit(client, shop, etag=etag),
        ):
            found = await refused(call)
            assert (found.code, found.reason) == (grpc.StatusCode.ABORTED, "STALE_ETAG")
    stored = await get_benefit(client, shop.merchant_id, "gold:1")
    assert (stored.benefit, stored.etag) == (benefit_of(shop), second.etag)


async def test_one_of_several_concurrent_puts_with_an_etag_succeeds(client: Client, shop: Shop) -> None:
    etag = (await put_benefit(client, benefit_of(shop))).etag
    puts = [put_benefit(client, benefit_of(shop, benefits_icon=f"icon-{index}"), etag) for index in range(20)]
    answers = await asyncio.gather(*puts, return_exceptions=True)

    [winner] = [answer for answer in answers if isinstance(answer, benefits_pb2.PutBenefitResponse)]
    errors = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert {grpc.StatusCode.ABORTED} == {error.code() for error in errors}
    stored = await get_benefit(client, shop.merchant_id, "gold:1")
    assert (stored.benefit, stored.etag) == (winner.benefit, winner.etag)


async def test_concurrent_first_puts_all_succeed(client: Client, shop: Shop) -> None:
    answers = await asyncio.gather(*(put_benefit(client, benefit_of(shop, benefits_icon=f"{n}")) for n in range(20)))

    assert len({answer.etag for answer in answers}) == 20


async def test_a_deleted_benefit_is_gone(client: Client, shop: Shop) -> None:
    """The etag of the deleted benefit does not match its successor."""
    etag = (await put_benefit(client, benefit_of(shop))).etag
    await delete_benefit(client, shop, etag=etag)

    for call in (get_benefit(client, shop.merchant_id, "gold:1"), delete_benefit(client, shop)):
        found = await refused(call)
        assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "BENEFIT_NOT_FOUND")
    found = await refused(put_benefit(client, benefit_of(shop), etag))
    assert found.reason == "STALE_ETAG"
    assert (await put_benefit(client, benefit_of(shop))).etag != etag


async def test_stores_of_a_benefit_must_be_the_merchants(client: Client, shop: Shop) -> None:
    other = Shop(unique("merchant"), unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    for store_id in ("nowhere", other.store_id):
        benefit = benefit_of(shop, store_ids=[shop.store_id, store_id])
        request = benefits_pb2.ListBenefitsRequest(merchant_id=shop.merchant_id, store_id=store_id)
        for call in (put_benefit(client, benefit), client.benefits.ListBenefits(request)):
            found = await refused(call)
            assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "STORE_NOT_FOUND")
            assert found.metadata == {"store_id": store_id}


async def list_benefit_ids(client: Client, shop: Shop, **filters: Any) -> list[str]:
    """Return the ids of benefits, through all pages."""
    ids: list[str] = []
    request = benefits_pb2.ListBenefitsRequest(merchant_id=shop.merchant_id, **filters)
    while True:
        page = await client.benefits.ListBenefits(request)
        ids += [benefit.benefit_id for benefit in page.benefits]
        if not page.next_page_token:
            return ids
        request.page_token = page.next_page_token


@pytest.mark.parametrize("portion", [1, 2, 7, 200])
async def test_benefits_are_listed_by_pages(
    client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch, portion: int
) -> None:
    monkeypatch.setattr(pagination, "PORTION_ROWS", portion)
    for index in range(7):
        await put_benefit(client, benefit_of(shop, benefit_id=f"b-{index}"))
    await put_benefit(client, benefit_of(Shop(unique("merchant"), "")))

    for page_size in (0, 1, 3, 7, 1_000):
        assert await list_benefit_ids(client, shop, page_size=page_size) == [f"b-{index}" for index in range(7)]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"membership_type": benefits_pb2.MEMBERSHIP_TYPE_PAID}, ["paid"]),
        ({"reward_scene": benefits_pb2.REWARD_SCENE_BIRTH_BENEFITS}, ["birthday"]),
        ({"reward_type": benefits_pb2.REWARD_TYPE_POINTS}, ["birthday", "paid"]),
        ({"benefits_status": benefits_pb2.BENEFITS_STATUS_INACTIVE}, ["paid"]),
        ({"level_code": "gid://shopline/Membership/MLC9"}, ["level"]),
        ({"level_code": "MLC"}, []),
        ({"reward_type": benefits_pb2.REWARD_TYPE_POINTS, "level_code": "MLC9"}, []),
    ],
)
async def test_every_filter_that_is_set_must_match(
    client: Client, shop: Shop, filters: dict[str, Any], expected: list[str]
) -> None:
    points = benefits_pb2.REWARD_TYPE_POINTS
    scene, paid = benefits_pb2.REWARD_SCENE_BIRTH_BENEFITS, benefits_pb2.MEMBERSHIP_TYPE_PAID
    inactive = benefits_pb2.BENEFITS_STATUS_INACTIVE
    await put_benefit(client, benefit_of(shop, benefit_id="birthday", reward_scene=scene, reward_type=points))
    await put_benefit(client, benefit_of(shop, benefit_id="level", level_code="MLC9"))
    paying = benefit_of(shop, benefit_id="paid", membership_type=paid, reward_type=points, benefits_status=inactive)
    await put_benefit(client, paying)
    other = benefit_of(shop, benefit_id="other", unrecognized_values={"membership_type": "VIP", "reward_type": "GIFT"})
    await put_benefit(client, other)

    assert await list_benefit_ids(client, shop, **filters) == expected


async def test_a_benefit_without_stores_is_listed_for_every_store(client: Client, shop: Shop) -> None:
    outlet = unique("store")
    await client.put_store(shop.merchant_id, outlet)
    await client.put_program(shop.merchant_id, shop.store_id)
    for benefit_id, stores in (("all", []), ("both", [shop.store_id, outlet]), ("outlet", [outlet])):
        await put_benefit(client, benefit_of(shop, benefit_id=benefit_id, store_ids=stores))

    assert await list_benefit_ids(client, shop, store_id=outlet) == ["all", "both", "outlet"]
    assert await list_benefit_ids(client, shop, store_id=shop.store_id) == ["all", "both"]
    assert await list_benefit_ids(client, shop, program_id=1) == ["all", "both"]
    assert await list_benefit_ids(client, shop, program_id=1, store_id=outlet) == ["all", "both"]
    found = await refused(list_benefit_ids(client, shop, program_id=2))
    assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "PROGRAM_NOT_FOUND")


async def test_a_page_token_is_valid_only_for_its_own_list(client: Client, shop: Shop) -> None:
    for index in range(3):
        await put_benefit(client, benefit_of(shop, benefit_id=f"b-{index}"))
    first = benefits_pb2.ListBenefitsRequest(merchant_id=shop.merchant_id, page_size=1)
    token = (await client.benefits.ListBenefits(first)).next_page_token

    for changes in ({"page_token": token, "level_code": "x"}, {"page_token": "x"}):
        assert wrong_fields(await refused(list_benefit_ids(client, shop, **changes))) == {"page_token"}
    wrong: dict[str, Any] = {
        "store_id": "s s",
        "program_id": -1,
        "level_code": "x" * 129,
        "membership_type": 99,
        "reward_scene": 99,
        "reward_type": 99,
        "benefits_status": 99,
        "page_size": 1_001,
    }
    assert wrong_fields(await refused(list_benefit_ids(client, shop, **wrong))) == set(wrong)


@pytest.mark.parametrize("portion", [1, 8, 200])
async def test_a_page_fits_into_a_response(
    client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch, portion: int
) -> None:
    monkeypatch.setattr(pagination, "PORTION_ROWS", portion)
    heavy = {"irrelevant_values": {"specific_product_ids": ["x" * 1_000] * 64}}
    for index in range(40):
        await put_benefit(client, benefit_of(shop, benefit_id=f"b-{index:02}", **heavy))

    request = benefits_pb2.ListBenefitsRequest(merchant_id=shop.merchant_id, page_size=1_000)
    assert (await client.benefits.ListBenefits(request)).ByteSize() < 2 * 1024 * 1024
    assert await list_benefit_ids(client, shop, page_size=1_000) == [f"b-{index:02}" for index in range(40)]
