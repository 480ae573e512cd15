"""PointsService on a real database: the lists of entries, and the book that stands."""

from collections.abc import Mapping
from typing import Any

import asyncpg
import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from pointbook.v1 import points_pb2
from pointbook_server.db.tables import points_entries
from support.harness import NOW_MS, Client, Service, Shop, at, refused
from support.points import DECREASE, INCREASE, START_MS, decrease, entries, event_ids, increase, listing, superuser

DERIVED = (
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


async def fill(client: Client, shop: Shop) -> list[str]:
    """Seven entries, two of them in one millisecond; their ids, the newest first."""
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


async def test_entries_are_listed_newest_first_in_the_order_of_the_book(client: Client, shop: Shop) -> None:
    """Also inside a millisecond; other accounts' entries are theirs."""
    ids = await fill(client, shop)
    await client.apply(increase(shop, 2, 1, 1, buyer_id="another"))

    assert await event_ids(client, shop) == ids


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 1_000])
async def test_pages_show_every_entry_once(client: Client, shop: Shop, size: int) -> None:
    """Pages follow each other without a gap, and the last one says that it is the last."""
    ids = await fill(client, shop)

    found: list[str] = []
    lengths: list[int] = []
    token = ""
    while True:
        page = await client.points.ListPointsEntries(listing(shop, page_size=size, page_token=token))
        found += [entry.update.event_id for entry in page.entries]
        lengths.append(len(page.entries))
        token = page.next_page_token
        if not token:
            break

    assert found == ids
    assert len(lengths) == -(-7 // size)
    assert max(lengths) <= size


async def test_a_page_has_fifty_entries_unless_asked(client: Client, shop: Shop) -> None:
    """Size 0 is the default."""
    for number in range(51):
        await client.apply(increase(shop, number, 1, number + 1))

    page = await client.points.ListPointsEntries(listing(shop))

    assert len(page.entries) == 50
    assert page.next_page_token


async def test_a_page_goes_on_where_it_stopped_while_the_book_grows(client: Client, shop: Shop) -> None:
    """Newer entries do not push the older ones across pages."""
    ids = await fill(client, shop)
    page = await client.points.ListPointsEntries(listing(shop, page_size=3))
    await client.apply(increase(shop, 9, 1, 26))

    rest = await event_ids(client, shop, page_token=page.next_page_token)

    assert rest == ids[3:]


@pytest.mark.parametrize(
    ("filters", "places"),
    [
        ({"update_type": INCREASE}, [0, 2, 5, 6]),
        ({"update_type": DECREASE}, [1, 3, 4]),
        ({"scenes": ["LUCKY_DRAW"]}, [5]),
        ({"scenes": ["CASHBACK", "LUCKY_DRAW"]}, [1, 5]),
        ({"scenes": ["NEVER_SEEN"]}, []),
        ({"start_time": at(START_MS + 3)}, [0, 1, 2]),
        ({"end_time": at(START_MS + 2)}, [5, 6]),
        ({"start_time": at(START_MS + 2), "end_time": at(START_MS + 3)}, [3, 4]),
        ({"start_time": at(START_MS + 3), "end_time": at(START_MS + 3)}, []),
        ({"update_type": DECREASE, "scenes": ["REDEEM_COUPON"], "start_time": at(START_MS + 2)}, [3, 4]),
    ],
)
async def test_filters_keep_what_they_say(
    client: Client, shop: Shop, filters: Mapping[str, Any], places: list[int]
) -> None:
    """Type, scenes by name, and times from a start to before an end; all of them together."""
    ids = await fill(client, shop)

    assert await event_ids(client, shop, **filters) == [ids[place] for place in places]
    first = await client.points.ListPointsEntries(listing(shop, page_size=1, **filters))
    if len(places) > 1:
        rest = await event_ids(client, shop, page_token=first.next_page_token, **filters)
        assert rest == [ids[place] for place in places[1:]]
    else:
        assert not first.next_page_token


async def test_a_token_is_good_for_its_own_list_only(client: Client, shop: Shop) -> None:
    """With other filters or another account it is refused, and not answered wrongly; a page size may change."""
    await fill(client, shop)
    token = (await client.points.ListPointsEntries(listing(shop, page_size=2))).next_page_token

    for other in (
        {"update_type": INCREASE},
        {"scenes": ["LUCKY_DRAW"]},
        {"start_time": at(START_MS)},
        {"end_time": at(NOW_MS)},
        {"buyer_id": "another"},
        {"store_id": "another"},
        {"merchant_id": "another"},
    ):
        refusal = await refused(client.points.ListPointsEntries(listing(shop, page_token=token, **other)))
        assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
        assert set(refusal.fields) == {"page_token"}
    assert len(await entries(client, shop, page_size=4, page_token=token)) == 4


@pytest.mark.parametrize("token", ["x", "é", "AAAA", "W10=", "e30=", "bnVsbA==", "A" * 5_000])
async def test_a_broken_token_is_a_wrong_field(client: Client, shop: Shop, token: str) -> None:
    """Whatever is no token of ours is named, never an error of the server."""
    refusal = await refused(client.points.ListPointsEntries(listing(shop, page_token=token)))

    assert set(refusal.fields) == {"page_token"}


async def test_a_wrong_list_request_names_every_field(client: Client) -> None:
    """Each filter has its limits."""
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
async def test_a_list_request_is_bounded(client: Client, shop: Shop, filters: Mapping[str, Any]) -> None:
    """No page is negative, no list of scenes endless."""
    refusal = await refused(client.points.ListPointsEntries(listing(shop, **filters)))

    assert set(refusal.fields) == set(filters)


async def test_an_account_that_no_event_named_has_no_entries(client: Client, shop: Shop) -> None:
    """An empty list is an answer."""
    page = await client.points.ListPointsEntries(listing(shop))

    assert page == points_pb2.ListPointsEntriesResponse()


# The book stands.


async def test_the_event_of_an_entry_never_changes(client: Client, shop: Shop, service: Service) -> None:
    """Not even the database's superuser changes what was received, a remembered refusal included."""
    await client.apply(shop.update())
    await refused(client.apply(decrease(shop, 5, 3_000, None)))
    columns = [column for column in points_entries.c if column.name not in DERIVED]
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
async def test_entries_are_never_removed(client: Client, shop: Shop, service: Service, statement: str) -> None:
    """Neither one by one nor all at once."""
    await client.apply(shop.update())

    async with superuser(service) as connection:
        with pytest.raises(asyncpg.RestrictViolationError):
            await connection.execute(statement)

    assert len(await entries(client, shop)) == 1


async def test_what_is_derived_may_be_rewritten(client: Client, shop: Shop, service: Service) -> None:
    """A late event moves others: their place, balances, drift and draws are no part of what was received."""
    await client.apply(shop.update())

    async with superuser(service) as connection:
        done = await connection.execute(
            "UPDATE points_entries SET ordinal = 1, balance_before = 1, balance_after = 1, drift = 1,"
            " silently_expired = 1, draws = '[[1, null, \"e\"]]' WHERE merchant_id = $1",
            shop.merchant_id,
        )

    assert done == "UPDATE 1"
