"""BenefitsService on a real database: benefits are kept as they were put, replaced, listed and deleted."""

import asyncio
from typing import Any

import grpc
import pytest

from pointbook.v1 import benefits_pb2
from pointbook_server.benefits import servicer
from support.harness import Client, Refusal, Shop, refused, unique


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


def wrong_fields(found: Refusal) -> set[str]:
    """Tell which fields a refusal names."""
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS")
    return set(found.fields)


async def delete(client: Client, shop: Shop, benefit_id: str = "gold:1", etag: str = "") -> None:
    """Delete a benefit."""
    await client.benefits.DeleteBenefit(
        benefits_pb2.DeleteBenefitRequest(merchant_id=shop.merchant_id, benefit_id=benefit_id, etag=etag)
    )


async def test_a_benefit_is_replaced_whole(client: Client, shop: Shop) -> None:
    """What the second request leaves out is gone, and the etag is another."""
    first = await put(client, benefit_of(shop, benefits_icon="a", reward_type=benefits_pb2.REWARD_TYPE_POINTS))
    second = await put(client, benefit_of(shop))

    assert first.etag != second.etag
    assert (await get(client, shop.merchant_id, "gold:1")).benefit == benefit_of(shop)


async def test_a_stale_etag_changes_nothing(client: Client, shop: Shop) -> None:
    """Nobody overwrites or deletes what they have not seen."""
    first = await put(client, benefit_of(shop))
    second = await put(client, benefit_of(shop), first.etag)

    for etag in (first.etag, "x", "0", "9" * 30):
        for call in (put(client, benefit_of(shop, benefits_icon="lost"), etag), delete(client, shop, etag=etag)):
            found = await refused(call)
            assert (found.code, found.reason) == (grpc.StatusCode.ABORTED, "STALE_ETAG")
    kept = await get(client, shop.merchant_id, "gold:1")
    assert (kept.benefit, kept.etag) == (benefit_of(shop), second.etag)


async def test_of_concurrent_puts_with_one_etag_one_wins(client: Client, shop: Shop) -> None:
    """The others hear that it changed."""
    etag = (await put(client, benefit_of(shop))).etag
    puts = [put(client, benefit_of(shop, benefits_icon=f"icon-{index}"), etag) for index in range(20)]
    answers = await asyncio.gather(*puts, return_exceptions=True)

    [winner] = [answer for answer in answers if isinstance(answer, benefits_pb2.PutBenefitResponse)]
    errors = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert {grpc.StatusCode.ABORTED} == {error.code() for error in errors}
    kept = await get(client, shop.merchant_id, "gold:1")
    assert (kept.benefit, kept.etag) == (winner.benefit, winner.etag)


async def test_concurrent_first_puts_all_succeed(client: Client, shop: Shop) -> None:
    """Without an etag the last one stands, and no call fails because of another."""
    answers = await asyncio.gather(*(put(client, benefit_of(shop, benefits_icon=f"{n}")) for n in range(20)))

    assert len({answer.etag for answer in answers}) == 20


async def test_a_deleted_benefit_is_gone(client: Client, shop: Shop) -> None:
    """It is unknown from then on, to be deleted again too, and its etag is none of the one that takes its id."""
    etag = (await put(client, benefit_of(shop))).etag
    await delete(client, shop, etag=etag)

    for call in (get(client, shop.merchant_id, "gold:1"), delete(client, shop)):
        found = await refused(call)
        assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "BENEFIT_NOT_FOUND")
    found = await refused(put(client, benefit_of(shop), etag))
    assert found.reason == "STALE_ETAG"
    assert (await put(client, benefit_of(shop))).etag != etag


async def test_a_store_of_another_merchant_has_no_benefit_of_ours(client: Client, shop: Shop) -> None:
    """The first such store is named, to put and to list."""
    other = Shop(unique("merchant"), unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    for store_id in ("nowhere", other.store_id):
        benefit = benefit_of(shop, store_ids=[shop.store_id, store_id])
        request = benefits_pb2.ListBenefitsRequest(merchant_id=shop.merchant_id, store_id=store_id)
        for call in (put(client, benefit), client.benefits.ListBenefits(request)):
            found = await refused(call)
            assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "STORE_NOT_FOUND")
            assert found.metadata == {"store_id": store_id}


