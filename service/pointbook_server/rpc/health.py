"""The standard health service (grpc.health.v1).

It needs no token, so everything that a client can hold is bounded. Each stream is written by a task of its own, so a
client that does not read blocks only its own stream.
Source: https://github.com/grpc/grpc/blob/master/doc/health-checking.md
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from pointbook_server.errors import RETRY_AFTER_SECONDS, PointbookError
from pointbook_server.logs import CallRecord, current_call
from pointbook_server.reasons import Reason
from pointbook_server.rpc.call_log import FLOOD_LINES_MAX, OUTCOMES, CallLog
from pointbook_server.rpc.headers import read_headers
from pointbook_server.rpc.pacer import Pacer
from pointbook_server.rpc.request_fields import parse
from pointbook_server.rpc.request_reader import RequestReader
from pointbook_server.rpc.running_calls import current_task
from pointbook_server.rpc.status_mapping import NO_RETRY, abort

SERVICE_NAME = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
READ_SECONDS_MAX = 2.0
"""How long the request of a call may take to arrive. It is one name, so it usually comes with the call."""
WRITE_SECONDS_MAX = 5.0
"""How long a client may leave a response unread."""
REQUEST_BYTES_MAX = 256
READS_MAX = 16
"""Each can hold as much as the server's largest message until its time is up."""
CHECKS_MAX = 128
"""As many as delay each other by less than half a second: a Kubernetes probe times out after one."""
WATCHES_MAX = 256
STREAMS_OF_CONNECTION_MAX = 16
"""Per method: a client watches the services that it calls."""
UNREAD_MAX = 200
"""Above this number of unread streams, a connection gets one stream per method."""

Status = health_pb2.HealthCheckResponse


class _Stream:
    """One call of a connection.

    The server ends it if another connection needs its place.
    """

    def __init__(self, listener: "_Listener", peer: str, task: asyncio.Task[Any]) -> None:
        self.listener = listener
        self.peer = peer
        self.task = task
        self.started_at = monotonic()
        self.is_displaced = False
        self.has_read = False
        self.is_writing = False
        self.has_metadata_sent = False

    def displace(self) -> None:
        """End this stream in favour of another connection's."""
        self.is_displaced = True
        self.task.cancel()


class StreamLimit:
    """A bounded number of streams; no connection can lock out another.

    When all places are taken, the oldest stream of the connection with the most streams is ended.
    """

    def __init__(self, streams_max: int) -> None:
        self._streams_max = streams_max
        self._streams: dict[str, dict[_Stream, None]] = {}
        self._count = 0

    def add(self, stream: _Stream, streams_of_connection_max: int) -> None:
        """Count a stream. Raises QUEUE_FULL if its connection has too many."""
        if len(self._streams.get(stream.peer, ())) >= streams_of_connection_max:
            raise _too_many_streams()
        if self._count >= self._streams_max:
            largest: dict[_Stream, None] = max(self._streams.values(), key=len)
            oldest = next(iter(largest))
            self.discard(oldest)
            oldest.displace()
        self._streams.setdefault(stream.peer, {})[stream] = None
        self._count += 1

    def discard(self, stream: _Stream) -> None:
        """Stop counting a stream."""
        streams = self._streams.get(stream.peer, {})
        if stream in streams:
            self._count -= 1
            del streams[stream]
            if not streams:
                del self._streams[stream.peer]

    @contextmanager
    def holding(self, stream: _Stream, streams_of_connection_max: int) -> Iterator[None]:
        """Count a stream during a block. Raises QUEUE_FULL."""
        self.add(stream, streams_of_connection_max)
        try:
            yield
        finally:
            self.discard(stream)


class _Listener:
    """What the clients of one listener hold.

    Listeners are separate, so that clients of one cannot block or slow clients of another.
    """

    def __init__(self) -> None:
        self.reads = StreamLimit(READS_MAX)
        self.checks = StreamLimit(CHECKS_MAX)
        self.watches = StreamLimit(WATCHES_MAX)
        self.checks_pacer = Pacer()
        self.watches_pacer = Pacer()
        self.unread: Counter[str] = Counter()
        """The unread streams of each connection. They end with the connection."""


