"""The tests of a checkout team, which use the testing kit as its users do.

tests/e2e/test_testing_kit.py copies this file into a folder of its own and runs pytest there.
"""

import asyncio
import socket
from datetime import UTC, datetime, timedelta

import pytest

from pointbook.v1 import redemption_pb2
from pointbook_client import (
    CustomerPoints,
    IssuedCode,
    Redemption,
    RedemptionState,
    UnavailableError,
    ValidationType,
    connect,
    reasons,
    sync,
)
from pointbook_client.testing import AddedCustomer, DeliveryFailure, PointbookServer, PointbookTestingError

DAY = timedelta(days=1)
NEARLY = timedelta(seconds=60)


def checkout(
    pointbook: PointbookServer,
    customer: AddedCustomer,
    points: int,
    reference: str = "order-1",
    *,
    validation_code: str = "",
) -> Redemption:
    """Redeem points, as the checkout does."""
    with sync.connect(pointbook.address) as client:
        return client.redeem(customer.ref, 1, points, reference=reference, validation_code=validation_code).send()


def issue(pointbook: PointbookServer, customer: AddedCustomer, points: int = 50) -> IssuedCode:
    """Send the customer a code, as the checkout does."""
    with sync.connect(pointbook.address) as client:
        return client.issue_code(customer.ref, 1, points)


def points_of(pointbook: PointbookServer, customer: AddedCustomer) -> CustomerPoints:
    """Return the points of a customer."""
    return pointbook.client.get_customer_points(customer.ref, 1)


def state_of(pointbook: PointbookServer, redemption: Redemption) -> RedemptionState:
    """Return the current state of a redemption."""
    return pointbook.client.get_redemption(pointbook.merchant_id, redemption_id=redemption.redemption_id).state


def test_a_customer_redeems_with_the_code_that_was_sent(pointbook: PointbookServer) -> None:
    pointbook.put_program(validation={"required": True})
    customer = pointbook.add_customer(points=100)
    issue(pointbook, customer)

    (message,) = pointbook.messages
    assert (message.channel, message.to) == ("SMS", customer.mobile)
    assert message.text.startswith(f"{message.code} is your code to redeem 50 points.")
    redemption = checkout(pointbook, customer, 50, validation_code=message.code)

    assert redemption.points == 50
    assert points_of(pointbook, customer).active_points == 50


def test_codes_are_named_apart_from_other_numbers_in_the_text(pointbook: PointbookServer) -> None:
    pointbook.put_program(display_name="Club 777777", validation={"message_templates": {"": "$program $points $code"}})
    customer = pointbook.add_customer(points=888_888, mobile="", email="b@example.com")
    issue(pointbook, customer, points=888_888)

    (message,) = pointbook.messages
    assert (message.channel, message.to, message.subject) == ("EMAIL", "b@example.com", "Club 777777")
    assert message.text == f"Club 777777 888888 {message.code}"


def test_a_customer_without_contacts_gets_no_code(pointbook: PointbookServer) -> None:
    customer = pointbook.add_customer(points=100, mobile="", email="")

    with pytest.raises(reasons.NoDestinationError):
        issue(pointbook, customer)

    assert pointbook.messages == []


def test_holds_are_released_after_three_days(pointbook: PointbookServer) -> None:
    customer = pointbook.add_customer(points=100)
    redemption = checkout(pointbook, customer, 60)
    pointbook.clock.advance(3 * DAY - NEARLY)
    assert points_of(pointbook, customer).held_points == 60
    pointbook.clock.advance(NEARLY)

    assert points_of(pointbook, customer).held_points == 0
    assert state_of(pointbook, redemption) is RedemptionState.UNSETTLED
    assert checkout(pointbook, customer, 60).redemption_id == redemption.redemption_id


def test_the_deduction_in_shopline_settles_a_redemption(pointbook: PointbookServer) -> None:
    customer = pointbook.add_customer(points=100)
    redemption = checkout(pointbook, customer, 60)
    pointbook.deduct_points(customer, 60)

    assert state_of(pointbook, redemption) is RedemptionState.SETTLED
    assert points_of(pointbook, customer).points_balance == 40


def test_points_expire(pointbook: PointbookServer) -> None:
    customer = pointbook.add_customer(points=100, expire_time=pointbook.clock.now() + DAY)
    pointbook.add_points(customer, 30)
    pointbook.clock.advance(DAY)

    account = points_of(pointbook, customer)
    assert (account.active_points, account.expired_points) == (30, 100)


