"""The Python client, for asyncio and for threads, against a real server."""

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from pointbook.v1 import access_pb2, programs_pb2
from pointbook_client import (
    Buyer,
    CallCancelledError,
    CustomerRef,
    DeadlineExceededError,
    PointbookClient,
    RedemptionState,
    Tls,
    UnauthenticatedError,
    UnavailableError,
    connect,
    connections,
    reasons,
    requests,
    sync,
)
from pointbook_client.otel import OpenTelemetry
from pointbook_client.testing.ports import free_port
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.programs.model import Channel
from pointbook_server.rpc.listening import MESSAGE_BYTES_MAX
from pointbook_server.server import Server
from support.certificates import Authority
from support.clocks import NOW_MS, TestClock, at
from support.codes import add_customers
from support.connections import superuser
from support.outbox import Outbox
from support.processes import clean_environment, finish
from support.redemption import account_points, earn
from support.server_proxy import server_proxy
from support.servers import Service, running_server, server_settings, stop_idle, until_calls_end
from support.shops import Shop
from support.tokens import make_token, revoke_token
from support.traces import RecordedTracing, id_of, trace_of
from support.unique_names import unique
from support.waiting import until, until_locks_are_awaited

AUTHORITY = Authority()
DAY = timedelta(days=1)
NOW = datetime.fromtimestamp(NOW_MS / 1_000, UTC)
REFUSED_FORK = "this process was forked beside a client for asyncio: start it by `spawn`"


def buyer_of(shop: Shop, buyer_id: str = "buyer") -> CustomerRef:
    """Return the reference of a buyer of a shop."""
    return CustomerRef(shop.merchant_id, buyer=Buyer(shop.store_id, buyer_id))


@pytest.fixture
async def shop(service: Service, shop: Shop) -> Shop:
    """A shop with a program, and a buyer with 500 points."""
    await service.client.put_program(shop.merchant_id, shop.store_id, criteria={})
    await earn(service.client, shop, 500)
    return shop


@pytest.fixture
async def pointbook(service: Service, admin_token: str) -> AsyncIterator[PointbookClient]:
    """A client for asyncio with all scopes."""
    async with connect(f"127.0.0.1:{service.server.port}", token=admin_token) as client:
        yield client


async def test_customer_redeems_with_a_code_and_returns_the_points(
    service: Service, pointbook: PointbookClient, shop: Shop
) -> None:
    await add_customers(service.client, shop, ["ann"])
    customer = CustomerRef(shop.merchant_id, external_id="ann")

    validation = await pointbook.validate(customer, 1, 100)
    assert (validation.redeemable, validation.status.reason, validation.active_points) == (True, "REDEEMABLE", 500)
    issued = await pointbook.issue_code(customer, 1, 100)
    assert issued.sent
    code = service.outbox.messages[-1].text
    call = pointbook.redeem(
        customer,
        1,
        100,
        validation_code=code,
        challenge_id=issued.challenge_id,
        notes="a note",
        transaction_number="t-1",
    )
    redemption = await call
    again = await call.send()
    assert again == redemption
    assert (redemption.reference, redemption.state, redemption.points) == (call.reference, RedemptionState.PENDING, 100)
    assert (redemption.notes, redemption.transaction_number, redemption.customer_id) == ("a note", "t-1", "ann")
    assert redemption.redeem_value == Decimal(1)

    points = await pointbook.get_customer_points(customer, 1)
    assert (points.points_balance, points.active_points, points.held_points) == (500, 400, 100)

    partial = pointbook.reverse(shop.merchant_id, redemption_id=redemption.redemption_id, points=30, notes="returned")
    assert (await partial).reversed_points == 30
    assert (await partial).reversed_points == 30
    rest = await pointbook.reverse(shop.merchant_id, redeemed_reference=call.reference)
    assert (rest.state, rest.reversed_points) == (RedemptionState.REVERSED, 100)
    with pytest.raises(reasons.AlreadyReversedError) as caught:
        await pointbook.reverse(shop.merchant_id, redeemed_reference=call.reference)
    assert not caught.value.outcome_unknown

    stored = await pointbook.get_redemption(shop.merchant_id, reference=call.reference)
    assert {reversal.reference for reversal in stored.reversals} >= {partial.reference}
    assert stored == await pointbook.get_redemption(shop.merchant_id, redemption_id=redemption.redemption_id)


