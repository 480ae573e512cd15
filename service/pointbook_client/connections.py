"""Connections that follow their credentials, as gRPC's own are immutable."""

import asyncio
import os
import threading
import time
from abc import ABC, abstractmethod
from typing import Generic, TypeVar
from weakref import WeakSet

import grpc

from pointbook_client.options import ConnectSettings
from pointbook_client.tls import CredentialsSource

CREDENTIALS_CHECK_SECONDS = 1.0
"""The interval at which a connection checks whether its credentials have changed."""
REPLACED_CHANNEL_SECONDS = 60.0
"""How long a replaced channel stays open for its calls."""

_AIO_CHANNELS: WeakSet[grpc.aio.Channel] = WeakSet()
"""The channels of asyncio that this process has opened, until they are freed."""
_INHERITED: list[grpc.aio.Channel] = []
"""Those that its parents had when they forked: gRPC would end this process if they were freed."""

C = TypeVar("C", bound="grpc.Channel | grpc.aio.Channel")


class Connection(ABC, Generic[C]):
    """A channel of grpcio that is replaced when its credentials change.

    Running calls finish on the replaced one. Without a source of credentials it is in plaintext.
    """

    def __init__(self, settings: ConnectSettings) -> None:
        self._target = settings.target
        self._options = settings.channel_options
        self._source = settings.credentials
        self._lock = threading.Lock()
        self._credentials = self._source() if self._source else None
        self._channel = self._open(self._credentials)
        self._checked_at = time.monotonic()
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        """Return whether `close` was called."""
        return self._is_closed

    def channel(self) -> C:
        """Return the channel for new calls.

        Raises RuntimeError after `close`, where grpcio may end the process.
        """
        if self._is_closed:
            raise RuntimeError("the client is closed")
        if self._source is not None and time.monotonic() - self._checked_at >= CREDENTIALS_CHECK_SECONDS:
            with self._lock:
                self._renew(self._source)
        return self._channel

    def _renew(self, source: CredentialsSource) -> None:
        """Replace the channel if its credentials have changed."""
        self._checked_at = time.monotonic()
        credentials = source()
        if credentials is not self._credentials:
            replaced = self._channel
            self._credentials, self._channel = credentials, self._open(credentials)
            self._close_later(replaced)

    @abstractmethod
    def _open(self, credentials: grpc.ChannelCredentials | None) -> C:
        """Open a channel of grpcio."""

    @abstractmethod
    def _close_later(self, replaced: C) -> None:
        """Close a channel after its calls have ended."""


class AioConnection(Connection[grpc.aio.Channel]):
    """A connection of the running event loop."""

    def __init__(self, settings: ConnectSettings) -> None:
        """Open it.

        Raises RuntimeError in a process that was forked while its parent had a client for asyncio.
        """
        self._loop = asyncio.get_running_loop()
        if _INHERITED:
            # gRPC would end this process, or not end its calls, even if those clients are closed.
            raise RuntimeError("this process was forked beside a client for asyncio: start it by `spawn`")
        self._closing: set[asyncio.Task[None]] = set()
        super().__init__(settings)

    def _open(self, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
        if credentials is None:
            channel = grpc.aio.insecure_channel(self._target, options=self._options)
        else:
            channel = grpc.aio.secure_channel(self._target, credentials, options=self._options)
        _AIO_CHANNELS.add(channel)
        return channel

    def _close_later(self, replaced: grpc.aio.Channel) -> None:
        task = self._loop.create_task(_close_after_calls(replaced))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def channel(self) -> grpc.aio.Channel:
        """Return the channel for new calls.

        Raises RuntimeError in another event loop, such as that of a forked process, where calls would never end.
        """
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("the client belongs to another event loop: connect in this one")
        return super().channel()

    async def close(self, grace: float | None) -> None:
        """Close the current and all replaced channels."""
        self._is_closed = True
        await self._channel.close(grace)
        closing = tuple(self._closing)
        for task in closing:
            task.cancel()
        await asyncio.gather(*closing, return_exceptions=True)


class SyncConnection(Connection[grpc.Channel]):
    """A connection for threads."""

    def __init__(self, settings: ConnectSettings) -> None:
        self._process = os.getpid()
        self._fork_lock = threading.Lock()
        self._inherited: tuple[grpc.Channel, ...] = ()
        """Channels that belong to the parent of this process."""
        self._replaced: list[tuple[float, grpc.Channel]] = []
        super().__init__(settings)

    def _open(self, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
        if credentials is None:
            return grpc.insecure_channel(self._target, options=self._options)
        return grpc.secure_channel(self._target, credentials, options=self._options)

    def channel(self) -> grpc.Channel:
        """Return the channel for new calls, in a forked process one of its own.

        There, calls on the channel of the parent fail, or hang beyond their deadlines.
        """
        if os.getpid() != self._process and not self._is_closed:
            with self._fork_lock:
                if os.getpid() != self._process:
                    self._reopen()
        return super().channel()

    def _reopen(self) -> None:
        """Open a channel for this process, and leave those of its parent alone."""
        self._inherited += (self._channel, *(channel for _, channel in self._replaced))
        self._replaced = []
        # Another thread of the parent may have held it, and does not run here.
        self._lock = threading.Lock()
        # gRPC would share the sockets of the parent between channels to the same address.
        self._options = (*self._options, ("grpc.use_local_subchannel_pool", 1))
        self._channel = self._open(self._credentials)
        self._process = os.getpid()

    def _close_later(self, replaced: grpc.Channel) -> None:
        """Close the channels that were replaced long ago.

        A thread for this would delay the end of the program.
        """
        now = time.monotonic()
        for replaced_at, channel in self._replaced:
            if now - replaced_at >= REPLACED_CHANNEL_SECONDS:
                channel.close()
        self._replaced = [(at, channel) for at, channel in self._replaced if now - at < REPLACED_CHANNEL_SECONDS]
        self._replaced.append((now, replaced))

    def close(self) -> None:
        """Close the current and all replaced channels."""
        self._is_closed = True
        self._channel.close()
        for _, channel in self._replaced:
            channel.close()


def _store_inherited() -> None:
    """Store the channels of asyncio that belong to the parent of this process."""
    _INHERITED.extend(_AIO_CHANNELS)
    _AIO_CHANNELS.clear()


if hasattr(os, "register_at_fork"):  # Windows has no forks.
    os.register_at_fork(after_in_child=_store_inherited)


async def _close_after_calls(replaced: grpc.aio.Channel) -> None:
    """Close a replaced channel after its calls have ended.

    gRPC's own grace ignores calls that have just started.
    """
    try:
        await asyncio.sleep(REPLACED_CHANNEL_SECONDS)
    finally:
        await replaced.close()
