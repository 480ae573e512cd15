"""The gRPC server as several processes.

The process that starts them does not load the server.
"""

import asyncio
from collections.abc import Mapping

from pointbook_cli.services.database_checks import check_database
from pointbook_cli.services.listen_addresses import reserve_for_workers, worker_addresses
from pointbook_cli.services.supervisor import Supervisor, WorkerCommand, pointbook_command
from pointbook_server.delivery.senders import build_senders, close_senders
from pointbook_server.rpc.tls import tls_source
from pointbook_server.settings import ServerSettings


async def run_server_workers(settings: ServerSettings, database_url: str, stop: asyncio.Event) -> None:
    """Run the gRPC server's workers until the stop event.

    Raises OSError if they cannot start. They share the port by SO_REUSEPORT, since gRPC for Python cannot listen on an
    inherited socket.
    """
    # Report problems of senders and TLS files once, not by each worker.
    tls_source(settings)
    await close_senders(build_senders(settings).values())
    if settings.grpc_address.endswith(":0"):
        raise OSError("POINTBOOK_GRPC_ADDRESS: workers cannot share port 0; set a port")
    metrics = worker_addresses("POINTBOOK_METRICS_ADDRESS", settings.metrics_address, settings.workers)

    def environment_of(number: int) -> Mapping[str, str]:
        workers = {"POINTBOOK_WORKERS": str(settings.workers)}
        return workers | ({"POINTBOOK_METRICS_ADDRESS": metrics[number]} if metrics else {})

    command = WorkerCommand(
        count=settings.workers,
        program=pointbook_command("worker"),
        environment_of=environment_of,
        heartbeat_timeout_seconds=settings.heartbeat_timeout_seconds,
        drain_seconds=settings.drain_seconds,
    )
    with reserve_for_workers(
        ("POINTBOOK_GRPC_ADDRESS", settings.grpc_address),
        *(("POINTBOOK_METRICS_ADDRESS", address) for address in metrics),
    ):
        await check_database(database_url)
        await Supervisor(command).run(stop)
