"""`pointbook import`: the events of a file, sent to a server in batches until each has its answer."""

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
from pathlib import Path
from typing import Any, TextIO

import grpc
import typer

from pointbook.v1 import points_pb2, points_pb2_grpc
from pointbook_cli.points_file import Batch, Line, Manner, PointsFile, PointsFileError, Refused, refusal
from pointbook_cli.progress import Meter, counted
from pointbook_server.clock import system_clock

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
    """What to import, and how. Without an `address` the lines are read and checked, and nothing is sent."""

    file: Path
    manner: Manner
    report: Path | None
    address: str | None
    token: str
    batch_size: int
    in_flight: int


class Tally:
    """Counts what became of the lines. The first refused ones are kept, all of them written to the report."""

    def __init__(self, report: TextIO | None, outcomes: Sequence[str]) -> None:
        self.counts = Counter(dict.fromkeys([*outcomes, "refused"], 0))
        self.shown: list[Refused] = []
        self._report = report
        self._began = time.monotonic()

    def refuse(self, refused: Refused) -> None:
        """Count a refused line."""
        self.counts["refused"] += 1
        if len(self.shown) < REFUSED_SHOWN:
            self.shown.append(refused)
        if self._report is not None:
            row = {
                "line": refused.number,
                "event_id": refused.event_id,
                "reason": refused.reason,
                "message": refused.message,
                "violations": [{"field": name, "description": told} for name, told in refused.violations],
            }
            self._report.write(json.dumps(row) + "\n")

    def count(self, line: Line, result: points_pb2.PointsUpdateResult) -> None:
        """Count a line by its answer."""
        if result.HasField("error"):
            error = result.error
            pairs = ((violation.field, violation.description) for violation in error.violations)
            self.refuse(refusal(line.number, line.update.event_id, error.reason, error.message, pairs))
        else:
            self.counts[OUTCOMES[result.response.outcome]] += 1

    def told(self) -> str:
        """Tell the counts, and how fast they grow."""
        lines = self.counts.total()
        rate = lines / max(time.monotonic() - self._began, 0.001)
        counts = ", ".join(f"{count:,} {what}" for what, count in self.counts.items())
        return f"{counted(lines, 'line', 'lines')}, {rate:,.0f} a second: {counts}"


class Importer:
    """Hands the batches of a file to `send`, some at a time, in the order of the file as far as it matters.

    Events with a balance may come in any order. Where a line of a batch has none, the batch waits for those before
    it, and those behind it wait for the batch.
    """

    def __init__(
        self, send: Callable[[Batch], Coroutine[Any, Any, None]], *, in_flight: int, stop: asyncio.Event
    ) -> None:
        self._send = send
        self._in_flight = in_flight
        self._stop = stop
        self._sending: set[asyncio.Task[None]] = set()

    async def run(self, read: Callable[[], Batch | None]) -> None:
        """Send everything, or what there is until the stop event. The first error ends it."""
        stopped = asyncio.create_task(self._stop.wait())
        try:
            # A thread reads, since standard input may be a pipe in which nothing comes.
            while (batch := await asyncio.to_thread(read)) is not None:
                await self._settle(0 if batch.keeps_order else self._in_flight - 1, stopped)
                if self._stop.is_set():
                    break
                self._sending.add(asyncio.create_task(self._send(batch)))
                await self._settle(0 if batch.keeps_order else self._in_flight, stopped)
            await self._settle(0, stopped)
            if self._sending:
                await asyncio.wait(self._sending, timeout=STOP_SECONDS)
        finally:
            for task in (stopped, *self._sending):
                task.cancel()
            await asyncio.gather(stopped, *self._sending, return_exceptions=True)

    async def _settle(self, room: int, stopped: "asyncio.Task[Any]") -> None:
        """Wait until no more batches than `room` are on their way, or until the import is stopped."""
        while len(self._sending) > room and not stopped.done():
            done, _ = await asyncio.wait({*self._sending, stopped}, return_when=asyncio.FIRST_COMPLETED)
            for task in done & self._sending:
                self._sending.discard(task)
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
        lines: Sequence[Line] = batch.lines
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
        for refused in batch.refused:
            self._tally.refuse(refused)
        self._meter.advance(batch.size)

    async def _try(self, lines: Sequence[Line]) -> tuple[Sequence[Line], str]:
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


async def run_import(plan: Plan, stop: asyncio.Event) -> int:
    """Import a file, print what became of its lines, and answer the exit code. Raises OSError."""
    with _opened(plan.file) as source, _report(plan) as report:
        tally = Tally(report, ["fine"] if plan.address is None else list(OUTCOMES.values()))
        ending = asyncio.create_task(_end_with(source, stop))
        try:
            file = await asyncio.to_thread(PointsFile, io.BufferedReader(source), plan.manner, system_clock)
            with Meter(_size(source), tally.told) as meter:
                await _import(plan, file, tally, meter, stop)
        except PointsFileError as error:
            # A pipe that is left looks as if the file ended too early.
            if not stop.is_set():
                raise OSError(f"{plan.file}: {error}") from error
        except OSError as error:
            raise OSError(f"{error}; until then {tally.told()}") from error
        finally:
            ending.cancel()
    _print_summary(plan, tally, is_stopped=stop.is_set())
    if stop.is_set():
        return EXIT_STOPPED
    return EXIT_REFUSED if tally.counts["refused"] else 0


async def _import(plan: Plan, file: PointsFile, tally: Tally, meter: Meter, stop: asyncio.Event) -> None:
    def read() -> Batch | None:
        return file.read(plan.batch_size)

    if plan.address is None:

        async def check(batch: Batch) -> None:
            tally.counts["fine"] += len(batch.lines)
            for refused in batch.refused:
                tally.refuse(refused)
            meter.advance(batch.size)

        await Importer(check, in_flight=1, stop=stop).run(read)
        return
    async with grpc.aio.insecure_channel(plan.address, options=CHANNEL_OPTIONS) as channel:
        sender = Sender(channel, plan.token, tally, meter)
        await Importer(sender.send, in_flight=plan.in_flight, stop=stop).run(read)


async def _end_with(source: _Input, stop: asyncio.Event) -> None:
    await stop.wait()
    source.is_ended = True


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


def _print_summary(plan: Plan, tally: Tally, *, is_stopped: bool) -> None:
    """Print the counts, and the first refused lines."""
    for refused in sorted(tally.shown, key=lambda refused: refused.number):
        # What stands in a wrong line must not steer the terminal.
        event_id = ascii(refused.event_id)[1:-1][:EVENT_ID_SHOWN]
        named = f" ({event_id})" if event_id else ""
        typer.echo(f"line {refused.number}{named}: {refused.reason}: {refused.message}")
    if tally.counts["refused"] > len(tally.shown):
        where = "--report FILE writes them all" if plan.report is None else f"{plan.report} has them all"
        more = counted(tally.counts["refused"] - len(tally.shown), "more refused line", "more refused lines")
        typer.echo(f"and {more}; {where}")
    if is_stopped:
        typer.echo("Stopped. The same command goes on from here: what is in the book counts as duplicate.")
    typer.echo(f"{tally.told()}.")
