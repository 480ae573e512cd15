"""Points updates in batches: what the client sends again, when and in which order."""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from pointbook.v1 import points_pb2, points_pb2_grpc
from pointbook_client import (
    InvalidArgumentError,
    PointbookClient,
    PointbookError,
    UnavailableError,
    connect,
    reasons,
    retrying,
    sync,
)
from pointbook_client.calls import REQUEST_BYTES_MAX
from pointbook_server.errors import PointbookError as ServerError
from pointbook_server.reasons import REASONS, Reason
from pointbook_server.rpc.status_mapping import to_status
from support.clocks import NOW_MS, at
from support.points import APPLIED, DUPLICATE
from support.servers import Service
from support.shops import Shop

Update = points_pb2.PointsUpdate
Result = points_pb2.PointsUpdateResult


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "PAUSE_SECONDS_MIN", 0.001)
    monkeypatch.setattr(retrying, "PAUSE_SECONDS_MAX", 0.002)


class ScriptedPoints(points_pb2_grpc.PointsServiceServicer):
    """A points service whose updates or calls fail as a test sets."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        """The event ids of each call."""
        self.sizes: list[int] = []
        """The bytes of each call's request."""
        self.applied: defaultdict[str, list[str]] = defaultdict(list)
        """The event ids that each buyer's account received, in order."""
        self.call_errors: Iterator[ServerError | grpc.StatusCode | None] = iter(())
        """The errors of the next calls."""
        self.error_of: Callable[[Update], Reason | None] = lambda _: None
        """Returns the error of an update."""
        self.omitted = 0
        """How many results a response lacks, which no server does."""

    async def BatchApplyPointsUpdates(  # noqa: N802 - gRPC names the methods
        self, request: points_pb2.BatchApplyPointsUpdatesRequest, context: Any
    ) -> points_pb2.BatchApplyPointsUpdatesResponse:
        """Apply the updates; those after a failed one of the same account fail, too."""
        self.batches.append([update.event_id for update in request.updates])
        self.sizes.append(request.ByteSize())
        error = next(self.call_errors, None)
        if isinstance(error, grpc.StatusCode):
            await context.abort(error, "set by the test")
        elif error is not None:
            status = rpc_status.to_status(to_status(error))
            await context.abort(status.code, status.details, status.trailing_metadata)
        failed: dict[str, Reason] = {}
        results = [self._apply(update, failed) for update in request.updates]
        return points_pb2.BatchApplyPointsUpdatesResponse(results=results[self.omitted :])

    def _apply(self, update: Update, failed: dict[str, Reason]) -> Result:
        reason = failed.get(update.buyer_id) or self.error_of(update)
        if reason is None:
            self.applied[update.buyer_id].append(update.event_id)
            return Result(response=points_pb2.ApplyPointsUpdateResponse(outcome=APPLIED))
        if retrying.may_succeed_later(PointbookError(grpc.StatusCode[REASONS[reason].grpc_code], "")):
            failed[update.buyer_id] = reason
        code = grpc.StatusCode[REASONS[reason].grpc_code].value[0]
        return Result(error=points_pb2.UpdateError(code=code, reason=reason, message="set by the test"))


