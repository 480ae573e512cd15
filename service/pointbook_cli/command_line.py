"""Shared functions of commands: settings, running until a signal, and failing."""

import gc
import os
import signal
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import typer

from pointbook_cli.exit_codes import EXIT_USAGE

if TYPE_CHECKING:
    import asyncio
    from zoneinfo import ZoneInfo

    from pydantic_settings import BaseSettings

    from shopline_shim.settings import ShimSettings


GC_THRESHOLD = 20_000
"""The number of new objects after which the garbage collector runs."""

S = TypeVar("S", bound="BaseSettings")
T = TypeVar("T")


def fail(message: str) -> NoReturn:
    """End the command with one line on standard error."""
    typer.echo(f"pointbook: {message}", err=True)
    raise SystemExit(EXIT_USAGE)


def load_settings(settings_class: type[S], *required: str, **overrides: Any) -> S:
    """Load settings, or end the command.

    The command prints one line with every invalid setting.
    """
    check_settings(settings_class, required=required, overrides=overrides)
    return settings_class(**overrides)


def check_settings(
    *classes: "type[BaseSettings]", required: tuple[str, ...] = (), overrides: dict[str, Any] | None = None
) -> None:
    """End the command with one line if settings are invalid, missing or unknown."""
    from pointbook_cli.settings_checks import settings_problems

    problems = settings_problems(classes, os.environ, required=required, overrides=overrides or {})
    if problems:
        fail("wrong settings: " + "; ".join(problems))


def load_server_settings(**overrides: Any) -> tuple[Any, str]:
    """Load the server's settings; return them with the database URL.

    POINTBOOK_DATABASE_URL is required.
    """
    from pointbook_server.settings import ServerSettings

    settings = load_settings(ServerSettings, "database_url", **overrides)
    assert settings.database_url is not None  # noqa: S101 - it is required
    return settings, settings.database_url.get_secret_value()


def load_client_settings(grpc_address: str) -> "ShimSettings":
    """Load the settings of a gRPC client.

    An empty address means POINTBOOK_GRPC_ADDRESS.
    """
    from shopline_shim.settings import ShimSettings

    return load_settings(ShimSettings, **({"grpc_address": grpc_address} if grpc_address else {}))


def run_until_stopped(main: "Callable[[asyncio.Event], Coroutine[Any, Any, T]]") -> T:
    """Run a service or a long command; SIGINT and SIGTERM set its stop event."""
    import asyncio

    import uvloop

    from pointbook_common.open_files import raise_open_files

    async def run() -> T:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        return await main(stop)

    raise_open_files()
    # Imported modules live until the end, so the collector need not scan them again.
    gc.collect()
    gc.freeze()
    return uvloop.run(run())


def parse_time_zone(name: str) -> "ZoneInfo":
    """Parse an IANA time zone, or end the command."""
    from zoneinfo import ZoneInfo

    try:
        return ZoneInfo(name)
    except (ValueError, OSError, KeyError):
        fail("--time-zone must be an IANA time zone such as Asia/Shanghai")
