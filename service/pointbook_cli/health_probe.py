"""Health checks of a running server or shim, for containers."""

import ssl
from pathlib import Path

import grpc
import httpx
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import field_validator

from pointbook_cli.server_channel import local_address
from pointbook_common.certificates import SettingFile, TlsFiles, load, name_of
from shopline_shim.grpc_channel import channel_credentials, client_tls_files, open_channel
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
        with _open_channel(settings, local_address(settings.health_address or settings.grpc_address)) as channel:
            response = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=TIMEOUT_SECONDS
            )
    except grpc.RpcError as error:
        return False, str(error.details()) if has_tls else ""
    except OSError as error:
        return False, str(error)
    return response.status == health_pb2.HealthCheckResponse.SERVING, ""


def _open_channel(settings: ProbeSettings, address: str) -> grpc.Channel:
    """Open a channel; with the server's TLS files, accept any certificate.

    A probe sends no secret, certificates seldom name the loopback address, and renewed files may not be in use yet.
    gRPC always verifies certificates, so it gets the one that the server has just presented as its CA. Raises OSError.
    """
    cert, key = settings.tls_cert_file, settings.tls_key_file
    if cert is None or key is None:
        return open_channel(settings, address)
    presented = ssl.get_server_certificate(split_address(address), timeout=TIMEOUT_SECONDS).encode()
    files = TlsFiles()
    if settings.client_cert_file is not None:
        files = client_tls_files(settings) or files
    elif settings.tls_client_ca_file is not None:
        files = TlsFiles(SettingFile("POINTBOOK_TLS_CERT_FILE", cert), SettingFile("POINTBOOK_TLS_KEY_FILE", key))
    identity = load(files)
    options = (
        ("grpc.enable_http_proxy", 0),
        ("grpc.ssl_target_name_override", name_of(x509.load_pem_x509_certificate(presented))),
    )
    return grpc.secure_channel(address, channel_credentials(presented, identity), options=options)


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
    """Build a context that verifies no certificates; see `_open_channel`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
