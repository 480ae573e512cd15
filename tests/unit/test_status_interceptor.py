"""The status interceptor, where gRPC itself cannot be made to meet the moment."""

import asyncio
from typing import Any

import grpc
import pytest

from pointbook_server.errors import PointbookError, Reason
from pointbook_server.rpc.refusal_limits import Pacer, RefusalLog
from pointbook_server.rpc.running_calls import RunningCalls
from pointbook_server.rpc.status_interceptor import StatusInterceptor


class LeavingCaller:
    """The context of a call whose caller goes away just as its status is sent."""

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """Tell what the caller sent along."""
        return ()

    def time_remaining(self) -> float:
        """Tell how long the caller waits."""
        return 1.0

    async def abort(self, *_status: object, **_metadata: object) -> None:
        """Fail as gRPC does."""
        raise grpc.aio.InternalError('Failed "execute_batch"')


async def test_caller_that_disconnects_at_its_status_is_not_an_error() -> None:
    """Any other exception than a cancellation is logged by gRPC as an error, with its trace."""

    async def refuse(_requests: object, _context: object) -> bytes:
        raise PointbookError(Reason.DEADLINE_EXCEEDED, "The call exceeded its deadline.")

    async def find(_details: object) -> Any:
        return grpc.stream_unary_rpc_method_handler(refuse)

    class Details:
        method = "/pointbook.v1.PointsService/ApplyPointsUpdate"
        invocation_metadata: tuple[tuple[str, str | bytes], ...] = ()

    running_calls = RunningCalls()
    interceptor = StatusInterceptor(
        deadline_seconds=1.0, running_calls=running_calls, refusals=RefusalLog(), pacer=Pacer()
    )
    handler = await interceptor.intercept_service(find, Details())

    with pytest.raises(asyncio.CancelledError):
        await handler.stream_unary(None, LeavingCaller())
    await asyncio.wait_for(running_calls.drain(), 1)
