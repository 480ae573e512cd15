"""`forget_refusal`: refusals are not stored, and stored ones are lifted."""

import asyncio
from typing import Any

import asyncpg
import pytest

from pointbook.v1 import points_pb2
from support.clients import Client
from support.connections import superuser
from support.ledger import check_ledger
from support.points import apply_batch, count_rows, decrease, increase, list_event_ids, outcomes_of
from support.servers import Service
from support.shops import Shop

REFUSALS = "SELECT event_id FROM points_entries WHERE merchant_id = $1 AND outcome = 'REFUSED' ORDER BY event_id"


async def apply(client: Client, *updates: points_pb2.PointsUpdate) -> list[str]:
    """Apply updates one by one; return the outcome or the error reason of each."""
    return [outcomes_of(await apply_batch(client, update))[0] for update in updates]


async def stored_refusals(service: Service, shop: Shop) -> list[str]:
    """Return the event_ids of stored refusals."""
    async with superuser(service) as connection:
        return [row["event_id"] for row in await connection.fetch(REFUSALS, shop.merchant_id)]


def forgetting_decrease(shop: Shop, after_ms: int, value: int, **changes: Any) -> points_pb2.PointsUpdate:
    """Build a decrease without a balance whose refusal is not stored."""
    return decrease(shop, after_ms, value, None, forget_refusal=True, **changes)


async def test_a_forgotten_refusal_stores_nothing(client: Client, shop: Shop, service: Service) -> None:
    """Neither on a new account nor on an existing one."""
    assert await apply(client, forgetting_decrease(shop, 0, 5)) == ["INSUFFICIENT_POINTS"]
    assert await count_rows(service, shop.merchant_id) == (0, 0)

    assert await apply(client, increase(shop, 10, 4, 4), forgetting_decrease(shop, 20, 5)) == [
        "APPLIED",
        "INSUFFICIENT_POINTS",
    ]
    assert await count_rows(service, shop.merchant_id) == (1, 1)


@pytest.mark.parametrize("after_ms", [5, 10, 15])
async def test_a_forgotten_refusal_is_checked_again_on_retry(
    after_ms: int, client: Client, shop: Shop, service: Service
) -> None:
    """Before, at and after the time of other entries."""
    update = forgetting_decrease(shop, after_ms, 5)
    earlier, later = increase(shop, 0, 5, None), increase(shop, 20, 1, None)

    assert await apply(client, update, later, update, earlier) == [
        *("INSUFFICIENT_POINTS", "APPLIED", "INSUFFICIENT_POINTS", "LATE"),
    ]
    assert await apply(client, update, update) == ["LATE", "DUPLICATE"]
    assert await list_event_ids(client, shop) == [later.event_id, update.event_id, earlier.event_id]
    await check_ledger(service.database_url, shop.merchant_id)


async def test_a_stored_refusal_is_lifted_once_the_update_is_accepted(
    client: Client, shop: Shop, service: Service
) -> None:
    """Until then it stays, also for callers that do not ask to forget it."""
    update = decrease(shop, 10, 5, None)
    forgetting = points_pb2.PointsUpdate()
    forgetting.CopyFrom(update)
    forgetting.forget_refusal = True

    assert await apply(client, update, forgetting, update) == ["INSUFFICIENT_POINTS"] * 3
    assert await stored_refusals(service, shop) == [update.event_id]
    assert await apply(client, increase(shop, 0, 5, None), update) == ["APPLIED", "INSUFFICIENT_POINTS"]
    assert await stored_refusals(service, shop) == [update.event_id]
    assert await apply(client, forgetting, update, forgetting) == ["APPLIED", "DUPLICATE", "DUPLICATE"]
    assert await stored_refusals(service, shop) == []
    assert (await client.account(shop.merchant_id, shop.store_id, "buyer")).points_balance == 0
    await check_ledger(service.database_url, shop.merchant_id)


async def test_a_known_event_id_with_different_content_is_refused_even_if_refusals_are_forgotten(
    client: Client, shop: Shop, service: Service
) -> None:
    known = increase(shop, 0, 5, 5, buyer_id="another")
    refused = decrease(shop, 0, 7, None, buyer_id="third")
    assert await apply(client, known, refused) == ["APPLIED", "INSUFFICIENT_POINTS"]

    reusing = [forgetting_decrease(shop, 10, 5, event_id=each.event_id) for each in (known, refused)]

    assert await apply(client, *reusing) == ["EVENT_ID_REUSED"] * 2
    assert await stored_refusals(service, shop) == [refused.event_id]


async def test_a_batch_may_mix_stored_and_forgotten_refusals(client: Client, shop: Shop, service: Service) -> None:
    stored, forgotten = decrease(shop, 10, 5, None), forgetting_decrease(shop, 20, 5)

    results = await apply_batch(client, stored, forgotten, increase(shop, 0, 5, None), stored, forgotten)

    refused = "INSUFFICIENT_POINTS"
    assert outcomes_of(results) == [refused, refused, "APPLIED", refused, "APPLIED"]
    assert await stored_refusals(service, shop) == [stored.event_id]
    assert await list_event_ids(client, shop, page_size=1) == [forgotten.event_id]
    await check_ledger(service.database_url, shop.merchant_id)


async def test_concurrent_calls_that_lift_a_refusal_apply_the_event_once(client: Client, shop: Shop) -> None:
    update = decrease(shop, 10, 5, None)
    assert await apply(client, update, increase(shop, 0, 9, None)) == ["INSUFFICIENT_POINTS", "APPLIED"]
    update.forget_refusal = True

    results = await asyncio.gather(*(apply(client, update) for _ in range(20)))

    assert sorted(outcome for call_outcomes in results for outcome in call_outcomes) == ["APPLIED"] + ["DUPLICATE"] * 19
    assert (await client.account(shop.merchant_id, shop.store_id, "buyer")).points_balance == 4


async def test_forget_refusal_has_no_effect_on_an_update_with_a_balance(client: Client, shop: Shop) -> None:
    """It is not part of the content either."""
    update = decrease(shop, 0, 5, -5)
    forgetting = points_pb2.PointsUpdate()
    forgetting.CopyFrom(update)
    forgetting.forget_refusal = True

    assert await apply(client, forgetting, update, forgetting) == ["APPLIED", "DUPLICATE", "DUPLICATE"]


async def test_only_refusals_can_be_deleted_from_the_database(client: Client, shop: Shop, service: Service) -> None:
    """An entry cannot be deleted even by a superuser."""
    entry, refusal = increase(shop, 0, 5, 5), decrease(shop, 10, 9, None)
    assert await apply(client, entry, refusal) == ["APPLIED", "INSUFFICIENT_POINTS"]
    async with superuser(service) as connection:
        delete = "DELETE FROM points_entries WHERE event_id = $1"
        with pytest.raises(asyncpg.RestrictViolationError):
            await connection.execute(delete, entry.event_id)
        assert await connection.execute(delete, refusal.event_id) == "DELETE 1"