async def test_amount_may_be_in_currency(pointbook: PointbookClient, shop: Shop) -> None:
    validation = await pointbook.validate(buyer_of(shop), 1, currency_value=Decimal("1.50"))
    redemption = await pointbook.redeem(buyer_of(shop), 1, currency_value=Decimal("1.50"))

    assert (validation.redeemable, validation.points, validation.redeem_value) == (True, 150, Decimal("1.50"))
    assert (redemption.points, redemption.buyer) == (150, Buyer(shop.store_id, "buyer"))


async def test_refusals_are_typed(pointbook: PointbookClient, shop: Shop) -> None:
    with pytest.raises(reasons.InsufficientPointsError) as refused:
        await pointbook.redeem(buyer_of(shop), 1, 1_000)
    assert (refused.value.status_code, refused.value.outcome_unknown) == (803, False)
    with pytest.raises(reasons.RedemptionNotFoundError):
        await pointbook.get_redemption(shop.merchant_id, reference="none")
    with pytest.raises(reasons.InvalidFieldsError) as invalid:
        await pointbook.redeem(buyer_of(shop), 1, 1, reference="x" * 129)
    assert [violation.field for violation in invalid.value.violations] == ["external_reference_number"]


async def test_reference_of_another_redemption_is_refused(pointbook: PointbookClient, shop: Shop) -> None:
    call = pointbook.redeem(buyer_of(shop), 1, 10)
    await call

    with pytest.raises(reasons.ReferenceReusedError):
        await pointbook.redeem(buyer_of(shop), 1, 20, reference=call.reference)


async def test_iterators_read_all_pages(
    pointbook: PointbookClient, shop: Shop, monkeypatch: pytest.MonkeyPatch, service: Service
) -> None:
    monkeypatch.setattr(requests, "PAGE_SIZE", 2)
    calls = [await pointbook.redeem(buyer_of(shop), 1, points) for points in (10, 20, 30, 40, 50)]
    for number in range(3):
        await earn(
            service.client, shop, 1, f"expiring-{number}", points_expiry_time=at(NOW_MS + 3_600_000 * (number + 1))
        )
    await earn(service.client, shop, 1, points_balance=501)

    listed = [each async for each in pointbook.list_redemptions(shop.merchant_id)]
    assert {each.redemption_id for each in listed} == {each.redemption_id for each in calls}
    assert len(listed) == 5
    none = [
        each
        async for each in pointbook.list_redemptions(
            shop.merchant_id, customer=buyer_of(shop), state=RedemptionState.REVERSED, start_time=NOW - DAY
        )
    ]
    assert none == []
    entries = [each async for each in pointbook.list_points_entries(shop.merchant_id, Buyer(shop.store_id, "buyer"))]
    assert sorted((each.points, each.update_type.value) for each in entries) == [(1, "INCREASE"), (500, "INCREASE")]
    expiring = [
        each
        async for each in pointbook.list_expiring_points(shop.merchant_id, store_id=shop.store_id, until_time=NOW + DAY)
    ]
    assert [each.buyer.buyer_id for each in expiring] == ["expiring-0", "expiring-1", "expiring-2"]


async def test_pages_of_any_list_method_leave_the_request_unchanged(pointbook: PointbookClient, shop: Shop) -> None:
    for _ in range(4):
        store = programs_pb2.Store(merchant_id=shop.merchant_id, store_id=unique("store"))
        await pointbook.programs.PutStore(programs_pb2.PutStoreRequest(store=store))
    request = programs_pb2.ListStoresRequest(merchant_id=shop.merchant_id, page_size=2)

    sizes = [len(page.stores) async for page in pointbook.pages(pointbook.programs.ListStores, request)]

    assert sizes == [2, 2, 1]
    assert request.page_token == ""


async def test_iterator_can_be_left_early(pointbook: PointbookClient, shop: Shop) -> None:
    await pointbook.redeem(buyer_of(shop), 1, 10)
    await pointbook.redeem(buyer_of(shop), 1, 20)

    async for redemption in pointbook.list_redemptions(shop.merchant_id):
        assert redemption.points in {10, 20}
        break


async def test_account_is_read_at_a_time(pointbook: PointbookClient, shop: Shop) -> None:
    buyer = Buyer(shop.store_id, "buyer")

    now = await pointbook.get_points_account(shop.merchant_id, buyer)
    before = await pointbook.get_points_account(shop.merchant_id, buyer, at_time=NOW - 2 * DAY, with_lots=False)

    assert (now.points_balance, now.lots[0].remaining_points, now.buyer) == (500, 500, buyer)
    assert before.lots == ()
    assert before.as_of == NOW - 2 * DAY


