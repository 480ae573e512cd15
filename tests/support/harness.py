"""What tests stand on: a caller with stubs and a bearer token as internal services are, and a shop for each test."""

import base64
import itertools
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc_status import rpc_status

from pointbook.v1 import (
    access_pb2_grpc,
    benefits_pb2_grpc,
    customers_pb2,
    customers_pb2_grpc,
    points_pb2,
    points_pb2_grpc,
    programs_pb2,
    programs_pb2_grpc,
    redemption_pb2_grpc,
    webhooks_pb2_grpc,
)
from pointbook_server.access.model import Scope
from pointbook_server.access.rules import new_token
from pointbook_server.access.transactions import TokenTransactions
from pointbook_server.db.database import Connection, Database
from pointbook_server.delivery.sender import Message
from pointbook_server.server import Server
from pointbook_server.settings import ServerSettings

NOW_MS = 1_780_000_000_000
"""The moment that the tests' clock starts at: in May 2026."""
CODE_KEY = base64.b64encode(b"k" * 32).decode()
QUARANTINE_KEY = base64.b64encode(b"q" * 32).decode()

_numbers = itertools.count(1)


def unique(prefix: str) -> str:
    """Make a name that no other test uses."""
    return f"{prefix}-{next(_numbers)}-{secrets.token_hex(4)}"


def server_settings(**changes: Any) -> ServerSettings:
    """Settings for a server under test, on any free port."""
    values: dict[str, Any] = {
        "grpc_address": "127.0.0.1:0",
        "code_keys": {"k1": CODE_KEY},
        "quarantine_keys": {"q1": QUARANTINE_KEY},
        "drain_seconds": 2.0,
    }
    return ServerSettings(**{**values, **changes})


class TestClock:
    """A clock that stands still until a test moves it."""

    __test__ = False

    def __init__(self) -> None:
        self.now_ms = NOW_MS

    def __call__(self) -> int:
        """Tell the time."""
        return self.now_ms

    async def read_database(self, _connection: Connection) -> int:
        """Tell the database's time, which a test moves together with the server's."""
        return self.now_ms

    def move(self, seconds: float) -> None:
        """Let time pass."""
        self.now_ms += int(seconds * 1_000)


@dataclass
class Outbox:
    """A sender at the provider's edge that keeps what it was given; `error` makes it fail."""

    needs_destination: bool = False
    messages: list[Message] = field(default_factory=list)
    error: Exception | None = None

    async def send(self, message: Message) -> None:
        """Keep a message, or fail."""
        if self.error is not None:
            raise self.error
        self.messages.append(message)


