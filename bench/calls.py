"""The calls that the load process makes: how each kind's requests are written, sent and checked."""

import itertools
import json
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from http_client import HttpConnection
from jobs import Job, Kind
from pointbook.v1 import identity_pb2, points_pb2, points_pb2_grpc, redemption_pb2, redemption_pb2_grpc
from shopline_shim.signature import sign
from shops import EVENT_POINTS, AccountIds, Happening, History, Population, new_event_id

PROGRAM_ID = 1
REDEEMED_POINTS = 10
SECRET = "bench-secret"  # noqa: S105 - it guards nothing but this run's own shim
CALL_TIMEOUT_SECONDS = 10.0

Call = Callable[[Any], Awaitable[int]]
"""Sends one request and checks its answer; tells how many events came late."""


class UnexpectedAnswerError(Exception):
    """A call was not answered as the benchmark wants it: its figures would mean nothing."""


class UnavailableError(Exception):
    """The shim, or one update of a batch, asked for the same to be sent again."""


def is_unavailable(error: Exception) -> bool:
    """Tell whether a call was refused as every caller must expect: its figures are lost, and the run goes on."""
    if isinstance(error, grpc.aio.AioRpcError):
        return error.code() is grpc.StatusCode.UNAVAILABLE
    return isinstance(error, UnavailableError)


class Requests:
    """Writes requests without end. It lives as long as the load process, so that each account's story goes on."""

    def __init__(self) -> None:
        self._histories: dict[Population, History] = {}
        self._customers: dict[Population, Iterator[int]] = {}

    def of(self, job: Job) -> Iterator[Any]:
        """Write the requests of a job's kind, one after the other."""
        population = job.population
        if job.kind is Kind.ISSUE:
            # Every code goes to another customer: who has one gets no second one within its cooldown.
            customers = self._customers.setdefault(population, iter(range(population.accounts)))
            return (_issue_request(population.ids(number)) for number in customers)
        numbers = _random_numbers(population.accounts)
        if job.kind is Kind.REDEEM:
            return (_redeem_request(population.ids(number)) for number in numbers)
        if job.kind is Kind.VALIDATE:
            return (_validate_request(population.ids(number)) for number in numbers)
        history = self._histories.setdefault(population, History(population))
        if job.kind is Kind.LATE:
            return (_apply_request(history.late(number)) for number in numbers)
        happenings = (history.next(number) for number in numbers)
        if job.kind is Kind.BATCH:
            return (_batch_request(list(itertools.islice(happenings, job.updates))) for _ in itertools.repeat(None))
        return map(_webhook_request if job.kind is Kind.WEBHOOK else _apply_request, happenings)


async def open_calls(job: Job, stack: AsyncExitStack) -> list[Call]:
    """Connect, and give each of a job's callers the call to make: one channel for all, or an HTTP connection each."""
    if job.kind is Kind.WEBHOOK:
        return [_post(await stack.enter_async_context(HttpConnection(job.address))) for _ in range(job.in_flight)]
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(job.address))
    metadata = (("authorization", f"Bearer {job.token}"),)
    open_call = {
        Kind.APPLY: _apply,
        Kind.LATE: _apply,
        Kind.BATCH: _batch,
        Kind.VALIDATE: _validate,
        Kind.ISSUE: _issue,
        Kind.REDEEM: _redeem,
    }[job.kind]
    return [open_call(channel, metadata)] * job.in_flight


def _random_numbers(count: int) -> Iterator[int]:
    return (int(random.random() * count) for _ in itertools.repeat(None))  # noqa: S311 - it only picks accounts


def _apply(channel: grpc.aio.Channel, metadata: Any) -> Call:
    method = points_pb2_grpc.PointsServiceStub(channel).ApplyPointsUpdate

    async def call(request: points_pb2.ApplyPointsUpdateRequest) -> int:
        return _is_late(await method(request, metadata=metadata, timeout=CALL_TIMEOUT_SECONDS))

    return call


def _batch(channel: grpc.aio.Channel, metadata: Any) -> Call:
    method = points_pb2_grpc.PointsServiceStub(channel).BatchApplyPointsUpdates

    async def call(request: points_pb2.BatchApplyPointsUpdatesRequest) -> int:
        response = await method(request, metadata=metadata, timeout=CALL_TIMEOUT_SECONDS)
        for result in response.results:
            if result.HasField("error"):
                raise _refusal(result.error)
        return sum(_is_late(result.response) for result in response.results)

    return call


def _is_late(response: points_pb2.ApplyPointsUpdateResponse) -> bool:
    if response.outcome == points_pb2.APPLY_OUTCOME_DUPLICATE:
        raise UnexpectedAnswerError("a new event was taken for a duplicate")
    return response.outcome == points_pb2.APPLY_OUTCOME_LATE


def _refusal(error: points_pb2.UpdateError) -> Exception:
    if error.code == grpc.StatusCode.UNAVAILABLE.value[0]:
        return UnavailableError()
    return UnexpectedAnswerError(f"an update of a batch was answered {error.reason}: {error.message}")


def _validate(channel: grpc.aio.Channel, metadata: Any) -> Call:
    method = redemption_pb2_grpc.RedemptionServiceStub(channel).ValidateRedemption

    async def call(request: redemption_pb2.ValidateRedemptionRequest) -> int:
        response = await method(request, metadata=metadata, timeout=CALL_TIMEOUT_SECONDS)
        if not response.redeemable:
            raise UnexpectedAnswerError(f"not redeemable: {response.status.reason}")
        return 0

    return call


