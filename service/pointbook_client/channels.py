"""Channels whose calls have the client's deadline, metadata and exceptions."""

import asyncio
from collections.abc import Iterable
from typing import Any, Generic, NoReturn, Self

import grpc

from pointbook_client.calls import CallDefaults, size_error
from pointbook_client.connections import AioConnection, C, Connection, SyncConnection

OwnMetadata = Iterable[tuple[str, str | bytes]]


class _Method(Generic[C]):
    """A method of the server on the current channel of a connection."""

    def __init__(self, connection: Connection[C], defaults: CallDefaults, name: str, coders: dict[str, Any]) -> None:
        self._connection = connection
        self._defaults = defaults
        self._name = name
        self._serializer = coders.pop("request_serializer", None)
        self._coders = coders
        self._last: tuple[C, Any] | None = None

    def _current(self) -> Any:
        """Return grpcio's callable of this method."""
        channel, last = self._connection.channel(), self._last
        if last is None or last[0] is not channel:
            last = (channel, channel.unary_unary(self._name, **self._coders))
            self._last = last
        return last[1]

    def _serialize(self, request: Any) -> bytes:
        """Return a request as it is sent.

        Raises InvalidFieldsError if it is too large, and TypeError if it is no message.
        """
        serialized: bytes = self._serializer(request) if self._serializer else request
        if error := size_error(len(serialized)):
            raise error
        return serialized


class _AioMethod(_Method[grpc.aio.Channel]):
    async def __call__(
        self,
        request: Any,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - gRPC's own
        metadata: OwnMetadata | None = None,
        **more: Any,
    ) -> Any:
        """Call the method, and return its response. Raises PointbookError."""
        serialized, seconds = self._serialize(request), self._defaults.timeout(timeout)
        with self._defaults.running(self._name, metadata) as sent:
            try:
                return await self._current()(serialized, timeout=seconds, metadata=sent, **more)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if self._connection.is_closed and task is not None and not task.cancelling():
                    # `close` has cancelled the call. Its task goes on, and must not end as if it were cancelled.
                    raise _closed() from None
                raise


class _SyncMethod(_Method[grpc.Channel]):
    def __call__(
        self, request: Any, timeout: float | None = None, metadata: OwnMetadata | None = None, **more: Any
    ) -> Any:
        """Call the method, and return its response. Raises PointbookError."""
        serialized, seconds = self._serialize(request), self._defaults.timeout(timeout)
        with self._defaults.running(self._name, metadata) as sent:
            return self._current()(serialized, timeout=seconds, metadata=sent, **more)

    # The types of stubs have these two as well. They would raise grpcio's errors, so they say what to use instead.

    def with_call(self, *_: Any, **__: Any) -> NoReturn:
        """Raise NotImplementedError, as errors have the metadata that matter."""
        raise NotImplementedError("call the method itself")

    def future(self, *_: Any, **__: Any) -> NoReturn:
        """Raise NotImplementedError, as threads or asyncio make concurrent calls."""
        raise NotImplementedError("call the method in a thread, or use the client for asyncio")


class _Streams:
    """The methods with streams, which are grpcio's own.

    The API has none, but health and reflection do.
    """

    _connection: Connection[Any]

    def unary_stream(self, method: str, *coders: Any, **more: Any) -> Any:
        """Return a callable of the current channel."""
        return self._connection.channel().unary_stream(method, *coders, **more)

    def stream_unary(self, method: str, *coders: Any, **more: Any) -> Any:
        """Return a callable of the current channel."""
        return self._connection.channel().stream_unary(method, *coders, **more)

    def stream_stream(self, method: str, *coders: Any, **more: Any) -> Any:
        """Return a callable of the current channel."""
        return self._connection.channel().stream_stream(method, *coders, **more)


class AioChannel(_Streams, grpc.aio.Channel):
    """A channel for the stubs of asyncio."""

    def __init__(self, connection: AioConnection, defaults: CallDefaults) -> None:
        self._connection: AioConnection = connection
        self.defaults = defaults

    def with_defaults(self, defaults: CallDefaults) -> "AioChannel":
        """Return a channel with other defaults over the same connection."""
        return AioChannel(self._connection, defaults)

    def unary_unary(self, method: str, *coders: Any, **more: Any) -> Any:
        """Return a callable that makes each call on the current channel."""
        names = ("request_serializer", "response_deserializer")
        return _AioMethod(self._connection, self.defaults, method, {**dict(zip(names, coders, strict=False)), **more})

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:  # noqa: FBT001, FBT002 - gRPC's own
        """Return the state of the current channel."""
        return self._connection.channel().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Wait until the current channel has another state."""
        await self._connection.channel().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Wait until the current channel is connected."""
        await self._connection.channel().channel_ready()

    async def close(self, grace: float | None = None) -> None:
        """Close the connection."""
        await self._connection.close(grace)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class SyncChannel(_Streams, grpc.Channel):
    """A channel for the stubs of threads."""

    def __init__(self, connection: SyncConnection, defaults: CallDefaults) -> None:
        self._connection: SyncConnection = connection
        self.defaults = defaults

    def with_defaults(self, defaults: CallDefaults) -> "SyncChannel":
        """Return a channel with other defaults over the same connection."""
        return SyncChannel(self._connection, defaults)

    def unary_unary(self, method: str, *coders: Any, **more: Any) -> Any:
        """Return a callable that makes each call on the current channel."""
        names = ("request_serializer", "response_deserializer")
        return _SyncMethod(self._connection, self.defaults, method, {**dict(zip(names, coders, strict=False)), **more})

    def subscribe(self, callback: Any, try_to_connect: bool | None = None) -> None:  # noqa: FBT001 - gRPC's own
        """Call back when the state of the current channel changes."""
        self._connection.channel().subscribe(callback, try_to_connect or False)

    def unsubscribe(self, callback: Any) -> None:
        """Stop calling back."""
        self._connection.channel().unsubscribe(callback)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _closed() -> grpc.aio.AioRpcError:
    """Return the error of a call that `close` has ended, as in threads."""
    return grpc.aio.AioRpcError(
        grpc.StatusCode.CANCELLED, grpc.aio.Metadata(), grpc.aio.Metadata(), details="Channel closed!"
    )