def test_codes_and_cooldowns_end(pointbook: PointbookServer) -> None:
    customer = pointbook.add_customer(points=100)
    assert issue(pointbook, customer).sent
    assert not issue(pointbook, customer).sent
    pointbook.clock.advance(timedelta(minutes=1))
    assert issue(pointbook, customer).sent
    pointbook.clock.advance(timedelta(minutes=5))

    with pytest.raises(reasons.CodeInvalidError):
        checkout(pointbook, customer, 50, validation_code=pointbook.messages[-1].code)

    assert len(pointbook.messages) == 2


def test_the_limit_of_messages_ends(pointbook: PointbookServer) -> None:
    customer = pointbook.add_customer(points=100)
    for _ in range(3):
        assert issue(pointbook, customer).sent
        pointbook.clock.advance(timedelta(minutes=1))
    with pytest.raises(reasons.SendLimitReachedError):
        issue(pointbook, customer)
    pointbook.clock.advance(DAY)

    assert issue(pointbook, customer).sent


def test_caps_begin_anew_with_the_next_day(pointbook: PointbookServer) -> None:
    pointbook.put_program(criteria={"max_points_per_day": 50})
    pointbook.clock.advance_to((pointbook.clock.now() + DAY).replace(hour=23, minute=0))
    customer = pointbook.add_customer(points=100)
    checkout(pointbook, customer, 50)
    with pytest.raises(reasons.AboveMaxPerDayError):
        checkout(pointbook, customer, 50, "order-2")
    pointbook.clock.advance(timedelta(hours=1))

    assert checkout(pointbook, customer, 50, "order-2").points == 50


def test_the_clock_starts_at_the_real_time_and_moves_forward_only(pointbook: PointbookServer) -> None:
    assert abs(pointbook.clock.now() - datetime.now(UTC)) < NEARLY
    customer = pointbook.add_customer(points=10)
    account = pointbook.client.get_points_account(pointbook.merchant_id, customer.buyer)
    assert abs(account.as_of - datetime.now(UTC)) < NEARLY

    with pytest.raises(ValueError, match="only moves forward"):
        pointbook.clock.advance(-DAY)
    with pytest.raises(ValueError, match="only moves forward"):
        pointbook.clock.advance_to(pointbook.clock.now() - DAY)
    with pytest.raises(ValueError, match="no time zone"):
        pointbook.clock.advance_to(datetime(2099, 1, 1))  # noqa: DTZ001 - what it refuses


def test_the_clock_ends_with_the_year_9999(pointbook: PointbookServer) -> None:
    customer = pointbook.add_customer(points=10)
    pointbook.clock.advance_to(datetime(8000, 1, 1, tzinfo=UTC))
    for duration in (DAY * 366 * 2000, timedelta.max):
        with pytest.raises(ValueError, match="the year 9999"):
            pointbook.clock.advance(duration)

    assert pointbook.clock.now().year == 8000
    assert pointbook.client.get_points_account(pointbook.merchant_id, customer.buyer).as_of.year == 8000


def test_a_refused_message_does_not_arrive(pointbook: PointbookServer) -> None:
    customer = pointbook.add_customer(points=100)
    pointbook.fail_deliveries()
    with pytest.raises(reasons.DeliveryFailedError):
        issue(pointbook, customer)
    assert pointbook.messages == []
    pointbook.restore_deliveries()

    assert issue(pointbook, customer).sent
    assert len(pointbook.messages) == 1


def test_the_client_sends_again_what_was_refused_once(pointbook: PointbookServer) -> None:
    customer = pointbook.add_customer(points=100)
    pointbook.fail_deliveries(count=1)

    assert issue(pointbook, customer).sent
    assert len(pointbook.messages) == 1


def test_a_message_without_an_answer_arrives(pointbook: PointbookServer) -> None:
    customer = pointbook.add_customer(points=100)
    pointbook.fail_deliveries(DeliveryFailure.UNCERTAIN)
    with pytest.raises(reasons.DeliveryFailedError):
        issue(pointbook, customer)

    (message,) = pointbook.messages
    assert checkout(pointbook, customer, 50, validation_code=message.code).points == 50