class HealthService:
    """Serves Check and Watch for a fixed set of services with one common status.

    It needs no token, so refusals of all kinds can come in floods.
    """

    def __init__(self, services: Iterable[str], pacer: Pacer) -> None:
        self._services = frozenset(("", *services))
        self._log = CallLog(FLOOD_LINES_MAX)
        self._refused_pacer = pacer
        self._is_serving = False
        self._is_stopping = False
        self._has_ended = False
        self._changed = asyncio.Event()
        self._requests = RequestReader(READ_SECONDS_MAX)
        self._listeners: list[_Listener] = []

    def add_to_server(self, server: grpc.aio.Server) -> None:
        """Add the service to a server, with limits of its own.

        Both methods are served as streams, because gRPC waits without a limit for the request and the response of a
        unary method.
        """
        listener = _Listener()
        self._listeners.append(listener)
        behaviours = {
            "Check": self._limited(listener, listener.checks, listener.checks_pacer, self._check),
            "Watch": self._limited(listener, listener.watches, listener.watches_pacer, self._watch),
        }
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            name: grpc.stream_stream_rpc_method_handler(behaviour, response_serializer=Status.SerializeToString)
            for name, behaviour in behaviours.items()
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))

    def set_serving(self, serving: bool) -> None:  # noqa: FBT001 - the value that is set, not an option
        """Set the status of all services. After `stop` it stays NOT_SERVING."""
        if serving != self._is_serving and not (serving and self._is_stopping):
            self._is_serving = serving
            self._wake_watches()

    @property
    def is_serving(self) -> bool:
        """Whether the status is SERVING."""
        return self._is_serving

    def stop(self) -> None:
        """Set NOT_SERVING for good. Watches continue until `end_watches`."""
        self._is_stopping = True
        self.set_serving(False)

    def end_watches(self) -> None:
        """End all watches, so that a stopping server does not wait for them."""
        self._has_ended = True
        self._wake_watches()

    def _wake_watches(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _limited(
        self,
        listener: _Listener,
        limit: StreamLimit,
        pacer: Pacer,
        respond: Callable[[str, Any, _Stream], Awaitable[None]],
    ) -> Callable[[Any, Any], Awaitable[None]]:
        """Return a method's handler that enforces the limits of time and streams."""

        async def call(_requests: object, context: Any) -> None:
            task = current_task()
            stream = _Stream(listener, context.peer(), task)
            try:
                if listener.unread[stream.peer]:
                    raise _too_many_streams()
                streams_max = STREAMS_OF_CONNECTION_MAX if listener.unread.total() < UNREAD_MAX else 1
                with limit.holding(stream, streams_max):
                    await pacer.wait()
                    await respond(await self._read(context, stream), context, stream)
            except PointbookError as error:
                await self._end(context, error, stream)
            except asyncio.CancelledError:
                if not stream.is_displaced:
                    raise
                task.uncancel()
                await self._end(context, _too_many_streams(), stream)

        return call

    async def _read(self, context: Any, stream: _Stream) -> str:
        """Return the name of the service that a call asks about."""
        with stream.listener.reads.holding(stream, STREAMS_OF_CONNECTION_MAX):
            stream.has_read = True
            request = await self._requests.read(context, stream.task)
        if len(request) > REQUEST_BYTES_MAX:
            raise PointbookError(Reason.INVALID_FIELDS, f"A health request has at most {REQUEST_BYTES_MAX} bytes.")
        service: str = parse(health_pb2.HealthCheckRequest.FromString, request).service
        return service

    async def _write(self, context: Any, status: int, stream: _Stream) -> None:
        """Write a status. Raises DEADLINE_EXCEEDED if the client does not read it in time."""
        stream.is_writing = True
        try:
            async with asyncio.timeout(WRITE_SECONDS_MAX):
                if not stream.has_metadata_sent:
                    # gRPC cannot end a stream with an error while its metadata is in flight together with a message.
                    await context.send_initial_metadata(())
                    stream.has_metadata_sent = True
                await context.write(Status(status=status))
        except TimeoutError:
            raise PointbookError(Reason.DEADLINE_EXCEEDED, "The response was not read in time.") from None
        stream.is_writing = False

    async def _end(self, context: Any, error: PointbookError, stream: _Stream) -> None:
        """End a stream with an error.

        The error is sent after any unread response, so this can take as long as the client likes. Until then, its
        connection gets no further stream.
        """
        unread = stream.listener.unread
        unread[stream.peer] += stream.is_writing
        try:
            # gRPC continues to receive a request once the read has started, so such a stream must not be delayed.
            if not stream.has_read:
                await self._refused_pacer.wait()
            call = CallRecord("Health", read_headers(context.invocation_metadata()).request_id, stream.started_at)
            current_call.set(call)
            await abort(context, error, call.request_id)
        except grpc.aio.AbortError:
            self._log.write(call, OUTCOMES[error.reason])
            raise
        finally:
            unread[stream.peer] -= stream.is_writing
            if not unread[stream.peer]:
                del unread[stream.peer]

    async def _check(self, service: str, context: Any, stream: _Stream) -> None:
        if service not in self._services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service", trailing_metadata=NO_RETRY)
        await self._write(context, Status.SERVING if self._is_serving else Status.NOT_SERVING, stream)

    async def _watch(self, service: str, context: Any, stream: _Stream) -> None:
        """Write the status whenever it differs from the one written last."""
        written: int | None = None
        while not self._has_ended:
            changed = self._changed
            if service not in self._services:
                status = Status.SERVICE_UNKNOWN
            else:
                status = Status.SERVING if self._is_serving else Status.NOT_SERVING
            if status != written:
                await self._write(context, status, stream)
                written = status
            else:
                await changed.wait()
        raise PointbookError(Reason.SHUTTING_DOWN, "This server is stopping.", retry_after_seconds=RETRY_AFTER_SECONDS)


def _too_many_streams() -> PointbookError:
    return PointbookError(
        Reason.QUEUE_FULL, "Too many concurrent health calls; retry.", retry_after_seconds=RETRY_AFTER_SECONDS
    )