async def test_deadline_ends_a_call(pointbook: PointbookClient, admin_token: str, shop: Shop, service: Service) -> None:
    request = requests.redeem(buyer_of(shop), 1, 10, None, {})

    def run() -> None:
        with sync.connect(f"127.0.0.1:{service.server.port}", token=admin_token, timeout=0.3) as client:
            client.redeem(buyer_of(shop), 1, 10).send()

    async with superuser(service) as connection, connection.transaction():
        await connection.execute("SELECT FROM points_accounts WHERE merchant_id = $1 FOR UPDATE", shop.merchant_id)
        began = time.monotonic()
        with pytest.raises(DeadlineExceededError) as caught:
            await pointbook.with_options(timeout=0.3).redeem(buyer_of(shop), 1, 10)
        assert 0.25 < time.monotonic() - began < 5
        with pytest.raises(DeadlineExceededError):
            await pointbook.redemptions.RedeemPoints(request, timeout=0.3)
        with pytest.raises(DeadlineExceededError):
            await asyncio.to_thread(run)
    assert caught.value.outcome_unknown


async def test_request_id_is_that_of_the_caller(pointbook: PointbookClient, shop: Shop) -> None:
    with pytest.raises(reasons.RedemptionNotFoundError) as named:
        await pointbook.with_options(request_id="order-17").get_redemption(shop.merchant_id, reference="none")
    with pytest.raises(reasons.RedemptionNotFoundError) as own:
        await pointbook.get_redemption(shop.merchant_id, reference="none")

    for unusable in ("", "two words", "a\nb", "näh", "x" * 65):
        with pytest.raises(reasons.RedemptionNotFoundError) as replaced:
            await pointbook.with_options(request_id=unusable).get_redemption(shop.merchant_id, reference="none")
        assert len(replaced.value.request_id) == 32

    assert named.value.request_id == "order-17"
    assert len(own.value.request_id) == 32


async def test_stub_call_has_its_own_metadata_and_timeout(pointbook: PointbookClient, shop: Shop) -> None:
    request = programs_pb2.GetStoreRequest(merchant_id=shop.merchant_id, store_id=shop.store_id)

    response = await pointbook.programs.GetStore(request, timeout=5, metadata=(("x-request-id", "r-1"),))
    assert response.store.store_id == shop.store_id
    with pytest.raises(UnauthenticatedError) as caught:
        await pointbook.programs.GetStore(request, metadata=(("authorization", "Basic x"), ("x-request-id", "r-2")))
    assert (caught.value.reason, caught.value.request_id) == ("TOKEN_MISSING", "r-2")


async def test_token_is_read_for_each_call(service: Service, shop: Shop) -> None:
    tokens = [await make_token(service.database_url, [ALL_MERCHANTS], list(Scope)) for _ in range(2)]
    current = tokens[0]
    async with connect(f"127.0.0.1:{service.server.port}", token=lambda: current) as client:
        await client.redeem(buyer_of(shop), 1, 10)
        await revoke_token(service.database_url, tokens[0])
        current = tokens[1]
        await client.redeem(buyer_of(shop), 1, 10)
        current = "pb_none.none"
        with pytest.raises(UnauthenticatedError) as caught:
            await client.redeem(buyer_of(shop), 1, 10)
    assert caught.value.reason == "TOKEN_INVALID"
    assert not any(token in f"{caught.value!r} {caught.value}" for token in (*tokens, current))


async def test_cancelled_call_ends_in_the_server(service: Service, pointbook: PointbookClient, shop: Shop) -> None:
    async with superuser(service) as connection, connection.transaction():
        await connection.execute("SELECT FROM points_accounts WHERE merchant_id = $1 FOR UPDATE", shop.merchant_id)
        call = asyncio.create_task(pointbook.redeem(buyer_of(shop), 1, 10).send())
        await until_locks_are_awaited(service.database_url)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    await until_calls_end(service.server)


