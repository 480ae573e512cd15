"""HTTPS of the shim, where no proxy serves it: a context that follows its certificate's files."""

import asyncio
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from pointbook_server.certificates import SettingFile, TlsFiles, TlsSource
from shopline_shim.settings import ShimSettings

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Tls:
    """How connections begin and end: uvicorn has no setting for that, and leaves strangers a minute."""

    context: ssl.SSLContext
    handshake_seconds: float

    async def listen(self, protocol: Callable[[], asyncio.Protocol], listener: socket.socket) -> asyncio.Server:
        """Accept connections of a listening socket. Each may take a bounded time for its handshake, and its goodbye."""
        return await asyncio.get_running_loop().create_server(
            protocol,
            sock=listener,
            ssl=self.context,
            ssl_handshake_timeout=self.handshake_seconds,
            ssl_shutdown_timeout=self.handshake_seconds,
        )


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
                log.warning("changed TLS files are not used yet", cause=str(error))
        connection.context = context

    first.sni_callback = choose
    return first


def _context(cert: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(cert, key)
    return context
