"""What the hot methods cost, in numbers that do not depend on the machine.

Speed itself is measured by the benchmarks. A figure that rises for a good reason is raised here, with the reason in the
commit. One that falls is lowered, so that the gain stays.
"""

import asyncio
from collections.abc import Callable, Sequence

import pytest
from google.protobuf.message import Message

from pointbook.v1 import points_pb2, redemption_pb2
from support.call_costs import Cost, measure_calls
from support.clocks import NOW_MS, at
from support.codes import add_customers, issue_and_read_code
from support.redemption import customer_ref, earn, redeem, redeem_request, validate_request
from support.servers import Service
from support.shops import Shop

CALLS = 12
UPDATES_IN_BATCH = 100
TOLERANCES = (0.75, 1.1)
"""How far a cost may be from its figure: functions differ between versions of Python and libraries."""

COSTS = {
    "PointsService/ApplyPointsUpdate": Cost(2, 890),
    "PointsService/BatchApplyPointsUpdates": Cost(2, 225),
    "PointsService/GetPointsAccount": Cost(1, 545),
    "RedemptionService/ValidateRedemption": Cost(3, 970),
    "RedemptionService/IssueValidationCode": Cost(12, 3_210),
    "RedemptionService/RedeemPoints": Cost(11, 2_640),
}
"""The figures of a call to an idle server on Python 3.11, for a batch per update."""


WITH_CODE = Cost(20, 4_780)
"""The figures of RedeemPoints with a one-time code."""


REVERSAL = Cost(11, 2_040)
"""The figures of ReverseRedemption, by the id of a redemption that drew on the customer's only account."""


def assert_cost(cost: Cost, goal: Cost) -> None:
    """Check a cost against its figures."""
    assert cost.round_trips == goal.round_trips
    low, high = TOLERANCES
    assert low * goal.function_calls <= cost.function_calls <= high * goal.function_calls


def buyer_of(number: int) -> str:
    """Return the buyer of a call."""
    return f"buyer-{number}"


def update_of(shop: Shop, number: int) -> points_pb2.PointsUpdate:
    """Return an update that follows the one that opened the account."""
    return shop.update(buyer_of(number), points_balance=320, updated_at=at(NOW_MS - 1_000))


def requests_of(shop: Shop, method: str) -> Sequence[Message]:
    """Return requests of a method, each about a customer of its own."""
    build: Callable[[int], Message] = {
        "PointsService/ApplyPointsUpdate": lambda number: points_pb2.ApplyPointsUpdateRequest(
            update=update_of(shop, number)
        ),
        "PointsService/BatchApplyPointsUpdates": lambda number: points_pb2.BatchApplyPointsUpdatesRequest(
            updates=[update_of(shop, number * UPDATES_IN_BATCH + each) for each in range(UPDATES_IN_BATCH)]
        ),
        "PointsService/GetPointsAccount": lambda number: points_pb2.GetPointsAccountRequest(
            merchant_id=shop.merchant_id, store_id=shop.store_id, buyer_id=buyer_of(number)
        ),
        "RedemptionService/ValidateRedemption": lambda number: validate_request(
            shop, customer=customer_ref(shop, buyer_of(number))
        ),
        "RedemptionService/IssueValidationCode": lambda number: redemption_pb2.IssueValidationCodeRequest(
            customer=customer_ref(shop, buyer_of(number)), program_id=1, points=10
        ),
        "RedemptionService/RedeemPoints": lambda number: redeem_request(
            shop, customer=customer_ref(shop, buyer_of(number))
        ),
    }[method]
    return [build(number) for number in range(CALLS)]


@pytest.mark.parametrize("method", COSTS)
async def test_the_cost_of_a_call_is_known(
    service: Service, admin_token: str, shop: Shop, method: str, figure: Callable[[str, float | str, str], None]
) -> None:
    per_call = UPDATES_IN_BATCH if method == "PointsService/BatchApplyPointsUpdates" else 1
    await service.client.put_program(shop.merchant_id, shop.store_id)
    await asyncio.gather(*(earn(service.client, shop, 300, buyer_of(number)) for number in range(CALLS * per_call)))

    cost = await measure_calls(service.server, admin_token, method, requests_of(shop, method))

    name = method.partition("/")[2]
    goal = COSTS[method]
    figure(f"{name}: round trips to the database", cost.round_trips, f"{goal.round_trips}")
    figure(f"{name}: calls of functions, each update", cost.function_calls / per_call, f"about {goal.function_calls:,}")
    assert_cost(Cost(cost.round_trips, cost.function_calls / per_call), goal)


async def test_the_cost_of_a_redemption_with_a_code_is_known(
    service: Service, admin_token: str, shop: Shop, figure: Callable[[str, float | str, str], None]
) -> None:
    buyers = [buyer_of(number) for number in range(CALLS)]
    await add_customers(service.client, shop, buyers)
    requests = []
    for buyer in buyers:
        customer = customer_ref(shop, buyer)
        challenge_id, code = await issue_and_read_code(service, shop, 10, customer=customer)
        requests.append(redeem_request(shop, customer=customer, validation_code=code, challenge_id=challenge_id))

    cost = await measure_calls(service.server, admin_token, "RedemptionService/RedeemPoints", requests)

    figure("RedeemPoints with a code: round trips to the database", cost.round_trips, f"{WITH_CODE.round_trips}")
    figure("RedeemPoints with a code: calls of functions", cost.function_calls, f"about {WITH_CODE.function_calls:,}")
    assert_cost(cost, WITH_CODE)


async def test_the_cost_of_a_reversal_is_known(
    service: Service, admin_token: str, shop: Shop, figure: Callable[[str, float | str, str], None]
) -> None:
    await service.client.put_program(shop.merchant_id, shop.store_id)
    requests = []
    for buyer in map(buyer_of, range(CALLS)):
        await earn(service.client, shop, 300, buyer)
        made = await redeem(service.client, redeem_request(shop, customer=customer_ref(shop, buyer)))
        requests.append(
            redemption_pb2.ReverseRedemptionRequest(
                merchant_id=shop.merchant_id,
                redemption_id=made.redemption_id,
                external_reference_number=f"reversal-of-{buyer}",
            )
        )

    cost = await measure_calls(service.server, admin_token, "RedemptionService/ReverseRedemption", requests)

    figure("ReverseRedemption: round trips to the database", cost.round_trips, f"{REVERSAL.round_trips}")
    figure("ReverseRedemption: calls of functions", cost.function_calls, f"about {REVERSAL.function_calls:,}")
    assert_cost(cost, REVERSAL)