async def test_close_ends_running_calls_and_refuses_new_ones(service: Service, admin_token: str, shop: Shop) -> None:
    client = connect(f"127.0.0.1:{service.server.port}", token=admin_token)
    async with superuser(service) as connection, connection.transaction():
        await connection.execute("SELECT FROM points_accounts WHERE merchant_id = $1 FOR UPDATE", shop.merchant_id)
        call = asyncio.create_task(client.redeem(buyer_of(shop), 1, 10).send())
        await until_locks_are_awaited(service.database_url)
        await client.close()
        with pytest.raises(CallCancelledError) as caught:
            await call

    assert caught.value.outcome_unknown
    with pytest.raises(RuntimeError, match="closed"):
        await client.redeem(buyer_of(shop), 1, 10)
    await client.close()


async def test_client_of_another_event_loop_is_refused(service: Service, admin_token: str, shop: Shop) -> None:
    async with connect(f"127.0.0.1:{service.server.port}", token=admin_token) as client:

        def call_in_another_loop() -> None:
            asyncio.run(client.redeem(buyer_of(shop), 1, 10).send())

        with pytest.raises(RuntimeError, match="belongs to another event loop"):
            await asyncio.to_thread(call_in_another_loop)


async def test_client_for_threads_has_the_same_results(
    service: Service, pointbook: PointbookClient, admin_token: str, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "PAGE_SIZE", 2)

    def run() -> list[Any]:
        with sync.connect(f"127.0.0.1:{service.server.port}", token=admin_token) as client:
            assert client.validate(buyer_of(shop), 1, 10).redeemable
            call = client.redeem(buyer_of(shop), 1, 10)
            redemption = call.send()
            assert call.send() == redemption
            for points in (20, 30):
                client.redeem(buyer_of(shop), 1, points).send()
            assert (
                client.reverse(shop.merchant_id, redeemed_reference=call.reference, points=5).send().reversed_points
                == 5
            )
            with pytest.raises(reasons.InsufficientPointsError):
                client.with_options(timeout=5, request_id="r-1").redeem(buyer_of(shop), 1, 1_000).send()
            assert client.apply_updates([shop.update("other"), shop.update("another")])
            listed = list(client.list_redemptions(shop.merchant_id))
            account = client.get_points_account(shop.merchant_id, Buyer(shop.store_id, "buyer"))
            entries = list(client.list_points_entries(shop.merchant_id, Buyer(shop.store_id, "buyer")))
            return [listed, account, entries, client.get_customer_points(buyer_of(shop), 1)]

    listed, account, entries, points = await asyncio.to_thread(run)

    assert listed == [each async for each in pointbook.list_redemptions(shop.merchant_id)]
    assert len(listed) == 3
    assert account == await pointbook.get_points_account(shop.merchant_id, Buyer(shop.store_id, "buyer"))
    assert len(entries) == 1
    assert points == await pointbook.get_customer_points(buyer_of(shop), 1)


async def test_threads_share_a_client(service: Service, admin_token: str, shop: Shop) -> None:
    def run() -> list[str]:
        with sync.connect(f"127.0.0.1:{service.server.port}", token=admin_token) as client:
            shared = client.redeem(buyer_of(shop), 1, 10)
            calls = [shared if number % 2 else client.redeem(buyer_of(shop), 1, 10) for number in range(40)]
            with ThreadPoolExecutor(16) as threads:
                return [redemption.redemption_id for redemption in threads.map(lambda call: call.send(), calls)]

    ids = await asyncio.to_thread(run)

    assert len(set(ids)) == 21
    assert await account_points(service.client, shop) == (500, 290, 210)


async def test_fork_connects_anew_with_the_client_for_threads(service: Service, admin_token: str, shop: Shop) -> None:
    program = f"""
import os
from concurrent.futures import ThreadPoolExecutor
from pointbook_client import PointbookError, sync

def call(*_):
    try:
        client.get_redemption({shop.merchant_id!r}, reference="none")
    except PointbookError as error:
        return error.reason or str(error)

address, token = "127.0.0.1:{service.server.port}", {admin_token!r}
with sync.connect(address, token=token, retries=False, timeout=10) as client:
    print(call(), flush=True)
    if (pid := os.fork()) == 0:
        with ThreadPoolExecutor(4) as threads:
            print(*set(threads.map(call, range(8))), flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
    print(call(), flush=True)
"""
    finished = await finish(sys.executable, "-c", program, environment=clean_environment({}))

    assert finished.out.splitlines() == ["REDEMPTION_NOT_FOUND"] * 3


