"""The shim as several processes.

The process that starts them does not load the shim.
"""

import asyncio
from collections.abc import Mapping

from pointbook_cli.services.listen_addresses import reserve_for_workers, worker_addresses
from pointbook_cli.services.supervisor import Supervisor, WorkerCommand, pointbook_command
from shopline_shim.settings import ShimSettings
from shopline_shim.tcp_listener import listen
from shopline_shim.tls_context import build_tls_context


async def run_shim_workers(settings: ShimSettings, stop: asyncio.Event) -> None:
    """Run the shim's workers until the stop event.

    Raises OSError if they cannot start. They accept from one listening socket, which this process keeps open: any
    worker can accept a connection. With SO_REUSEPORT, the connections queued for a worker would be lost when it ends,
    and wait as long as it hangs.
    """
    # Report problems of TLS files once, not by each worker.
    build_tls_context(settings)
    name = "POINTBOOK_SHIM_METRICS_ADDRESS"
    if settings.shim_metrics_address == settings.http_address:
        raise OSError(f"{name}: the metrics of workers need other ports than POINTBOOK_HTTP_ADDRESS")
    metrics = worker_addresses(name, settings.shim_metrics_address, settings.shim_workers)

    def environment_of(number: int) -> Mapping[str, str]:
        workers = {"POINTBOOK_SHIM_WORKERS": str(settings.shim_workers)}
        return workers | ({name: metrics[number]} if metrics else {})

    with listen(settings.http_address) as listener, reserve_for_workers(*((name, address) for address in metrics)):
        command = WorkerCommand(
            count=settings.shim_workers,
            program=pointbook_command("shim-worker", str(listener.fileno())),
            environment_of=environment_of,
            heartbeat_timeout_seconds=settings.heartbeat_timeout_seconds,
            drain_seconds=settings.drain_timeout_seconds,
            inherited=(listener.fileno(),),
        )
        await Supervisor(command).run(stop)
