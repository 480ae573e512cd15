"""The calls of the load process: each sends a request and checks the response."""

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import grpc

from load.http_client import HttpConnection
from load.jobs import CallKind, Job
from load.requests import REDEEMED_POINTS
from pointbook.v1 import points_pb2, points_pb2_grpc, redemption_pb2_grpc

CALL_TIMEOUT_SECONDS = 10.0

Call = Callable[[Any], Awaitable[int]]
"""Sends one request, checks the response, and returns the number of late events."""


class UnexpectedAnswerError(Exception):
    """A call had an unexpected result, which makes the measurement invalid."""


class UnavailableError(Exception):
    """The shim, or one update of a batch, returned an error that calls for a retry."""


def is_unavailable(error: Exception) -> bool:
    """Return whether a call failed as callers must expect.

    Such calls do not fail the run.
    """
    if isinstance(error, grpc.aio.AioRpcError):
        return error.code() is grpc.StatusCode.UNAVAILABLE
    return isinstance(error, UnavailableError)


async def open_calls(job: Job, stack: AsyncExitStack) -> list[Call]:
    """Return a call for each caller of a job.

    The calls share one channel, which uses all servers of its address in turn, or have an HTTP connection each.
    """
    if job.kind is CallKind.WEBHOOK:
        return [_post(await stack.enter_async_context(HttpConnection(job.address))) for _ in range(job.in_flight)]
    options = [("grpc.lb_policy_name", "round_robin")]
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(job.address, options))
    metadata = (("authorization", f"Bearer {job.token}"),)
    open_call = {
        CallKind.APPLY: _apply,
        CallKind.LATE: _apply,
        CallKind.BATCH: _batch,
        CallKind.GET: _get,
        CallKind.VALIDATE: _validate,
        CallKind.ISSUE: _issue,
        CallKind.REDEEM: _redeem,
    }[job.kind]
    return [open_call(channel, metadata)] * job.in_flight


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
                raise _error_of(result.error)
        return sum(_is_late(result.response) for result in response.results)

    return call


def _is_late(response: points_pb2.ApplyPointsUpdateResponse) -> bool:
    if response.outcome == points_pb2.APPLY_OUTCOME_DUPLICATE:
        raise UnexpectedAnswerError("a new event was treated as a duplicate")
    return response.outcome == points_pb2.APPLY_OUTCOME_LATE


def _error_of(error: points_pb2.UpdateError) -> Exception:
    if error.code == grpc.StatusCode.UNAVAILABLE.value[0]:
        return UnavailableError()
    return UnexpectedAnswerError(f"an update of a batch failed with {error.reason}: {error.message}")


def _get(channel: grpc.aio.Channel, metadata: Any) -> Call:
    method = points_pb2_grpc.PointsServiceStub(channel).GetPointsAccount
    return _checked(method, metadata, lambda response: "" if response.account.lots else "an account without lots")


def _validate(channel: grpc.aio.Channel, metadata: Any) -> Call:
    method = redemption_pb2_grpc.RedemptionServiceStub(channel).ValidateRedemption
    return _checked(
        method, metadata, lambda response: "" if response.redeemable else f"not redeemable: {response.status.reason}"
    )


def _issue(channel: grpc.aio.Channel, metadata: Any) -> Call:
    method = redemption_pb2_grpc.RedemptionServiceStub(channel).IssueValidationCode
    return _checked(method, metadata, lambda response: "" if response.issued_code.sent else "no code was sent")


def _redeem(channel: grpc.aio.Channel, metadata: Any) -> Call:
    method = redemption_pb2_grpc.RedemptionServiceStub(channel).RedeemPoints
    return _checked(
        method, metadata, lambda response: "" if response.redemption.points == REDEEMED_POINTS else "another redemption"
    )


def _checked(method: Any, metadata: Any, find_fault: Callable[[Any], str]) -> Call:
    """Return a call that raises UnexpectedAnswerError if its response has a fault."""

    async def call(request: Any) -> int:
        response = await method(request, metadata=metadata, timeout=CALL_TIMEOUT_SECONDS)
        if fault := find_fault(response):
            raise UnexpectedAnswerError(fault)
        return 0

    return call


def _post(connection: HttpConnection) -> Call:
    async def call(request: bytes) -> int:
        status, body = await connection.request(request)
        if status == 503:  # noqa: PLR2004 - a retry is expected
            raise UnavailableError
        if status != 200 or b"DUPLICATE" in body:  # noqa: PLR2004 - committed
            raise UnexpectedAnswerError(f"the webhook got {status} {body!r}")
        return b"LATE" in body

    return call
