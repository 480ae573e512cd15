"""The `pointbook` command: its command groups, and how errors end it."""

import gc
import os
from typing import Annotated

import typer

from pointbook_cli.command_line import GC_THRESHOLD, fail
from pointbook_cli.commands import (
    benefits,
    customer,
    data,
    doctor,
    quarantine,
    report,
    services,
    store,
    token,
    webhook,
)

app = typer.Typer(
    help="Pointbook: loyalty points, redemptions and one-time codes over gRPC.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(services.app)
app.add_typer(data.app)
app.add_typer(doctor.app)
app.add_typer(report.app, name="report")
app.add_typer(token.app, name="token")
app.add_typer(customer.app, name="customer")
app.add_typer(webhook.app, name="webhook")
app.add_typer(quarantine.app, name="quarantine")
app.add_typer(store.app, name="store")
app.add_typer(benefits.app, name="benefits")


def _print_version(value: bool) -> None:  # noqa: FBT001 - typer passes the option's value by position
    """Print the version and end the command, if the option is given."""
    if value:
        from importlib.metadata import version

        typer.echo(f"pointbook {version('pointbook')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Declare the options that come before a command."""


def run() -> None:
    """Run the command line; print an error that an operator can fix as one line."""
    _open_standard_streams()
    # gRPC would log a line for each handshake that a client aborts, and for each invalid header.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # Imported modules live until the end, and a call leaves little garbage. With Python's default threshold, the
    # collector would scan all objects after every other call, which takes a tenth of the time, as it does at a start.
    gc.set_threshold(GC_THRESHOLD, 20, 20)
    try:
        app()
    except Exception as error:
        problem = _describe_operator_error(error)
        if problem is None:
            raise
        fail(problem)


def _describe_operator_error(error: Exception) -> str | None:
    """Return the line for an error that an operator can fix, and None for others."""
    from pointbook_cli.embedded_postgres import EmbeddedPostgresError
    from pointbook_common.errors import SettingError
    from pointbook_server.errors import DatabaseDefectError, PointbookError

    if isinstance(error, DatabaseDefectError):
        return f"the database cannot be used: {error}"
    if isinstance(error, PointbookError):
        # A timeout has no text of its own.
        return f"{error} ({str(error.__cause__) or 'no response'})" if error.__cause__ else str(error)
    return str(error) if isinstance(error, EmbeddedPostgresError | SettingError | OSError) else None


def _open_standard_streams() -> None:
    """Open standard streams that are closed.

    A socket would get their numbers, and libuv aborts on that.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest free number is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # noqa: FBT003 - it takes no keyword


if __name__ == "__main__":
    run()
