"""`pointbook migrate`, `pointbook import` and `pointbook verify`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from pointbook_cli.command_line import fail, load_client_settings, load_server_settings, run_until_stopped
from pointbook_cli.commands.options import ServerOption
from pointbook_cli.exit_codes import EXIT_PROBLEMS

app = typer.Typer()


@app.command()
def migrate(
    on_citus: Annotated[
        bool,
        typer.Option(
            "--citus",
            help="Also distribute the tables over the nodes of a Citus cluster, including their rows. After the first "
            "time, every upgrade needs this option.",
        ),
    ] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Only print which migrations are pending. The exit code is 1 if any are."),
    ] = False,
    offline: Annotated[
        bool,
        typer.Option("--offline", help="No server runs: also take away what servers of the present release use."),
    ] = False,
    lock_wait: Annotated[
        float | None,
        typer.Option(min=0, help="For how many seconds a migration tries to lock its tables; 60 by default."),
    ] = None,
) -> None:
    """Migrate the database to the newest revision.

    A database that a later release has migrated stays as it is.
    """
    import asyncio

    from pointbook_cli.migration_text import describe_pending
    from pointbook_cli.terminal import count_of
    from pointbook_server.db.migrations import LOCK_WAIT_SECONDS, check_cluster, distribute, read_stored_revision
    from pointbook_server.db.migrations import migrate as run_migrations
    from pointbook_server.db.migrations.revisions import all_revisions
    from pointbook_server.errors import UnusableDatabaseError

    _, url = load_server_settings()
    if check:
        is_pending, lines = describe_pending(asyncio.run(read_stored_revision(url)), all_revisions())
        typer.echo("\n".join(lines))
        sys.exit(EXIT_PROBLEMS if is_pending else 0)
    try:
        if on_citus:
            asyncio.run(check_cluster(url))
        before, after = asyncio.run(
            run_migrations(
                url,
                on_citus=on_citus,
                offline=offline,
                lock_wait_seconds=LOCK_WAIT_SECONDS if lock_wait is None else lock_wait,
                report=lambda line: typer.echo(line, err=True),
            )
        )
        if before == after:
            typer.echo(f"The database is already at revision {after}.")
        else:
            typer.echo(f"The database was migrated from revision {before or 'nothing'} to {after}.")
        if on_citus:
            names = asyncio.run(distribute(url))
            typer.echo(f"{count_of(len(names), 'table was', 'tables were')} distributed: {', '.join(names) or 'none'}.")
    except UnusableDatabaseError as error:
        fail(str(error))


@app.command("import")
def import_file(
    file: Annotated[Path, typer.Argument(help="A .csv, .jsonl or .ndjson file; - is standard input.")],
    file_format: Annotated[
        str, typer.Option("--format", help="csv or jsonl, if the file's name does not end in either.")
    ] = "",
    merchant: Annotated[str, typer.Option(help="The merchant of lines without a merchant_id.")] = "",
    store: Annotated[str, typer.Option(help="The store of lines without a store_id.")] = "",
    opening_balances: Annotated[
        bool, typer.Option("--opening-balances", help="Each line is the opening balance of an account.")
    ] = False,
    at: Annotated[str, typer.Option(help="The time of lines without updated_at: RFC 3339 or milliseconds.")] = "",
    server: ServerOption = "",
    batch_size: Annotated[int, typer.Option(min=1, max=1_000, help="The number of lines per call.")] = 500,
    in_flight: Annotated[int, typer.Option(min=1, max=16, help="The number of concurrent calls.")] = 3,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every line without a server; send nothing.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Write all refused lines to this file, as JSON Lines.")] = None,
) -> None:
    """Send the points events of a file to a server.

    A second run changes nothing: its events are duplicates.
    """
    from pointbook_cli.points_import.importer import ImportOptions, run_import
    from pointbook_cli.points_import.points_file import FORMATS, Format, PointsFileOptions, parse_time_ms
    from pointbook_server.rpc.request_fields import TIME_MS_MAX, YEAR_2000_MS

    settings = load_client_settings(server)
    format_name = file_format.lower() or FORMATS.get(file.suffix.lower(), "")
    if format_name not in set(Format):
        fail(f"--format must be one of {', '.join(Format)}, unless the file's name ends in {', '.join(FORMATS)}")
    at_ms = parse_time_ms(at) if at else None
    if at and (at_ms is None or not YEAR_2000_MS <= at_ms <= TIME_MS_MAX):
        fail("--at must be RFC 3339, such as 2026-01-31T12:00:00Z, or milliseconds since 1970, from the year 2000 on")
    options = ImportOptions(
        file=file,
        file_options=PointsFileOptions(Format(format_name), merchant, store, at_ms, opening_balances),
        report=report,
        server=None if dry_run else settings,
        batch_size=batch_size,
        in_flight=in_flight,
    )
    sys.exit(run_until_stopped(lambda stop: run_import(options, stop)))


@app.command()
def verify(
    merchant: Annotated[str, typer.Option(help="Verify only this merchant's accounts.")] = "",
    store: Annotated[str, typer.Option(help="Verify only this store's accounts.")] = "",
    buyer: Annotated[str, typer.Option(help="Verify only this buyer's accounts.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="The maximum number of differences to print.")] = 100,
) -> None:
    """Fold every account again from its entries, and print differences.

    The exit code is 0 if there are none, and 1 otherwise.
    """
    from pointbook_cli.verification import run_verify
    from pointbook_server.ledger.verifier import VerificationScope

    _, url = load_server_settings()
    sys.exit(run_until_stopped(lambda stop: run_verify(url, VerificationScope(merchant, store, buyer), limit, stop)))
