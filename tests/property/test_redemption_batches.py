"""Commands that share a transaction have the same results as one after the other."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointbook.v1 import customers_pb2
from pointbook_common.durations import DAY_MS
from pointbook_server.customers.model import CustomerKey, GroupKey, Identifier, IdentifierKind
from pointbook_server.errors import PointbookError
from pointbook_server.ledger.model import AccountKey
from pointbook_server.redemption.assessment import GroupRef, RedemptionRequest
from pointbook_server.redemption.commands import PendingRedemption, RedeemCommand
from pointbook_server.redemption.customer_validation import ValidationEvidence
from pointbook_server.redemption.model import Redemption
from support.clocks import NOW_MS, at
from support.examples import examples
from support.redemption import earn
from support.servers import Service
from support.shops import Shop
from support.unique_names import unique

EXAMPLES = settings(
    max_examples=examples(25),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NAMES = ("ada", "bob", "cyd", "eve")
"""All but Eve are registered; of those, every two neighbours share a group."""
GROUPS = (("ada", "bob"), ("bob", "cyd"))
CAP = 50


class CommandSpec(NamedTuple):
    """A command for any shop."""

    who: str
    points: int
    program_id: int
    lends: bool
    group: int | None
    reference: int
    transaction_number: str


SPECS = st.builds(
    CommandSpec,
    who=st.sampled_from(NAMES),
    points=st.integers(0, 40),
    program_id=st.sampled_from([1, 1, 2, 3]),
    lends=st.booleans(),
    group=st.sampled_from([None, None, 0, 1, 2]),
    reference=st.integers(0, 11),
    transaction_number=st.sampled_from(["", "", "", "bill"]),
)


async def create_shops(service: Service) -> list[Shop]:
    """Create two stores with a program each, which lend points, and one of both.

    Each customer has points in both stores, which expire one after the other.
    """
    client, first = service.client, Shop(unique("merchant"), unique("store"))
    shops = [first, Shop(first.merchant_id, f"{first.store_id}-2")]
    for number, shop in enumerate(shops, start=1):
        await client.put_store(shop.merchant_id, shop.store_id)
        await client.put_program(
            shop.merchant_id,
            shop.store_id,
            program_id=number,
            criteria={"max_points_per_day": CAP},
            allow_group_redemption=True,
            allow_cross_program_redemption=True,
        )
    stores = [shop.store_id for shop in shops]
    await client.put_program(
        first.merchant_id, "", program_id=3, store_ids=stores, criteria={"min_balance_required": 9}
    )
    for name in NAMES:
        if name != "eve":
            buyers = [{"store_id": store_id, "buyer_id": name} for store_id in stores]
            await client.put_customer(first.merchant_id, name, external_id=name, buyers=buyers)
        for day, shop in enumerate(shops, start=1):
            await earn(client, shop, 70, name, points_expiry_time=at(NOW_MS + day * DAY_MS))
            moment = at(NOW_MS - DAY_MS // 2)
            await earn(client, shop, 30, name, points_balance=100, updated_at=moment)
    for number, names in enumerate(GROUPS):
        members = [customers_pb2.UserGroup.Member(customer_id=name, can_redeem=True) for name in names]
        await client.put_group(first.merchant_id, f"g-{number}", primary_customer_id=names[0], members=members)
    return shops


def to_command(shops: list[Shop], spec: CommandSpec) -> RedeemCommand:
    """Build the command of a shop."""
    key: CustomerKey = Identifier(IdentifierKind.EXTERNAL_ID, spec.who)
    if spec.who == "eve":
        key = AccountKey(shops[spec.points % 2].store_id, spec.who)
    request = RedemptionRequest(
        merchant_id=shops[0].merchant_id,
        identifier="",
        key=key,
        program_id=spec.program_id,
        points=spec.points,
        currency_value=None,
        group_redemption=spec.lends,
        group=None if spec.group is None else GroupRef(((GroupKey.ID, f"g-{spec.group}"),)),
        channel=None,
    )
    return RedeemCommand(request, f"order-{spec.reference}", spec.transaction_number, "")


async def run_redeem_commands(service: Service, orders: Sequence[RedeemCommand]) -> list[Redemption | PointbookError]:
    """Run commands in one transaction."""
    store = service.server.services.redemptions._transactions
    requests = [order.request for order in orders]
    pending = [
        PendingRedemption(order, before, ValidationEvidence())
        for order, before in zip(orders, await store.assess(requests, service.clock()), strict=True)
    ]
    return await store.redeem(requests[0].merchant_id, pending, service.clock)


def summarise(shops: list[Shop], responses: Sequence[Redemption | PointbookError]) -> list[Any]:
    """Return the content of results without the shop's ids."""
    stores = {shop.store_id: number for number, shop in enumerate(shops)}
    return [
        (response.reason, response.metadata.get("violations"))
        if isinstance(response, PointbookError)
        else (
            response.content.points,
            response.active_points,
            [(stores[draw.store_id], *draw[1:4]) for draw in response.draws],
        )
        for response in responses
    ]


async def held_points(service: Service, shops: list[Shop]) -> list[int]:
    """Return the held points of every account."""
    accounts = [await service.client.account(shop.merchant_id, shop.store_id, name) for shop in shops for name in NAMES]
    return [account.held_points for account in accounts]


@given(st.lists(SPECS, min_size=4, max_size=20))
@EXAMPLES
async def test_batch_has_same_results_as_single_commands(service: Service, specs: list[CommandSpec]) -> None:
    together, alone = await create_shops(service), await create_shops(service)
    responses = await run_redeem_commands(service, [to_command(together, spec) for spec in specs])
    expected = [(await run_redeem_commands(service, [to_command(alone, spec)]))[0] for spec in specs]

    assert summarise(together, responses) == summarise(alone, expected)
    assert await held_points(service, together) == await held_points(service, alone)
