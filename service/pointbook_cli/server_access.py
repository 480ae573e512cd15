"""How commands call the server in the settings."""

import contextlib
from collections.abc import Iterator

from pointbook_cli.terminal import escape_unprintable
from pointbook_client import PointbookError
from pointbook_client.sync import PointbookClient, connect
from shopline_shim.server_connection import server_tls
from shopline_shim.settings import ShimSettings


@contextlib.contextmanager
def open_client(settings: ShimSettings, *, timeout_seconds: float = 30.0) -> Iterator[PointbookClient]:
    """Open a client of the server in the settings.

    Raises OSError with the error that the server returned, and SettingError if TLS files are wrong.
    """
    with connect(
        local_address(settings.grpc_address),
        token=settings.token.get_secret_value(),
        timeout=timeout_seconds,
        # An operator who mistyped an address learns it at once.
        wait_for_ready=False,
        **server_tls(settings),
    ) as client:
        try:
            yield client
        except PointbookError as error:
            raise OSError(describe_error(error)) from error


def local_address(address: str) -> str:
    """Return an address to connect to.

    It is loopback for an address that listens on every interface.
    """
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host in {"", "0.0.0.0", "[::]", "::"} else address  # noqa: S104 - it compares


def describe_error(error: PointbookError) -> str:
    """Return an error of the server as one line.

    It has the code, the reason, the message, the wrong fields and the request id.
    """
    return escape_unprintable(" ".join(str(error).split()))
