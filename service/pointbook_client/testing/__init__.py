"""A real Pointbook server for tests: the pytest fixture `pointbook`.

Install `pointbook-client[testing]`, and name the fixture in a test. Nothing has to be imported, except for types::

    from datetime import timedelta

    from pointbook_client.testing import PointbookServer


    def test_a_hold_is_released(pointbook: PointbookServer) -> None:
        customer = pointbook.add_customer(points=100)
        checkout(pointbook.address, customer.ref, points=100)  # the code under test
        pointbook.clock.advance(timedelta(days=3))
        assert pointbook.client.get_customer_points(customer.ref, 1).held_points == 0
"""

from pointbook_client.testing.clock import PointbookClock
from pointbook_client.testing.errors import PointbookTestingError
from pointbook_client.testing.messages import CapturedMessage, DeliveryFailure
from pointbook_client.testing.options import PointbookOptions
from pointbook_client.testing.server import AddedCustomer, PointbookServer

__all__ = [
    "AddedCustomer",
    "CapturedMessage",
    "DeliveryFailure",
    "PointbookClock",
    "PointbookOptions",
    "PointbookServer",
    "PointbookTestingError",
]
