"""The rows of the table that tell speed: each is measured in several rounds that take turns, and the median counts.

So what else the machine does meanwhile burdens all rows alike, and their ratios stand.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import asyncpg

from jobs import Job, Kind, Measurement, Stopwatch
from processes import Load
from report import Result, Steps
from shops import Population, Shops

ROUNDS = 3
IN_FLIGHT = 64
ECHO = "echo"
APPLY = "ApplyPointsUpdate"
PLAIN = "ApplyPointsUpdate, written plainly"
HOT = f"{APPLY}, 10 hot accounts"
VALIDATE = "ValidateRedemption, no code"
IDLE_ECHO = f"{ECHO}, one call at a time: p50"
IDLE_APPLY = f"{APPLY}, one call at a time: p50"
COMMIT = "one single-row commit: p50"
WEBHOOK = "webhook → shim → server → committed → 200"


@dataclass(frozen=True, slots=True)
class Row:
    """A rate to measure, the rows that it is a ratio to, and the bars for those ratios."""

    name: str
    kind: Kind
    server: str
    population: Population
    bars: tuple[tuple[str, str], ...] = (("", ""),)


def rows(shops: Shops) -> tuple[Row, ...]:
    """List the rates, with the bars of the specification."""
    return (
        Row(ECHO, Kind.APPLY, "echo", shops.echo),
        Row(APPLY, Kind.APPLY, "pointbook", shops.book, ((ECHO, "≥ 0.50, aim 0.70"), (PLAIN, "≥ 2.5, aim 4"))),
        Row(PLAIN, Kind.APPLY, "plain", shops.book),
        Row(HOT, Kind.APPLY, "pointbook", shops.hot, ((APPLY, "≥ 0.9, aim 1.0"),)),
        Row(f"{APPLY}, 1,000 merchants", Kind.APPLY, "pointbook", shops.spread, ((APPLY, "≥ 0.3, aim 0.5"),)),
        Row(VALIDATE, Kind.VALIDATE, "pointbook", shops.book, ((ECHO, "≥ 0.55, aim 0.80"),)),
        Row(
            "IssueValidationCode, instant sender",
            Kind.ISSUE,
            "pointbook",
            shops.customers,
            ((ECHO, "≥ 0.25, aim 0.50"),),
        ),
        Row(WEBHOOK, Kind.WEBHOOK, "shim", shops.book, ((ECHO, "≥ 0.20, aim 0.35"),)),
    )


def idle_rows(shops: Shops) -> tuple[Row, ...]:
    """List what is also called one at a time."""
    return (
        Row(IDLE_ECHO, Kind.APPLY, "echo", shops.echo),
        Row(IDLE_APPLY, Kind.APPLY, "pointbook", shops.book),
    )


class Speed:
    """Measures all rows by one load process, against servers by their addresses."""

    def __init__(self, load: Load, token: str, addresses: Mapping[str, str]) -> None:
        self._load = load
        self._token = token
        self._addresses = addresses
        self._measured: defaultdict[str, list[Measurement]] = defaultdict(list)

    async def measure(self, shops: Shops, seconds: float, connection: asyncpg.Connection, steps: Steps) -> list[Result]:
        """Measure every row for so many seconds altogether, and one call at a time for some more."""
        for number in range(1, ROUNDS + 1):
            for row in rows(shops):
                steps.begin(f"round {number} of {ROUNDS}: {row.name}")
                await self._run(row, in_flight=IN_FLIGHT, seconds=seconds / ROUNDS)
            steps.begin(f"round {number} of {ROUNDS}: one call at a time")
            for row in idle_rows(shops):
                await self._run(row, in_flight=1, seconds=seconds / ROUNDS / 4)
            self._measured[COMMIT].append(await measure_commits(connection, seconds / ROUNDS / 4))
        return self._results(shops)

    async def _run(self, row: Row, *, in_flight: int, seconds: float) -> None:
        job = Job(row.kind, self._addresses[row.server], self._token, row.population, in_flight, seconds)
        self._measured[row.name].append(await self._load.run(job))

    def _results(self, shops: Shops) -> list[Result]:
        results = [self._rate(row, ratio_to, bar) for row in rows(shops) for ratio_to, bar in row.bars]
        p99_ms = self._median(WEBHOOK, "p99_ms")
        results.append(Result(f"{WEBHOOK}: p99", p99_ms, "ms", "< 500 ms"))
        late = sum(measurement.late for measurement in self._measured[HOT])
        calls = sum(measurement.calls for measurement in self._measured[HOT])
        results.append(Result(f"{HOT}: events that came late", 100 * late / calls, "%"))
        unavailable = sum(measurement.unavailable for rounds in self._measured.values() for measurement in rounds)
        results.append(Result("all rows: calls answered UNAVAILABLE", unavailable, "calls"))
        return [*results, *self._idle_results()]

    def _rate(self, row: Row, ratio_to: str, bar: str) -> Result:
        rate = self._median(row.name, "rate")
        ratio = rate / self._median(ratio_to, "rate") if ratio_to else None
        return Result(row.name, rate, "calls/s", bar, ratio, ratio_to)

    def _idle_results(self) -> list[Result]:
        echo_ms, commit_ms = self._median(IDLE_ECHO, "p50_ms"), self._median(COMMIT, "p50_ms")
        apply_ms = self._median(IDLE_APPLY, "p50_ms")
        ratio = apply_ms / (echo_ms + commit_ms)
        return [
            Result(IDLE_ECHO, echo_ms, "ms"),
            Result(COMMIT, commit_ms, "ms"),
            Result(IDLE_APPLY, apply_ms, "ms", "≤ 1.5, aim 1.2", ratio, "the two above together"),
        ]

    def _median(self, name: str, figure: str) -> float:
        return float(median(getattr(measurement, figure) for measurement in self._measured[name]))


async def measure_commits(connection: asyncpg.Connection, seconds: float) -> Measurement:
    """Measure what a durable change of one row takes, with nothing between us and the database."""
    await connection.execute("CREATE TABLE IF NOT EXISTS bench_commits (number bigint NOT NULL)")
    statement = await connection.prepare("INSERT INTO bench_commits VALUES ($1)")
    stopwatch = Stopwatch()
    while stopwatch.elapsed_seconds < seconds:
        with stopwatch.lap():
            await statement.fetch(len(stopwatch.laps))
    return stopwatch.measurement()
