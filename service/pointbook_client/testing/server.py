"""What a test gets: a server with a merchant, a store and a program of its own."""

import itertools
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from pointbook.v1 import customers_pb2, points_pb2, programs_pb2, redemption_pb2
from pointbook_client.identity import Buyer, CustomerRef
from pointbook_client.sync import PointbookClient, connect
from pointbook_client.testing.clock import PointbookClock
from pointbook_client.testing.messages import CapturedMessage, DeliveryFailure
from pointbook_client.testing.session import PointbookSession

_AREAS = (201, 202, 203, 205, 206, 207, 208, 209, 210, 212)
_NUMBERS_IN_AREA = 100
# A killed server is back soon.
_CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
)


@dataclass(frozen=True, slots=True)
class AddedCustomer:
    """A customer with a SHOPLINE customer in a store, whose account has their points."""

    ref: CustomerRef
    """The reference for calls: the buyer."""
    buyer: Buyer
    customer_id: str
    mobile: str
    """The mobile number in E.164; empty if the customer has none."""
    email: str
    """The e-mail address; empty if the customer has none."""


class PointbookServer:
    """A running Pointbook, with a merchant, a store and program 1 for one test.

    The methods are synchronous, and can be called in tests of asyncio too: the server runs in a process of its own.
    The code under test gets `address`, and `token` if the option `tokens` is set.
    """

    def __init__(self, session: PointbookSession) -> None:
        session.begin_test()
        self._session = session
        self._customer_numbers = itertools.count()
        self._client: PointbookClient | None = None
        self._token: str | None = None
        self._log_start = session.log_size
        self._program = programs_pb2.Program()
        self.clock = PointbookClock(session.set_clock)
        """The clock of the server: `now`, `advance` and `advance_to`."""
        self.merchant_id = f"merchant-{secrets.token_hex(8)}"
        """The test's merchant."""
        self.store_id = self.add_store()
        """The merchant's first store."""
        self.program_id = 1
        """The program of `put_program`."""
        self.put_program()

    @property
    def address(self) -> str:
        """HOST:PORT of the server: plaintext on loopback."""
        return self._session.address

    @property
    def token(self) -> str:
        """A token with all scopes for the test's merchant; empty if calls need none."""
        if self._token is None:
            self._token = self.create_token() if self._session.admin_token else ""
        return self._token

    @property
    def client(self) -> PointbookClient:
        """A synchronous client for everything that has no method here.

        It may do everything, for every merchant, also if tokens are required::

            points = pointbook.client.get_customer_points(customer.ref, program_id=1)
        """
        if self._client is None:
            token = self._session.admin_token
            self._client = connect(self.address, token=token, channel_options=_CHANNEL_OPTIONS)
        return self._client

    @property
    def messages(self) -> list[CapturedMessage]:
        """The messages captured since the test began, the oldest first."""
        return self._session.messages(self.merchant_id)

    @property
    def log(self) -> str:
        """The log of the server since the test began."""
        return self._session.read_log(self._log_start)

    def add_store(self) -> str:
        """Register another store of the merchant, and return its id."""
        store = programs_pb2.Store(merchant_id=self.merchant_id, store_id=f"store-{secrets.token_hex(8)}")
        self._running_client().programs.PutStore(programs_pb2.PutStoreRequest(store=store))
        return store.store_id

    def put_program(self, **changes: Any) -> programs_pb2.Program:
        """Replace the program with its default settings and some changes, and return it.

        By default it covers the test's first store, allows redemption without limits and without a validation, and its
        points are worth 0.01 USD. Messages are given as dicts::

            pointbook.put_program(criteria={"max_points_per_day": 100}, validation={"required": True})
        """
        values: dict[str, Any] = {
            "merchant_id": self.merchant_id,
            "program_id": self.program_id,
            "display_name": "Test program",
            "store_ids": [self.store_id],
            "redemption_enabled": True,
            "point_value": "0.01",
            "currency_code": "USD",
        }
        request = programs_pb2.PutProgramRequest(program=programs_pb2.Program(**{**values, **changes}))
        self._program = self._running_client().programs.PutProgram(request).program
        return self._program

    def add_customer(
        self,
        points: int = 0,
        *,
        mobile: str | None = None,
        email: str | None = None,
        store_id: str = "",
        expire_time: datetime | None = None,
        **fields: Any,
    ) -> AddedCustomer:
        """Add a new customer with an account, by default in the first store.

        By default they have contacts that no other customer of the test has; an empty one leaves it out. `fields` are
        further fields of the message Customer::

            customer = pointbook.add_customer(points=100, email="", external_id="member-1", language="zh-TW")
        """
        number = next(self._customer_numbers)
        buyer = Buyer(store_id or self.store_id, f"buyer-{number + 1}")
        added = AddedCustomer(
            ref=CustomerRef(self.merchant_id, buyer=buyer),
            buyer=buyer,
            customer_id=f"customer-{number + 1}",
            mobile=_mobile(number) if mobile is None else mobile,
            email=f"customer-{number + 1}@example.com" if email is None else email,
        )
        customer = customers_pb2.Customer(
            merchant_id=self.merchant_id,
            customer_id=added.customer_id,
            mobile=added.mobile,
            email=added.email,
            buyers=[buyer.to_message()],
            **fields,
        )
        self._running_client().customers.PutCustomer(customers_pb2.PutCustomerRequest(customer=customer))
        if points:
            self.add_points(added, points, expire_time=expire_time)
        return added

    def add_points(self, customer: AddedCustomer, points: int, *, expire_time: datetime | None = None) -> None:
        """Add points as a webhook about an order does; by default they never expire."""
        changes: dict[str, Any] = {} if expire_time is None else {"points_expiry_time": _timestamp(expire_time)}
        self._apply(
            customer,
            update_type=points_pb2.POINTS_UPDATE_TYPE_INCREASE,
            updated_scene=points_pb2.POINTS_UPDATE_SCENE_SUCCESSFUL_ORDERS,
            updated_value=points,
            **changes,
        )

    def deduct_points(self, customer: AddedCustomer, points: int) -> None:
        """Deduct points as SHOPLINE does for a redemption, which that settles."""
        self._apply(
            customer,
            update_type=points_pb2.POINTS_UPDATE_TYPE_DECREASE,
            updated_scene=points_pb2.POINTS_UPDATE_SCENE_CASHBACK,
            updated_value=points,
        )

    def miss_call(self, caller_number: str, called_number: str = "") -> str:
        """Report a missed call as the telephony provider does, by default to the program.

        Returns the id of the challenge that the call confirms, or "" if none.
        """
        request = redemption_pb2.ConfirmMissedCallRequest(
            merchant_id=self.merchant_id,
            caller_number=caller_number,
            called_number=called_number or self._program.validation.missed_call_number,
            provider_call_id=secrets.token_hex(8),
            call_time=_timestamp(self.clock.now()),
        )
        return self._running_client().redemptions.ConfirmMissedCall(request).challenge_id

    def fail_deliveries(self, failure: DeliveryFailure = DeliveryFailure.REFUSED, *, count: int | None = None) -> None:
        """Fail the delivery of the next `count` messages.

        By default all fail until `restore_deliveries`. A restart ends it too.
        """
        self._session.fail_deliveries(failure, count)

    def restore_deliveries(self) -> None:
        """Make deliveries succeed again."""
        self._session.fail_deliveries(None, None)

    def create_token(self, scopes: Sequence[str] | None = None) -> str:
        """Create a token for the test's merchant, by default with all scopes.

        It restricts calls only if the option `tokens` is set.
        """
        return self._session.create_token([self.merchant_id], None if scopes is None else list(scopes))

    def kill(self) -> None:
        """Kill the server as in a crash; calls fail until `restart`.

        What it has committed stays.
        """
        self._session.kill()

    def restart(self) -> None:
        """Start the server again on the same address and data, and return once it serves.

        A running server is killed first. Raises PointbookTestingError if another program has taken the port meanwhile.
        """
        self._session.restart()

    def close(self) -> None:
        """Close the client. The fixture does it at the end of the test."""
        if self._client is not None:
            self._client.close()

    def _running_client(self) -> PointbookClient:
        """Return the client, whose calls would wait long for a server that was killed."""
        self._session.check_server()
        return self.client

    def _apply(self, customer: AddedCustomer, **fields: Any) -> None:
        update = points_pb2.PointsUpdate(
            event_id=secrets.token_hex(16),
            merchant_id=self.merchant_id,
            store_id=customer.buyer.store_id,
            buyer_id=customer.buyer.buyer_id,
            updated_at=_timestamp(self.clock.now()),
            **fields,
        )
        self._running_client().points.ApplyPointsUpdate(points_pb2.ApplyPointsUpdateRequest(update=update))


def _timestamp(moment: datetime) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromDatetime(moment)
    return timestamp


def _mobile(number: int) -> str:
    """Return the mobile number of a customer, one that is reserved for fiction.

    Raises ValueError after the last one.
    """
    area, line = divmod(number, _NUMBERS_IN_AREA)
    if area >= len(_AREAS):
        raise ValueError(f"a test has {len(_AREAS) * _NUMBERS_IN_AREA} mobile numbers: choose the others yourself")
    return f"+1{_AREAS[area]}55501{line:02}"
