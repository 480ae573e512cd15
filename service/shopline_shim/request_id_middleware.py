"""The outermost ASGI middleware: request ids, and a response for every exception."""

import asyncio
import uuid

import structlog
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shopline_shim.responses import INTERNAL, RETRY_AFTER, STOPPING

log = structlog.get_logger()


class RequestIdMiddleware:
    """ASGI middleware for request ids and uncaught exceptions.

    The id is `request.state.request_id` and the response header X-Request-Id. An uncaught exception is logged with the
    id, and the response is a problem without the exception's message.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application for one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        response_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal response_started
            if message["type"] == "http.response.start":
                response_started = True
                MutableHeaders(scope=message).append("X-Request-Id", request_id)
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            log.exception("unexpected error", request_id=request_id)
            response = INTERNAL.response()
        except asyncio.CancelledError:  # Only uvicorn cancels requests, at the end of the drain timeout.
            response = STOPPING.response(RETRY_AFTER)
        else:
            return
        if not response_started:
            await response(scope, receive, send_with_id)
