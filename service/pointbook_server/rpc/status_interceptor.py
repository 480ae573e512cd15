"""The outermost interceptor: request ids, deadlines, and statuses of errors."""

import asyncio
import random
import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc
import structlog

from pointbook_server.access.model import current_principal
from pointbook_server.errors import PointbookError
from pointbook_server.logs import current_call
from pointbook_server.reasons import Reason
from pointbook_server.rpc.refusal_limits import Pacer, RefusalLog
from pointbook_server.rpc.running_calls import RunningCalls
from pointbook_server.rpc.status_mapping import REQUEST_ID_HEADER, abort, grpc_code

PACED_CODES = frozenset({grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED})
"""The refusals that callers without a valid token can repeat at will: an invalid token, or too many token look-ups."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

log = structlog.get_logger()


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the handlers of unary responses.

    Health and reflection stream theirs, and send their own statuses.
    """

    def __init__(
        self, *, deadline_seconds: float, running_calls: RunningCalls, refusals: RefusalLog, pacer: Pacer
    ) -> None:
        self._deadline_seconds = deadline_seconds
        self._running_calls = running_calls
        self._refusals = refusals
        self._pacer = pacer
        self._handlers: dict[str, Any] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap a method's handler, once for all calls.

        A handler that refuses one call is not cached. The wrapped handler gets the call's metadata instead of a
        request, and reads the request from the context: gRPC builds the metadata again each time it is asked for it, so
        it is read once.
        """
        wrapped = self._handlers.get(handler_call_details.method)
        if wrapped is not None:
            return wrapped
        handler = await continuation(handler_call_details)
        if handler is None or handler.response_streaming:
            return handler
        wrapped = grpc.stream_unary_rpc_method_handler(
            self._wrap(handler.stream_unary, handler_call_details.method),
            request_deserializer=None,
            response_serializer=handler.response_serializer,
        )
        if handler.response_serializer is not None:
            self._handlers[handler_call_details.method] = wrapped
        return wrapped

    def _wrap(
        self, behaviour: Callable[[Any, Any], Awaitable[Any]], method: str
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        async def call(_requests: object, context: Any) -> Any:
            task = self._running_calls.add_current()
            metadata = context.invocation_metadata()
            request_id = request_id_of(metadata)
            current_call.set({"request_id": request_id, "method": method})
            try:
                return await self._run(behaviour, metadata, context)
            except PointbookError as error:
                if current_principal.get(None) is None and grpc_code(error.reason) in PACED_CODES:
                    await self._pacer.wait()
                await abort(context, error, request_id, self._refusals)
            except asyncio.CancelledError:
                if task.cancelling():
                    raise
                # The call itself was not cancelled, so its client is still waiting for a status.
                log.exception("stray cancellation")
                await abort(context, _internal_error(request_id), request_id, self._refusals)
            except Exception:
                log.exception("internal error")
                await abort(context, _internal_error(request_id), request_id, self._refusals)
            finally:
                self._running_calls.discard(task)

        return call

    async def _run(self, behaviour: Callable[[Any, Any], Awaitable[Any]], metadata: Any, context: Any) -> Any:
        """Run a handler until the caller's or the server's deadline.

        Raises DEADLINE_EXCEEDED.
        """
        remaining = context.time_remaining()
        seconds = self._deadline_seconds if remaining is None else min(remaining, self._deadline_seconds)
        deadline = asyncio.timeout(seconds)
        try:
            async with deadline:
                return await behaviour(metadata, context)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise PointbookError(Reason.DEADLINE_EXCEEDED, "The call exceeded its deadline.") from None


def request_id_of(metadata: Iterable[tuple[str, str | bytes]] | None) -> str:
    """Return the caller's request id if it is safe to log, otherwise a new one."""
    for key, value in metadata or ():
        if key == REQUEST_ID_HEADER and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
            return value
    return f"{random.getrandbits(64):016x}"


def _internal_error(request_id: str) -> PointbookError:
    return PointbookError(
        Reason.INTERNAL,
        "An internal error occurred; the server's log has the cause under the request id.",
        metadata={"request_id": request_id},
    )
