"""The requests of each kind of call."""

import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from load.jobs import CallKind, Job
from pointbook.v1 import identity_pb2, points_pb2, redemption_pb2
from pointbook_common.durations import SECOND_MS
from scenarios.populations import EVENT_POINTS, AccountHistories, AccountIds, PointsChange, Population, new_event_id
from shopline_shim.signature import sign

PROGRAM_ID = 1
REDEEMED_POINTS = 10
SECRET = "bench-secret"  # noqa: S105 - only this run's shim uses it


class RequestGenerator:
    """An endless source of requests.

    It exists as long as the load process, so that the changes of an account continue from job to job.
    """

    def __init__(self) -> None:
        self._histories: dict[Population, AccountHistories] = {}
        self._customers: dict[Population, Iterator[int]] = {}

    def requests(self, job: Job) -> Iterator[Any]:
        """Iterate over requests of a job's kind."""
        population = job.population
        if job.kind is CallKind.ISSUE:
            # A customer gets no second code during the cooldown, so every code is for another one.
            customers = self._customers.setdefault(population, iter(range(population.accounts)))
            return (_issue_request(population.ids(number)) for number in customers)
        numbers = _random_numbers(population.accounts)
        if build := ACCOUNT_REQUESTS.get(job.kind):
            return (build(population.ids(number)) for number in numbers)
        histories = self._histories.setdefault(population, AccountHistories(population))
        if job.kind is CallKind.LATE:
            return (_apply_request(histories.late_change(number)) for number in numbers)
        changes = (histories.next_change(number) for number in numbers)
        if job.kind is CallKind.BATCH:
            return (_batch_request(list(itertools.islice(changes, job.updates))) for _ in itertools.repeat(None))
        return map(_webhook_request if job.kind is CallKind.WEBHOOK else _apply_request, changes)


def _random_numbers(count: int) -> Iterator[int]:
    return (int(random.random() * count) for _ in itertools.repeat(None))  # noqa: S311 - it only selects accounts


def _apply_request(change: PointsChange) -> points_pb2.ApplyPointsUpdateRequest:
    return points_pb2.ApplyPointsUpdateRequest(update=_update(change))


def _batch_request(changes: Sequence[PointsChange]) -> points_pb2.BatchApplyPointsUpdatesRequest:
    return points_pb2.BatchApplyPointsUpdatesRequest(updates=map(_update, changes))


def _update(change: PointsChange) -> points_pb2.PointsUpdate:
    account = change.account
    update = points_pb2.PointsUpdate(
        event_id=new_event_id(),
        merchant_id=account.merchant_id,
        store_id=account.store_id,
        buyer_id=account.buyer_id,
        updated_value=EVENT_POINTS,
        points_balance=change.balance,
        updated_at=_timestamp(change.updated_at_ms),
    )
    if change.is_increase:
        update.update_type = points_pb2.POINTS_UPDATE_TYPE_INCREASE
        update.updated_scene = points_pb2.POINTS_UPDATE_SCENE_SUCCESSFUL_REGISTRATION
        update.points_expiry_time.CopyFrom(_timestamp(change.expires_at_ms))
    else:
        update.update_type = points_pb2.POINTS_UPDATE_TYPE_DECREASE
        update.updated_scene = points_pb2.POINTS_UPDATE_SCENE_REDEEM_PRODUCTS
    return update


def _webhook_request(change: PointsChange) -> bytes:
    """Return an encoded HTTP request, signed as by SHOPLINE."""
    account = change.account
    body = json.dumps(
        {
            "buyer_id": account.buyer_id,
            "points_balance": change.balance,
            "points_expiry_time": change.expires_at_ms if change.is_increase else "",
            "store_id": account.store_id,
            "update_type": "INCREASE" if change.is_increase else "DECREASE",
            "updated_at": change.updated_at_ms,
            "updated_scene": "SUCCESSFUL_REGISTRATION" if change.is_increase else "REDEEM_PRODUCTS",
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


def _get_request(account: AccountIds) -> points_pb2.GetPointsAccountRequest:
    return points_pb2.GetPointsAccountRequest(**account._asdict())


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


ACCOUNT_REQUESTS: dict[CallKind, Callable[[AccountIds], Any]] = {
    CallKind.GET: _get_request,
    CallKind.VALIDATE: _validate_request,
    CallKind.REDEEM: _redeem_request,
}
"""The requests that differ only by their account."""


def _customer(account: AccountIds) -> identity_pb2.CustomerRef:
    buyer = identity_pb2.Buyer(store_id=account.store_id, buyer_id=account.buyer_id)
    return identity_pb2.CustomerRef(merchant_id=account.merchant_id, buyer=buyer)


def _timestamp(time_ms: int) -> Timestamp:
    seconds, rest_ms = divmod(time_ms, SECOND_MS)
    return Timestamp(seconds=seconds, nanos=rest_ms * 1_000_000)
