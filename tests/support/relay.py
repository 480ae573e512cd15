"""A relay in front of a server, which fails calls and loses responses."""

from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_status import rpc_status

from pointbook_server.errors import PointbookError
from pointbook_server.reasons import Reason
from pointbook_server.rpc.status_mapping import PUSHBACK_HEADER, to_status

Context = grpc.aio.ServicerContext[bytes, bytes]


@dataclass
class Relay:
    """Forwards calls, and counts them."""

    address: str
    channel: grpc.aio.Channel
    calls: Counter[str] = field(default_factory=Counter)
    """The number of calls of each method since the last reset."""
    tokens: set[str] = field(default_factory=set)
    """The authorization metadata of all calls."""
    refusals: defaultdict[str, list[int | None]] = field(default_factory=lambda: defaultdict(list))
    """By method, the pushback in milliseconds of each of the next calls, which are refused with UNAVAILABLE."""
    losses: dict[str, Callable[[], Awaitable[object]]] = field(default_factory=dict)
    """By method, what happens after the next call was forwarded; its response is then lost."""

    def reset(self) -> None:
        """Forward all calls, and count from 0."""
        for stored in (self.calls, self.tokens, self.refusals, self.losses):
            stored.clear()

    async def forward(self, method: str, request: bytes, context: Context) -> bytes:
        """Forward a call, or fail as the test set."""
        name = method.rpartition("/")[2]
        self.calls[name] += 1
        self.tokens |= {str(value) for key, value in context.invocation_metadata() or () if key == "authorization"}
        if self.refusals[name]:
            await _refuse(context, self.refusals[name].pop(0))
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary(method)
        try:
            # The server may be restarting.
            response = await call(request, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            await context.abort(error.code(), error.details() or "", tuple(error.trailing_metadata()))
        if name in self.losses:
            await self.losses.pop(name)()
            # What a client reports for a connection that broke: no details, no pushback.
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection was lost")
        return response


class _AllMethods(grpc.GenericRpcHandler):
    """Serves every unary method, whose messages stay bytes."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Return a handler that forwards a call."""

        async def forward(request: bytes, context: Context) -> bytes:
            return await self._relay.forward(handler_call_details.method, request, context)

        return grpc.unary_unary_rpc_method_handler(forward)


@asynccontextmanager
async def relay_to(target: str, credentials: grpc.ServerCredentials | None = None) -> AsyncIterator[Relay]:
    """Forward calls to a server during the block, with credentials by TLS."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    async with grpc.aio.insecure_channel(target, options=[("grpc.max_reconnect_backoff_ms", 200)]) as channel:
        if credentials is None:
            port = server.add_insecure_port("127.0.0.1:0")
        else:
            port = server.add_secure_port("127.0.0.1:0", credentials)
        relay = Relay(f"127.0.0.1:{port}", channel)
        server.add_generic_rpc_handlers((_AllMethods(relay),))
        await server.start()
        try:
            yield relay
        finally:
            await server.stop(None)


async def _refuse(context: Context, pushback_ms: int | None) -> None:
    """Refuse a call as a server whose database is unavailable."""
    error = PointbookError(Reason.DATABASE_UNAVAILABLE, "The database is unavailable.", retry_after_seconds=1.0)
    status = rpc_status.to_status(to_status(error))
    pushback = () if pushback_ms is None else ((PUSHBACK_HEADER, str(pushback_ms)),)
    await context.abort(status.code, status.details, (*status.trailing_metadata, *pushback))
