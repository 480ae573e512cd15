"""A listener for TLS connections that counts them before their handshake."""

import asyncio
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass

from shopline_shim.connection_limits import ConnectionLimits
from shopline_shim.http_protocol import LimitedHttpProtocol

_ACCEPT_BATCH = 32
_RETRY_SECONDS = 0.1
"""The pause after the system had no file descriptor for another connection."""


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """The TLS context, and a handshake timeout: uvicorn always waits a minute."""

    context: ssl.SSLContext
    handshake_timeout_seconds: float


class TlsListener:
    """An acceptor that adds connections to the limits as soon as they are accepted.

    asyncio creates the protocol only after the handshake, so clients that never start one could exhaust the file
    descriptors.
    """

    def __init__(
        self,
        tls: TlsOptions,
        listener: socket.socket,
        protocol: Callable[..., LimitedHttpProtocol],
        limits: ConnectionLimits,
    ) -> None:
        self._tls = tls
        self._listener = listener
        self._protocol = protocol
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._retry_timer: asyncio.TimerHandle | None = None
        self._handshakes: set[asyncio.Task[None]] = set()
        listener.setblocking(False)  # noqa: FBT003 - it is its only argument
        self._listen()

    def close(self) -> None:
        """Stop accepting, and cancel running handshakes."""
        self._loop.remove_reader(self._listener)
        if self._retry_timer is not None:
            self._retry_timer.cancel()
        for handshake in self._handshakes:
            handshake.cancel()

    async def wait_closed(self) -> None:
        """Wait until all handshakes have ended."""
        await asyncio.gather(*self._handshakes, return_exceptions=True)

    def _listen(self) -> None:
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        """Accept a batch of connections.

        Between batches the loop closes the connections that were evicted for them.
        """
        for _ in range(_ACCEPT_BATCH):
            try:
                accepted, _address = self._listener.accept()
            except BlockingIOError:
                return
            except ConnectionError:
                continue
            except OSError:
                self._loop.remove_reader(self._listener)
                self._retry_timer = self._loop.call_later(_RETRY_SECONDS, self._listen)
                return
            task = self._loop.create_task(self._start_tls(accepted))
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)

    async def _start_tls(self, accepted: socket.socket) -> None:
        accepted.setblocking(False)  # noqa: FBT003 - it is its only argument
        protocol = self._protocol(accepted=accepted)
        self._limits.add(protocol)
        try:
            await self._loop.connect_accepted_socket(
                lambda: protocol,
                accepted,
                ssl=self._tls.context,
                ssl_handshake_timeout=self._tls.handshake_timeout_seconds,
                ssl_shutdown_timeout=self._tls.handshake_timeout_seconds,
            )
        except OSError:
            # A failed handshake is not logged: anyone can cause it.
            self._limits.remove(protocol)