@pytest.mark.parametrize(
    ("before_fork", "result"),
    [
        ("kept = [asyncio.run(call())]", REFUSED_FORK),
        ("kept = [asyncio.run(call(is_closed=False))]", REFUSED_FORK),
        # In the fork, it would be freed there.
        ("kept = [asyncio.run(call())]; in_fork = kept.clear", REFUSED_FORK),
        ("loop = asyncio.new_event_loop(); loop.run_until_complete(call())", "REDEMPTION_NOT_FOUND"),
    ],
)
async def test_fork_beside_a_client_for_asyncio_is_named(
    service: Service, admin_token: str, shop: Shop, before_fork: str, result: str
) -> None:
    program = f"""
import asyncio
import os
import signal
from pointbook_client import PointbookError, connect

async def call(is_closed=True):
    client = connect("127.0.0.1:{service.server.port}", token={admin_token!r})
    try:
        await client.get_redemption({shop.merchant_id!r}, reference="none")
    except PointbookError as error:
        print(error.reason, flush=True)
    if is_closed:
        await client.close()
    return client

in_fork = int
{before_fork}
if (pid := os.fork()) == 0:
    signal.alarm(20)
    try:
        in_fork()
        asyncio.run(call())
    except RuntimeError as error:
        print(error, flush=True)
    finally:
        os._exit(0)
os.waitpid(pid, 0)
"""
    finished = await finish(sys.executable, "-c", program, environment=clean_environment({}))

    assert finished.out.splitlines() == ["REDEMPTION_NOT_FOUND", result]


async def test_closed_client_for_threads_refuses_calls(service: Service, admin_token: str, shop: Shop) -> None:
    def run() -> None:
        client = sync.connect(f"127.0.0.1:{service.server.port}", token=admin_token)
        client.close()
        client.close()
        with pytest.raises(RuntimeError, match="closed"):
            client.validate(buyer_of(shop), 1, 10)

    await asyncio.to_thread(run)


@asynccontextmanager
async def server_with_tls(service: Service, folder: Path) -> AsyncIterator[Server]:
    """Run a server that requires client certificates during the block."""
    cert, key = AUTHORITY.issue("server", names=["pointbook.internal"]).write(folder, "server")
    (folder / "ca.crt").write_bytes(AUTHORITY.pem)
    settings = server_settings(tls_cert_file=cert, tls_key_file=key, tls_client_ca_file=folder / "ca.crt")
    server = Server(settings, service.database_url, senders={}, clock=TestClock())
    await server.start()
    try:
        yield server
    finally:
        await stop_idle(server)


def tls_files(folder: Path, name: str) -> Tls:
    """Issue the certificate of a client, and return its files."""
    cert, key = AUTHORITY.issue(name).write(folder, "client")
    return Tls(ca_file=folder / "ca.crt", cert_file=cert, key_file=key, server_name="pointbook.internal")


NAMES = ("first.internal", "second.internal")


async def test_renewed_certificate_is_used_without_a_failed_call(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "CREDENTIALS_CHECK_SECONDS", 0.0)
    tokens = [
        await make_token(service.database_url, [ALL_MERCHANTS], [Scope.REDEEM], client_names=[name]) for name in NAMES
    ]
    request = access_pb2.GetCallerAccessRequest()
    async with server_with_tls(service, tmp_path) as server:
        current = tokens[0]
        tls = tls_files(tmp_path, NAMES[0])
        async with connect(f"127.0.0.1:{server.port}", token=lambda: current, tls=tls) as client:
            await client.access.GetCallerAccess(request)
            running = [asyncio.ensure_future(client.access.GetCallerAccess(request)) for _ in range(20)]
            await asyncio.sleep(0)
            tls_files(tmp_path, NAMES[1])
            current = tokens[1]
            await client.access.GetCallerAccess(request)
            await asyncio.gather(*running)
            current = tokens[0]
            with pytest.raises(UnauthenticatedError):
                await client.access.GetCallerAccess(request)


