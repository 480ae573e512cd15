"""Ports and channel options of gRPC servers."""

import grpc

from pointbook_common.certificates import TlsSource
from pointbook_common.open_files import CONNECTIONS_MAX
from pointbook_server.rpc.health import REQUEST_BYTES_MAX
from pointbook_server.rpc.tls import server_credentials

METADATA_BYTES_MAX = 8 * 1024
MESSAGE_BYTES_MAX = 1024 * 1024
HANDSHAKE_MS_MAX = 5_000
IDLE_MS_MAX = 5 * 60_000
HEALTH_CONNECTIONS_MAX = 50
WAITING_CALLS_MAX = 1_000


def open_port(server: grpc.aio.Server, setting: str, address: str, tls: TlsSource | None) -> int:
    """Open a port, and return its number.

    Raises SettingError, and OSError, which names the setting.
    """
    try:
        if tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, server_credentials(tls))
    except RuntimeError as error:
        raise OSError(f"{setting}: gRPC cannot listen on {address}") from error


def grpc_options(
    *, reuse_port: bool, connections_max: int = CONNECTIONS_MAX, waiting_calls_max: int = WAITING_CALLS_MAX
) -> tuple[tuple[str, int], ...]:
    """Return options that bound what a client can hold, and how many calls wait.

    Only workers of one server share its port.
    """
    return (
        ("grpc.so_reuseport", int(reuse_port)),
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_send_message_length", 4 * MESSAGE_BYTES_MAX),
        ("grpc.max_metadata_size", METADATA_BYTES_MAX),
        ("grpc.absolute_max_metadata_size", METADATA_BYTES_MAX),
        ("grpc.max_concurrent_streams", 100),
        # Calls wait in gRPC until the event loop admits them, one a turn. Beyond the limit gRPC refuses them at once,
        # with CANCELLED. Its own limits let up to 3,000 wait, most of a second.
        ("grpc.server.max_pending_requests", waiting_calls_max),
        ("grpc.server.max_pending_requests_hard_limit", waiting_calls_max),
        # Off: this protection counts ended streams that are not freed yet, and so refuses clients within the limit.
        # Rapid resets are bounded by the limit of concurrent calls instead.
        ("grpc.http.overload_protection", 0),
        # Off: with it, each stream can send 4 MiB before the call is admitted; without it, 64 KiB.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.max_allowed_incoming_connections", connections_max),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS_MAX),
        ("grpc.http2.settings_timeout", HANDSHAKE_MS_MAX),
        ("grpc.max_connection_idle_ms", IDLE_MS_MAX),
        # Health streams that the client does not read end with their connection; other clients reconnect.
        ("grpc.max_connection_age_ms", 30 * 60_000),
        ("grpc.max_connection_age_grace_ms", 60_000),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    )


def health_options(*, reuse_port: bool) -> tuple[tuple[str, int], ...]:
    """Return the options of the server for health probes: the same with lower limits."""
    return (
        *grpc_options(reuse_port=reuse_port, connections_max=HEALTH_CONNECTIONS_MAX),
        ("grpc.max_receive_message_length", REQUEST_BYTES_MAX),
    )
