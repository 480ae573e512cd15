"""The handlers of methods in situations that gRPC cannot be made to produce."""

import asyncio
from typing import Any

import grpc
import pytest

from pointbook_server.errors import PointbookError
from pointbook_server.metrics import Metrics
from pointbook_server.reasons import Reason
from pointbook_server.rpc.admission import Admission
from pointbook_server.rpc.authentication import Authenticator
from pointbook_server.rpc.call_log import CallLog
from pointbook_server.rpc.method_handlers import MethodHandlers
from pointbook_server.rpc.pacer import Pacer
from pointbook_server.rpc.running_calls import RunningCalls
from support.call_costs import Details

METHOD = "/pointbook.v1.PointsService/ApplyPointsUpdate"


class DisconnectingContext:
    """The context of a call whose caller disconnects just as its status is sent."""

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """Return no metadata."""
        return ()

    def time_remaining(self) -> float:
        """Return the caller's remaining time."""
        return 1.0

    async def read(self) -> bytes:
        """Return an empty request."""
        return b""

    async def abort(self, *_status: object, **_metadata: object) -> None:
        """Fail as gRPC does."""
        raise grpc.aio.InternalError('Failed "execute_batch"')


async def test_caller_that_disconnects_at_its_status_is_not_an_error() -> None:
    """Any exception but a cancellation is logged by gRPC with a traceback."""

    async def refuse(_request: object, _context: object) -> bytes:
        raise PointbookError(Reason.DEADLINE_EXCEEDED, "The call exceeded its deadline.")

    running_calls = RunningCalls()
    handlers = MethodHandlers(
        Authenticator(None),
        Admission(token_calls_max=1, token_calls_per_second_max=0, check_clock=lambda: None),
        running_calls,
        deadline_seconds=1.0,
        call_log=CallLog(10),
        metrics=Metrics(),
        pacer=Pacer(),
    )
    service, name = METHOD[1:].split("/")
    handlers.add_registered_method_handlers(service, {name: grpc.unary_unary_rpc_method_handler(refuse)})
    handler: Any = handlers.service(Details(METHOD))

    with pytest.raises(asyncio.CancelledError):
        await handler.stream_unary(None, DisconnectingContext())
    await asyncio.wait_for(running_calls.drain(), 1)
