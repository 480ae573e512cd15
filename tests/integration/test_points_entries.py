"""ListPointsEntries on a real database, and the immutability of entries."""

from collections.abc import Mapping
from typing import Any

import asyncpg
import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from pointbook.v1 import points_pb2
from pointbook_server.db.tables import points_entries
from support.clients import Client
from support.clocks import NOW_MS, at
from support.connections import superuser
from support.points import DECREASE, INCREASE, START_MS, decrease, increase, list_entries, list_event_ids, list_request
from support.refusals import refused
from support.servers import Service
from support.shops import Shop

DERIVED_COLUMNS = (
    "ordinal",
    "balance_before",
    "balance_after",
    "drift",
    "silently_expired",
    "draws",
    "voided_at_ms",
    "void_reason",
)


# Lists.


async def apply_seven_updates(client: Client, shop: Shop) -> list[str]:
    """Write seven entries, and return their event_ids, newest first.

    Two of them are in one millisecond.
    """
    updates = [
        increase(shop, 0, 10, 10),
        increase(shop, 1, 10, 20, updated_scene=None, unrecognized_scene="LUCKY_DRAW"),
        decrease(shop, 2, 5, 15),
        decrease(shop, 2, 5, 10),
        increase(shop, 3, 10, 20),
        decrease(shop, 4, 5, 15, updated_scene=points_pb2.POINTS_UPDATE_SCENE_CASHBACK),
        increase(shop, 5, 10, 25),
    ]
    for update in updates:
        await client.apply(update)
    return [update.event_id for update in reversed(updates)]


