"""PointsService on a real database: identity, balance, and entries that stand."""

from harness import Client, Shop
from pointbook.v1 import points_pb2

APPLIED = points_pb2.APPLY_OUTCOME_APPLIED
DUPLICATE = points_pb2.APPLY_OUTCOME_DUPLICATE


async def test_an_update_becomes_the_balance(client: Client, shop: Shop) -> None:
    """The seed's update, made consistent, opens an account of 20 points."""
    response = await client.apply(shop.update())

    assert response.outcome == APPLIED
    assert response.account.points_balance == 20
    assert response.account.active_points == 20
    assert response.account.lifetime_points == 20
    assert response.drift == 0
    assert not response.account.lots


async def test_the_same_event_again_changes_nothing(client: Client, shop: Shop) -> None:
    """One event_id with one content is one event, however often it comes."""
    update = shop.update()
    await client.apply(update)

    again = await client.apply(update)

    assert again.outcome == DUPLICATE
    assert again.account.points_balance == 20
    account = await client.account(shop.merchant_id, shop.store_id, "buyer")
    assert [lot.remaining_points for lot in account.lots] == [20]
