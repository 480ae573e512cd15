"""HTTPS of the shim, where no proxy serves it: a context that follows its certificate's files."""

import asyncio
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from pointbook_common.certificates import SettingFile, TlsFiles, TlsSource
from shopline_shim.connections import Connections
from shopline_shim.deadlines import DeadlineProtocol
from shopline_shim.settings import ShimSettings

log = structlog.get_logger()


_ACCEPTED_AT_ONCE = 32
_FULL_SECONDS = 0.1
"""How long to wait where the system has no file for another connection."""


@dataclass(frozen=True, slots=True)
class Tls:
    """How connections begin and end: uvicorn has no setting for that, and leaves strangers a minute."""

    context: ssl.SSLContext
    handshake_seconds: float


class TlsListener:
    """Accepts connections that count from their first moment: asyncio shows none before the end of its handshake.

    Without that, strangers who begin no handshake hold any number of files.
    """

    def __init__(
        self, tls: Tls, listener: socket.socket, protocol: Callable[..., DeadlineProtocol], connections: Connections
    ) -> None:
        self._tls = tls
        self._listener = listener
        self._protocol = protocol
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.TimerHandle | None = None
        self._handshakes: set[asyncio.Task[None]] = set()
        listener.setblocking(False)  # noqa: FBT003 - it is its only argument
        self._listen()

    def close(self) -> None:
        """Accept no more, and break off what has not brought a request yet."""
        self._loop.remove_reader(self._listener)
        if self._waiting is not None:
            self._waiting.cancel()
        for handshake in self._handshakes:
            handshake.cancel()

    async def wait_closed(self) -> None:
        """Wait for the ends of all handshakes."""
        await asyncio.gather(*self._handshakes, return_exceptions=True)

    def _listen(self) -> None:
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        """Accept some of the connections that wait, so that those which are cut for them can close in between."""
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                accepted, _address = self._listener.accept()
            except BlockingIOError:
                return
            except ConnectionError:
                continue
            except OSError:
                self._loop.remove_reader(self._listener)
                self._waiting = self._loop.call_later(_FULL_SECONDS, self._listen)
                return
            task = self._loop.create_task(self._shake_hands(accepted))
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)

    async def _shake_hands(self, accepted: socket.socket) -> None:
        accepted.setblocking(False)  # noqa: FBT003 - it is its only argument
        protocol = self._protocol(accepted=accepted)
        self._connections.add(protocol)
        try:
            await self._loop.connect_accepted_socket(
                lambda: protocol,
                accepted,
                ssl=self._tls.context,
                ssl_handshake_timeout=self._tls.handshake_seconds,
                ssl_shutdown_timeout=self._tls.handshake_seconds,
            )
        except OSError:
            # Nothing is logged of strangers who send no TLS, or nothing.
            self._connections.remove(protocol)


def server_context(settings: ShimSettings) -> ssl.SSLContext | None:
    """Build a context that uses the newest certificate at every handshake; None where the shim speaks HTTP.

    Raises SettingError where the files are wrong, and OSError where OpenSSL refuses them.
    """
    cert, key = settings.http_tls_cert_file, settings.http_tls_key_file
    if cert is None or key is None:
        return None
    variable = "POINTBOOK_HTTP_TLS_CERT_FILE"
    source = TlsSource(TlsFiles(cert=SettingFile(variable, cert), key=SettingFile("POINTBOOK_HTTP_TLS_KEY_FILE", key)))
    try:
        served, context = source.current(), _context(cert, key)
    except OSError as error:
        raise OSError(f"{variable}: {error}") from error
    first = context

    def choose(connection: ssl.SSLObject, _name: str | None, _context_before: ssl.SSLContext) -> None:
        nonlocal served, context
        material = source.current()
        if material is not served:
            # Where the files have changed again since they were read, so will the material have at the next handshake.
            served = material
            try:
                context = _context(cert, key)
            except OSError as error:
                log.warning("changed TLS files are invalid, still using the previous ones", cause=str(error))
        connection.context = context

    first.sni_callback = choose
    return first


def _context(cert: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(cert, key)
    return context