class Client:
    """Stubs of all services, over one channel."""

    def __init__(
        self,
        port: int,
        token: str = "",
        options: Sequence[tuple[str, Any]] = (),
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        address, interceptors = f"127.0.0.1:{port}", [_Bearer(token)] if token else []
        if credentials is None:
            self.channel = grpc.aio.insecure_channel(address, options=list(options), interceptors=interceptors)
        else:
            self.channel = grpc.aio.secure_channel(
                address, credentials, options=list(options), interceptors=interceptors
            )
        self.access = access_pb2_grpc.AccessServiceStub(self.channel)
        self.benefits = benefits_pb2_grpc.BenefitsServiceStub(self.channel)
        self.points = points_pb2_grpc.PointsServiceStub(self.channel)
        self.programs = programs_pb2_grpc.ProgramsServiceStub(self.channel)
        self.customers = customers_pb2_grpc.CustomersServiceStub(self.channel)
        self.redemption = redemption_pb2_grpc.RedemptionServiceStub(self.channel)
        self.webhooks = webhooks_pb2_grpc.WebhooksServiceStub(self.channel)

    async def close(self) -> None:
        """Close the channel."""
        await self.channel.close()

    async def put_store(self, merchant_id: str, store_id: str) -> None:
        """Register a store."""
        store = programs_pb2.Store(merchant_id=merchant_id, store_id=store_id)
        await self.programs.PutStore(programs_pb2.PutStoreRequest(store=store))

    async def put_program(self, merchant_id: str, store_id: str, **changes: Any) -> programs_pb2.Program:
        """Put program 1 with the seed's own example: multiples of 10, at most 200 at a time."""
        program = programs_pb2.Program(
            **{
                "merchant_id": merchant_id,
                "program_id": 1,
                "store_ids": [store_id],
                "redemption_enabled": True,
                "criteria": {"multiples_of": 10, "max_points_per_redemption": 200},
                "point_value": "0.01",
                "currency_code": "USD",
                **changes,
            }
        )
        response = await self.programs.PutProgram(programs_pb2.PutProgramRequest(program=program))
        return response.program

    async def put_customer(self, merchant_id: str, customer_id: str, **changes: Any) -> customers_pb2.Customer:
        """Put a customer, and answer them as they are kept."""
        customer = customers_pb2.Customer(merchant_id=merchant_id, customer_id=customer_id, **changes)
        return (await self.customers.PutCustomer(customers_pb2.PutCustomerRequest(customer=customer))).customer

    async def put_group(self, merchant_id: str, group_id: str, **changes: Any) -> customers_pb2.UserGroup:
        """Put a user group, and answer it as it is kept."""
        group = customers_pb2.UserGroup(merchant_id=merchant_id, group_id=group_id, **changes)
        return (await self.customers.PutUserGroup(customers_pb2.PutUserGroupRequest(user_group=group))).user_group

    async def customer(self, merchant_id: str, customer_id: str) -> customers_pb2.Customer:
        """Read a customer by their id."""
        request = customers_pb2.GetCustomerRequest(merchant_id=merchant_id, customer_id=customer_id)
        return (await self.customers.GetCustomer(request)).customer

    async def apply(self, update: points_pb2.PointsUpdate) -> points_pb2.ApplyPointsUpdateResponse:
        """Apply one points update."""
        return await self.points.ApplyPointsUpdate(points_pb2.ApplyPointsUpdateRequest(update=update))

    async def account(self, merchant_id: str, store_id: str, buyer_id: str, **more: Any) -> points_pb2.PointsAccount:
        """Read an account."""
        request = points_pb2.GetPointsAccountRequest(
            merchant_id=merchant_id, store_id=store_id, buyer_id=buyer_id, **more
        )
        return (await self.points.GetPointsAccount(request)).account


class _Bearer(grpc.aio.UnaryUnaryClientInterceptor):
    """Puts a bearer token on every call."""

    def __init__(self, token: str) -> None:
        self._token = token

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        metadata = grpc.aio.Metadata(*(client_call_details.metadata or ()))
        metadata.add("authorization", f"Bearer {self._token}")
        return await continuation(client_call_details._replace(metadata=metadata), request)


@dataclass
class Service:
    """A running server under test, and a client of it whose token may do everything."""

    server: Server
    client: Client
    clock: TestClock
    outbox: Outbox
    database_url: str


async def make_token(
    database_url: str,
    merchants: list[str],
    scopes: list[Scope],
    expires_at_ms: int | None = None,
    client_names: Sequence[str] = (),
) -> str:
    """Make a token in a database, and answer its bearer string."""
    database = Database(database_url, pool_size=1)
    token, bearer = new_token("test", merchants, scopes, 0, expires_at_ms, client_names=client_names)
    await TokenTransactions(database).create(token)
    await database.dispose()
    return bearer


@dataclass(frozen=True)
class Shop:
    """A merchant with one registered store, for one test alone."""

    merchant_id: str
    store_id: str

    def update(self, buyer_id: str = "buyer", **changes: Any) -> points_pb2.PointsUpdate:
        """Make a points update: by default the seed's, made consistent."""
        values: dict[str, Any] = {
            "event_id": unique("event"),
            "merchant_id": self.merchant_id,
            "store_id": self.store_id,
            "buyer_id": buyer_id,
            "update_type": points_pb2.POINTS_UPDATE_TYPE_INCREASE,
            "updated_scene": points_pb2.POINTS_UPDATE_SCENE_SUCCESSFUL_REGISTRATION,
            "updated_value": 20,
            "points_balance": 20,
            "updated_at": at(NOW_MS - 60_000),
        }
        values |= changes
        return points_pb2.PointsUpdate(**{name: value for name, value in values.items() if value is not None})


def at(time_ms: int) -> Timestamp:
    """Make a Timestamp of milliseconds."""
    timestamp = Timestamp()
    timestamp.FromMilliseconds(time_ms)
    return timestamp


@dataclass(frozen=True)
class Refusal:
    """An RPC error as a caller reads it."""

    code: grpc.StatusCode
    reason: str
    metadata: Mapping[str, str]
    fields: Mapping[str, str]
    retry_seconds: float | None
    message: str


def refusal(error: grpc.aio.AioRpcError) -> Refusal:
    """Read the rich status of an error: exactly one ErrorInfo, and what else there is."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type] # it takes aio errors too
    assert status is not None, f"no rich status in {error.code()} {error.details()}"
    info, bad_request, retry = ErrorInfo(), BadRequest(), RetryInfo()
    infos = [detail for detail in status.details if detail.Unpack(info)]
    assert len(infos) == 1
    assert info.domain == "pointbook"
    has_retry = False
    for detail in status.details:
        detail.Unpack(bad_request)
        has_retry = detail.Unpack(retry) or has_retry
    return Refusal(
        code=error.code(),
        reason=info.reason,
        metadata=dict(info.metadata),
        fields={violation.field: violation.description for violation in bad_request.field_violations},
        retry_seconds=retry.retry_delay.ToMilliseconds() / 1_000 if has_retry else None,
        message=error.details() or "",
    )


async def refused(call: Any) -> Refusal:
    """Await a call that must fail, and read its error."""
    try:
        answer = await call
    except grpc.aio.AioRpcError as error:
        return refusal(error)
    raise AssertionError(f"the call was answered: {answer}")
