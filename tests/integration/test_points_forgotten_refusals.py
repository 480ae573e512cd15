"""`forget_refusal`: a refusal for lack of points is answered, stored nowhere, and lifts one that was stored before."""

import asyncio
from typing import Any

import asyncpg
import pytest

from pointbook.v1 import points_pb2
from support.harness import Client, Service, Shop
from support.ledger import check_book
from support.points import decrease, event_ids, increase, rows_of, send, superuser, told

REFUSALS = "SELECT event_id FROM points_entries WHERE merchant_id = $1 AND outcome = 'REFUSED' ORDER BY event_id"


async def apply(client: Client, *updates: points_pb2.PointsUpdate) -> list[str]:
    """Send updates one by one, and return the outcome or the error's reason of each."""
    return [told(await send(client, update))[0] for update in updates]


async def remembered(service: Service, shop: Shop) -> list[str]:
    """The event_ids under which a refusal is stored."""
    async with superuser(service) as connection:
        return [row["event_id"] for row in await connection.fetch(REFUSALS, shop.merchant_id)]


def forgetful(shop: Shop, after_ms: int, value: int, **changes: Any) -> points_pb2.PointsUpdate:
    """Points go out without a balance, and a refusal is not remembered."""
    return decrease(shop, after_ms, value, None, forget_refusal=True, **changes)


async def test_a_forgotten_refusal_stores_nothing(client: Client, shop: Shop, service: Service) -> None:
    """Neither an account nor a row, on an account that is new and on one that is not."""
    assert await apply(client, forgetful(shop, 0, 5)) == ["INSUFFICIENT_POINTS"]
    assert await rows_of(service, shop.merchant_id) == (0, 0)

    assert await apply(client, increase(shop, 10, 4, 4), forgetful(shop, 20, 5)) == ["APPLIED", "INSUFFICIENT_POINTS"]
    assert await rows_of(service, shop.merchant_id) == (1, 1)


@pytest.mark.parametrize("after_ms", [5, 10, 15])
async def test_an_update_that_was_refused_is_judged_anew(
    after_ms: int, client: Client, shop: Shop, service: Service
) -> None:
    """In whatever order it comes with the points that it takes, before and after entries that are there."""
    update = forgetful(shop, after_ms, 5)
    earlier, later = increase(shop, 0, 5, None), increase(shop, 20, 1, None)

    assert await apply(client, update, later, update, earlier) == [
        *("INSUFFICIENT_POINTS", "APPLIED", "INSUFFICIENT_POINTS", "LATE"),
    ]
    assert await apply(client, update, update) == ["LATE", "DUPLICATE"]
    assert await event_ids(client, shop) == [later.event_id, update.event_id, earlier.event_id]
    await check_book(service.database_url, shop.merchant_id)


async def test_a_remembered_refusal_is_lifted_once_the_update_is_accepted(
    client: Client, shop: Shop, service: Service
) -> None:
    """Until then it stays, and other callers get the answer that they got before."""
    update = decrease(shop, 10, 5, None)
    asking = points_pb2.PointsUpdate()
    asking.CopyFrom(update)
    asking.forget_refusal = True

    assert await apply(client, update, asking, update) == ["INSUFFICIENT_POINTS"] * 3
    assert await remembered(service, shop) == [update.event_id]
    assert await apply(client, increase(shop, 0, 5, None), update) == ["APPLIED", "INSUFFICIENT_POINTS"]
    assert await remembered(service, shop) == [update.event_id]
    assert await apply(client, asking, update, asking) == ["APPLIED", "DUPLICATE", "DUPLICATE"]
    assert await remembered(service, shop) == []
    assert (await client.account(shop.merchant_id, shop.store_id, "buyer")).points_balance == 0
    await check_book(service.database_url, shop.merchant_id)


async def test_other_content_under_a_known_id_is_still_reused(client: Client, shop: Shop, service: Service) -> None:
    """Also where the refusal would have been forgotten, and the id stands with another account or a refusal."""
    known = increase(shop, 0, 5, 5, buyer_id="another")
    refused = decrease(shop, 0, 7, None, buyer_id="third")
    assert await apply(client, known, refused) == ["APPLIED", "INSUFFICIENT_POINTS"]

    reusing = [forgetful(shop, 10, 5, event_id=each.event_id) for each in (known, refused)]

    assert await apply(client, *reusing) == ["EVENT_ID_REUSED"] * 2
    assert await remembered(service, shop) == [refused.event_id]


async def test_a_batch_mixes_both_kinds(client: Client, shop: Shop, service: Service) -> None:
    """Each update says for itself whether its refusal is remembered."""
    kept, forgotten = decrease(shop, 10, 5, None), forgetful(shop, 20, 5)

    results = await send(client, kept, forgotten, increase(shop, 0, 5, None), kept, forgotten)

    refused = "INSUFFICIENT_POINTS"
    assert told(results) == [refused, refused, "APPLIED", refused, "APPLIED"]
    assert await remembered(service, shop) == [kept.event_id]
    assert await event_ids(client, shop, page_size=1) == [forgotten.event_id]
    await check_book(service.database_url, shop.merchant_id)


async def test_callers_who_lift_a_refusal_at_the_same_time_apply_it_once(client: Client, shop: Shop) -> None:
    """One entry, whichever call is first."""
    update = decrease(shop, 10, 5, None)
    assert await apply(client, update, increase(shop, 0, 9, None)) == ["INSUFFICIENT_POINTS", "APPLIED"]
    update.forget_refusal = True

    answers = await asyncio.gather(*(apply(client, update) for _ in range(20)))

    assert sorted(word for answer in answers for word in answer) == ["APPLIED"] + ["DUPLICATE"] * 19
    assert (await client.account(shop.merchant_id, shop.store_id, "buyer")).points_balance == 4


async def test_the_flag_means_nothing_beside_a_balance(client: Client, shop: Shop) -> None:
    """Such an update is never refused for its balance, and its content is the same with and without the flag."""
    update = decrease(shop, 0, 5, -5)
    asking = points_pb2.PointsUpdate()
    asking.CopyFrom(update)
    asking.forget_refusal = True

    assert await apply(client, asking, update, asking) == ["APPLIED", "DUPLICATE", "DUPLICATE"]


async def test_the_database_deletes_refusals_alone(client: Client, shop: Shop, service: Service) -> None:
    """An entry of the book stays, even against a superuser's DELETE."""
    entry, refusal = increase(shop, 0, 5, 5), decrease(shop, 10, 9, None)
    assert await apply(client, entry, refusal) == ["APPLIED", "INSUFFICIENT_POINTS"]
    async with superuser(service) as connection:
        delete = "DELETE FROM points_entries WHERE event_id = $1"
        with pytest.raises(asyncpg.RestrictViolationError):
            await connection.execute(delete, entry.event_id)
        assert await connection.execute(delete, refusal.event_id) == "DELETE 1"
