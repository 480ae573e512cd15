"""The tests of a checkout team whose server requires tokens, as in production.

tests/e2e/test_testing_kit.py copies this file into a folder of its own, with the options of docs/testing.md, and runs
pytest there.
"""

from datetime import timedelta

import pytest

from pointbook.v1 import customers_pb2
from pointbook_client import CustomerRef, reasons, sync
from pointbook_client.testing import AddedCustomer, PointbookServer


def read_active_points(pointbook: PointbookServer, customer: CustomerRef, token: str) -> int:
    """Return the points of a customer, read with a token."""
    with sync.connect(pointbook.address, token=token) as client:
        return client.get_customer_points(customer, 1).active_points


def send_code(pointbook: PointbookServer, customer: AddedCustomer) -> bool:
    """Return whether a message with a code was sent to a customer."""
    with sync.connect(pointbook.address, token=pointbook.token) as client:
        return client.issue_code(customer.ref, 1, 50).sent


def test_calls_need_a_token(pointbook: PointbookServer) -> None:
    customer = pointbook.add_customer(points=100).ref
    with pytest.raises(reasons.TokenMissingError):
        read_active_points(pointbook, customer, "")
    with pytest.raises(reasons.MerchantForbiddenError):
        read_active_points(pointbook, CustomerRef("another-merchant", buyer=customer.buyer), pointbook.token)

    assert read_active_points(pointbook, customer, pointbook.token) == 100


def test_a_token_has_the_scopes_of_its_test(pointbook: PointbookServer) -> None:
    customer = pointbook.add_customer(points=100).ref
    with pytest.raises(reasons.ScopeMissingError):
        read_active_points(pointbook, customer, pointbook.create_token(["redeem"]))

    assert read_active_points(pointbook, customer, pointbook.create_token(["points.read"])) == 100


def test_tokens_survive_a_restart(pointbook: PointbookServer) -> None:
    customer = pointbook.add_customer(points=100).ref
    token = pointbook.token
    pointbook.restart()

    assert read_active_points(pointbook, customer, token) == 100


def test_settings_count(pointbook: PointbookServer) -> None:
    for _ in range(50):
        assert send_code(pointbook, pointbook.add_customer(points=50))
    with pytest.raises(reasons.SendLimitReachedError):
        send_code(pointbook, pointbook.add_customer(points=50))

    assert len(pointbook.messages) == len({message.to for message in pointbook.messages}) == 50


def test_a_changed_contact_gets_codes_after_the_pause(pointbook: PointbookServer) -> None:
    added = pointbook.add_customer(points=100, email="")
    assert send_code(pointbook, added)
    changed = customers_pb2.Customer(
        merchant_id=pointbook.merchant_id,
        customer_id=added.customer_id,
        mobile="+12125550199",
        buyers=[added.buyer.to_message()],
    )
    pointbook.client.customers.PutCustomer(customers_pb2.PutCustomerRequest(customer=changed))
    pointbook.clock.advance(timedelta(hours=23))
    with pytest.raises(reasons.ContactChangedError):
        send_code(pointbook, added)
    pointbook.clock.advance(timedelta(hours=1))

    assert send_code(pointbook, added)
    assert [message.to for message in pointbook.messages] == [added.mobile, "+12125550199"]
