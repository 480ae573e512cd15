"""Clients with the shipped retry policy: which errors they retry, and when."""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from pointbook.v1 import access_pb2, access_pb2_grpc, identity_pb2, programs_pb2, redemption_pb2
from pointbook_client.testing.ports import free_port
from pointbook_server.access.servicer import AccessServicer
from pointbook_server.delivery.sender import DeliveryFailedError, Sender
from pointbook_server.errors import PointbookError
from pointbook_server.logs import current_call
from pointbook_server.programs.model import Channel
from pointbook_server.reasons import REASONS, GrpcCode, Reason, Retry
from pointbook_server.rpc.authentication import Authenticator
from pointbook_server.rpc.listening import MESSAGE_BYTES_MAX
from pointbook_server.rpc.status_mapping import PUSHBACK_HEADER, PUSHBACK_SECONDS_MAX
from support.clients import Client
from support.clocks import NOW_MS
from support.codes import issue_code
from support.envoy import SERVICE_CONFIG
from support.http2 import dying_server
from support.outbox import Outbox
from support.redemption import earn
from support.refusals import refused
from support.servers import CODE_KEY, Service, running_server
from support.shops import Shop
from support.waiting import until

SMS, EMAIL = redemption_pb2.VALIDATION_TYPE_SMS, redemption_pb2.VALIDATION_TYPE_EMAIL
CONFIG = json.loads(SERVICE_CONFIG.read_text())
POLICY = CONFIG["methodConfig"][0]["retryPolicy"]
ATTEMPTS = POLICY["maxAttempts"]
DELAY_SECONDS = 0.4
"""Longer than the policy's first two backoffs, of 0.1 s and 0.2 s with jitter."""
OPTIONS = [
    ("grpc.service_config", SERVICE_CONFIG.read_text()),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.use_local_subchannel_pool", 1),
]
MOBILE, LANDLINE = "+8613812345678", "+862112345678"
ISSUE_CODE = "RedemptionService/IssueValidationCode"
GET_ACCESS = "AccessService/GetCallerAccess"
ERRORS = [reason for reason in Reason if REASONS[reason].grpc_code is not GrpcCode.OK]
PASSING = [
    reason
    for reason in ERRORS
    if REASONS[reason].grpc_code in POLICY["retryableStatusCodes"]
    and REASONS[reason].retry in {Retry.SOON, Retry.LATER}
]
"""The reasons that a repetition can clear, with a code that the policy retries."""


@dataclass
class Arrivals:
    """The calls that reached a server, by the times of their arrivals."""

    times: dict[str, list[float]] = field(default_factory=dict)

    def of(self, method: str) -> int:
        """Return how many calls of a method arrived."""
        return len(self.times.get(method, ()))

    def pauses(self, method: str) -> list[float]:
        """Return the seconds between calls of a method."""
        times = self.times[method]
        return [later - earlier for earlier, later in itertools.pairwise(times)]


@pytest.fixture
def arrivals(monkeypatch: pytest.MonkeyPatch) -> Arrivals:
    """The calls of this test that reach a server; every call is authenticated first."""
    arrived = Arrivals()
    authenticate = Authenticator.authenticate

    async def counted(self: Authenticator, bearer: str | None, context: Any) -> Any:
        call = current_call.get()
        assert call is not None
        arrived.times.setdefault(call.method, []).append(time.monotonic())
        return await authenticate(self, bearer, context)

    monkeypatch.setattr(Authenticator, "authenticate", counted)
    return arrived


@dataclass
class FailingServer:
    """A server whose GetCallerAccess raises errors before it succeeds, and its client."""

    port: int
    client: Client
    errors: list[PointbookError]

    async def call(self, *errors: PointbookError, seconds: float | None = None) -> access_pb2.GetCallerAccessResponse:
        """Make a call whose first attempts end with errors."""
        self.errors[:] = errors
        response: access_pb2.GetCallerAccessResponse = await self.client.access.GetCallerAccess(
            access_pb2.GetCallerAccessRequest(), timeout=seconds
        )
        return response


