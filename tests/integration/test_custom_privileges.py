"""Custom privileges on a real database: put, get, list and delete."""

import asyncio
from typing import Any

import grpc
import pytest

from pointbook.v1 import benefits_pb2
from support.clients import Client
from support.refusals import refused
from support.shops import Shop
from support.unique_names import unique


def privilege_of(shop: Shop, privilege_id: str = "gold:p1", **changes: Any) -> benefits_pb2.CustomPrivilege:
    """Return a privilege with only its ids and some values."""
    return benefits_pb2.CustomPrivilege(merchant_id=shop.merchant_id, privilege_id=privilege_id, **changes)


async def put_privilege(
    client: Client, privilege: benefits_pb2.CustomPrivilege, etag: str = ""
) -> benefits_pb2.PutCustomPrivilegeResponse:
    """Put a privilege."""
    request = benefits_pb2.PutCustomPrivilegeRequest(custom_privilege=privilege, etag=etag)
    answer: benefits_pb2.PutCustomPrivilegeResponse = await client.benefits.PutCustomPrivilege(request)
    return answer


async def get_privilege(client: Client, merchant_id: str, privilege_id: str) -> benefits_pb2.GetCustomPrivilegeResponse:
    """Return a privilege."""
    request = benefits_pb2.GetCustomPrivilegeRequest(merchant_id=merchant_id, privilege_id=privilege_id)
    answer: benefits_pb2.GetCustomPrivilegeResponse = await client.benefits.GetCustomPrivilege(request)
    return answer


async def delete_privilege(client: Client, shop: Shop, etag: str = "") -> None:
    """Delete a privilege."""
    request = benefits_pb2.DeleteCustomPrivilegeRequest(merchant_id=shop.merchant_id, privilege_id="gold:p1", etag=etag)
    await client.benefits.DeleteCustomPrivilege(request)


async def list_privilege_ids(client: Client, shop: Shop, **filters: Any) -> list[str]:
    """Return the ids of privileges, through all pages."""
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
async def test_put_and_get_return_every_field_of_a_privilege(
    values: dict[str, str], client: Client, shop: Shop
) -> None:
    """An absent field stays absent, and an empty one stays empty."""
    privilege = privilege_of(shop, **values)

    answer = await put_privilege(client, privilege)
    stored = await get_privilege(client, shop.merchant_id, "gold:p1")

    assert answer.custom_privilege == stored.custom_privilege == privilege
    assert answer.etag == stored.etag != ""


async def test_every_invalid_field_of_a_privilege_is_named_at_once(client: Client, shop: Shop) -> None:
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


async def test_putting_a_privilege_replaces_every_field(client: Client, shop: Shop) -> None:
    first = await put_privilege(client, privilege_of(shop, level_code="gold", privilege_name="Lounge"))
    second = await put_privilege(client, privilege_of(shop), first.etag)

    assert first.etag != second.etag
    assert (await get_privilege(client, shop.merchant_id, "gold:p1")).custom_privilege == privilege_of(shop)


async def test_a_stale_etag_neither_replaces_nor_deletes(client: Client, shop: Shop) -> None:
    first = await put_privilege(client, privilege_of(shop))
    second = await put_privilege(client, privilege_of(shop, privilege_name="Lounge"))
    for etag in (first.etag, "x", "9" * 30):
        for call in (put_privilege(client, privilege_of(shop), etag), delete_privilege(client, shop, etag)):
            assert (await refused(call)).reason == "STALE_ETAG"
    await delete_privilege(client, shop, second.etag)

    assert (await refused(put_privilege(client, privilege_of(shop), second.etag))).reason == "STALE_ETAG"
    await put_privilege(client, privilege_of(shop))
    assert (await refused(put_privilege(client, privilege_of(shop), second.etag))).reason == "STALE_ETAG"


async def test_an_unknown_privilege_is_not_found(client: Client, shop: Shop) -> None:
    await put_privilege(client, privilege_of(shop))
    await delete_privilege(client, shop)
    for call in (
        get_privilege(client, shop.merchant_id, "gold:p1"),
        get_privilege(client, unique("merchant"), "gold:p1"),
        delete_privilege(client, shop),
    ):
        found = await refused(call)
        assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "CUSTOM_PRIVILEGE_NOT_FOUND")
        assert found.metadata == {"privilege_id": "gold:p1"}


@pytest.mark.parametrize("page_size", [0, 1, 2, 1_000])
async def test_privileges_are_listed_by_level(page_size: int, client: Client, shop: Shop) -> None:
    for privilege_id, level_code in (
        ("b", "gold"),
        ("a", "gold"),
        ("c", "silver"),
        ("d", "gid://shopline/Membership/gold"),
    ):
        await put_privilege(client, privilege_of(shop, privilege_id, level_code=level_code))

    assert await list_privilege_ids(client, shop, page_size=page_size) == ["a", "b", "c", "d"]
    for level_code in ("gold", "gid://shopline/Membership/gold"):
        assert await list_privilege_ids(client, shop, page_size=page_size, level_code=level_code) == ["a", "b", "d"]
    assert await list_privilege_ids(client, shop, page_size=page_size, level_code="bronze") == []


async def test_a_page_of_privileges_fits_into_a_response(client: Client, shop: Shop) -> None:
    texts = {"privilege_description": "名" * 2_000, "benefits_icon": "名" * 2_048}
    await asyncio.gather(
        *(put_privilege(client, privilege_of(shop, f"p{number:03}", **texts)) for number in range(200))
    )
    request = benefits_pb2.ListCustomPrivilegesRequest(merchant_id=shop.merchant_id, page_size=1_000)
    page = await client.benefits.ListCustomPrivileges(request)

    assert page.ByteSize() <= 2 * 1024 * 1024 + 1_000
    assert 0 < len(page.custom_privileges) < 200
    assert await list_privilege_ids(client, shop, page_size=1_000) == [f"p{number:03}" for number in range(200)]


async def test_a_page_token_is_valid_only_for_its_own_level(client: Client, shop: Shop) -> None:
    for privilege_id in ("a", "b"):
        await put_privilege(client, privilege_of(shop, privilege_id, level_code="gold"))
    request = benefits_pb2.ListCustomPrivilegesRequest(merchant_id=shop.merchant_id, level_code="gold", page_size=1)
    token = (await client.benefits.ListCustomPrivileges(request)).next_page_token

    for other in ({"level_code": "silver", "page_token": token}, {"level_code": "gold", "page_token": "x"}):
        assert set((await refused(_list(client, shop, other))).fields) == {"page_token"}


async def _list(client: Client, shop: Shop, filters: dict[str, str]) -> Any:
    request = benefits_pb2.ListCustomPrivilegesRequest(merchant_id=shop.merchant_id, page_size=1, **filters)
    return await client.benefits.ListCustomPrivileges(request)


async def test_concurrent_first_puts_leave_one_privilege(client: Client, shop: Shop) -> None:
    answers = await asyncio.gather(
        *(put_privilege(client, privilege_of(shop, privilege_name=str(n))) for n in range(20))
    )

    assert len({answer.etag for answer in answers}) == 20
    assert await list_privilege_ids(client, shop) == ["gold:p1"]
