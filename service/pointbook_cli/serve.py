"""Running the gRPC server, in one process or in several that share a port."""

import asyncio
import errno
import os
import signal
import socket
import sys
from typing import Any

import structlog

from pointbook_server.database import Database
from pointbook_server.delivery.senders import close_senders, senders_of
from pointbook_server.errors import PointbookError
from pointbook_server.migrations import pending
from pointbook_server.schema import SchemaError, check_schema
from pointbook_server.server import Server
from pointbook_server.settings import ServerSettings
from pointbook_server.tls import tls_source

WORKER_STOP_SECONDS = 5.0
"""What a worker may take beyond its drain time."""

log = structlog.get_logger()


async def run_server(settings: ServerSettings, database_url: str, stop: asyncio.Event) -> None:
    """Serve until the stop event, on a database that has been migrated.

    A database that is away at the start does not stop the server: health tells NOT_SERVING until it is back.
    """
    senders = senders_of(settings)
    await check_database(database_url)
    if settings.workers == 1:
        check_unused("POINTBOOK_GRPC_ADDRESS", settings.grpc_address)
    server = Server(settings, database_url, senders=senders)
    await server.start()
    log.info(
        "serving", address=settings.grpc_address, port=server.port, metrics_address=settings.metrics_address or None
    )
    await stop.wait()
    log.info("stopping")
    await server.stop()


async def run_worker(settings: ServerSettings, database_url: str, stop: asyncio.Event) -> None:
    """Serve as one of several workers until the stop event, or until our parent is gone, however it ended.

    Standard input is a pipe whose other end the parent alone holds.
    """
    loop = asyncio.get_running_loop()

    def end() -> None:
        loop.remove_reader(sys.stdin)
        stop.set()

    loop.add_reader(sys.stdin, end)
    await run_server(settings, database_url, stop)


async def run_workers(settings: ServerSettings, database_url: str, stop: asyncio.Event) -> None:
    """Run several worker processes until the stop event; when one ends by itself, all stop.

    They are started before any gRPC object exists, since gRPC does not survive a fork.
    """
    # What is wrong with the senders is told once, and not by each worker.
    await close_senders(senders_of(settings).values())
    # So are TLS files.
    tls_source(settings)
    if settings.grpc_address.endswith(":0"):
        raise OSError("POINTBOOK_GRPC_ADDRESS: workers cannot share port 0; name a port")
    check_unused("POINTBOOK_GRPC_ADDRESS", settings.grpc_address)
    await check_database(database_url)
    workers = [
        await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "pointbook_cli.main",
            "worker",
            stdin=asyncio.subprocess.PIPE,
            env={**os.environ, **_environment_of(settings, number)},
        )
        for number in range(settings.workers)
    ]
    exits = [asyncio.create_task(worker.wait()) for worker in workers]
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([*exits, stopped], return_when=asyncio.FIRST_COMPLETED)
    for worker in workers:
        if worker.returncode is None:
            worker.send_signal(signal.SIGTERM)
    _, late = await asyncio.wait(exits, timeout=settings.drain_seconds + WORKER_STOP_SECONDS)
    for worker in workers:
        if worker.returncode is None:
            worker.kill()
    await asyncio.gather(*late)
    stopped.cancel()
    if not stop.is_set():
        raise OSError("a worker ended by itself; its log says why")


def _environment_of(settings: ServerSettings, number: int) -> dict[str, str]:
    """Tell what a worker's settings differ in from its siblings'."""
    environment = {"POINTBOOK_WORKERS": str(settings.workers)}
    if settings.metrics_address:
        host, _, port = settings.metrics_address.rpartition(":")
        environment["POINTBOOK_METRICS_ADDRESS"] = f"{host}:{int(port) + number}"
    return environment


async def check_database(database_url: str) -> None:
    """Raise OSError where a database cannot be served from; log one that is away, since the server waits for it."""
    database = Database(database_url, pool_size=1)
    try:
        async with database.autocommit() as connection:
            await check_schema(connection)
    except SchemaError as error:
        raise OSError(str(error)) from error
    except PointbookError as error:
        log.error("the database is away; the server waits for it", cause=repr(error.__cause__))  # noqa: TRY400 - no stack
    finally:
        await database.dispose()


async def check_migrated(database_url: str) -> None:
    """Raise OSError where a database lacks the newest tables, and DATABASE_UNAVAILABLE where it is away."""
    if await pending(database_url):
        raise OSError("the database is not at the newest revision; run `pointbook migrate`")


def check_unused(name: str, address: str) -> None:
    """Raise OSError, naming the setting, where something listens on a HOST:PORT address already, or nothing can.

    gRPC would tell so in several lines, and not at all where both share their ports between workers.
    """
    host, _, port = address.rpartition(":")
    try:
        places = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise OSError(f"{name}: there is no host {host}") from None
    failures = [failure for family, _, _, _, place in places if (failure := _try_to_bind(family, place))]
    # A name may stand for an address that this machine does not have, as localhost does where there is no IPv6.
    if len(failures) == len(places) or any(failure.errno == errno.EADDRINUSE for failure in failures):
        raise OSError(f"{name}: cannot listen on {address}: {failures[0].strerror}")


def _try_to_bind(family: int, place: Any) -> OSError | None:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(place)
        except OSError as error:
            return error
    return None