async def test_renewed_certificate_is_used_by_threads(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "CREDENTIALS_CHECK_SECONDS", 0.0)
    monkeypatch.setattr(connections, "REPLACED_CHANNEL_SECONDS", 0.2)
    token = await make_token(service.database_url, [ALL_MERCHANTS], [Scope.REDEEM], client_names=list(NAMES))
    request = access_pb2.GetCallerAccessRequest()
    async with server_with_tls(service, tmp_path) as server:

        def run() -> int:
            tls = tls_files(tmp_path, NAMES[0])
            with (
                sync.connect(f"127.0.0.1:{server.port}", token=token, tls=tls) as client,
                ThreadPoolExecutor(8) as pool,
            ):
                calls = []
                for number in range(60):
                    if number % 10 == 9:
                        tls_files(tmp_path, NAMES[number // 10 % 2])
                    calls.append(pool.submit(client.access.GetCallerAccess, request))
                    # Spreads the calls over the time after which a replaced channel is closed.
                    time.sleep(0.01)
                return len([call.result() for call in calls])

        assert await asyncio.to_thread(run) == 60


async def test_server_of_another_authority_is_refused(service: Service, tmp_path: Path) -> None:
    async with server_with_tls(service, tmp_path) as server:
        other = tmp_path / "other.crt"
        other.write_bytes(Authority().pem)
        tls = Tls(ca_file=other, server_name="pointbook.internal")
        async with connect(f"127.0.0.1:{server.port}", tls=tls, wait_for_ready=False, retries=False) as client:
            with pytest.raises(UnavailableError):
                await client.access.GetCallerAccess(access_pb2.GetCallerAccessRequest())


async def test_call_waits_for_a_server_that_starts_late(database_url: str, admin_token: str) -> None:
    port = free_port()
    request = access_pb2.GetCallerAccessRequest()
    async with (
        connect(f"127.0.0.1:{port}", token=admin_token) as patient,
        connect(f"127.0.0.1:{port}", token=admin_token, wait_for_ready=False, retries=False) as hasty,
    ):
        with pytest.raises(UnavailableError) as caught:
            await hasty.access.GetCallerAccess(request)
        assert caught.value.outcome_unknown
        waiting = asyncio.ensure_future(patient.access.GetCallerAccess(request))
        await asyncio.sleep(0)
        async with running_server(database_url, grpc_address=f"127.0.0.1:{port}"):
            assert (await waiting).merchant_ids == ["*"]


async def test_call_that_waits_for_a_server_ends_at_its_deadline(admin_token: str) -> None:
    async with connect(f"127.0.0.1:{free_port()}", token=admin_token, timeout=0.3) as client:
        with pytest.raises(DeadlineExceededError):
            await client.access.GetCallerAccess(access_pb2.GetCallerAccessRequest())


class CountingHealth(health_pb2_grpc.HealthServicer):  # type: ignore[misc] # the package has no types
    """A health service whose first calls fail."""

    def __init__(self, failures: int, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> None:
        self.calls: list[dict[str, Any]] = []
        self._failures, self._code = failures, code

    async def Check(self, _request: object, context: Any) -> health_pb2.HealthCheckResponse:  # noqa: N802 - gRPC's name
        """Fail, or report SERVING."""
        self.calls.append(dict(context.invocation_metadata()))
        if len(self.calls) <= self._failures:
            await context.abort(self._code, "set by the test")
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


@asynccontextmanager
async def health_server(servicer: CountingHealth) -> AsyncIterator[str]:
    """Serve a health service during the block, and yield its address."""
    server = grpc.aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@pytest.mark.parametrize(("retries", "calls"), [(True, 3), (False, 1)])
async def test_retries_can_be_turned_off(retries: bool, calls: int) -> None:  # noqa: FBT001 - a parameter of pytest
    servicer = CountingHealth(failures=2)
    async with health_server(servicer) as address, connect(address, retries=retries) as client:
        stub = health_pb2_grpc.HealthStub(client.channel)
        if retries:
            await stub.Check(health_pb2.HealthCheckRequest())
        else:
            with pytest.raises(UnavailableError, match="set by the test"):
                await stub.Check(health_pb2.HealthCheckRequest())

    assert len(servicer.calls) == calls
    assert len({call["x-request-id"] for call in servicer.calls}) == 1


async def test_request_that_no_server_reads_is_not_sent(
    service: Service, pointbook: PointbookClient, admin_token: str, shop: Shop
) -> None:
    def asked_for(size: int) -> programs_pb2.GetStoreRequest:
        frame = 4
        return programs_pb2.GetStoreRequest(
            merchant_id=shop.merchant_id, store_id="x" * (size - frame - 2 - len(shop.merchant_id))
        )

    largest, too_large = asked_for(MESSAGE_BYTES_MAX), asked_for(MESSAGE_BYTES_MAX + 1)
    assert largest.ByteSize() == MESSAGE_BYTES_MAX

    with pytest.raises(reasons.InvalidFieldsError) as refused:
        await pointbook.programs.GetStore(largest)
    with pytest.raises(reasons.InvalidFieldsError) as not_sent:
        await pointbook.programs.GetStore(too_large)
    with (
        sync.connect(f"127.0.0.1:{service.server.port}", token=admin_token) as client,
        pytest.raises(reasons.InvalidFieldsError) as not_sent_by_threads,
    ):
        client.programs.GetStore(too_large)

    assert refused.value.violations
    for raised in (not_sent, not_sent_by_threads):
        assert str(raised.value) == (
            "INVALID_ARGUMENT: INVALID_FIELDS: The request has 1,048,577 bytes, which are more than 1,048,576."
        )
        assert not raised.value.outcome_unknown


async def test_request_of_another_type_is_named(pointbook: PointbookClient) -> None:
    wrong: Any = "store-1"
    with pytest.raises(TypeError, match="str"):
        await pointbook.programs.GetStore(wrong)


async def test_own_channel_options_replace_those_of_the_client() -> None:
    servicer = CountingHealth(failures=0)
    async with health_server(servicer) as address:
        for options in ((), (("grpc.primary_user_agent", "till/1"),)):
            async with connect(address, channel_options=options) as client:
                await health_pb2_grpc.HealthStub(client.channel).Check(health_pb2.HealthCheckRequest())

    agents = [str(call["user-agent"]).split()[0] for call in servicer.calls]
    assert agents[0].startswith("pointbook-client/")
    assert agents[1] == "till/1"


async def test_servers_of_one_address_get_calls_in_turn() -> None:
    servicers = [CountingHealth(failures=0) for _ in range(2)]
    async with (
        health_server(servicers[0]) as one,
        health_server(servicers[1]) as other,
        connect(f"ipv4:{one},{other}") as client,
    ):
        stub = health_pb2_grpc.HealthStub(client.channel)

        async def both_are_connected() -> bool:
            await stub.Check(health_pb2.HealthCheckRequest())
            return all(servicer.calls for servicer in servicers)

        await until(both_are_connected)
        before = [len(servicer.calls) for servicer in servicers]
        for _ in range(10):
            await stub.Check(health_pb2.HealthCheckRequest())

    assert [len(servicer.calls) - count for servicer, count in zip(servicers, before, strict=True)] == [5, 5]


class RecordingCall:
    """A call that an observer sees."""

    def __init__(self) -> None:
        self.codes: list[grpc.StatusCode] = []

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Return a request id."""
        return (("x-request-id", "from-the-observer"),)

    def end(self, code: grpc.StatusCode) -> None:
        """Store the code."""
        self.codes.append(code)


class RecordingObserver:
    """An observer that stores what it sees."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, RecordingCall]] = []

    def start(self, method: str) -> RecordingCall:
        """Store the method."""
        call = RecordingCall()
        self.calls.append((method, call))
        return call


async def test_observer_sees_each_call_once(service: Service, admin_token: str, shop: Shop) -> None:
    observer = RecordingObserver()
    async with connect(f"127.0.0.1:{service.server.port}", token=admin_token, observer=observer) as client:
        await client.redeem(buyer_of(shop), 1, 10)
        with pytest.raises(reasons.RedemptionNotFoundError) as caught:
            await client.get_redemption(shop.merchant_id, reference="none")
        async with superuser(service) as connection, connection.transaction():
            await connection.execute("SELECT FROM points_accounts WHERE merchant_id = $1 FOR UPDATE", shop.merchant_id)
            call = asyncio.create_task(client.redeem(buyer_of(shop), 1, 10).send())
            await until_locks_are_awaited(service.database_url)
            call.cancel()
            await asyncio.wait([call])

    redeem = "/pointbook.v1.RedemptionService/RedeemPoints"
    assert [(method, call.codes) for method, call in observer.calls] == [
        (redeem, [grpc.StatusCode.OK]),
        ("/pointbook.v1.RedemptionService/GetRedemption", [grpc.StatusCode.NOT_FOUND]),
        (redeem, [grpc.StatusCode.CANCELLED]),
    ]
    assert caught.value.request_id == "from-the-observer"


class FailingObserver(RecordingObserver):
    """An observer that raises at one moment of a call."""

    def __init__(self, moment: str) -> None:
        super().__init__()
        self._moment = moment

    def start(self, method: str) -> RecordingCall:
        """Return a call that raises in the method of this name, or raise."""
        if self._moment == "start":
            raise RuntimeError("the observer's own")
        call = super().start(method)
        setattr(call, self._moment, self._fail)
        return call

    def _fail(self, *_: object) -> NoReturn:
        raise RuntimeError("the observer's own")


@pytest.mark.parametrize("moment", ["start", "metadata", "end"])
async def test_redemption_is_returned_although_the_observer_fails(
    service: Service, admin_token: str, shop: Shop, moment: str, caplog: pytest.LogCaptureFixture
) -> None:
    address, observer = f"127.0.0.1:{service.server.port}", FailingObserver(moment)
    async with connect(address, token=admin_token, observer=observer) as client:
        redemption = await client.redeem(buyer_of(shop), 1, 10)
        with pytest.raises(reasons.RedemptionNotFoundError):
            await client.get_redemption(shop.merchant_id, reference="none")

    assert redemption.points == 10
    assert caplog.text.count("The observer of calls failed.") == 2


async def test_call_is_a_span_of_the_current_trace_and_the_server_continues_it(
    database_url: str, admin_token: str, shop: Shop
) -> None:
    tracing, exporter = RecordedTracing(), InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    server = Server(
        server_settings(), database_url, senders={Channel.SMS: Outbox()}, clock=TestClock(), tracing=tracing
    )
    await server.start()
    observer = OpenTelemetry(provider)
    async with connect(f"127.0.0.1:{server.port}", token=admin_token, observer=observer) as client:
        with provider.get_tracer("test").start_as_current_span("checkout") as checkout:
            await client.redeem(buyer_of(shop), 1, 10)
            with pytest.raises(reasons.RedemptionNotFoundError):
                await client.get_redemption(shop.merchant_id, reference="none")
    await stop_idle(server)

    redeem, get, parent = exporter.get_finished_spans()
    assert parent.name == "checkout"
    assert [span.parent.span_id for span in (redeem, get) if span.parent] == [checkout.get_span_context().span_id] * 2
    assert redeem.name == "pointbook.v1.RedemptionService/RedeemPoints"
    assert redeem.kind is trace.SpanKind.CLIENT
    assert dict(redeem.attributes or {}) == {
        "rpc.system": "grpc",
        "rpc.service": "pointbook.v1.RedemptionService",
        "rpc.method": "RedeemPoints",
        "rpc.grpc.status_code": 0,
    }
    assert (get.attributes or {})["rpc.grpc.status_code"] == 5
    assert [span.status.status_code for span in (redeem, get)] == [trace.StatusCode.UNSET, trace.StatusCode.ERROR]
    (served,) = tracing.named(redeem.name)
    assert trace_of(served) == trace_of(redeem)
    assert served.parent is not None
    assert served.parent.span_id == id_of(redeem)


@pytest.mark.parametrize("module", ["pointbook_client", "pointbook_client.sync"])
def test_opentelemetry_is_imported_only_for_traces(module: str) -> None:
    program = f"import sys, {module}; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


async def test_refusal_after_a_lost_answer_is_final_only_once_the_lost_call_has_ended(
    service: Service, admin_token: str, shop: Shop
) -> None:
    """The first attempt waits for a lock, and redeems after a retry was refused."""
    async with server_proxy(service.server.port) as proxy, connect(proxy.address, token=admin_token) as client:
        call = client.redeem(buyer_of(shop), 1, 10)
        async with superuser(service) as connection:
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute("SELECT FROM points_accounts WHERE merchant_id = $1 FOR UPDATE", shop.merchant_id)
            first = asyncio.create_task(call.send())
            await until_locks_are_awaited(service.database_url)
            await service.client.put_program(shop.merchant_id, shop.store_id, criteria={}, redemption_enabled=False)
            proxy.abort()
            with pytest.raises(reasons.RedemptionDisabledError) as hidden:
                await first
            with pytest.raises(reasons.RedemptionDisabledError) as again:
                await call
            await service.client.put_program(shop.merchant_id, shop.store_id, criteria={})
            await transaction.rollback()

        assert hidden.value.outcome_unknown
        assert again.value.outcome_unknown
        redemption = await call
    assert await account_points(service.client, shop) == (500, 490, 10)
    assert redemption.reference == call.reference
