"""The rows of the table that tell speed: each is measured in several rounds that take turns, and the median counts.

So what else the machine does meanwhile burdens all rows alike, and their ratios stand.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import asyncpg

from jobs import Job, Measurement, Stopwatch
from pgbench import measure_upserts, prepare_upserts
from prepare import connect
from processes import Load
from report import Result, Steps
from rows import HOT, IDLE_APPLY, IDLE_ECHO, PGBENCH, WEBHOOK, Row, idle_rows
from shops import Shops

ROUNDS = 3
IDLE_SHARE = 0.25
"""How much of a row's time is spent on calling one at a time."""
COMMIT = "one single-row commit: p50"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured in each round: rows, and whether also one call at a time."""

    shops: Shops
    rows: tuple[Row, ...]
    is_idle: bool

    @property
    def steps(self) -> int:
        """How many steps it takes."""
        return ROUNDS * (sum(1 + row.is_beside_pgbench for row in self.rows) + self.is_idle)


class Speed:
    """Measures a plan's rows by one load process, against servers by their addresses, on one database."""

    def __init__(self, plan: Plan, load: Load, token: str, addresses: Mapping[str, str], database_url: str) -> None:
        self._plan = plan
        self._load = load
        self._token = token
        self._addresses = addresses
        self._database_url = database_url
        self._measured: defaultdict[str, list[Measurement]] = defaultdict(list)
        self._rates: defaultdict[str, list[float]] = defaultdict(list)

    async def measure(self, seconds: float, steps: Steps) -> list[Result]:
        """Measure every row for so many seconds altogether, and one call at a time for some more."""
        connection = await connect(self._database_url)
        if any(row.is_beside_pgbench for row in self._plan.rows):
            await prepare_upserts(connection)
        for number in range(1, ROUNDS + 1):
            await self._round(f"round {number} of {ROUNDS}", seconds / ROUNDS, connection, steps)
        await connection.close()
        return self._results()

    async def _round(self, name: str, seconds: float, connection: asyncpg.Connection, steps: Steps) -> None:
        for row in self._plan.rows:
            steps.begin(f"{name}: {row.name}")
            await self._run(row, seconds)
            if row.is_beside_pgbench:
                steps.begin(f"{name}: {PGBENCH}")
                self._rates[PGBENCH].append(await measure_upserts(self._database_url, seconds))
        if self._plan.is_idle:
            steps.begin(f"{name}: one call at a time")
            for row in idle_rows(self._plan.shops):
                await self._run(row, seconds * IDLE_SHARE)
            self._measured[COMMIT].append(await measure_commits(connection, seconds * IDLE_SHARE))

    async def _run(self, row: Row, seconds: float) -> None:
        job = Job(
            kind=row.kind,
            address=self._addresses[row.server],
            token=self._token,
            population=row.population,
            in_flight=row.in_flight,
            seconds=seconds,
            updates=row.updates,
        )
        measurement = await self._load.run(job)
        self._measured[row.name].append(measurement)
        self._rates[row.name].append(measurement.rate * row.updates)

    def _results(self) -> list[Result]:
        results = [result for row in self._plan.rows for result in self._rates_of(row)]
        if WEBHOOK in self._measured:
            results.append(Result(f"{WEBHOOK}: p99", self._median(WEBHOOK, "p99_ms"), "ms", "< 500 ms"))
        if HOT in self._measured:
            late = sum(measurement.late for measurement in self._measured[HOT])
            calls = sum(measurement.calls for measurement in self._measured[HOT])
            results.append(Result(f"{HOT}: events that came late", 100 * late / calls, "%"))
        unavailable = sum(measurement.unavailable for rounds in self._measured.values() for measurement in rounds)
        results.append(Result("all rows: calls answered UNAVAILABLE", unavailable, "calls"))
        return [*results, *self._idle_results()] if self._plan.is_idle else results

    def _rates_of(self, row: Row) -> list[Result]:
        """Tell a row's rate beside each of its bars, as far as what they are ratios to was measured."""
        rate = median(self._rates[row.name])
        results = [
            Result(row.name, rate, row.unit, bar, rate / median(self._rates[ratio_to]), ratio_to)
            for ratio_to, bar in row.bars
            if ratio_to in self._rates
        ]
        if row.is_beside_pgbench:
            results.append(Result(PGBENCH, median(self._rates[PGBENCH]), row.unit))
        return results or [Result(row.name, rate, row.unit)]

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
