"""How a client connects: addresses, retries, keepalive and deadlines."""

import ipaddress
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from typing import Any, TypedDict

from pointbook_client.calls import CallDefaults
from pointbook_client.keywords import check_names
from pointbook_client.observers import CallObserver
from pointbook_client.tls import CredentialsSource, Tls

DEFAULT_TIMEOUT_SECONDS = 20.0
"""The deadline of a call with all of its attempts: longer than any call takes that the server accepts."""
ChannelOptions = Sequence[tuple[str, Any]]
Token = str | Callable[[], str] | None
"""A bearer token, or a function that returns the current one for each call; none or empty for a server without."""


class ConnectOptions(TypedDict, total=False):
    """What `connect` may be told."""

    timeout: float
    """The deadline of a call with all of its attempts, in seconds. Default: DEFAULT_TIMEOUT_SECONDS."""
    retries: bool
    """Whether failed calls that a retry may help are repeated. Default: true.

    gRPC always repeats a call that no server has seen, such as on a connection that was just closed.
    """
    wait_for_ready: bool
    """Whether calls wait, until their deadline, for a server that cannot be reached. Default: true."""
    observer: CallObserver
    """Sees every call, such as `pointbook_client.otel.OpenTelemetry()`."""
    channel_options: ChannelOptions
    """More options of gRPC's channel, which replace those of the client."""


@dataclass(frozen=True, slots=True)
class ConnectSettings:
    """How to open a connection, and what its calls have in common."""

    target: str
    channel_options: ChannelOptions
    credentials: CredentialsSource | None
    defaults: CallDefaults


def connect_settings(
    address: str,
    token: Token,
    tls: Tls | CredentialsSource | bool | None,  # noqa: FBT001 - as in `connect`, where it is a keyword
    options: ConnectOptions,
) -> ConnectSettings:
    """Return the settings of a connection.

    Without `tls` it is in plaintext on loopback, and uses TLS with gRPC's own roots elsewhere. Raises OSError if a file
    of `tls` cannot be read, ValueError for an address with http:// or blanks, and TypeError for another `tls`.
    """
    check_names(options, ConnectOptions)
    if not address or address.startswith(("http://", "https://")) or address != address.strip():
        raise ValueError("an address is like `points.internal:50051`, without http:// and blanks around it")
    if tls is None:
        tls = not is_loopback(address)
    if isinstance(tls, bool):
        tls = Tls() if tls else None
    if not (tls is None or isinstance(tls, Tls) or callable(tls)):
        raise TypeError("tls must be Tls(…), True, False, or a function that returns credentials")
    server_name = tls.server_name if isinstance(tls, Tls) else ""
    own = channel_options(
        retries=options.get("retries", True),
        wait_for_ready=options.get("wait_for_ready", True),
        server_name=server_name,
    )
    return ConnectSettings(
        target=address,
        channel_options=tuple(({**dict(own), **dict(options.get("channel_options", ()))}).items()),
        credentials=tls.credentials_source() if isinstance(tls, Tls) else tls,
        defaults=CallDefaults(
            timeout_seconds=options.get("timeout", DEFAULT_TIMEOUT_SECONDS),
            token=token if callable(token) else lambda: token or "",
            observer=options.get("observer"),
        ),
    )


def channel_options(*, retries: bool, wait_for_ready: bool, server_name: str = "") -> ChannelOptions:
    """Return the options of a channel: service config, keepalive, reconnection."""
    return (
        ("grpc.service_config", service_config(retries=retries, wait_for_ready=wait_for_ready)),
        ("grpc.primary_user_agent", f"pointbook-client/{version('pointbook-client')}"),
        # Reconnect within a second after a server is back; gRPC's own backoff grows to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1_000),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # Detect a server that vanished while calls are running. Do not ping an idle connection.
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 0),
        # The server is on the internal network, so ignore HTTP_PROXY and its like.
        ("grpc.enable_http_proxy", 0),
        *((("grpc.ssl_target_name_override", server_name),) if server_name else ()),
    )


def service_config(*, retries: bool, wait_for_ready: bool) -> str:
    """Return the standard service config as JSON.

    Its timeout is left out: gRPC would cut longer deadlines to it, and the client sets one for each call.
    """
    config = json.loads((files(__package__) / "service-config.json").read_text())
    for method in config["methodConfig"]:
        method.pop("timeout", None)
        method["waitForReady"] = wait_for_ready
        if not retries:
            method.pop("retryPolicy")
    return json.dumps(config)


def is_loopback(address: str) -> bool:
    """Return whether all servers of an address of gRPC are on this machine.

    >>> [is_loopback(address) for address in ("127.0.0.1:50051", "[::1]:1", "localhost:1", "unix:/run/pointbook")]
    [True, True, True, True]
    >>> is_loopback("points.internal:50051")
    False
    """
    scheme, _, rest = address.partition(":")
    if scheme in {"unix", "unix-abstract"}:
        return True
    if scheme in {"ipv4", "ipv6"}:
        return all(_is_local(server) for server in rest.split(","))
    # The name server of `dns://10.0.0.53/localhost` could name any host.
    return _is_local(rest.removeprefix("///") if scheme == "dns" else address)


def _is_local(server: str) -> bool:
    """Return whether `host:port` or `[host]:port` is on this machine."""
    host = server.rpartition(":")[0] if server.rpartition(":")[2].isdecimal() else server
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"
