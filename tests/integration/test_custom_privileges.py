"""Custom privileges on a real database: kept as they were put, replaced, listed by level, and deleted."""

import asyncio
from typing import Any

import grpc
import pytest

from pointbook.v1 import benefits_pb2
from support.harness import Client, Shop, refused, unique


def privilege_of(shop: Shop, privilege_id: str = "gold:p1", **changes: Any) -> benefits_pb2.CustomPrivilege:
    """Make a privilege that says nothing but what is changed."""
    return benefits_pb2.CustomPrivilege(merchant_id=shop.merchant_id, privilege_id=privilege_id, **changes)


async def put(
    client: Client, privilege: benefits_pb2.CustomPrivilege, etag: str = ""
) -> benefits_pb2.PutCustomPrivilegeResponse:
    """Put a privilege."""
    request = benefits_pb2.PutCustomPrivilegeRequest(custom_privilege=privilege, etag=etag)
    answer: benefits_pb2.PutCustomPrivilegeResponse = await client.benefits.PutCustomPrivilege(request)
    return answer


async def get(client: Client, merchant_id: str, privilege_id: str) -> benefits_pb2.GetCustomPrivilegeResponse:
    """Get a privilege."""
    request = benefits_pb2.GetCustomPrivilegeRequest(merchant_id=merchant_id, privilege_id=privilege_id)
    answer: benefits_pb2.GetCustomPrivilegeResponse = await client.benefits.GetCustomPrivilege(request)
    return answer


async def delete(client: Client, shop: Shop, etag: str = "") -> None:
    """Delete a privilege."""
    request = benefits_pb2.DeleteCustomPrivilegeRequest(merchant_id=shop.merchant_id, privilege_id="gold:p1", etag=etag)
    await client.benefits.DeleteCustomPrivilege(request)


async def listed(client: Client, shop: Shop, **filters: Any) -> list[str]:
    """List the ids of privileges, through all pages."""
    request = benefits_pb2.ListCustomPrivilegesRequest(merchant_id=shop.merchant_id, **filters)
    ids = []
    while True:
        page = await client.benefits.ListCustomPrivileges(request)
        assert len(page.custom_privileges) <= (filters.get("page_size") or 50)
        ids += [privilege.privilege_id for privilege in page.custom_privileges]
        if not page.next_page_token:
            return ids
        request.page_token = page.next_page_token


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"privilege_name": "", "privilege_description": "", "benefits_icon": "", "previlege_status": ""},
        {
            "level_code": "gold",
            "privilege_name": "金" * 255,
            "privilege_description": "Line one\nLine two\ttab" + "x" * 1_979,
            "benefits_icon": "https://img.example/" + "x" * 2_028,
            "previlege_status": "ACTIVE",
        },
    ],
)
async def test_a_privilege_is_kept_as_it_was_put(values: dict[str, str], client: Client, shop: Shop) -> None:
    """What is absent stays absent, and what is empty stays empty."""
    privilege = privilege_of(shop, **values)

    answer = await put(client, privilege)
    kept = await get(client, shop.merchant_id, "gold:p1")

    assert answer.custom_privilege == kept.custom_privilege == privilege
    assert answer.etag == kept.etag != ""


async def test_every_wrong_field_of_a_privilege_is_named(client: Client, shop: Shop) -> None:
    """At once, by its path."""
    wrong = benefits_pb2.CustomPrivilege(
        privilege_id="two words",
        level_code="é",
        privilege_name="x" * 256,
        privilege_description="bell\a",
        benefits_icon="line\nbreak",
        previlege_status="not one word",
    )
    found = await refused(client.benefits.PutCustomPrivilege(_named(shop, wrong)))

    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS")
    fields = {*wrong.DESCRIPTOR.fields_by_name} - {"merchant_id"}
    assert set(found.fields) == {f"custom_privilege.{name}" for name in fields}
    absent = await refused(client.benefits.PutCustomPrivilege(benefits_pb2.PutCustomPrivilegeRequest()))
    assert "custom_privilege" in absent.fields


def _named(shop: Shop, privilege: benefits_pb2.CustomPrivilege) -> benefits_pb2.PutCustomPrivilegeRequest:
    privilege.merchant_id = shop.merchant_id
    return benefits_pb2.PutCustomPrivilegeRequest(custom_privilege=privilege)


async def test_a_privilege_is_replaced_whole(client: Client, shop: Shop) -> None:
    """What the second request leaves out is gone, and the etag is another."""
    first = await put(client, privilege_of(shop, level_code="gold", privilege_name="Lounge"))
    second = await put(client, privilege_of(shop), first.etag)

    assert first.etag != second.etag
    assert (await get(client, shop.merchant_id, "gold:p1")).custom_privilege == privilege_of(shop)