@asynccontextmanager
async def failing_server(database_url: str, token: str) -> AsyncIterator[FailingServer]:
    """Run a failing server during the block."""
    errors: list[PointbookError] = []
    get_access = AccessServicer.GetCallerAccess

    async def fail(self: AccessServicer, request: Any, context: Any) -> Any:
        if errors:
            raise errors.pop(0)
        return await get_access(self, request, context)

    async with AsyncExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            # Only of this server, which finds its methods when it starts.
            patch.setattr(AccessServicer, "GetCallerAccess", fail)
            server, _ = await stack.enter_async_context(running_server(database_url))
        client = Client(server.port, token, OPTIONS)
        yield FailingServer(server.port, client, errors)
        await client.close()


@pytest.fixture(scope="module")
async def failing(database_url: str, admin_token: str) -> AsyncIterator[FailingServer]:
    """A failing server for this file."""
    async with failing_server(database_url, admin_token) as failing:
        yield failing


async def get_access(channel: grpc.aio.Channel, token: str) -> access_pb2.GetCallerAccessResponse:
    """Call GetCallerAccess."""
    request = access_pb2.GetCallerAccessRequest()
    response: access_pb2.GetCallerAccessResponse = await access_pb2_grpc.AccessServiceStub(channel).GetCallerAccess(
        request, metadata=(("authorization", f"Bearer {token}"),)
    )
    return response


def error(reason: Reason, seconds: float | None = None) -> PointbookError:
    """Build an error with what its reason needs, and maybe a delay."""
    resource = REASONS[reason].resource
    metadata = {resource.metadata_key: "any"} if resource else {}
    return PointbookError(reason, "No.", metadata=metadata, retry_after_seconds=seconds)


@pytest.mark.parametrize("reason", ERRORS)
async def test_an_error_is_retried_if_its_reason_can_pass(
    failing: FailingServer, arrivals: Arrivals, reason: Reason
) -> None:
    if reason in PASSING:
        assert (await failing.call(error(reason))).scopes
    else:
        assert (await refused(failing.call(error(reason)))).reason == reason

    assert arrivals.of(GET_ACCESS) == (2 if reason in PASSING else 1)


def test_every_passing_reason_of_several_codes_is_retried() -> None:
    """Otherwise the tests of delays would test nothing."""
    assert {Reason.TRANSACTION_CONFLICT, Reason.QUEUE_FULL, Reason.TOKEN_LIMIT_REACHED} < set(PASSING)
    assert {REASONS[reason].grpc_code for reason in PASSING} == {*POLICY["retryableStatusCodes"]} - {"CANCELLED"}


@pytest.mark.parametrize("reason", PASSING)
async def test_the_next_attempt_waits_for_the_delay_of_the_server(
    failing: FailingServer, arrivals: Arrivals, reason: Reason
) -> None:
    assert (await failing.call(error(reason, DELAY_SECONDS), error(reason, DELAY_SECONDS))).scopes

    assert len(arrivals.pauses(GET_ACCESS)) == 2
    assert min(arrivals.pauses(GET_ACCESS)) >= DELAY_SECONDS


@pytest.mark.parametrize("seconds", [None, 0.0])
async def test_without_a_delay_the_backoff_of_the_client_applies(
    failing: FailingServer, arrivals: Arrivals, seconds: float | None
) -> None:
    assert (await failing.call(error(Reason.DELIVERY_FAILED, seconds))).scopes

    (pause,) = arrivals.pauses(GET_ACCESS)
    assert pause > 0.05


@pytest.mark.parametrize("reason", PASSING)
@pytest.mark.parametrize(
    ("seconds", "deadline"),
    [(PUSHBACK_SECONDS_MAX + 0.001, None), (600.0, None), (PUSHBACK_SECONDS_MAX, PUSHBACK_SECONDS_MAX + 0.4)],
)
async def test_a_delay_that_is_too_long_for_a_call_is_left_to_the_caller(
    failing: FailingServer, arrivals: Arrivals, *, reason: Reason, seconds: float, deadline: float | None
) -> None:
    found = await refused(failing.call(error(reason, seconds), seconds=deadline))

    assert (found.reason, found.retry_seconds) == (reason, seconds)
    assert arrivals.of(GET_ACCESS) == 1


async def test_the_attempts_of_a_call_are_limited(failing: FailingServer, arrivals: Arrivals) -> None:
    errors = [error(Reason.QUEUE_FULL, 0.05)] * (ATTEMPTS + 1)
    assert (await refused(failing.call(*errors))).reason == "QUEUE_FULL"

    assert arrivals.of(GET_ACCESS) == ATTEMPTS


