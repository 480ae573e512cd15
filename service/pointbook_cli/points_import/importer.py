"""An import: read and sort a file, send or check its lines, print outcomes."""

import asyncio
import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

import typer

from pointbook_cli.exit_codes import EXIT_PROBLEMS, EXIT_STOPPED
from pointbook_cli.points_import.batch_sender import BatchScheduler, BatchSender
from pointbook_cli.points_import.dry_run import DryRun
from pointbook_cli.points_import.line_counts import ACCEPTED_BY_DRY_RUN, OUTCOMES, LineCounts
from pointbook_cli.points_import.points_file import PointsFile, PointsFileError, PointsFileOptions, RefusedLine
from pointbook_cli.points_import.sorted_lines import LineBatch, RefusedLines, SortedLines
from pointbook_cli.points_import.stoppable_input import StoppableInput, open_input
from pointbook_cli.progress import Meter
from pointbook_cli.server_access import local_address
from pointbook_cli.terminal import count_of
from pointbook_client import PointbookClient, connect
from pointbook_server.clock import system_clock
from shopline_shim.server_connection import server_tls
from shopline_shim.settings import ShimSettings

REFUSED_SHOWN = 20
EVENT_ID_LENGTH_SHOWN = 128
LINES_PER_READ = 1_000
STOPPED_SENDING = "Stopped. Run the same command again to continue; events that were sent count as duplicates."
STOPPED_BEFORE_SENDING = "Stopped. Nothing was sent."
DRY_RUN_LIMITS = (
    "Only the server can check: unknown stores, balances of existing accounts, event ids of earlier imports, tokens."
)
CALL_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """The options of an import.

    Without a `server`, lines are read and checked, and nothing is sent.
    """

    file: Path
    file_options: PointsFileOptions
    report: Path | None
    server: ShimSettings | None
    batch_size: int
    in_flight: int


async def run_import(options: ImportOptions, stop: asyncio.Event) -> int:
    """Import a file, print the outcomes of its lines, and return the exit code.

    Raises OSError.
    """
    return await PointsImport(options, stop).run()


