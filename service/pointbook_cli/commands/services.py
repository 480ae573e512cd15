"""`pointbook dev`, `pointbook serve`, `pointbook shim` and `pointbook health`."""

import socket
import sys
from typing import Annotated

import typer

from pointbook_cli.command_line import check_settings, load_server_settings, load_settings, run_until_stopped
from pointbook_cli.exit_codes import EXIT_PROBLEMS

app = typer.Typer()


@app.command()
def dev(
    reset: Annotated[bool, typer.Option("--reset", help="Erase the embedded database first.")] = False,
) -> None:
    """Run everything on the embedded database, for development.

    It listens on loopback in plaintext, without tokens, and with reflection.
    """
    from pointbook_cli.services.dev import run_dev
    from pointbook_server.logs import configure_logs
    from pointbook_server.settings import ServerSettings
    from shopline_shim.settings import ShimSettings

    check_settings(ServerSettings, ShimSettings)
    settings, shim_settings = ServerSettings(), ShimSettings()
    configure_logs(settings.log_level, json=False)
    run_until_stopped(lambda stop: run_dev(settings, shim_settings, stop, reset=reset))


@app.command()
def serve(
    workers: Annotated[
        int | None, typer.Option(min=1, help="The number of server processes; POINTBOOK_WORKERS by default.")
    ] = None,
) -> None:
    """Run the gRPC server."""
    from pointbook_server.logs import configure_logs

    settings, url = load_server_settings(**({} if workers is None else {"workers": workers}))
    configure_logs(settings.log_level)
    if settings.workers > 1:
        from pointbook_cli.services.server_workers import run_server_workers

        run_until_stopped(lambda stop: run_server_workers(settings, url, stop))
    else:
        from pointbook_cli.services.server_process import run_server

        run_until_stopped(lambda stop: run_server(settings, url, stop))


MetricsListener = Annotated[
    int | None, typer.Option(help="The file descriptor of an inherited socket on which to serve metrics.")
]


@app.command(hidden=True)
def worker(metrics_listener: MetricsListener = None) -> None:
    """Run one of several server processes that share a port.

    `pointbook serve --workers` starts it.
    """
    from pointbook_cli.services.server_process import run_server
    from pointbook_cli.services.supervisor import run_as_worker
    from pointbook_server.logs import configure_logs

    settings, url = load_server_settings()
    configure_logs(settings.log_level)
    metrics = _inherited(metrics_listener)
    run_until_stopped(
        lambda stop: run_as_worker(lambda stop, ready: run_server(settings, url, stop, ready, metrics), stop),
    )


@app.command()
def shim(
    workers: Annotated[
        int | None, typer.Option(min=1, help="The number of shim processes; POINTBOOK_SHIM_WORKERS by default.")
    ] = None,
) -> None:
    """Run the HTTP shim that turns signed SHOPLINE webhooks into gRPC calls."""
    from pointbook_server.logs import configure_logs
    from shopline_shim.settings import ShimSettings

    overrides = {} if workers is None else {"shim_workers": workers}
    settings = load_settings(ShimSettings, "shopline_secrets", **overrides)
    configure_logs(settings.log_level)
    if settings.shim_workers > 1:
        from pointbook_cli.services.shim_workers import run_shim_workers

        run_until_stopped(lambda stop: run_shim_workers(settings, stop))
    else:
        from shopline_shim.server import ShimServer

        run_until_stopped(lambda stop: ShimServer(settings).serve(stop=stop))


@app.command(hidden=True)
def shim_worker(
    listener: Annotated[int, typer.Argument(help="The file descriptor of the inherited listening socket.")],
    metrics_listener: MetricsListener = None,
) -> None:
    """Run one of several shim processes that share a socket.

    `pointbook shim --workers` starts it.
    """
    from pointbook_cli.services.supervisor import run_as_worker
    from pointbook_server.logs import configure_logs
    from shopline_shim.server import ShimServer
    from shopline_shim.settings import ShimSettings

    settings = load_settings(ShimSettings, "shopline_secrets")
    configure_logs(settings.log_level)
    shim = ShimServer(settings, _inherited(listener), _inherited(metrics_listener))
    run_until_stopped(
        lambda stop: run_as_worker(lambda stop, ready: shim.serve(stop=stop, ready=ready), stop),
    )


def _inherited(descriptor: int | None) -> socket.socket | None:
    """Return the inherited socket of a file descriptor."""
    return None if descriptor is None else socket.socket(fileno=descriptor)


@app.command()
def health(
    shim: Annotated[bool, typer.Option(help="Check a shim's /readyz instead of the gRPC server.")] = False,
) -> None:
    """Check that the server in the settings is serving, for container health checks.

    The exit code is 0 if it is, and 1 if not.
    """
    from pointbook_cli.health_probe import ProbeSettings, probe_server, probe_shim
    from pointbook_cli.terminal import escape_unprintable

    settings = load_settings(ProbeSettings)
    is_serving, cause = probe_shim(settings) if shim else probe_server(settings)
    typer.echo("serving" if is_serving else f"not serving: {escape_unprintable(cause)}".removesuffix(": "))
    if not is_serving:
        sys.exit(EXIT_PROBLEMS)
