"""TLS of probes with a server whose certificate is not verified."""

import ssl
from dataclasses import replace
from pathlib import Path

from cryptography import x509

from pointbook_common.certificates import SettingFile, TlsFiles, load, name_of
from shopline_shim.server_connection import ServerTls, server_name_options
from shopline_shim.server_credentials import client_tls_files, to_credentials
from shopline_shim.settings import ShimSettings, split_address


def presented_tls(
    settings: ShimSettings, address: str, own: tuple[Path, Path] | None, *, timeout_seconds: float
) -> ServerTls:
    """Return TLS that trusts the certificate which the server presents.

    `own` are the server's own certificate and key, if it needs one of its clients: the probe presents them if the
    settings have no other. Raises OSError.
    """
    presented = ssl.get_server_certificate(split_address(address), timeout=timeout_seconds).encode()
    files = TlsFiles()
    if settings.client_cert_file is not None:
        files = client_tls_files(settings)
    elif own is not None:
        cert, key = own
        files = TlsFiles(SettingFile("POINTBOOK_TLS_CERT_FILE", cert), SettingFile("POINTBOOK_TLS_KEY_FILE", key))
    credentials = to_credentials(replace(load(files), ca=presented))
    name = name_of(x509.load_pem_x509_certificate(presented))
    return ServerTls(tls=lambda: credentials, channel_options=server_name_options(name))
