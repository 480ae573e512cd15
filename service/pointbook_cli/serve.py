"""Running the gRPC server, in one process or in several that share a port."""

import asyncio
import os
import signal
import sys

import structlog

from pointbook_server.errors import PointbookError
from pointbook_server.migrations import pending
from pointbook_server.server import Server
from pointbook_server.settings import ServerSettings

WORKER_STOP_SECONDS = 5.0
"""What a worker may take beyond its drain time."""

log = structlog.get_logger()


async def run_server(settings: ServerSettings, database_url: str, stop: asyncio.Event) -> None:
    """Serve until the stop event, on a database that has been migrated.

    A database that is away at the start does not stop the server: health tells NOT_SERVING until it is back.
    """
    try:
        if await pending(database_url):
            raise OSError("the database is not at the newest revision; run `pointbook migrate`")
    except PointbookError:
        log.warning("the database is away")
    # The senders that reach customers come with a later release; until then no code is issued here.
    server = Server(settings, database_url, senders={})
    await server.start()
    log.info("serving", address=settings.grpc_address, port=server.port)
    await stop.wait()
    log.info("stopping")
    await server.stop()


async def run_workers(settings: ServerSettings, stop: asyncio.Event) -> None:
    """Run several worker processes until the stop event; when one ends by itself, all stop.

    They are started before any gRPC object exists, since gRPC does not survive a fork.
    """
    if settings.grpc_address.endswith(":0"):
        raise OSError("POINTBOOK_GRPC_ADDRESS: workers cannot share port 0; name a port")
    environment = {**os.environ, "POINTBOOK_WORKERS": str(settings.workers)}
    workers = [
        await asyncio.create_subprocess_exec(sys.executable, "-m", "pointbook_cli.main", "worker", env=environment)
        for _ in range(settings.workers)
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