def _issue(channel: grpc.aio.Channel, metadata: Any) -> Call:
    method = redemption_pb2_grpc.RedemptionServiceStub(channel).IssueValidationCode

    async def call(request: redemption_pb2.IssueValidationCodeRequest) -> int:
        response = await method(request, metadata=metadata, timeout=CALL_TIMEOUT_SECONDS)
        if not response.issued_code.sent:
            raise UnexpectedAnswerError("no code was sent")
        return 0

    return call


def _redeem(channel: grpc.aio.Channel, metadata: Any) -> Call:
    method = redemption_pb2_grpc.RedemptionServiceStub(channel).RedeemPoints

    async def call(request: redemption_pb2.RedeemPointsRequest) -> int:
        response = await method(request, metadata=metadata, timeout=CALL_TIMEOUT_SECONDS)
        if response.redemption.points != REDEEMED_POINTS:
            raise UnexpectedAnswerError("another redemption was answered")
        return 0

    return call


def _post(connection: HttpConnection) -> Call:
    async def call(request: bytes) -> int:
        status, body = await connection.request(request)
        if status == 503:  # noqa: PLR2004 - the shim's word for "send it again"
            raise UnavailableError
        if status != 200 or b"DUPLICATE" in body:  # noqa: PLR2004 - the one answer that means "committed"
            raise UnexpectedAnswerError(f"the webhook was answered {status} {body!r}")
        return b"LATE" in body

    return call


def _apply_request(happening: Happening) -> points_pb2.ApplyPointsUpdateRequest:
    return points_pb2.ApplyPointsUpdateRequest(update=_update(happening))


def _batch_request(happenings: Sequence[Happening]) -> points_pb2.BatchApplyPointsUpdatesRequest:
    return points_pb2.BatchApplyPointsUpdatesRequest(updates=map(_update, happenings))


def _update(happening: Happening) -> points_pb2.PointsUpdate:
    account = happening.account
    update = points_pb2.PointsUpdate(
        event_id=new_event_id(),
        merchant_id=account.merchant_id,
        store_id=account.store_id,
        buyer_id=account.buyer_id,
        updated_value=EVENT_POINTS,
        points_balance=happening.balance,
        updated_at=_timestamp(happening.updated_at_ms),
    )
    if happening.increases:
        update.update_type = points_pb2.POINTS_UPDATE_TYPE_INCREASE
        update.updated_scene = points_pb2.POINTS_UPDATE_SCENE_SUCCESSFUL_REGISTRATION
        update.points_expiry_time.CopyFrom(_timestamp(happening.expires_at_ms))
    else:
        update.update_type = points_pb2.POINTS_UPDATE_TYPE_DECREASE
        update.updated_scene = points_pb2.POINTS_UPDATE_SCENE_REDEEM_PRODUCTS
    return update


def _webhook_request(happening: Happening) -> bytes:
    """Write a whole HTTP request, signed as SHOPLINE does."""
    account = happening.account
    body = json.dumps(
        {
            "buyer_id": account.buyer_id,
            "points_balance": happening.balance,
            "points_expiry_time": happening.expires_at_ms if happening.increases else "",
            "store_id": account.store_id,
            "update_type": "INCREASE" if happening.increases else "DECREASE",
            "updated_at": happening.updated_at_ms,
            "updated_scene": "SUCCESSFUL_REGISTRATION" if happening.increases else "REDEEM_PRODUCTS",
            "updated_value": EVENT_POINTS,
        }
    ).encode()
    head = (
        "POST /webhooks/shopline HTTP/1.1\r\n"
        "Host: localhost\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n"
        "X-Shopline-Topic: app_memberSystem_points/challenged\r\n"
        f"X-Shopline-Hmac-Sha256: {sign(SECRET, body)}\r\n"
        "X-Shopline-Shop-Domain: example.myshopline.com\r\n"
        f"X-Shopline-Shop-Id: {account.store_id}\r\n"
        f"X-Shopline-Merchant-Id: {account.merchant_id}\r\n"
        "X-Shopline-API-Version: v20250601\r\n"
        "X-Shopline-Webhook-Id: 5f8d0d55b54764421b7156c3\r\n"
        "\r\n"
    )
    return head.encode() + body


def _validate_request(account: AccountIds) -> redemption_pb2.ValidateRedemptionRequest:
    return redemption_pb2.ValidateRedemptionRequest(
        customer=_customer(account), program_id=PROGRAM_ID, points=REDEEMED_POINTS
    )


def _issue_request(account: AccountIds) -> redemption_pb2.IssueValidationCodeRequest:
    return redemption_pb2.IssueValidationCodeRequest(
        customer=_customer(account), program_id=PROGRAM_ID, points=REDEEMED_POINTS
    )


def _redeem_request(account: AccountIds) -> redemption_pb2.RedeemPointsRequest:
    return redemption_pb2.RedeemPointsRequest(
        customer=_customer(account),
        program_id=PROGRAM_ID,
        points=REDEEMED_POINTS,
        external_reference_number=new_event_id(),
    )


def _customer(account: AccountIds) -> identity_pb2.CustomerRef:
    buyer = identity_pb2.Buyer(store_id=account.store_id, buyer_id=account.buyer_id)
    return identity_pb2.CustomerRef(merchant_id=account.merchant_id, buyer=buyer)


def _timestamp(time_ms: int) -> Timestamp:
    seconds, rest_ms = divmod(time_ms, 1_000)
    return Timestamp(seconds=seconds, nanos=rest_ms * 1_000_000)