@asynccontextmanager
async def scripted() -> AsyncIterator[tuple[ScriptedPoints, PointbookClient, str]]:
    """Run a scripted server during the block; yield it with a client and its address."""
    servicer = ScriptedPoints()
    server = grpc.aio.server()
    points_pb2_grpc.add_PointsServiceServicer_to_server(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    async with connect(address, retries=False) as client:
        yield servicer, client, address
    await server.stop(None)


def updates_of(shop: Shop, count: int, buyers: int = 3) -> list[Update]:
    """Return updates that each add a point, of several buyers in turn."""
    return [
        shop.update(
            f"buyer-{number % buyers}",
            updated_value=1,
            points_balance=number // buyers + 1,
            updated_at=at(NOW_MS - 10_000_000 + number),
        )
        for number in range(count)
    ]


def failing_once(updates: Sequence[Update], *indexes: int, reason: Reason) -> Callable[[Update], Reason | None]:
    """Return a script by which updates fail the first time."""
    pending = {updates[index].event_id for index in indexes}

    def error_of(update: Update) -> Reason | None:
        if update.event_id in pending:
            pending.discard(update.event_id)
            return reason
        return None

    return error_of


def order_of(updates: Sequence[Update]) -> dict[str, list[str]]:
    """Return the event ids of each buyer, in order."""
    order: defaultdict[str, list[str]] = defaultdict(list)
    for update in updates:
        order[update.buyer_id].append(update.event_id)
    return order


async def test_more_updates_than_a_call_takes_are_applied_in_order(
    service: Service, admin_token: str, shop: Shop
) -> None:
    updates = updates_of(shop, 2_300)
    async with connect(f"127.0.0.1:{service.server.port}", token=admin_token) as client:
        results = await client.apply_updates(updates)
        again = await client.apply_updates(updates[:3], outcomes_only=False)

    outcomes = {result.outcome for result in results if not isinstance(result, PointbookError)}
    assert (len(results), outcomes) == (2_300, {APPLIED})
    assert [each.outcome for each in again if not isinstance(each, PointbookError)] == [DUPLICATE] * 3
    account = await service.client.account(shop.merchant_id, shop.store_id, "buyer-0")
    assert (account.points_balance, account.drift) == (767, 0)


async def test_updates_of_more_bytes_than_a_call_takes_are_sent_in_order(shop: Shop) -> None:
    updates, failures = updates_of(shop, 60), list[PointbookError]()
    for number, update in enumerate(updates):
        update.webhook.shop_domain = "x" * (100 * 1024 if number % 7 else 700 * 1024)
    async with scripted() as (server, client, _):
        server.error_of = failing_once(updates, 0, 7, 30, 59, reason=Reason.QUEUE_FULL)
        results = await client.apply_updates(updates, on_retry=failures.append)

    assert len(results) == 60
    assert not [result for result in results if isinstance(result, PointbookError)]
    assert server.applied == order_of(updates)
    assert len(failures) == 4
    assert max(server.sizes) <= REQUEST_BYTES_MAX


async def test_update_that_fits_into_no_call_fails_alone(service: Service, admin_token: str, shop: Shop) -> None:
    updates = updates_of(shop, 5)
    updates[1].webhook.shop_domain = "x" * REQUEST_BYTES_MAX
    updates[3].webhook.shop_domain = "x" * (REQUEST_BYTES_MAX - 1_000)
    async with connect(f"127.0.0.1:{service.server.port}", token=admin_token) as client:
        results = await client.apply_updates(updates)

    assert [getattr(result, "reason", "") for result in results] == ["", "INVALID_FIELDS", "", "INVALID_FIELDS", ""]
    too_large, too_long = results[1], results[3]
    assert isinstance(too_large, reasons.InvalidFieldsError)
    assert isinstance(too_long, reasons.InvalidFieldsError)
    assert "1,048,576" in too_large.message
    assert [violation.field for violation in too_long.violations] == ["update.webhook.shop_domain"]


async def test_most_updates_of_a_call_fit_although_each_is_the_largest(
    service: Service, admin_token: str, shop: Shop
) -> None:
    updates = updates_of(shop, 1_000)
    for number, update in enumerate(updates):
        update.event_id = f"{number:0128}"
        update.buyer_id = f"{number % 3:064}"
        update.updated_scene = points_pb2.POINTS_UPDATE_SCENE_UNSPECIFIED
        update.unrecognized_scene = "S" * 64
        update.points_expiry_time.FromDatetime(at(NOW_MS + 10_000_000).ToDatetime())
        update.webhook.CopyFrom(
            points_pb2.WebhookMetadata(webhook_id="w" * 128, shop_domain="d" * 255, api_version="v" * 64)
        )
    async with connect(f"127.0.0.1:{service.server.port}", token=admin_token) as client:
        results = await client.apply_updates(updates)

    assert [result for result in results if isinstance(result, PointbookError)] == []


async def test_result_of_each_update_is_in_its_place(service: Service, admin_token: str, shop: Shop) -> None:
    updates = updates_of(shop, 5)
    updates[1].store_id = "nowhere"
    updates[3].updated_value = -1
    async with connect(f"127.0.0.1:{service.server.port}", token=admin_token) as client:
        results = await client.apply_updates(updates)

    assert [type(result).__name__ for result in results] == [
        "ApplyPointsUpdateResponse",
        "StoreNotFoundError",
        "ApplyPointsUpdateResponse",
        "InvalidFieldsError",
        "ApplyPointsUpdateResponse",
    ]
    invalid = results[3]
    assert isinstance(invalid, PointbookError)
    assert invalid.violations


@pytest.mark.parametrize("reason", [Reason.QUEUE_FULL, Reason.DATABASE_UNAVAILABLE, Reason.TRANSACTION_CONFLICT])
async def test_failed_updates_are_sent_again_in_the_order_of_their_account(shop: Shop, reason: Reason) -> None:
    updates, failures = updates_of(shop, 1_200), list[PointbookError]()
    async with scripted() as (server, client, _):
        server.error_of = failing_once(updates, 0, 7, 500, 998, 1_100, reason=reason)
        results = await client.apply_updates(updates, on_retry=failures.append)

    assert len(results) == 1_200
    assert not [result for result in results if isinstance(result, PointbookError)]
    assert server.applied == order_of(updates)
    assert all(len(batch) <= 1_000 for batch in server.batches)
    assert {failure.reason for failure in failures} == {reason.value}
    assert len(failures) == len(server.batches) - 1


async def test_updates_that_no_retry_helps_are_not_sent_again(shop: Shop) -> None:
    updates = updates_of(shop, 3)
    async with scripted() as (server, client, _):
        server.error_of = lambda update: (
            Reason.EVENT_ID_REUSED if update is not None and update.buyer_id == "buyer-1" else None
        )
        results = await client.apply_updates(updates)

    assert isinstance(results[1], reasons.EventIdReusedError)
    assert len(server.batches) == 1


async def test_updates_may_come_from_a_generator(shop: Shop) -> None:
    updates = updates_of(shop, 3)
    async with scripted() as (server, client, _):
        results = await client.apply_updates(update for update in updates)

    assert [type(result) for result in results] == [points_pb2.ApplyPointsUpdateResponse] * 3
    assert server.applied == order_of(updates)


async def test_client_gives_up(shop: Shop) -> None:
    async with scripted() as (server, client, _):
        server.error_of = lambda _: Reason.QUEUE_FULL
        began = time.monotonic()
        with pytest.raises(reasons.QueueFullError):
            await client.apply_updates(updates_of(shop, 3), retry_seconds=0.2)

    assert 0.2 <= time.monotonic() - began < 5
    assert len(server.batches) > 2


@pytest.mark.parametrize(
    "error",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        ServerError(Reason.QUEUE_FULL, "Full."),
        ServerError(Reason.SHUTTING_DOWN, "Bye."),
    ],
)
async def test_failed_call_is_repeated_as_a_whole(shop: Shop, error: Any) -> None:
    updates = updates_of(shop, 5)
    async with scripted() as (server, client, _):
        server.call_errors = iter([error, error])
        results = await client.apply_updates(updates)

    assert len(results) == 5
    assert server.batches == [[update.event_id for update in updates]] * 3


