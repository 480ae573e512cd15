"""`pointbook report`: points, redemptions and one-time codes of a merchant."""

from collections.abc import Awaitable, Callable
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from pointbook_cli.command_line import fail, load_server_settings, parse_time_zone

MerchantOption = Annotated[str, typer.Option("--merchant", help="The merchant.")]
StoreOption = Annotated[str, typer.Option("--store", help="Only this store of the merchant.")]
FromOption = Annotated[
    datetime | None, typer.Option("--from", formats=["%Y-%m-%d"], help="The first day, such as 2026-01-01.")
]
ToOption = Annotated[
    datetime | None, typer.Option("--to", formats=["%Y-%m-%d"], help="The last day, such as 2026-01-31.")
]
TimeZoneOption = Annotated[
    str,
    typer.Option("--time-zone", help="The IANA time zone of days and months; by default, that of the programs."),
]
CsvOption = Annotated[bool, typer.Option("--csv", help="Print CSV.")]
OutputOption = Annotated[Path | None, typer.Option("--output", help="Write to this file, as CSV.")]

STANDARD_OUTPUT = 1

app = typer.Typer(
    help="Report on a merchant, from one unchanging state of the database in the settings.", no_args_is_help=True
)


@app.command("points")
def report_points(
    merchant: MerchantOption,
    store: StoreOption = "",
    first: FromOption = None,
    last: ToOption = None,
    time_zone: TimeZoneOption = "",
    as_csv: CsvOption = False,
    output: OutputOption = None,
) -> None:
    """Report a merchant's points now, and how they changed in a period.

    Without --from and --to, the period is everything.
    """
    from pointbook_cli import reports

    _check_time_zone(time_zone)
    query = reports.ReportQuery(merchant, store, *_days(first, last), time_zone)
    _report(reports.report_points, query, as_csv=as_csv, output=output)


@app.command("redemptions")
def report_redemptions(
    merchant: MerchantOption,
    store: StoreOption = "",
    first: FromOption = None,
    last: ToOption = None,
    time_zone: TimeZoneOption = "",
    as_csv: CsvOption = False,
    output: OutputOption = None,
) -> None:
    """Report the redemptions of a period by program, month and state."""
    from pointbook_cli import reports

    _check_time_zone(time_zone)
    query = reports.ReportQuery(merchant, store, *_days(first, last), time_zone)
    _report(reports.report_redemptions, query, as_csv=as_csv, output=output)


@app.command("codes")
def report_codes(
    merchant: MerchantOption,
    first: FromOption = None,
    last: ToOption = None,
    as_csv: CsvOption = False,
    output: OutputOption = None,
) -> None:
    """Report the one-time codes of a period by UTC day, action, channel and outcome."""
    from pointbook_cli import reports

    query = reports.ReportQuery(merchant, "", *_days(first, last))
    _report(reports.report_codes, query, as_csv=as_csv, output=output)


def _check_time_zone(name: str) -> None:
    if name:
        parse_time_zone(name)


def _days(first: datetime | None, last: datetime | None) -> tuple[date | None, date | None]:
    """Return the first and the last day, or end the command."""
    if first is not None and last is not None and last < first:
        fail("--to is before --from")
    return first and first.date(), last and last.date()


def _report(read: Callable[[str, Any], Awaitable[Any]], query: Any, *, as_csv: bool, output: Path | None) -> None:
    """Read a report, and print or write it."""
    import asyncio

    from pointbook_cli.report_tables import print_table, write_csv

    _, url = load_server_settings()

    async def run() -> Any:
        return await read(url, query)

    table = asyncio.run(run())
    if output is not None:
        with output.open("w", encoding="utf-8", newline="") as file:
            write_csv(table, file)
    elif as_csv:
        # UTF-8 as in a file: the encoding of the locale may lack letters of names.
        with open(STANDARD_OUTPUT, "w", encoding="utf-8", newline="", closefd=False) as file:
            write_csv(table, file)
    else:
        print_table(table)