class PointsImport:
    """One import of one file."""

    def __init__(self, options: ImportOptions, stop: asyncio.Event) -> None:
        self._options = options
        self._stop = stop
        self._lines = SortedLines()
        self._refused_lines = RefusedLines()
        outcomes = [ACCEPTED_BY_DRY_RUN] if options.server is None else list(OUTCOMES.values())
        self._counts = LineCounts(self._refused_lines, outcomes)
        self._notes: list[str] = []
        self._has_begun_sending = False

    async def run(self) -> int:
        """Import the file, print the outcomes of its lines, and return the exit code.

        Raises OSError.
        """
        with (
            contextlib.closing(self._lines),
            contextlib.closing(self._refused_lines),
            _open_report(self._options) as report,
        ):
            try:
                await self._read()
                await self._send()
            finally:
                if report is not None:
                    for line in self._refused_lines:
                        report.write(_report_row(line))
            self._print_summary()
        if self._stop.is_set():
            return EXIT_STOPPED
        return EXIT_PROBLEMS if self._counts.refused else 0

    async def _read(self) -> None:
        """Read and sort the file in a thread, since reading standard input may block."""
        with open_input(self._options.file) as source:
            stopping = asyncio.create_task(self._end_on_stop(source))
            try:
                await asyncio.to_thread(self._read_and_sort, source)
            except PointsFileError as error:
                # Input that was ended early looks like an incomplete file.
                if not self._stop.is_set():
                    raise OSError(f"{self._options.file}: {error}") from error
            finally:
                stopping.cancel()

    def _read_and_sort(self, source: StoppableInput) -> None:
        activity = "reading"
        reader = io.BufferedReader(source)
        meter = Meter(source.size(), lambda: f"{activity}: {count_of(self._count_read(), 'line', 'lines')}")
        with reader, meter:
            file = PointsFile(reader, self._options.file_options, system_clock)
            while (chunk := file.read(LINES_PER_READ)) is not None:
                if self._stop.is_set():
                    return  # The last line may be incomplete.
                self._lines.add(chunk.lines)
                for line in chunk.refused:
                    self._counts.add_refused(line)
                meter.advance(chunk.size)
            activity = "sorting"
            meter.advance(0)
            self._lines.sort()
        if file.rounded_count:
            lines = count_of(file.rounded_count, "line has", "lines have")
            self._notes.append(
                f"{lines} an id that ends in zeros after its 15th digit, as spreadsheets round long numbers: compare "
                f"line {file.first_rounded} with the source"
            )

    def _count_read(self) -> int:
        return self._lines.count + self._counts.refused

    async def _send(self) -> None:
        """Send the lines, or check them without a server."""

        def read() -> LineBatch | None:
            return self._lines.read(self._options.batch_size)

        if self._stop.is_set():
            return
        server = self._options.server
        activity = "checking" if server is None else "sending"
        with Meter(self._lines.count, lambda: f"{activity}: {self._counts.summary()}") as meter:
            if server is None:
                await self._check(read, meter)
                return
            self._has_begun_sending = True
            async with self._connect(server) as client:
                sender = BatchSender(client, self._counts, meter)
                scheduler = BatchScheduler(sender.send, in_flight=self._options.in_flight, stop=self._stop)
                try:
                    await scheduler.run(read)
                except OSError as error:
                    raise OSError(f"{error}; until then {self._counts.summary()}") from error

    def _connect(self, server: ShimSettings) -> PointbookClient:
        """Connect to the server. Raises SettingError if TLS files are wrong."""
        return connect(
            local_address(server.grpc_address),
            token=server.token.get_secret_value(),
            timeout=CALL_TIMEOUT_SECONDS,
            # The batch sender repeats calls, and prints that it does.
            retries=False,
            wait_for_ready=False,
            **server_tls(server),
        )

    async def _check(self, read: Callable[[], LineBatch | None], meter: Meter) -> None:
        """Check the lines without a server."""
        with contextlib.closing(DryRun(opening_balances=self._options.file_options.opening_balances)) as dry_run:

            async def check(batch: LineBatch) -> None:
                for line in batch.lines:
                    refused = dry_run.check(line)
                    if refused is None:
                        self._counts.add_accepted()
                    else:
                        self._counts.add_refused(refused)
                meter.advance(len(batch.lines))

            await BatchScheduler(check, in_flight=1, stop=self._stop).run(read)
            self._notes += dry_run.notes()

    async def _end_on_stop(self, source: StoppableInput) -> None:
        await self._stop.wait()
        source.is_ended = True
        self._lines.stop()

    def _print_summary(self) -> None:
        """Print the first refused lines, the notes and the counts."""
        for line in islice(self._refused_lines, REFUSED_SHOWN):
            # Escaped, so that the content of a line cannot control the terminal.
            event_id = ascii(line.event_id)[1:-1][:EVENT_ID_LENGTH_SHOWN]
            name = f" ({event_id})" if event_id else ""
            typer.echo(f"line {line.number}{name}: {line.reason}: {line.message}")
        if self._counts.refused > REFUSED_SHOWN:
            report = self._options.report
            source = "--report FILE writes them all" if report is None else f"{report} has them all"
            more = count_of(self._counts.refused - REFUSED_SHOWN, "more refused line", "more refused lines")
            typer.echo(f"and {more}; {source}")
        for note in self._notes:
            typer.echo(note)
        if self._stop.is_set():
            typer.echo(STOPPED_SENDING if self._has_begun_sending else STOPPED_BEFORE_SENDING)
        typer.echo(f"{self._counts.summary()}.")
        if self._options.server is None:
            typer.echo(DRY_RUN_LIMITS)


@contextlib.contextmanager
def _open_report(options: ImportOptions) -> Iterator[TextIO | None]:
    """Open the report. Raises OSError if it is the imported file."""
    if options.report is None:
        yield None
        return
    if options.report.exists() and options.file.exists() and options.report.samefile(options.file):
        raise OSError("--report is the file to import")
    with options.report.open("w", encoding="utf-8") as report:
        yield report


def _report_row(line: RefusedLine) -> str:
    row = {
        "line": line.number,
        "event_id": line.event_id,
        "reason": line.reason,
        "message": line.message,
        "violations": [{"field": name, "description": description} for name, description in line.violations],
    }
    return json.dumps(row) + "\n"