async def listed(client: Client, shop: Shop, **filters: Any) -> list[str]:
    """List benefits through all pages, by their ids."""
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
    """Each once, in the order of their ids, and none of another merchant's, in whatever portions they are read."""
    monkeypatch.setattr(servicer, "PORTION", portion)
    for index in range(7):
        await put(client, benefit_of(shop, benefit_id=f"b-{index}"))
    await put(client, benefit_of(Shop(unique("merchant"), "")))

    for page_size in (0, 1, 3, 7, 1_000):
        assert await listed(client, shop, page_size=page_size) == [f"b-{index}" for index in range(7)]


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
async def test_filters_keep_what_fits_exactly(
    client: Client, shop: Shop, filters: dict[str, Any], expected: list[str]
) -> None:
    """All filters that are set must hold."""
    points = benefits_pb2.REWARD_TYPE_POINTS
    scene, paid = benefits_pb2.REWARD_SCENE_BIRTH_BENEFITS, benefits_pb2.MEMBERSHIP_TYPE_PAID
    inactive = benefits_pb2.BENEFITS_STATUS_INACTIVE
    await put(client, benefit_of(shop, benefit_id="birthday", reward_scene=scene, reward_type=points))
    await put(client, benefit_of(shop, benefit_id="level", level_code="MLC9"))
    paying = benefit_of(shop, benefit_id="paid", membership_type=paid, reward_type=points, benefits_status=inactive)
    await put(client, paying)
    other = benefit_of(shop, benefit_id="other", unrecognized_values={"membership_type": "VIP", "reward_type": "GIFT"})
    await put(client, other)

    assert await listed(client, shop, **filters) == expected


async def test_benefits_of_a_store_or_a_program(client: Client, shop: Shop) -> None:
    """A benefit that names no store is every store's."""
    outlet = unique("store")
    await client.put_store(shop.merchant_id, outlet)
    await client.put_program(shop.merchant_id, shop.store_id)
    for benefit_id, stores in (("all", []), ("both", [shop.store_id, outlet]), ("outlet", [outlet])):
        await put(client, benefit_of(shop, benefit_id=benefit_id, store_ids=stores))

    assert await listed(client, shop, store_id=outlet) == ["all", "both", "outlet"]
    assert await listed(client, shop, store_id=shop.store_id) == ["all", "both"]
    assert await listed(client, shop, program_id=1) == ["all", "both"]
    assert await listed(client, shop, program_id=1, store_id=outlet) == ["all", "both"]
    found = await refused(listed(client, shop, program_id=2))
    assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "PROGRAM_NOT_FOUND")


async def test_a_page_token_is_good_for_its_list_alone(client: Client, shop: Shop) -> None:
    """Of other filters, or broken, it is a wrong field; and so is whatever is out of bounds."""
    for index in range(3):
        await put(client, benefit_of(shop, benefit_id=f"b-{index}"))
    first = benefits_pb2.ListBenefitsRequest(merchant_id=shop.merchant_id, page_size=1)
    token = (await client.benefits.ListBenefits(first)).next_page_token

    for changes in ({"page_token": token, "level_code": "x"}, {"page_token": "x"}):
        assert wrong_fields(await refused(listed(client, shop, **changes))) == {"page_token"}
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
    assert wrong_fields(await refused(listed(client, shop, **wrong))) == set(wrong)


@pytest.mark.parametrize("portion", [1, 8, 200])
async def test_a_page_fits_into_an_answer(
    client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch, portion: int
) -> None:
    """However much benefits say, every client can read a page of them, in whatever portions they are read."""
    monkeypatch.setattr(servicer, "PORTION", portion)
    heavy = {"irrelevant_values": {"specific_product_ids": ["x" * 1_000] * 64}}
    for index in range(40):
        await put(client, benefit_of(shop, benefit_id=f"b-{index:02}", **heavy))

    request = benefits_pb2.ListBenefitsRequest(merchant_id=shop.merchant_id, page_size=1_000)
    assert (await client.benefits.ListBenefits(request)).ByteSize() < 2 * 1024 * 1024
    assert await listed(client, shop, page_size=1_000) == [f"b-{index:02}" for index in range(40)]
