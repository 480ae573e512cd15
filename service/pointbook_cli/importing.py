"""`pointbook import`: the events of a file, sorted on disk, and sent to a server until each has its answer."""

import asyncio
import contextlib
import io
import json
import os
import random
import select
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import grpc
import typer

from pointbook.v1 import points_pb2, points_pb2_grpc
from pointbook_cli.dry_run import DryRun
from pointbook_cli.health import local_address
from pointbook_cli.points_file import Manner, PointsFile, PointsFileError, Refused, refusal
from pointbook_cli.progress import Meter, counted
from pointbook_cli.sorted_lines import Batch, Refusals, SortedLine, SortedLines
from pointbook_server.clock import system_clock
from shopline_shim.grpc_channel import client_tls_source, open_aio_channel
from shopline_shim.settings import ShimSettings

CALL_SECONDS = 30.0
PATIENCE_SECONDS = 120.0
"""How long a batch is sent again and again before the import gives up."""
RETRY_SECONDS = (0.1, 4.0)
"""The first pause before a batch is sent again, and the longest."""
STOP_SECONDS = 5.0
"""How long calls on their way may take once the import is stopped."""
READY_SECONDS = 0.2
REFUSED_SHOWN = 20
EVENT_ID_SHOWN = 128
READ_LINES = 1_000
"""How many lines are read, and written to the disk, at a time."""
STOPPED_SENDING = "Stopped. The same command goes on from here: what is in the book counts as duplicate."
STOPPED_BEFORE_SENDING = "Stopped. Nothing was sent."
ONLY_THE_SERVER = (
    "What only the server can judge: unknown stores, balances of existing accounts, event ids known already, tokens."
)
EXIT_REFUSED = 1
EXIT_STOPPED = 130
RETRIED = {
    code.value[0]: code.name
    for code in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    )
}
"""The errors that a repetition may mend, by their numbers."""
OUTCOMES = {
    points_pb2.APPLY_OUTCOME_APPLIED: "applied",
    points_pb2.APPLY_OUTCOME_LATE: "late",
    points_pb2.APPLY_OUTCOME_DUPLICATE: "duplicate",
}
CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to import, and how. Without a `server` the lines are read and checked, and nothing is sent."""

    file: Path
    manner: Manner
    report: Path | None
    server: ShimSettings | None
    batch_size: int
    in_flight: int


class Tally:
    """Counts what became of the lines, and keeps the refused ones."""

    def __init__(self, refusals: Refusals, outcomes: Sequence[str]) -> None:
        self.counts = Counter(dict.fromkeys([*outcomes, "refused"], 0))
        self._refusals = refusals
        self._began = time.monotonic()

    def refuse(self, refused: Refused) -> None:
        """Count a refused line."""
        self.counts["refused"] += 1
        self._refusals.add(refused)

    def count(self, line: SortedLine, result: points_pb2.PointsUpdateResult) -> None:
        """Count a line by its answer."""
        if result.HasField("error"):
            error = result.error
            pairs = ((violation.field, violation.description) for violation in error.violations)
            self.refuse(refusal(line.number, line.update.event_id, error.reason, error.message, pairs))
        else:
            self.counts[OUTCOMES[result.response.outcome]] += 1

    def told(self) -> str:
        """Return the counts as text, and how fast they grow."""
        lines = self.counts.total()
        rate = lines / max(time.monotonic() - self._began, 0.001)
        counts = ", ".join(f"{count:,} {what}" for what, count in self.counts.items())
        return f"{counted(lines, 'line', 'lines')}, {rate:,.0f} a second: {counts}"


class Importer:
    """Hands batches to `send`, some at a time, so that the events of an account arrive in their order.

    A batch waits for those on their way that share an account or an event_id with it.
    """

    def __init__(
        self, send: Callable[[Batch], Coroutine[Any, Any, None]], *, in_flight: int, stop: asyncio.Event
    ) -> None:
        self._send = send
        self._in_flight = in_flight
        self._stop = stop
        self._sending: dict[asyncio.Task[None], Batch] = {}

    async def run(self, read: Callable[[], Batch | None]) -> None:
        """Send everything, or what there is until the stop event. The first error ends it."""
        stopped = asyncio.create_task(self._stop.wait())
        try:
            while (batch := await asyncio.to_thread(read)) is not None:
                while self._must_wait(batch) and not stopped.done():
                    await self._settle(stopped)
                if self._stop.is_set():
                    break
                self._sending[asyncio.create_task(self._send(batch))] = batch
            while self._sending and not stopped.done():
                await self._settle(stopped)
            if self._sending:
                await asyncio.wait(self._sending, timeout=STOP_SECONDS)
        finally:
            for task in (stopped, *self._sending):
                task.cancel()
            await asyncio.gather(stopped, *self._sending, return_exceptions=True)

    def _must_wait(self, batch: Batch) -> bool:
        others = self._sending.values()
        return len(others) >= self._in_flight or any(not batch.shared.isdisjoint(other.shared) for other in others)

    async def _settle(self, stopped: "asyncio.Task[Any]") -> None:
        """Wait until a batch has been answered, or until the import is stopped."""
        done, _ = await asyncio.wait({*self._sending, stopped}, return_when=asyncio.FIRST_COMPLETED)
        for task in done - {stopped}:
            del self._sending[task]
            task.result()


class Sender:
    """Sends batches to a server, again where that may help, until each line has its answer."""

    def __init__(self, channel: grpc.aio.Channel, token: str, tally: Tally, meter: Meter) -> None:
        self._points = points_pb2_grpc.PointsServiceStub(channel)
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._tally = tally
        self._meter = meter
        self._is_away = False

    async def send(self, batch: Batch) -> None:
        """Send a batch. Raises OSError where the server refuses the call, or is away for too long."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        pause, longest = RETRY_SECONDS
        lines: Sequence[SortedLine] = batch.lines
        while lines:
            lines, cause = await self._try(lines)
            if not lines:
                break
            if time.monotonic() > deadline:
                raise OSError(f"the server answers {cause} for {PATIENCE_SECONDS:.0f} seconds now")
            if not self._is_away:
                self._is_away = True
                self._meter.say(f"{cause}: trying again for up to {PATIENCE_SECONDS:.0f} seconds")
            await asyncio.sleep(random.uniform(pause / 2, pause))  # noqa: S311 - only jitter
            pause = min(pause * 2, longest)
        self._is_away = False
        self._meter.advance(len(batch.lines))

    async def _try(self, lines: Sequence[SortedLine]) -> tuple[Sequence[SortedLine], str]:
        """Send lines once; answers those to send again, and why."""
        request = points_pb2.BatchApplyPointsUpdatesRequest(updates=[line.update for line in lines])
        try:
            response = await self._points.BatchApplyPointsUpdates(
                request, metadata=self._metadata, timeout=CALL_SECONDS
            )
        except grpc.aio.AioRpcError as error:
            if error.code().value[0] not in RETRIED:
                raise OSError(f"the server refused the call: {error.code().name}: {error.details()}") from error
            return lines, error.code().name
        again, cause = [], ""
        for line, result in zip(lines, response.results, strict=True):
            if result.error.code in RETRIED:
                again.append(line)
                cause = RETRIED[result.error.code]
            else:
                self._tally.count(line, result)
        return again, cause