async def test_an_overloaded_server_gets_few_repetitions(
    database_url: str, admin_token: str, arrivals: Arrivals
) -> None:
    """Half of the budget are repetitions; then each call arrives once."""
    calls, budget = 100, CONFIG["retryThrottling"]["maxTokens"] // 2
    async with failing_server(database_url, admin_token) as failing:
        failing.errors += [error(Reason.QUEUE_FULL, 0.05)] * calls * ATTEMPTS
        request = access_pb2.GetCallerAccessRequest()
        found = await asyncio.gather(*(refused(failing.client.access.GetCallerAccess(request)) for _ in range(calls)))

    assert {each.reason for each in found} == {"QUEUE_FULL"}
    assert calls < arrivals.of(GET_ACCESS) <= calls + budget


@pytest.mark.parametrize("method", ["/pointbook.v1.AccessService/None", "/grpc.health.v1.Health/Check"])
async def test_unknown_methods_and_services_are_not_retried(
    failing: FailingServer, admin_token: str, method: str
) -> None:
    """They end without a reason, but with the same metadata."""
    call: Any = failing.client.channel.stream_stream(method)
    request = health_pb2.HealthCheckRequest(service="unknown").SerializeToString()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(iter([request]), metadata=(("authorization", f"Bearer {admin_token}"),)).read()

    assert (PUSHBACK_HEADER, "-1") in tuple(caught.value.trailing_metadata() or ())


async def send_padded(channel: grpc.aio.Channel, token: str, size: int) -> None:
    """Call GetCallerAccess with a request of more than `size` bytes."""
    call: Any = channel.unary_unary(f"/pointbook.v1.{GET_ACCESS}")
    # A field that the server does not know.
    request = b"\x7a" + bytes((size & 127 | 128, size >> 7 & 127 | 128, size >> 14)) + b"x" * size
    await call(request, metadata=(("authorization", f"Bearer {token}"),))


