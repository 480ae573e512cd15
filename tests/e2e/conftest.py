"""Tests of real processes run beside a `pointbook dev` that a developer has left open, or as if there were one."""

import contextlib
import socket
from collections.abc import Iterator

import pytest

from pointbook_server.settings import ServerSettings
from shopline_shim.settings import ShimSettings, split_address


@pytest.fixture(scope="session", autouse=True)
def default_addresses() -> Iterator[tuple[str, ...]]:
    """Occupy the default ports, so that a test that forgets to name free ones fails always and not only by chance."""
    addresses = (ServerSettings().grpc_address, ShimSettings().http_address)
    with contextlib.ExitStack() as stack:
        for address in addresses:
            listener = stack.enter_context(socket.socket())
            # The other processes of a parallel run hold the ports too.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            with contextlib.suppress(OSError):  # A real `pointbook dev` is there.
                listener.bind(split_address(address))
                listener.listen()
        yield addresses
