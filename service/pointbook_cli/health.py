"""Asking a running process how it is, as container health checks do."""

import ssl
from pathlib import Path

import grpc
import httpx
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import field_validator

from pointbook_common.certificates import SettingFile, TlsFiles, load, name_of
from shopline_shim.grpc_channel import channel_credentials, client_tls_files, open_channel
from shopline_shim.settings import ShimSettings, split_address

TIMEOUT_SECONDS = 3.0


class ProbeSettings(ShimSettings):
    """The settings of a client, and those of a server beside it: its TLS, and the address that answers health alone."""

    health_address: str = ""

    tls_cert_file: Path | None = None
    tls_key_file: Path | None = None
    tls_client_ca_file: Path | None = None

    @field_validator("tls_cert_file", "tls_key_file", "tls_client_ca_file", mode="before")
    @classmethod
    def _unset_empty_files(cls, value: object) -> object:
        return None if value == "" else value


def server_state(settings: ProbeSettings) -> tuple[bool, str]:
    """Return whether a gRPC server is serving, and with TLS, which fails in many ways, why it cannot be asked.

    Raises SettingError where TLS files are wrong.
    """
    has_tls = settings.server_ca_file is not None or settings.tls_cert_file is not None
    try:
        with _channel(settings, local_address(settings.health_address or settings.grpc_address)) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_SECONDS)
    except grpc.RpcError as error:
        return False, str(error.details()) if has_tls else ""
    except OSError as error:
        return False, str(error)
    return answer.status == health_pb2.HealthCheckResponse.SERVING, ""


def _channel(settings: ProbeSettings, address: str) -> grpc.Channel:
    """Open a channel. A server beside the probe may show any certificate.

    A probe sends no secret, certificates seldom name the loopback address, and renewed files may not be served yet.
    gRPC always verifies, so it is given the certificate that the server has just shown. Raises OSError.
    """
    cert, key = settings.tls_cert_file, settings.tls_key_file
    if cert is None or key is None:
        return open_channel(settings, address)
    shown = ssl.get_server_certificate(split_address(address), timeout=TIMEOUT_SECONDS).encode()
    files = TlsFiles()
    if settings.client_cert_file is not None:
        files = client_tls_files(settings) or files
    elif settings.tls_client_ca_file is not None:
        files = TlsFiles(SettingFile("POINTBOOK_TLS_CERT_FILE", cert), SettingFile("POINTBOOK_TLS_KEY_FILE", key))
    identity = load(files)
    options = (
        ("grpc.enable_http_proxy", 0),
        ("grpc.ssl_target_name_override", name_of(x509.load_pem_x509_certificate(shown))),
    )
    return grpc.secure_channel(address, channel_credentials(shown, identity), options=options)


def shim_state(settings: ShimSettings) -> tuple[bool, str]:
    """Return whether a shim is ready, and its own words where it is not; no words where it does not answer."""
    address = local_address(settings.http_address)
    url = f"http{'s' if settings.http_tls_cert_file else ''}://{address}/readyz"
    try:
        answer = httpx.get(url, timeout=TIMEOUT_SECONDS, trust_env=False, verify=_trusting_context())
        return answer.is_success, "" if answer.is_success else str(answer.json()["detail"])
    except (httpx.HTTPError, ValueError, TypeError, KeyError):
        return False, ""


def _trusting_context() -> ssl.SSLContext:
    """Build a context that verifies nothing, for the reasons of `_channel`: the shim is on this machine."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def local_address(address: str) -> str:
    """Turn an address that listens on every interface into one that can be called from here."""
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in {"", "0.0.0.0", "[::]", "::"} else address  # noqa: S104 - it compares
