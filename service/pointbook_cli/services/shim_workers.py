"""The shim as several processes.

The process that starts them does not load the shim.
"""

import asyncio

from pointbook_cli.services.supervisor import Supervisor, WorkerCommand, pointbook_command
from pointbook_cli.services.worker_metrics import serve_worker_metrics
from shopline_shim.settings import ShimSettings
from shopline_shim.tcp_listener import listen
from shopline_shim.tls_context import build_tls_context, server_tls_source


async def run_shim_workers(settings: ShimSettings, stop: asyncio.Event) -> None:
    """Run the shim's workers until the stop event.

    Raises OSError if they cannot start. They accept from one listening socket, which this process keeps open: any
    worker can accept a connection. With SO_REUSEPORT, the connections queued for a worker would be lost when it ends,
    and wait as long as it hangs.
    """
    # Report problems of TLS files once, not by each worker.
    if (source := server_tls_source(settings)) is not None:
        build_tls_context(source)
    name = "POINTBOOK_SHIM_METRICS_ADDRESS"
    if settings.shim_metrics_address == settings.http_address:
        raise OSError(f"{name}: the metrics of workers need another port than POINTBOOK_HTTP_ADDRESS")
    with (
        listen(settings.http_address) as listener,
        serve_worker_metrics(name, settings.shim_metrics_address, settings.shim_workers) as metrics,
    ):
        webhooks = listener.fileno()
        command = WorkerCommand(
            count=settings.shim_workers,
            program_of=lambda number: pointbook_command("shim-worker", str(webhooks), *metrics.arguments_of(number)),
            environment={"POINTBOOK_SHIM_WORKERS": str(settings.shim_workers)},
            heartbeat_timeout_seconds=settings.heartbeat_timeout_seconds,
            drain_seconds=settings.drain_timeout_seconds,
            inherited_by=lambda number: (webhooks, *metrics.inherited_by(number)),
            observer=metrics,
        )
        await Supervisor(command).run(stop)
