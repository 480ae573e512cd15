"""The status interceptor in situations that gRPC cannot be made to produce."""

import asyncio
from typing import Any

import grpc
import pytest

from pointbook_server.errors import PointbookError
from pointbook_server.reasons import Reason
from pointbook_server.rpc.refusal_limits import Pacer, RefusalLog
from pointbook_server.rpc.running_calls import RunningCalls
from pointbook_server.rpc.status_interceptor import StatusInterceptor


class DisconnectingContext:
    """The context of a call whose caller disconnects just as its status is sent."""

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """Return no metadata."""
        return ()

    def time_remaining(self) -> float:
        """Return the caller's remaining time."""
        return 1.0

    async def abort(self, *_status: object, **_metadata: object) -> None:
        """Fail as gRPC does."""
        raise grpc.aio.InternalError('Failed "execute_batch"')


async def test_caller_that_disconnects_at_its_status_is_not_an_error() -> None:
    """Any exception but a cancellation is logged by gRPC with a traceback."""

    async def refuse(_requests: object, _context: object) -> bytes:
        raise PointbookError(Reason.DEADLINE_EXCEEDED, "The call exceeded its deadline.")

    async def find_handler(_details: object) -> Any:
        return grpc.stream_unary_rpc_method_handler(refuse)

    class Details:
        method = "/pointbook.v1.PointsService/ApplyPointsUpdate"
        invocation_metadata: tuple[tuple[str, str | bytes], ...] = ()

    running_calls = RunningCalls()
    interceptor = StatusInterceptor(
        deadline_seconds=1.0, running_calls=running_calls, refusals=RefusalLog(), pacer=Pacer()
    )
    handler = await interceptor.intercept_service(find_handler, Details())

    with pytest.raises(asyncio.CancelledError):
        await handler.stream_unary(None, DisconnectingContext())
    await asyncio.wait_for(running_calls.drain(), 1)
