"""Health checks of a running server or shim, for containers."""

import contextlib
import json
import ssl
import threading
from concurrent.futures import Future
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path

from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import field_validator

from pointbook_cli.server_access import local_address
from pointbook_client import PointbookError
from pointbook_client.sync import PointbookClient, connect
from shopline_shim.server_connection import server_tls
from shopline_shim.settings import ShimSettings, split_address

TIMEOUT_SECONDS = 3.0
BODY_BYTES_MAX = 64 * 1024
"""How much of a response is read."""


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
        from pointbook_cli.presented_tls import presented_tls  # noqa: PLC0415 - plaintext starts faster without it

        own = None if settings.tls_client_ca_file is None else (cert, key)
        tls = presented_tls(settings, address, own, timeout_seconds=TIMEOUT_SECONDS)
    return connect(address, timeout=TIMEOUT_SECONDS, retries=False, wait_for_ready=False, **tls)


def probe_shim(settings: ShimSettings) -> tuple[bool, str]:
    """Return whether a shim is ready, and why not.

    The cause is the detail of its response; empty without a response in time.
    """
    host, port = split_address(local_address(settings.http_address))
    if settings.http_tls_cert_file:
        tls = _unverified_context()
        connection: HTTPConnection = HTTPSConnection(host, port, timeout=TIMEOUT_SECONDS, context=tls)
    else:
        connection = HTTPConnection(host, port, timeout=TIMEOUT_SECONDS)
    readiness: Future[tuple[bool, str]] = Future()
    # The timeout of a socket is that of each read: it would not end a response of one byte a second.
    threading.Thread(target=lambda: readiness.set_result(_get_readiness(connection)), daemon=True).start()
    try:
        return readiness.result(TIMEOUT_SECONDS)
    except TimeoutError:
        return False, ""


def _get_readiness(connection: HTTPConnection) -> tuple[bool, str]:
    """Return the result of a request to a shim, however long it takes."""
    try:
        with contextlib.closing(connection):
            connection.request("GET", "/readyz")
            response = connection.getresponse()
            if response.status == HTTPStatus.OK:
                return True, ""
            return False, str(json.loads(response.read(BODY_BYTES_MAX))["detail"])
    except (OSError, HTTPException, ValueError, TypeError, KeyError, RecursionError):
        return False, ""


def _unverified_context() -> ssl.SSLContext:
    """Build a context that verifies no certificates; see `_connect`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
