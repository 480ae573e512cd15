"""Events that are in the book already: which of them another webhook brought."""

import pytest
import structlog

from pointbook.v1 import points_pb2
from support.harness import Client, Service, Shop, at, unique
from support.points import APPLIED, DUPLICATE, START_MS, buyer, decrease, increase, send

DIFFERENT_IDS = [("w-1", "w-2", True), ("w-1", "w-1", False), ("w-1", "", False), ("", "w-2", False), ("", "", False)]


def brought_by(update: points_pb2.PointsUpdate, webhook_id: str, **changes: object) -> points_pb2.PointsUpdate:
    """The same event, brought by a webhook."""
    again = points_pb2.PointsUpdate()
    again.CopyFrom(update)
    again.webhook.webhook_id = webhook_id
    for name, value in changes.items():
        setattr(again, name, value)
    return again


@pytest.mark.parametrize(("first", "second", "differs"), DIFFERENT_IDS)
@pytest.mark.parametrize("event_id", ["", "another"])
async def test_a_duplicate_says_whether_another_webhook_brought_it(
    client: Client, shop: Shop, *, event_id: str, first: str, second: str, differs: bool
) -> None:
    """Under the event's own id, and where the content alone is the same; an unknown webhook id says nothing."""
    update = shop.update()
    changes = {"event_id": f"{event_id}-{update.event_id}"} if event_id else {}

    entered = await client.apply(brought_by(update, first))
    again = await client.apply(brought_by(update, second, **changes))

    assert (entered.outcome, entered.webhook_id_differs) == (APPLIED, False)
    assert (again.outcome, again.webhook_id_differs) == (DUPLICATE, differs)


@pytest.mark.parametrize(("first", "second", "differs"), DIFFERENT_IDS)
async def test_a_duplicate_inside_a_batch_says_so_too(
    client: Client, shop: Shop, *, first: str, second: str, differs: bool
) -> None:
    """Its entry is one that the same transaction writes."""
    update = shop.update()

    entered, again = await send(client, brought_by(update, first), brought_by(update, second))

    assert (entered.response.outcome, entered.response.webhook_id_differs) == (APPLIED, False)
    assert (again.response.outcome, again.response.webhook_id_differs) == (DUPLICATE, differs)


async def test_a_duplicate_of_an_old_entry_is_compared_with_that_entry(client: Client, shop: Shop) -> None:
    """Not with the account's newest one."""
    old = shop.update(updated_at=at(START_MS))
    await client.apply(brought_by(old, "w-1"))
    await client.apply(brought_by(increase(shop, 1_000, 5, 25), "w-2"))

    same = await client.apply(brought_by(old, "w-1", event_id=unique("event")))
    other = await client.apply(brought_by(old, "w-2", event_id=unique("event")))

    assert (same.webhook_id_differs, other.webhook_id_differs) == (False, True)


async def test_two_identical_events_of_one_millisecond_are_one_and_are_found(
    client: Client, service: Service, shop: Shop
) -> None:
    """+5, -5, +5: the third is a duplicate by another webhook, counted and logged, and drift stays the truth."""
    earned, spent = increase(shop, 0, 5, 5), decrease(shop, 0, 5, 0)
    count = "pointbook_duplicates_with_other_webhook_id_total"
    before = service.server.metrics.registry.get_sample_value(count)
    assert before is not None

    with structlog.testing.capture_logs() as logs:
        first = await client.apply(brought_by(earned, "w-1"))
        second = await client.apply(brought_by(spent, "w-2"))
        third = await client.apply(brought_by(earned, "w-3"))

    assert (first.webhook_id_differs, second.webhook_id_differs) == (False, False)
    assert (third.outcome, third.webhook_id_differs) == (DUPLICATE, True)
    assert service.server.metrics.registry.get_sample_value(count) == before + 1
    (line,) = [line for line in logs if line["event"] == "duplicate under another webhook id"]
    assert line == {
        "event": "duplicate under another webhook id",
        "log_level": "info",
        "merchant_id": shop.merchant_id,
        "store_id": shop.store_id,
        "event_id": earned.event_id,
        "webhook_id": "w-3",
        "entry_webhook_id": "w-1",
    }
    await client.apply(increase(shop, 1_000, 1, 6))
    assert (await buyer(client, shop)).drift == 5
