"""Fixtures for tests of real processes."""

import contextlib
import socket
from collections.abc import Iterator

import pytest

from pointbook_server.settings import ServerSettings
from shopline_shim.settings import ShimSettings, split_address
from support.servers import Service


@pytest.fixture(scope="session", autouse=True)
def default_addresses() -> Iterator[tuple[str, ...]]:
    """Occupy the default ports, so that a test that uses them always fails."""
    addresses = (ServerSettings().grpc_address, ShimSettings().http_address)
    with contextlib.ExitStack() as stack:
        for address in addresses:
            listener = stack.enter_context(socket.socket())
            # Other processes of a parallel run occupy the ports too.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            with contextlib.suppress(OSError):  # A real `pointbook dev` is running.
                listener.bind(split_address(address))
                listener.listen()
        yield addresses


@pytest.fixture
def settings(service: Service, admin_token: str) -> dict[str, str]:
    """The environment of an operator with all scopes."""
    return {"GRPC_ADDRESS": f"127.0.0.1:{service.server.port}", "TOKEN": admin_token}