async def test_a_stale_etag_neither_replaces_nor_deletes(client: Client, shop: Shop) -> None:
    """Also that of a privilege that was deleted since, and of one that was never there."""
    first = await put(client, privilege_of(shop))
    second = await put(client, privilege_of(shop, privilege_name="Lounge"))
    for etag in (first.etag, "x", "9" * 30):
        for call in (put(client, privilege_of(shop), etag), delete(client, shop, etag)):
            assert (await refused(call)).reason == "STALE_ETAG"
    await delete(client, shop, second.etag)

    assert (await refused(put(client, privilege_of(shop), second.etag))).reason == "STALE_ETAG"
    await put(client, privilege_of(shop))
    assert (await refused(put(client, privilege_of(shop), second.etag))).reason == "STALE_ETAG"


async def test_an_unknown_privilege_is_not_found(client: Client, shop: Shop) -> None:
    """Another merchant's is unknown too, and so is one that is deleted already."""
    await put(client, privilege_of(shop))
    await delete(client, shop)
    for call in (
        get(client, shop.merchant_id, "gold:p1"),
        get(client, unique("merchant"), "gold:p1"),
        delete(client, shop),
    ):
        found = await refused(call)
        assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "CUSTOM_PRIVILEGE_NOT_FOUND")
        assert found.metadata == {"privilege_id": "gold:p1"}


@pytest.mark.parametrize("page_size", [0, 1, 2, 1_000])
async def test_privileges_are_listed_with_their_level(page_size: int, client: Client, shop: Shop) -> None:
    """By their ids, of one level or of all, a level with or without SHOPLINE's prefix."""
    for privilege_id, level_code in (
        ("b", "gold"),
        ("a", "gold"),
        ("c", "silver"),
        ("d", "gid://shopline/Membership/gold"),
    ):
        await put(client, privilege_of(shop, privilege_id, level_code=level_code))

    assert await listed(client, shop, page_size=page_size) == ["a", "b", "c", "d"]
    for level_code in ("gold", "gid://shopline/Membership/gold"):
        assert await listed(client, shop, page_size=page_size, level_code=level_code) == ["a", "b", "d"]
    assert await listed(client, shop, page_size=page_size, level_code="bronze") == []


async def test_a_page_of_privileges_stays_small(client: Client, shop: Shop) -> None:
    """However long their texts are, an answer has at most 2 MiB, and the pages have them all."""
    texts = {"privilege_description": "名" * 2_000, "benefits_icon": "名" * 2_048}
    await asyncio.gather(*(put(client, privilege_of(shop, f"p{number:03}", **texts)) for number in range(200)))
    request = benefits_pb2.ListCustomPrivilegesRequest(merchant_id=shop.merchant_id, page_size=1_000)
    page = await client.benefits.ListCustomPrivileges(request)

    assert page.ByteSize() <= 2 * 1024 * 1024 + 1_000
    assert 0 < len(page.custom_privileges) < 200
    assert await listed(client, shop, page_size=1_000) == [f"p{number:03}" for number in range(200)]


async def test_a_page_token_is_good_for_its_own_level(client: Client, shop: Shop) -> None:
    """And for nothing else."""
    for privilege_id in ("a", "b"):
        await put(client, privilege_of(shop, privilege_id, level_code="gold"))
    request = benefits_pb2.ListCustomPrivilegesRequest(merchant_id=shop.merchant_id, level_code="gold", page_size=1)
    token = (await client.benefits.ListCustomPrivileges(request)).next_page_token

    for other in ({"level_code": "silver", "page_token": token}, {"level_code": "gold", "page_token": "x"}):
        assert set((await refused(_list(client, shop, other))).fields) == {"page_token"}


async def _list(client: Client, shop: Shop, filters: dict[str, str]) -> Any:
    request = benefits_pb2.ListCustomPrivilegesRequest(merchant_id=shop.merchant_id, page_size=1, **filters)
    return await client.benefits.ListCustomPrivileges(request)


async def test_callers_who_create_the_same_privilege_leave_one(client: Client, shop: Shop) -> None:
    """Each is answered, and the last one stands."""
    answers = await asyncio.gather(*(put(client, privilege_of(shop, privilege_name=str(n))) for n in range(20)))

    assert len({answer.etag for answer in answers}) == 20
    assert await listed(client, shop) == ["gold:p1"]