async def test_entries_are_listed_newest_first_in_ledger_order(client: Client, shop: Shop) -> None:
    """Also inside a millisecond; entries of other accounts are not listed."""
    ids = await apply_seven_updates(client, shop)
    await client.apply(increase(shop, 2, 1, 1, buyer_id="another"))

    assert await list_event_ids(client, shop) == ids


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 1_000])
async def test_pages_show_every_entry_once(client: Client, shop: Shop, size: int) -> None:
    ids = await apply_seven_updates(client, shop)

    found: list[str] = []
    lengths: list[int] = []
    token = ""
    while True:
        page = await client.points.ListPointsEntries(list_request(shop, page_size=size, page_token=token))
        found += [entry.update.event_id for entry in page.entries]
        lengths.append(len(page.entries))
        token = page.next_page_token
        if not token:
            break

    assert found == ids
    assert len(lengths) == -(-7 // size)
    assert max(lengths) <= size


async def test_a_page_has_fifty_entries_by_default(client: Client, shop: Shop) -> None:
    for number in range(51):
        await client.apply(increase(shop, number, 1, number + 1))

    page = await client.points.ListPointsEntries(list_request(shop))

    assert len(page.entries) == 50
    assert page.next_page_token


async def test_newer_entries_do_not_shift_the_next_page(client: Client, shop: Shop) -> None:
    ids = await apply_seven_updates(client, shop)
    page = await client.points.ListPointsEntries(list_request(shop, page_size=3))
    await client.apply(increase(shop, 9, 1, 26))

    rest = await list_event_ids(client, shop, page_token=page.next_page_token)

    assert rest == ids[3:]


@pytest.mark.parametrize(
    ("filters", "indexes"),
    [
        ({"update_type": INCREASE}, [0, 2, 5, 6]),
        ({"update_type": DECREASE}, [1, 3, 4]),
        ({"scenes": ["LUCKY_DRAW"]}, [5]),
        ({"scenes": ["CASHBACK", "LUCKY_DRAW"]}, [1, 5]),
        ({"scenes": ["UNUSED_SCENE"]}, []),
        ({"start_time": at(START_MS + 3)}, [0, 1, 2]),
        ({"end_time": at(START_MS + 2)}, [5, 6]),
        ({"start_time": at(START_MS + 2), "end_time": at(START_MS + 3)}, [3, 4]),
        ({"start_time": at(START_MS + 3), "end_time": at(START_MS + 3)}, []),
        ({"update_type": DECREASE, "scenes": ["REDEEM_COUPON"], "start_time": at(START_MS + 2)}, [3, 4]),
    ],
)
async def test_filters_by_type_scene_and_time(
    client: Client, shop: Shop, filters: Mapping[str, Any], indexes: list[int]
) -> None:
    ids = await apply_seven_updates(client, shop)

    assert await list_event_ids(client, shop, **filters) == [ids[index] for index in indexes]
    first = await client.points.ListPointsEntries(list_request(shop, page_size=1, **filters))
    if len(indexes) > 1:
        rest = await list_event_ids(client, shop, page_token=first.next_page_token, **filters)
        assert rest == [ids[index] for index in indexes[1:]]
    else:
        assert not first.next_page_token


async def test_a_page_token_is_valid_for_its_own_list_only(client: Client, shop: Shop) -> None:
    """The page size may change."""
    await apply_seven_updates(client, shop)
    token = (await client.points.ListPointsEntries(list_request(shop, page_size=2))).next_page_token

    for other in (
        {"update_type": INCREASE},
        {"scenes": ["LUCKY_DRAW"]},
        {"start_time": at(START_MS)},
        {"end_time": at(NOW_MS)},
        {"buyer_id": "another"},
        {"store_id": "another"},
        {"merchant_id": "another"},
    ):
        refusal = await refused(client.points.ListPointsEntries(list_request(shop, page_token=token, **other)))
        assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
        assert set(refusal.fields) == {"page_token"}
    assert len(await list_entries(client, shop, page_size=4, page_token=token)) == 4


@pytest.mark.parametrize("token", ["x", "é", "AAAA", "W10=", "e30=", "bnVsbA==", "A" * 5_000])
async def test_an_invalid_page_token_is_a_wrong_field(client: Client, shop: Shop, token: str) -> None:
    refusal = await refused(client.points.ListPointsEntries(list_request(shop, page_token=token)))

    assert set(refusal.fields) == {"page_token"}


async def test_a_wrong_list_request_names_all_wrong_fields(client: Client) -> None:
    request = points_pb2.ListPointsEntriesRequest(
        store_id="a store",
        page_size=1_001,
        page_token="x",
        update_type=9,  # type: ignore[arg-type] # a number that the enum does not have
        scenes=["CASHBACK", "", "LUCKY DRAW"],
        start_time=Timestamp(nanos=-1),
        end_time=Timestamp(seconds=2**62),
    )

    refusal = await refused(client.points.ListPointsEntries(request))

    assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
    assert set(refusal.fields) == {
        "merchant_id",
        "store_id",
        "buyer_id",
        "page_size",
        "page_token",
        "update_type",
        "scenes[1]",
        "scenes[2]",
        "start_time",
        "end_time",
    }


@pytest.mark.parametrize(
    "filters", [{"page_size": -1}, {"scenes": [f"SCENE_{number}" for number in range(101)]}, {"scenes": ["A", "A"]}]
)
async def test_page_size_and_scenes_are_bounded(client: Client, shop: Shop, filters: Mapping[str, Any]) -> None:
    refusal = await refused(client.points.ListPointsEntries(list_request(shop, **filters)))

    assert set(refusal.fields) == set(filters)


async def test_an_account_without_events_has_no_entries(client: Client, shop: Shop) -> None:
    page = await client.points.ListPointsEntries(list_request(shop))

    assert page == points_pb2.ListPointsEntriesResponse()


# Immutable entries.


async def test_the_event_of_an_entry_cannot_be_changed(client: Client, shop: Shop, service: Service) -> None:
    """Not even by a superuser; this includes stored refusals."""
    await client.apply(shop.update())
    await refused(client.apply(decrease(shop, 5, 3_000, None)))
    columns = [column for column in points_entries.c if column.name not in DERIVED_COLUMNS]
    changed = {str: "'changed'", int: "7"}

    async with superuser(service) as connection:
        for column in columns:
            with pytest.raises(asyncpg.RestrictViolationError):
                await connection.execute(
                    f"UPDATE points_entries SET {column.name} = {changed[column.type.python_type]}"  # noqa: S608 - names of our columns
                    " WHERE merchant_id = $1",
                    shop.merchant_id,
                )


@pytest.mark.parametrize("statement", ["DELETE FROM points_entries", "TRUNCATE points_entries"])
async def test_entries_cannot_be_deleted(client: Client, shop: Shop, service: Service, statement: str) -> None:
    await client.apply(shop.update())

    async with superuser(service) as connection:
        with pytest.raises(asyncpg.RestrictViolationError):
            await connection.execute(statement)

    assert len(await list_entries(client, shop)) == 1


async def test_derived_values_may_be_updated(client: Client, shop: Shop, service: Service) -> None:
    """A late event changes them."""
    await client.apply(shop.update())

    async with superuser(service) as connection:
        done = await connection.execute(
            "UPDATE points_entries SET ordinal = 1, balance_before = 1, balance_after = 1, drift = 1,"
            " silently_expired = 1, draws = '[[1, null, \"e\"]]' WHERE merchant_id = $1",
            shop.merchant_id,
        )

    assert done == "UPDATE 1"
