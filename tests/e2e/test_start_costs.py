"""The libraries that commands load."""

import json
import sys
from pathlib import Path

import pytest

from pointbook_client.testing.ports import free_port
from support import imported_libraries
from support.processes import POINTBOOK, clean_environment, finish, finish_fork

HEAVY = {"alembic", "asyncpg", "cryptography", "httpx", "opentelemetry", "sqlalchemy", "starlette", "structlog"}
"""Packages that take a noticeable part of a second."""
WORK = {"asyncio", "email_validator", "grpc", "pydantic", "rich"}
"""Packages that commands need which run a loop, read settings, call the server or print tables."""


@pytest.mark.parametrize(
    ("arguments", "exit_code", "unneeded"),
    [
        (("--version",), 0, HEAVY | WORK),
        (("token", "list"), 2, HEAVY | {"email_validator", "grpc"}),
        (("health",), 1, HEAVY | {"email_validator"}),
        (("health", "--shim"), 1, HEAVY | {"email_validator"}),
    ],
)
async def test_the_command_does_not_load_what_it_does_not_need(
    arguments: tuple[str, ...], exit_code: int, unneeded: set[str]
) -> None:
    address = f"127.0.0.1:{free_port()}"
    environment = clean_environment({"GRPC_ADDRESS": address, "HTTP_ADDRESS": address})
    finished = await finish(sys.executable, "-X", "importtime", POINTBOOK, *arguments, environment=environment)
    assert finished.exit_code == exit_code, finished
    modules = [line.rpartition("|")[2].strip() for line in finished.err.splitlines() if line.startswith("import time:")]
    assert "pointbook_cli.main" in modules
    assert sorted(unneeded.intersection(name.partition(".")[0] for name in modules)) == []


async def test_the_fork_server_has_loaded_every_library() -> None:
    """The names in the message belong to LIBRARIES of tests/support/fork_server.py."""
    finished = await finish_fork(Path(imported_libraries.__file__), settings={})
    assert finished.exit_code == 0, finished.err
    counts = json.loads(finished.out)
    assert counts["own"] > 100
    assert counts["libraries"] == []
