"""The TLS context of the shim's HTTPS, which reloads renewed certificates."""

import ssl
from pathlib import Path

import structlog

from pointbook_common.certificates import SettingFile, TlsFiles, TlsSource
from shopline_shim.settings import ShimSettings

log = structlog.get_logger()


def server_tls_source(settings: ShimSettings) -> TlsSource | None:
    """Return the certificate and key of the shim's HTTPS, or None for plain HTTP.

    Raises SettingError if the files are wrong.
    """
    cert, key = settings.http_tls_cert_file, settings.http_tls_key_file
    if cert is None or key is None:
        return None
    files = TlsFiles(
        cert=SettingFile("POINTBOOK_HTTP_TLS_CERT_FILE", cert), key=SettingFile("POINTBOOK_HTTP_TLS_KEY_FILE", key)
    )
    return TlsSource(files)


def build_tls_context(source: TlsSource) -> ssl.SSLContext:
    """Return a context that serves the newest certificate.

    Raises OSError if OpenSSL rejects the files, and ValueError if the source has no certificate.
    """
    cert, key = source.files.cert, source.files.key
    if cert is None or key is None:
        raise ValueError("a server needs a certificate and its key")
    try:
        loaded, context = source.current(), _load_context(cert.path, key.path)
    except OSError as error:
        raise OSError(f"{cert.variable}: {error}") from error
    initial_context = context

    def use_newest(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        nonlocal loaded, context
        material = source.current()
        if material is not loaded:
            # If the files change again before OpenSSL reads them, the next handshake sees other material and reloads.
            loaded = material
            try:
                context = _load_context(cert.path, key.path)
            except OSError as error:
                log.warning("changed TLS files are invalid, still using the previous ones", cause=str(error))
        connection.context = context

    initial_context.sni_callback = use_newest
    return initial_context


def _load_context(cert: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(cert, key)
    return context
