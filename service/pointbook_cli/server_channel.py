"""The gRPC channel of commands to the server in the settings."""

import contextlib
from collections.abc import Iterator

import grpc

from pointbook_cli.terminal import escape_unprintable
from shopline_shim.grpc_channel import open_channel
from shopline_shim.grpc_errors import error_details
from shopline_shim.settings import ShimSettings


@contextlib.contextmanager
def open_server_channel(settings: ShimSettings) -> Iterator[grpc.Channel]:
    """Open a channel to the server in the settings.

    Raises OSError with the error that the server returned.
    """
    with open_channel(settings, local_address(settings.grpc_address)) as channel:
        try:
            yield channel
        except grpc.RpcError as error:
            raise OSError(describe_error(error)) from error


def authorization(token: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata that carries a bearer token; none if it is empty."""
    return (("authorization", f"Bearer {token}"),) if token else ()


def local_address(address: str) -> str:
    """Return an address to connect to.

    It is loopback for an address that listens on every interface.
    """
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in {"", "0.0.0.0", "[::]", "::"} else address  # noqa: S104 - it compares


def describe_error(error: grpc.RpcError) -> str:
    """Return a server's error as one line: reason, and violations or message."""
    info, bad_request = error_details(error)
    violations = "; ".join(f"{violation.field} {violation.description}" for violation in bad_request.field_violations)
    message = " ".join((error.details() or "").split())
    return escape_unprintable(f"{info.reason or error.code().name}: {violations or message}")
