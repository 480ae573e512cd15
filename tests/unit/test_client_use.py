"""The shim and the command call the server by the client alone."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SERVICE = Path(__file__).parents[2] / "service"
PACKAGES = ("pointbook_cli", "pointbook_common", "shopline_shim")
MODULES = ("google.rpc", "grpc_status")
"""They read the details of errors."""
NAMES = frozenset({"AioRpcError", "RpcError", "insecure_channel", "page_token", "secure_channel"})
"""They open channels, catch gRPC's own errors, or request the next page."""


def own_ways(source: str) -> Iterator[str]:
    """Yield the imports and names with which a module does what the client does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            imported = []
        yield from (name for name in imported if f"{name}.".startswith(tuple(f"{module}." for module in MODULES)))
        named = {getattr(node, field, None) for field in ("attr", "arg", "id", "name")}
        yield from sorted(NAMES & named)


def test_channels_errors_and_pages_are_those_of_the_client() -> None:
    files = [path for package in PACKAGES for path in sorted((SERVICE / package).rglob("*.py"))]
    places = [f"{path.relative_to(SERVICE)}: {way}" for path in files for way in own_ways(path.read_text())]

    assert files
    assert not places, "\n".join(places)


@pytest.mark.parametrize(
    ("source", "way"),
    [
        ("from google.rpc.error_details_pb2 import ErrorInfo", "google.rpc.error_details_pb2.ErrorInfo"),
        ("from google.rpc import status_pb2", "google.rpc.status_pb2"),
        ("import grpc_status", "grpc_status"),
        ("from grpc.aio import AioRpcError", "AioRpcError"),
        ("grpc.aio.secure_channel(address, credentials)", "secure_channel"),
        ("request.page_token = page.next_page_token", "page_token"),
        ("List(page_token=token)", "page_token"),
    ],
)
def test_another_way_is_found(source: str, way: str) -> None:
    assert list(own_ways(source)) == [way]
