"""Duplicates: whether another webhook delivered the entry."""

import pytest
import structlog

from pointbook.v1 import points_pb2
from support.clients import Client
from support.clocks import at
from support.points import APPLIED, DUPLICATE, START_MS, apply_batch, buyer_account, decrease, increase
from support.servers import Service
from support.shops import Shop
from support.unique_names import unique

DIFFERENT_IDS = [("w-1", "w-2", True), ("w-1", "w-1", False), ("w-1", "", False), ("", "w-2", False), ("", "", False)]


def delivered_by(update: points_pb2.PointsUpdate, webhook_id: str, **changes: object) -> points_pb2.PointsUpdate:
    """Return the same event as delivered by a webhook."""
    again = points_pb2.PointsUpdate()
    again.CopyFrom(update)
    again.webhook.webhook_id = webhook_id
    for name, value in changes.items():
        setattr(again, name, value)
    return again


@pytest.mark.parametrize(("first", "second", "differs"), DIFFERENT_IDS)
@pytest.mark.parametrize("event_id", ["", "another"])
async def test_a_duplicate_reports_whether_another_webhook_delivered_it(
    client: Client, shop: Shop, *, event_id: str, first: str, second: str, differs: bool
) -> None:
    """With the same event_id or the same content; an unknown id never differs."""
    update = shop.update()
    changes = {"event_id": f"{event_id}-{update.event_id}"} if event_id else {}

    applied = await client.apply(delivered_by(update, first))
    again = await client.apply(delivered_by(update, second, **changes))

    assert (applied.outcome, applied.webhook_id_differs) == (APPLIED, False)
    assert (again.outcome, again.webhook_id_differs) == (DUPLICATE, differs)


@pytest.mark.parametrize(("first", "second", "differs"), DIFFERENT_IDS)
async def test_a_duplicate_within_a_batch_reports_it_too(
    client: Client, shop: Shop, *, first: str, second: str, differs: bool
) -> None:
    update = shop.update()

    applied, again = await apply_batch(client, delivered_by(update, first), delivered_by(update, second))

    assert (applied.response.outcome, applied.response.webhook_id_differs) == (APPLIED, False)
    assert (again.response.outcome, again.response.webhook_id_differs) == (DUPLICATE, differs)


async def test_a_duplicate_is_compared_with_its_own_entry(client: Client, shop: Shop) -> None:
    """Not with the account's newest entry."""
    old = shop.update(updated_at=at(START_MS))
    await client.apply(delivered_by(old, "w-1"))
    await client.apply(delivered_by(increase(shop, 1_000, 5, 25), "w-2"))

    same = await client.apply(delivered_by(old, "w-1", event_id=unique("event")))
    other = await client.apply(delivered_by(old, "w-2", event_id=unique("event")))

    assert (same.webhook_id_differs, other.webhook_id_differs) == (False, True)


async def test_identical_events_of_one_millisecond_count_once_and_are_counted_and_logged(
    client: Client, service: Service, shop: Shop
) -> None:
    """+5, -5, +5: the third is a duplicate, and the next event reveals the drift.

    Source: docs/reference/ledger.md#indistinguishable-events.
    """
    earned, spent = increase(shop, 0, 5, 5), decrease(shop, 0, 5, 0)
    count = "pointbook_duplicates_with_other_webhook_id_total"
    before = service.server.metrics.registry.get_sample_value(count)
    assert before is not None

    with structlog.testing.capture_logs() as logs:
        first = await client.apply(delivered_by(earned, "w-1"))
        second = await client.apply(delivered_by(spent, "w-2"))
        third = await client.apply(delivered_by(earned, "w-3"))

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
    assert (await buyer_account(client, shop)).drift == 5
