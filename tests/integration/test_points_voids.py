"""VoidPointsEntries and UnvoidPointsEntries on a real database."""

import asyncpg
import grpc
import pytest

from pointbook.v1 import points_pb2
from support.clients import Client
from support.clocks import NOW_MS, at
from support.connections import superuser
from support.ledger import check_ledger
from support.points import (
    DUPLICATE,
    apply_batch,
    buyer_account,
    count_rows,
    decrease,
    increase,
    list_entries,
    list_event_ids,
    outcomes_of,
    unvoid_entries,
    void_entries,
)
from support.refusals import refused
from support.servers import Service
from support.shops import Shop
from support.unique_names import unique


async def apply_three_updates(client: Client, shop: Shop) -> None:
    """Write three entries; the second contradicts the balance of the third."""
    await apply_batch(
        client,
        increase(shop, 0, 20, 20, event_id=f"{shop.store_id}-first"),
        increase(shop, 10, 30, None, event_id=f"{shop.store_id}-wrong"),
        increase(shop, 20, 5, 25, event_id=f"{shop.store_id}-last"),
    )


async def test_a_void_entry_does_not_count(client: Client, shop: Shop, service: Service) -> None:
    """It is still listed, with the reason and the time."""
    await apply_three_updates(client, shop)
    wrong = f"{shop.store_id}-wrong"
    assert (await buyer_account(client, shop)).drift == -30

    (account,) = await void_entries(client, shop, wrong, reason="Sent by a test till.")

    assert (account.points_balance, account.drift, account.lifetime_points) == (25, 0, 25)
    assert (account.buyer_id, account.as_of) == ("buyer", at(NOW_MS))
    last, middle, first = await list_entries(client, shop)
    assert middle.update.event_id == wrong
    assert middle.void == points_pb2.EntryVoid(reason="Sent by a test till.", time=at(NOW_MS))
    assert (middle.balance_before, middle.balance_after, middle.drift) == (20, 20, 0)
    assert not first.HasField("void")
    assert (last.balance_before, last.drift, last.HasField("void")) == (20, 0, False)
    await check_ledger(service.database_url, shop.merchant_id)


async def test_unvoiding_restores_the_account_and_its_entries(client: Client, shop: Shop, service: Service) -> None:
    await apply_three_updates(client, shop)
    before = (await buyer_account(client, shop), await list_entries(client, shop))
    ids = await list_event_ids(client, shop)
    await void_entries(client, shop, *ids)
    emptied = await buyer_account(client, shop)

    (account,) = await unvoid_entries(client, shop, *ids)

    assert (emptied.points_balance, emptied.drift, list(emptied.lots)) == (0, 0, [])
    assert account.drift == -30
    assert (await buyer_account(client, shop), await list_entries(client, shop)) == before
    await check_ledger(service.database_url, shop.merchant_id)


async def test_entries_of_several_accounts_are_voided_in_one_call(client: Client, shop: Shop, service: Service) -> None:
    """The response has the changed accounts, sorted, without lots."""
    names = ("c", "a", "b")
    updates = [increase(shop, 0, 20, 20, buyer_id=name) for name in names]
    await apply_batch(client, *updates)

    accounts = await void_entries(client, shop, *(update.event_id for update in updates[:2]))

    assert [(account.buyer_id, account.points_balance) for account in accounts] == [("a", 0), ("c", 0)]
    assert all(not account.lots for account in accounts)
    assert (await client.account(shop.merchant_id, shop.store_id, "b")).points_balance == 20
    await check_ledger(service.database_url, shop.merchant_id)


async def test_all_entries_are_voided_or_none(client: Client, shop: Shop, service: Service) -> None:
    await apply_three_updates(client, shop)

    for method in (void_entries, unvoid_entries):
        refusal = await refused(method(client, shop, f"{shop.store_id}-last", "unknown"))

        assert refusal.code == grpc.StatusCode.NOT_FOUND
        assert refusal.reason == "ENTRY_NOT_FOUND"
        assert refusal.metadata == {"event_id": "unknown"}
    assert not any(entry.HasField("void") for entry in await list_entries(client, shop))
    async with superuser(service) as connection:
        voidings = "SELECT count(*) FROM points_voidings WHERE merchant_id = $1"
        assert await connection.fetchval(voidings, shop.merchant_id) == 0


async def test_unknown_entries_and_entries_of_other_merchants_are_not_found(client: Client, shop: Shop) -> None:
    await apply_three_updates(client, shop)
    stranger = Shop(unique("merchant"), shop.store_id)

    for owner, event_id in ((shop, "unknown"), (stranger, f"{shop.store_id}-last")):
        refusal = await refused(void_entries(client, owner, event_id))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "ENTRY_NOT_FOUND")


async def test_a_refused_event_cannot_be_voided(client: Client, shop: Shop) -> None:
    """It is not an entry."""
    update = decrease(shop, 0, 20, None)
    await refused(client.apply(update))

    refusal = await refused(void_entries(client, shop, update.event_id))

    assert refusal.reason == "ENTRY_NOT_FOUND"
    assert (await refused(client.apply(update))).reason == "INSUFFICIENT_POINTS"


async def test_voiding_twice_changes_nothing(client: Client, shop: Shop, service: Service) -> None:
    """The first reason stays, and no account is returned; also when unvoiding."""
    await apply_three_updates(client, shop)
    last = f"{shop.store_id}-last"
    await void_entries(client, shop, last, reason="The first reason.")
    before = await buyer_account(client, shop)

    assert await void_entries(client, shop, last, reason="Another reason.") == []
    assert await unvoid_entries(client, shop, f"{shop.store_id}-first") == []

    assert await buyer_account(client, shop) == before
    assert [entry.void.reason for entry in await list_entries(client, shop)] == ["The first reason.", "", ""]
    async with superuser(service) as connection:
        voidings = await connection.fetch("SELECT reason FROM points_voidings WHERE merchant_id = $1", shop.merchant_id)
    assert [row["reason"] for row in voidings] == ["The first reason."]