def test_a_missed_call_validates_a_redemption(pointbook: PointbookServer) -> None:
    channels = [redemption_pb2.VALIDATION_TYPE_MISSED_CALL]
    pointbook.put_program(validation={"channels": channels, "missed_call_number": "+12015550199", "required": True})
    customer = pointbook.add_customer(points=100)
    challenge_id = issue(pointbook, customer).challenge_id

    assert pointbook.miss_call("+12025550142") == ""
    assert pointbook.miss_call(customer.mobile) == challenge_id
    with sync.connect(pointbook.address) as client:
        call = client.redeem(customer.ref, 1, 50, challenge_id=challenge_id, validation_type=ValidationType.MISSED_CALL)
        assert call.send().points == 50


def test_a_lost_answer_is_asked_for_again(pointbook: PointbookServer) -> None:
    pointbook.clock.advance(DAY)
    customer = pointbook.add_customer(points=100)
    issue(pointbook, customer)
    redemption = checkout(pointbook, customer, 50)
    address = pointbook.address
    pointbook.kill()
    with pytest.raises(PointbookTestingError, match="restart"):
        pointbook.add_points(customer, 1)
    with sync.connect(address, wait_for_ready=False, retries=False) as client:
        call = client.redeem(customer.ref, 1, 50, reference="order-1")
        with pytest.raises(UnavailableError) as error:
            call.send()
        assert error.value.outcome_unknown
        pointbook.clock.advance(2 * DAY)
        pointbook.restart()

    assert pointbook.address == address
    assert checkout(pointbook, customer, 50).redemption_id == redemption.redemption_id
    # Two days have passed since the redemption, and the third one releases it.
    assert points_of(pointbook, customer).held_points == 50
    pointbook.clock.advance(DAY)
    assert points_of(pointbook, customer).held_points == 0
    assert len(pointbook.messages) == 1


def test_a_restart_on_a_taken_port_fails_and_can_be_repeated(pointbook: PointbookServer) -> None:
    host, _, port = pointbook.address.rpartition(":")
    pointbook.kill()
    with socket.create_server((host, int(port))):
        with pytest.raises(PointbookTestingError, match="cannot listen"):
            pointbook.restart()
        with pytest.raises(PointbookTestingError, match="call `restart` first"):
            pointbook.add_customer()
    pointbook.restart()

    assert pointbook.add_customer(points=10).ref


def test_a_test_can_end_with_a_killed_server(pointbook: PointbookServer) -> None:
    pointbook.kill()

    assert pointbook.messages == []


def test_every_test_has_a_merchant_of_its_own(pointbook: PointbookServer) -> None:
    customer = pointbook.add_customer(points=100)
    elsewhere = pointbook.add_customer(points=7, store_id=pointbook.add_store(), external_id="member-2")

    assert (customer.buyer.buyer_id, elsewhere.buyer.buyer_id) == ("buyer-1", "buyer-2")
    assert pointbook.client.get_points_account(pointbook.merchant_id, elsewhere.buyer).active_points == 7
    assert checkout(pointbook, customer, 1).reference == "order-1"
    assert pointbook.messages == []
    assert pointbook.token == ""


async def test_a_checkout_of_asyncio_redeems_each_order_once(pointbook: PointbookServer) -> None:
    customer = pointbook.add_customer(points=100)
    async with connect(pointbook.address) as client:
        calls = [client.redeem(customer.ref, 1, 10, reference=f"order-{number % 4}") for number in range(12)]
        redemptions = await asyncio.gather(*(call.send() for call in calls))
        assert (await client.get_customer_points(customer.ref, 1)).held_points == 40
        pointbook.clock.advance(3 * DAY)
        points = await client.get_customer_points(customer.ref, 1)

    assert len({redemption.redemption_id for redemption in redemptions}) == 4
    assert (points.active_points, points.held_points) == (100, 0)


async def test_a_checkout_of_asyncio_waits_for_the_server(pointbook: PointbookServer) -> None:
    customer = pointbook.add_customer(points=100)
    async with connect(pointbook.address) as client:
        call = client.redeem(customer.ref, 1, 10)
        redemption = await call
        pointbook.kill()
        again = asyncio.create_task(call.send())
        await asyncio.sleep(0)
        pointbook.restart()

        assert (await again).redemption_id == redemption.redemption_id