async def test_call_that_no_retry_helps_raises_at_once(shop: Shop) -> None:
    async with scripted() as (server, client, _):
        server.call_errors = iter([ServerError(Reason.INVALID_FIELDS, "Wrong.")])
        with pytest.raises(InvalidArgumentError):
            await client.apply_updates(updates_of(shop, 1))

    assert len(server.batches) == 1


async def test_pause_is_not_shorter_than_the_server_asks_for(shop: Shop) -> None:
    async with scripted() as (server, client, _):
        server.call_errors = iter([ServerError(Reason.TOKEN_LIMIT_REACHED, "Later.", retry_after_seconds=0.3)])
        began = time.monotonic()
        await client.apply_updates(updates_of(shop, 1))

    assert time.monotonic() - began >= 0.3


async def test_no_updates_need_no_call() -> None:
    async with scripted() as (server, client, _):
        assert await client.apply_updates([]) == []

    assert server.batches == []


async def test_missing_results_are_an_error(shop: Shop) -> None:
    async with scripted() as (server, client, _):
        server.omitted = 1
        with pytest.raises(ValueError, match="shorter"):
            await client.apply_updates(updates_of(shop, 2))


async def test_threads_send_failed_updates_again(shop: Shop) -> None:
    updates = updates_of(shop, 10)
    async with scripted() as (server, _, address):
        server.error_of = failing_once(updates, 2, 5, reason=Reason.QUEUE_FULL)
        server.call_errors = iter([grpc.StatusCode.UNAVAILABLE])

        def run() -> int:
            with sync.connect(address, retries=False) as client:
                with pytest.raises(UnavailableError):
                    client.apply_updates(updates, retry_seconds=-1)
                return len(client.apply_updates(updates))

        assert await asyncio.to_thread(run) == 10
    assert server.applied == order_of(updates)