async def test_the_records_of_voiding_cannot_be_changed(client: Client, shop: Shop, service: Service) -> None:
    await apply_three_updates(client, shop)
    last = f"{shop.store_id}-last"
    await void_entries(client, shop, last, reason="A mistake.")
    await unvoid_entries(client, shop, last, reason="It was none.")

    async with superuser(service) as connection:
        rows = await connection.fetch(
            "SELECT event_id, action, reason, at_ms FROM points_voidings WHERE merchant_id = $1 ORDER BY action DESC",
            shop.merchant_id,
        )
        assert list(map(tuple, rows)) == [
            (last, "VOID", "A mistake.", NOW_MS),
            (last, "UNVOID", "It was none.", NOW_MS),
        ]
        for statement in (
            "UPDATE points_voidings SET reason = 'another'",
            "DELETE FROM points_voidings",
            "TRUNCATE points_voidings",
        ):
            with pytest.raises(asyncpg.RestrictViolationError):
                await connection.execute(statement)


async def test_a_void_entry_still_makes_repeated_events_duplicates(client: Client, shop: Shop) -> None:
    """With the same event_id or another one."""
    update = increase(shop, 0, 20, 20)
    await client.apply(update)
    await client.apply(increase(shop, 10, 5, 5))
    await void_entries(client, shop, update.event_id)

    again = await client.apply(update)
    renamed = points_pb2.PointsUpdate()
    renamed.CopyFrom(update)
    renamed.event_id = unique("event")

    assert (again.outcome, again.account.points_balance, again.drift) == (DUPLICATE, 5, 0)
    assert (await client.apply(renamed)).outcome == DUPLICATE
    assert len(await list_entries(client, shop)) == 2


async def test_a_late_event_keeps_the_reason_of_a_void_entry(client: Client, shop: Shop, service: Service) -> None:
    await apply_three_updates(client, shop)
    wrong = f"{shop.store_id}-wrong"
    await void_entries(client, shop, wrong, reason="Sent by a test till.")

    # The first has the millisecond of the void entry, which stays behind all entries that count.
    results = await apply_batch(client, increase(shop, 10, 1, 21), increase(shop, 5, 2, 22))

    assert outcomes_of(results) == ["LATE", "LATE"]
    found = {entry.update.event_id: entry for entry in await list_entries(client, shop)}
    assert found[wrong].void.reason == "Sent by a test till."
    assert found[wrong].balance_before == 21
    await check_ledger(service.database_url, shop.merchant_id)


async def test_voiding_a_decrease_returns_its_points(client: Client, shop: Shop) -> None:
    """A refused event stays refused, and may be sent with another event_id."""
    await client.apply(increase(shop, 0, 20, 20))
    wrong, refused_one = decrease(shop, 10, 20, None), decrease(shop, 20, 5, None)
    await client.apply(wrong)
    assert (await refused(client.apply(refused_one))).reason == "INSUFFICIENT_POINTS"

    await void_entries(client, shop, wrong.event_id)

    assert (await refused(client.apply(refused_one))).reason == "INSUFFICIENT_POINTS"
    refused_one.event_id = unique("event")
    assert (await client.apply(refused_one)).account.points_balance == 15


async def test_the_next_event_opens_an_account_whose_entries_are_all_void(
    client: Client, shop: Shop, service: Service
) -> None:
    await apply_three_updates(client, shop)
    await void_entries(client, shop, *await list_event_ids(client, shop))

    later = await client.apply(increase(shop, 30, 10, 110))
    earlier = await client.apply(increase(shop, -10, 10, 100))

    assert (later.account.points_balance, later.account.lifetime_points, later.drift) == (110, 110, 0)
    assert (earlier.account.points_balance, earlier.account.lifetime_points, earlier.account.drift) == (110, 110, 0)
    await check_ledger(service.database_url, shop.merchant_id)


@pytest.mark.parametrize("method", ["VoidPointsEntries", "UnvoidPointsEntries"])
async def test_a_wrong_request_to_void_names_all_wrong_fields(
    client: Client, shop: Shop, method: str, service: Service
) -> None:
    await apply_three_updates(client, shop)
    request_type = getattr(points_pb2, f"{method}Request")
    last = f"{shop.store_id}-last"

    async def wrong_fields(ids: list[str], reason: str = "Why.") -> set[str]:
        request = request_type(merchant_id=shop.merchant_id, event_ids=ids, reason=reason)
        return set((await refused(getattr(client.points, method)(request))).fields)

    assert await wrong_fields([], "") == {"event_ids", "reason"}
    assert await wrong_fields([last, "a b", "e" * 129]) == {"event_ids[1]", "event_ids[2]"}
    assert await wrong_fields([last, last]) == {"event_ids"}
    assert await wrong_fields([f"event-{number}" for number in range(1_001)]) == {"event_ids"}
    assert await wrong_fields([last], "r" * 501) == {"reason"}
    refusal = await refused(getattr(client.points, method)(request_type(event_ids=[last], reason="Why.")))
    assert set(refusal.fields) == {"merchant_id"}
    assert await count_rows(service, shop.merchant_id) == (1, 3)
    assert not any(entry.HasField("void") for entry in await list_entries(client, shop))
