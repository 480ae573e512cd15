"""The servers under load, started by `python -m servers.process NAME`.

Each prints its address once it serves. They run like `pointbook serve` and `pointbook shim`, with settings from
POINTBOOK_* variables; only the sender of one-time codes is the benchmark's own.
"""

import asyncio
import contextlib
import io
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TextIO

import asyncpg
import grpc
from prometheus_client import Counter, Histogram, Summary
from sqlalchemy.ext.asyncio import create_async_engine

from pointbook.v1 import points_pb2, points_pb2_grpc
from pointbook_cli.command_line import load_server_settings, load_settings, run_until_stopped
from pointbook_server.db.database import PLANNED_ONCE, SESSION_SETTINGS
from pointbook_server.delivery.sender import Message
from pointbook_server.logs import configure_logs
from pointbook_server.programs.model import Channel
from pointbook_server.rpc.call_log import CallLog
from pointbook_server.rpc.listening import grpc_options
from pointbook_server.server import Server
from servers.plain_servicer import PlainPointsServicer
from shopline_shim.server import ShimServer
from shopline_shim.settings import ShimSettings

HOST = "127.0.0.1"
ANY_PORT = f"{HOST}:0"


class InstantSender:
    """A sender that succeeds immediately, so that no provider's time is measured."""

    needs_destination = False

    async def send(self, message: Message) -> None:
        """Send nothing."""


class EchoServicer(points_pb2_grpc.PointsServiceServicer):
    """An ApplyPointsUpdate without any work: the cost of gRPC itself."""

    async def ApplyPointsUpdate(  # noqa: N802 - gRPC names the methods
        self, request: points_pb2.ApplyPointsUpdateRequest, _context: object
    ) -> points_pb2.ApplyPointsUpdateResponse:
        """Return the balance of the request."""
        update = request.update
        return points_pb2.ApplyPointsUpdateResponse(
            outcome=points_pb2.APPLY_OUTCOME_APPLIED,
            account=points_pb2.PointsAccount(
                merchant_id=update.merchant_id,
                store_id=update.store_id,
                buyer_id=update.buyer_id,
                points_balance=update.points_balance,
                active_points=update.points_balance,
                lifetime_points=update.points_balance,
                as_of=update.updated_at,
            ),
        )


async def serve_pointbook(stop: asyncio.Event) -> None:
    """Run the real server."""
    settings, database_url = load_server_settings(grpc_address=ANY_PORT)
    server = Server(settings, database_url, senders={Channel.SMS: InstantSender()})
    await server.start()
    _print_address(f"{HOST}:{server.port}")
    await stop.wait()
    await server.stop()


async def serve_unmeasured(stop: asyncio.Event) -> None:
    """Run the real server without its metrics and its log of calls.

    Its rate shows what they cost.
    """
    for metric, method in ((Counter, "inc"), (Histogram, "observe"), (Summary, "observe"), (CallLog, "write")):
        setattr(metric, method, _do_nothing)
    await serve_pointbook(stop)


async def serve_echo(stop: asyncio.Event) -> None:
    """Run the echo server, which all rates are compared with."""
    await _serve_unguarded(EchoServicer(), stop)


async def serve_plain(stop: asyncio.Event) -> None:
    """Run the plain service, with the database settings of the real server."""
    settings, database_url = load_server_settings()
    connect = partial(asyncpg.connect, database_url, server_settings=SESSION_SETTINGS | PLANNED_ONCE)
    engine = create_async_engine(
        "postgresql+asyncpg://", async_creator=connect, pool_size=settings.database_pool_size, max_overflow=0
    )
    await _serve_unguarded(PlainPointsServicer(engine), stop)
    await engine.dispose()


async def serve_shim(stop: asyncio.Event) -> None:
    """Run the real shim."""
    shim = ShimServer(load_settings(ShimSettings, http_address=ANY_PORT))
    ready = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(shim.serve(stop=stop, ready=ready))
        await ready.wait()
        _print_address(shim.address)


async def _serve_unguarded(servicer: points_pb2_grpc.PointsServiceServicer, stop: asyncio.Event) -> None:
    """Run a servicer with the real server's options, but without its guards."""
    server = grpc.aio.server(options=grpc_options(reuse_port=False))
    points_pb2_grpc.add_PointsServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port(ANY_PORT)
    await server.start()
    _print_address(f"{HOST}:{port}")
    await stop.wait()
    await server.stop(grace=1)


def _do_nothing(*_: object) -> None:
    """Do nothing."""


def _print_address(address: str) -> None:
    print(address, flush=True)


SERVERS: dict[str, Callable[[asyncio.Event], Coroutine[Any, Any, None]]] = {
    "pointbook": serve_pointbook,
    "unmeasured": serve_unmeasured,
    "echo": serve_echo,
    "plain": serve_plain,
    "shim": serve_shim,
}


class ProblemsOnly(io.TextIOBase):
    """A stream that drops the log lines of ordinary events.

    They would hide the results of the benchmark.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a line that is worth reading."""
        if '"level": "info"' not in text:
            self._stream.write(text)
        return len(text)


if __name__ == "__main__":
    with contextlib.redirect_stderr(ProblemsOnly(sys.stderr)):
        configure_logs("INFO", json=True)
    run_until_stopped(SERVERS[sys.argv[1]])
