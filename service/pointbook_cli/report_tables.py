"""Reports as tables, on a terminal or as CSV that spreadsheets can open safely."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TextIO

from rich.table import Table
from rich.text import Text

from pointbook_cli.terminal import escape_unprintable, print_unpadded, table_console
from pointbook_server.ledger.report import PointsReport
from pointbook_server.redemption.report import RedemptionReport
from pointbook_server.validation_codes.report import CodeEvents

Cell = int | Decimal | str | None
"""A value of a report; None where a column has no meaning."""
FORMULA_STARTS = tuple("=+-@\t\r\uff1d\uff0b\uff0d\uff20")
"""The characters by which spreadsheets recognize a formula, also in the full width of East Asian texts."""


@dataclass(frozen=True, slots=True)
class ReportTable:
    """A report: the names of its columns, its rows, and what the days and months mean."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str


def points_table(report: PointsReport, time_zone: str) -> ReportTable:
    """Return the points now, then the flow in the period, one figure per row."""
    now = {
        "balance": (report.balance, report.accounts),
        "active": (report.active, None),
        "held": (report.held, report.holding_accounts),
        "expired but not deducted": (report.expired, report.expired_accounts),
        "negative balances": (report.negative_balance, report.negative_accounts),
        "drift": (report.drift, report.drifting_accounts),
    }
    flow = report.flow
    period = {
        "balance at the start": report.start_balance,
        "opening balances": flow.opened,
        "earned": flow.earned,
        "refunded": flow.refunded,
        "spent": flow.spent,
        "spent by redemptions": flow.redeemed,
        "expired by events": flow.expired,
        "expired silently": flow.silently_expired,
        "drift": flow.drift,
        "balance at the end": report.end_balance,
    }
    rows: list[tuple[Cell, ...]] = [
        *(("now", name, None, points, None, accounts) for name, (points, accounts) in now.items()),
        *(
            ("now", "outstanding", month, total.points, total.unheld, total.accounts)
            for month, total in report.outstanding.items()
        ),
        *(("period", name, None, points, None, None) for name, points in period.items()),
    ]
    columns = ("when", "figure", "expiry_month", "points", "unheld_points", "accounts")
    return ReportTable(columns, tuple(rows), f"Months and days of {time_zone}.")


def redemption_table(report: RedemptionReport, time_zone: str) -> ReportTable:
    """Return the sums of redemptions, one row for each program, month and state."""
    rows: list[tuple[Cell, ...]] = []
    for group, sums in report.sums.items():
        program = report.programs[group.program_id]
        rows.append(
            (
                group.program_id,
                program.display_name,
                group.month,
                group.state,
                sums.redemptions,
                sums.points,
                sums.redeem_value,
                program.currency_code,
                sums.redeem_local_value,
                program.local_currency_code or program.currency_code,
                sums.reversed_points,
                sums.reversed_value,
                sums.overdue,
                sums.overdue_points,
            )
        )
    columns = (
        "program_id",
        "program",
        "month",
        "state",
        "redemptions",
        "points",
        "value",
        "currency",
        "local_value",
        "local_currency",
        "reversed_points",
        "reversed_value",
        "overdue",
        "overdue_points",
    )
    zone = time_zone or "each program's time zone"
    return ReportTable(columns, tuple(rows), f"Months and days of {zone}.")


def code_table(events: Sequence[CodeEvents]) -> ReportTable:
    """Return the events of codes, one row for each day, action, channel and outcome."""
    rows = tuple((each.day.isoformat(), each.action.value, each.channel, each.outcome, each.events) for each in events)
    return ReportTable(("day", "action", "channel", "outcome", "events"), rows, "Days of UTC.")


def print_table(table: ReportTable) -> None:
    """Print a report in the width of the terminal, with numbers to the right."""
    console = table_console()
    if not table.rows:
        console.print("There is nothing to report.")
        return
    printed = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, name in enumerate(table.columns):
        is_number = any(isinstance(row[index], int | Decimal) for row in table.rows)
        printed.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for row in table.rows:
        printed.add_row(*(Text(_to_text(cell)) for cell in row))
    print_unpadded(console, printed)
    console.print()
    console.print(table.note)


def write_csv(table: ReportTable, output: TextIO) -> None:
    """Write a report as CSV with a header, with plain numbers."""
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(table.columns)
    for row in table.rows:
        writer.writerow([_to_csv(cell) for cell in row])


def _to_text(cell: Cell) -> str:
    if isinstance(cell, int):
        return f"{cell:,}"
    return f"{cell:,f}" if isinstance(cell, Decimal) else escape_unprintable(cell or "")


def _to_csv(cell: Cell) -> str:
    """Return a cell as text.

    A text that spreadsheets would take for a formula gets a leading apostrophe.
    """
    if isinstance(cell, int):
        return str(cell)
    if isinstance(cell, Decimal):
        return f"{cell:f}"
    text = escape_unprintable(cell or "")
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text