class _Input(io.FileIO):
    """A file or a pipe that can be told to end, while a thread waits for what comes next."""

    is_ended = False

    def readinto(self, buffer: Any) -> int | None:
        """Read what there is, when there is something."""
        while not self.is_ended:
            if select.select([self], [], [], READY_SECONDS)[0]:
                return super().readinto(buffer)
        return 0


class Import:
    """One import: the file is read and sorted, and then its lines are sent, or judged where there is no server."""

    def __init__(self, plan: Plan, stop: asyncio.Event) -> None:
        self._plan = plan
        self._stop = stop
        self._lines = SortedLines()
        self._refusals = Refusals()
        self._tally = Tally(self._refusals, ["fine"] if plan.server is None else list(OUTCOMES.values()))
        self._notes: list[str] = []
        self._has_begun_sending = False

    async def run(self) -> int:
        """Import the file, print what became of its lines, and return the exit code. Raises OSError."""
        with contextlib.closing(self._lines), contextlib.closing(self._refusals), _report(self._plan) as report:
            try:
                await self._read()
                await self._send()
            finally:
                if report is not None:
                    for refused in self._refusals:
                        report.write(_report_row(refused))
            self._print_summary()
        if self._stop.is_set():
            return EXIT_STOPPED
        return EXIT_REFUSED if self._tally.counts["refused"] else 0

    async def _read(self) -> None:
        """Read the file to its end and sort it, in a thread, since reading standard input may block."""
        with _opened(self._plan.file) as source:
            ending = asyncio.create_task(self._end_with(source))
            try:
                await asyncio.to_thread(self._read_and_sort, source)
            except PointsFileError as error:
                # A pipe that is left looks as if the file ended too early.
                if not self._stop.is_set():
                    raise OSError(f"{self._plan.file}: {error}") from error
            finally:
                ending.cancel()

    def _read_and_sort(self, source: "_Input") -> None:
        work = "reading"
        reader = io.BufferedReader(source)
        meter = Meter(_size(source), lambda: f"{work}: {counted(self._count_read(), 'line', 'lines')}")
        with reader, meter:
            file = PointsFile(reader, self._plan.manner, system_clock)
            while (portion := file.read(READ_LINES)) is not None:
                if self._stop.is_set():
                    return  # The last line may have been cut off.
                self._lines.add(portion.lines)
                for refused in portion.refused:
                    self._tally.refuse(refused)
                meter.advance(portion.size)
            work = "sorting"
            meter.advance(0)
            self._lines.sort()
        count, first = file.rounded
        if count:
            lines = counted(count, "line has", "lines have")
            self._notes.append(
                f"{lines} an id that ends in zeros after its 15th digit, as spreadsheets round long numbers: compare "
                f"line {first} with the source"
            )

    def _count_read(self) -> int:
        return self._lines.count + self._tally.counts["refused"]

    async def _send(self) -> None:
        def read() -> Batch | None:
            return self._lines.read(self._plan.batch_size)

        if self._stop.is_set():
            return
        work = "judging" if self._plan.server is None else "sending"
        with Meter(self._lines.count, lambda: f"{work}: {self._tally.told()}") as meter:
            if self._plan.server is None:
                await self._judge(read, meter)
                return
            self._has_begun_sending = True
            address = local_address(self._plan.server.grpc_address)
            tls = client_tls_source(self._plan.server)
            async with open_aio_channel(self._plan.server, address, CHANNEL_OPTIONS, tls) as channel:
                sender = Sender(channel, self._plan.server.token.get_secret_value(), self._tally, meter)
                try:
                    await Importer(sender.send, in_flight=self._plan.in_flight, stop=self._stop).run(read)
                except OSError as error:
                    raise OSError(f"{error}; until then {self._tally.told()}") from error

    async def _judge(self, read: Callable[[], Batch | None], meter: Meter) -> None:
        """Judge the lines without a server."""
        with contextlib.closing(DryRun(opening_balances=self._plan.manner.opening_balances)) as dry_run:

            async def judge(batch: Batch) -> None:
                for line in batch.lines:
                    refused = dry_run.judge(line)
                    if refused is None:
                        self._tally.counts["fine"] += 1
                    else:
                        self._tally.refuse(refused)
                meter.advance(len(batch.lines))

            await Importer(judge, in_flight=1, stop=self._stop).run(read)
            self._notes += dry_run.notes()

    async def _end_with(self, source: "_Input") -> None:
        await self._stop.wait()
        source.is_ended = True
        self._lines.stop()

    def _print_summary(self) -> None:
        """Print the first refused lines, the notes and the counts."""
        for refused in islice(self._refusals, REFUSED_SHOWN):
            # What stands in a wrong line must not steer the terminal.
            event_id = ascii(refused.event_id)[1:-1][:EVENT_ID_SHOWN]
            named = f" ({event_id})" if event_id else ""
            typer.echo(f"line {refused.number}{named}: {refused.reason}: {refused.message}")
        if self._tally.counts["refused"] > REFUSED_SHOWN:
            where = (
                "--report FILE writes them all" if self._plan.report is None else f"{self._plan.report} has them all"
            )
            more = counted(self._tally.counts["refused"] - REFUSED_SHOWN, "more refused line", "more refused lines")
            typer.echo(f"and {more}; {where}")
        for note in self._notes:
            typer.echo(note)
        if self._stop.is_set():
            typer.echo(STOPPED_SENDING if self._has_begun_sending else STOPPED_BEFORE_SENDING)
        typer.echo(f"{self._tally.told()}.")
        if self._plan.server is None:
            typer.echo(ONLY_THE_SERVER)


async def run_import(plan: Plan, stop: asyncio.Event) -> int:
    """Import a file, print what became of its lines, and return the exit code. Raises OSError."""
    return await Import(plan, stop).run()


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[_Input]:
    is_standard_input = str(file) == "-"
    with _Input(sys.stdin.fileno() if is_standard_input else str(file), closefd=not is_standard_input) as source:
        yield source


@contextlib.contextmanager
def _report(plan: Plan) -> Iterator[TextIO | None]:
    """Open the report. It never takes the place of the file that is imported."""
    if plan.report is None:
        yield None
        return
    if plan.report.exists() and plan.file.exists() and plan.report.samefile(plan.file):
        raise OSError("--report is the file that is to be imported")
    with plan.report.open("w", encoding="utf-8") as report:
        yield report


def _size(source: _Input) -> int | None:
    """Tell how much there is to read; None of a pipe, of which nobody knows."""
    status = os.fstat(source.fileno())
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _report_row(refused: Refused) -> str:
    row = {
        "line": refused.number,
        "event_id": refused.event_id,
        "reason": refused.reason,
        "message": refused.message,
        "violations": [{"field": name, "description": told} for name, told in refused.violations],
    }
    return json.dumps(row) + "\n"