async def test_a_request_that_is_too_large_is_sent_once(
    failing: FailingServer, admin_token: str, arrivals: Arrivals
) -> None:
    """The library itself refuses it, without metadata, but does not keep it."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await send_padded(failing.client.channel, admin_token, MESSAGE_BYTES_MAX)

    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert arrivals.of(GET_ACCESS) == 1


async def test_a_large_request_is_retried_if_the_client_keeps_it(
    failing: FailingServer, admin_token: str, arrivals: Arrivals
) -> None:
    size, keep = 400 * 1024, ("grpc.per_rpc_retry_buffer_size", 1 << 20)
    failing.errors[:] = [error(Reason.QUEUE_FULL)] * 2
    with pytest.raises(grpc.aio.AioRpcError):
        await send_padded(failing.client.channel, admin_token, size)
    client = Client(failing.port, admin_token, [*OPTIONS, keep])
    await send_padded(client.channel, admin_token, size)
    await client.close()

    assert arrivals.of(GET_ACCESS) == 3


async def test_calls_of_a_killed_server_are_retried_at_the_other_one(
    database_url: str, admin_token: str, arrivals: Arrivals
) -> None:
    """Such a call ends as UNAVAILABLE, without metadata."""
    async with (
        dying_server() as (port, killed),
        running_server(database_url) as (server, _),
        grpc.aio.insecure_channel(f"ipv4:127.0.0.1:{port},127.0.0.1:{server.port}", options=OPTIONS) as channel,
    ):
        calls = 0
        while not killed.is_set():
            assert (await get_access(channel, admin_token)).scopes
            calls += 1

    assert arrivals.of(GET_ACCESS) == calls


async def test_a_call_waits_for_a_server_that_is_starting(database_url: str, admin_token: str) -> None:
    port = free_port()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
        call = asyncio.create_task(get_access(channel, admin_token))
        await until(lambda: channel.get_state() is grpc.ChannelConnectivity.TRANSIENT_FAILURE)
        async with running_server(database_url, grpc_address=f"127.0.0.1:{port}"):
            assert (await call).scopes


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """A shop whose program sends codes by SMS, with a buyer who has 500 points."""
    await service.client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation={"channels": [SMS]})
    await earn(service.client, shop, 500)
    yield shop
    service.clock.now_ms = NOW_MS


async def put_customer(service: Service, shop: Shop, mobile: str) -> None:
    """Register the buyer as a customer with a number."""
    buyers = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")]
    await service.client.put_customer(shop.merchant_id, "c-1", mobile=mobile, buyers=buyers)


@asynccontextmanager
async def retrying_client(
    service: Service, token: str, sender: Sender | None = None, **settings: Any
) -> AsyncIterator[Client]:
    """Run a server with one sender, and a client with the retry policy."""
    senders = {Channel.SMS: sender or Outbox()}
    async with running_server(service.database_url, token, senders=senders, clock=service.clock, **settings) as (
        server,
        _,
    ):
        client = Client(server.port, token, OPTIONS)
        yield client
        await client.close()


@pytest.mark.parametrize(
    ("mobiles", "changes", "code_keys", "reason"),
    [
        ([], {}, {"k1": CODE_KEY}, "NO_DESTINATION"),
        ([LANDLINE], {}, {"k1": CODE_KEY}, "NO_DESTINATION"),
        ([MOBILE], {"validation_type": EMAIL}, {"k1": CODE_KEY}, "CHANNEL_NOT_ENABLED"),
        (["+8613812345679", MOBILE], {}, {"k1": CODE_KEY}, "CONTACT_CHANGED"),
        ([MOBILE], {}, {}, "KEY_NOT_CONFIGURED"),
    ],
    ids=["no contact", "a landline", "a channel that is off", "a changed contact", "no key"],
)
async def test_permanent_errors_are_not_retried(
    service: Service,
    admin_token: str,
    shop: Shop,
    arrivals: Arrivals,
    *,
    mobiles: list[str],
    changes: dict[str, Any],
    code_keys: dict[str, str],
    reason: str,
) -> None:
    for mobile in mobiles:
        await put_customer(service, shop, mobile)
    sender = Outbox(needs_destination=True)
    async with retrying_client(service, admin_token, sender, code_keys=code_keys) as client:
        status = await refused(issue_code(client, shop, **changes))

    assert status.reason == reason
    assert arrivals.of(ISSUE_CODE) == 1
    assert sender.messages == []


async def test_temporary_errors_are_retried(service: Service, admin_token: str, shop: Shop, arrivals: Arrivals) -> None:
    """The provider is unreachable for two attempts; the caller does not notice."""
    await put_customer(service, shop, MOBILE)

    class RestartingProvider(Outbox):
        async def send(self, message: Any) -> None:
            self.error = DeliveryFailedError("unreachable") if arrivals.of(ISSUE_CODE) < 3 else None
            await super().send(message)

    sender = RestartingProvider(needs_destination=True)
    async with retrying_client(service, admin_token, sender) as client:
        assert (await issue_code(client, shop)).sent

    assert arrivals.of(ISSUE_CODE) == 3
    assert len(sender.messages) == 1


async def test_a_send_limit_of_minutes_comes_back_at_once(
    service: Service, admin_token: str, shop: Shop, arrivals: Arrivals
) -> None:
    await put_customer(service, shop, MOBILE)
    async with retrying_client(service, admin_token) as client:
        for points in (1, 2, 3):
            await issue_code(client, shop, points)
        status = await refused(issue_code(client, shop, 4))

    assert (status.reason, status.retry_seconds) == ("SEND_LIMIT_REACHED", 600.0)
    assert arrivals.of(ISSUE_CODE) == 4


async def test_a_stale_etag_comes_back_at_once(
    service: Service, admin_token: str, shop: Shop, arrivals: Arrivals
) -> None:
    program = await service.client.put_program(shop.merchant_id, shop.store_id)
    arrivals.times.clear()
    request = programs_pb2.PutProgramRequest(program=program, etag="1")
    async with retrying_client(service, admin_token) as client:
        assert (await refused(client.programs.PutProgram(request))).reason == "STALE_ETAG"

    assert arrivals.of("ProgramsService/PutProgram") == 1


async def test_calls_beyond_the_limit_of_a_token_succeed_later(
    service: Service, admin_token: str, arrivals: Arrivals
) -> None:
    async with retrying_client(service, admin_token, token_calls_per_second_max=4) as client:
        for _ in range(7):
            await client.access.GetCallerAccess(access_pb2.GetCallerAccessRequest())

    assert arrivals.of(GET_ACCESS) > 7
