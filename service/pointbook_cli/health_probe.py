"""Health checks of a running server or shim, for containers."""

import ssl
from dataclasses import replace
from pathlib import Path

import httpx
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import field_validator

from pointbook_cli.server_access import local_address
from pointbook_client import PointbookError
from pointbook_client.sync import PointbookClient, connect
from pointbook_common.certificates import SettingFile, TlsFiles, load, name_of
from shopline_shim.server_connection import ServerTls, client_tls_files, server_name_options, server_tls, to_credentials
from shopline_shim.settings import ShimSettings, split_address

TIMEOUT_SECONDS = 3.0


class ProbeSettings(ShimSettings):
    """The settings of a client, and the server's TLS files and health address."""

    health_address: str = ""

    tls_cert_file: Path | None = None
    tls_key_file: Path | None = None
    tls_client_ca_file: Path | None = None

    @field_validator("tls_cert_file", "tls_key_file", "tls_client_ca_file", mode="before")
    @classmethod
    def _unset_empty_files(cls, value: object) -> object:
        return None if value == "" else value


def probe_server(settings: ProbeSettings) -> tuple[bool, str]:
    """Return whether a gRPC server is serving, and why not.

    The cause is empty without TLS, which has few causes. Raises SettingError if TLS files are wrong.
    """
    has_tls = settings.server_ca_file is not None or settings.tls_cert_file is not None
    try:
        with _connect(settings, local_address(settings.health_address or settings.grpc_address)) as client:
            response = health_pb2_grpc.HealthStub(client.channel).Check(health_pb2.HealthCheckRequest())
    except PointbookError as error:
        return False, error.message if has_tls else ""
    except OSError as error:
        return False, str(error)
    return response.status == health_pb2.HealthCheckResponse.SERVING, ""


def _connect(settings: ProbeSettings, address: str) -> PointbookClient:
    """Connect without a token; with the server's TLS files, accept any certificate.

    A probe sends no secret, certificates seldom name the loopback address, and renewed files may not be in use yet.
    gRPC always verifies certificates, so it gets the one that the server has just presented as its CA. Raises OSError.
    """
    cert, key = settings.tls_cert_file, settings.tls_key_file
    if cert is None or key is None:
        tls = server_tls(settings)
    else:
        own = TlsFiles(SettingFile("POINTBOOK_TLS_CERT_FILE", cert), SettingFile("POINTBOOK_TLS_KEY_FILE", key))
        tls = _presented_tls(settings, address, own)
    return connect(address, timeout=TIMEOUT_SECONDS, retries=False, wait_for_ready=False, **tls)


def _presented_tls(settings: ProbeSettings, address: str, own: TlsFiles) -> ServerTls:
    """Return TLS that trusts the certificate which the server presents.

    The server's own certificate is that of the probe, if one is needed and none is set. Raises OSError.
    """
    presented = ssl.get_server_certificate(split_address(address), timeout=TIMEOUT_SECONDS).encode()
    files = TlsFiles()
    if settings.client_cert_file is not None:
        files = client_tls_files(settings) or files
    elif settings.tls_client_ca_file is not None:
        files = own
    credentials = to_credentials(replace(load(files), ca=presented))
    name = name_of(x509.load_pem_x509_certificate(presented))
    return ServerTls(tls=lambda: credentials, channel_options=server_name_options(name))


def probe_shim(settings: ShimSettings) -> tuple[bool, str]:
    """Return whether a shim is ready, and why not.

    The cause is the detail of its response; empty without a response.
    """
    address = local_address(settings.http_address)
    url = f"http{'s' if settings.http_tls_cert_file else ''}://{address}/readyz"
    try:
        response = httpx.get(url, timeout=TIMEOUT_SECONDS, trust_env=False, verify=_unverified_context())
        return response.is_success, "" if response.is_success else str(response.json()["detail"])
    except (httpx.HTTPError, ValueError, TypeError, KeyError):
        return False, ""


def _unverified_context() -> ssl.SSLContext:
    """Build a context that verifies no certificates; see `_connect`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
