"""Servers in the process of a test."""

import base64
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from pointbook_server.db.clock_skew import ServerClock
from pointbook_server.delivery.sender import Sender
from pointbook_server.programs.model import Channel
from pointbook_server.rpc import admission
from pointbook_server.server import Server
from pointbook_server.settings import ServerSettings
from support.clients import Client
from support.clocks import TestClock
from support.outbox import Outbox
from support.waiting import until

CODE_KEY = base64.b64encode(b"k" * 32).decode()
QUARANTINE_KEY = base64.b64encode(b"q" * 32).decode()


def server_settings(**changes: Any) -> ServerSettings:
    """Return settings of a server on any free port."""
    values: dict[str, Any] = {
        "grpc_address": "127.0.0.1:0",
        "code_keys": {"k1": CODE_KEY},
        "quarantine_keys": {"q1": QUARANTINE_KEY},
        "drain_seconds": 2.0,
    }
    return ServerSettings(**{**values, **changes})


@dataclass
class Service:
    """A running server, and a client whose token has all scopes for all merchants."""

    server: Server
    client: Client
    clock: TestClock
    outbox: Outbox
    database_url: str


async def until_calls_end(server: Server) -> None:
    """Wait until no unary call runs on a server.

    A refused call is logged, measured and traced after its caller has the answer. Raises TimeoutError.
    """
    await until(lambda: len(server._running_calls) == 0)


async def stop_idle(server: Server) -> None:
    """Stop a server without the pause for calls that follow a response."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(admission, "QUIET_SECONDS", 0.0)
        await server.stop()


@asynccontextmanager
async def running_server(
    database_url: str,
    token: str = "",
    *,
    senders: Mapping[Channel, Sender] | None = None,
    clock: ServerClock | None = None,
    **settings: Any,
) -> AsyncIterator[tuple[Server, Client]]:
    """Run a server during the block, and yield it with a client.

    By default it sends SMS to an outbox of its own, and its clock stands still.
    """
    senders = {Channel.SMS: Outbox()} if senders is None else senders
    server = Server(server_settings(**settings), database_url, senders=senders, clock=clock or TestClock())
    await server.start()
    client = Client(server.port, token)
    try:
        yield server, client
    finally:
        await client.close()
        await stop_idle(server)
