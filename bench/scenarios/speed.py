"""The speed of calls, as the median of several rounds.

The rates alternate within a round, so that other load on the machine affects all of them alike, and their ratios hold.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import asyncpg

from load.jobs import Job, Measurement, Stopwatch
from reporting.progress import StepProgress
from reporting.results import Result
from scenarios.pgbench import create_upsert_table, measure_upserts
from scenarios.populations import Populations
from scenarios.rates import HOT, PGBENCH, SEQUENTIAL_APPLY, SEQUENTIAL_ECHO, WEBHOOK, Rate, sequential_rates
from servers.database import connect
from servers.subprocesses import LoadProcess

ROUNDS = 3
SEQUENTIAL_SHARE = 0.25
"""The time for sequential calls, as a share of the time for a rate."""
COMMIT = "one single-row commit: p50"


@dataclass(frozen=True, slots=True)
class SpeedPlan:
    """The rates to measure in each round, and whether to measure sequential calls too."""

    populations: Populations
    rates: tuple[Rate, ...]
    has_sequential_calls: bool

    @property
    def steps(self) -> int:
        """The number of steps of all rounds."""
        return ROUNDS * (sum(1 + rate.is_compared_with_pgbench for rate in self.rates) + self.has_sequential_calls)


class SpeedMeasurement:
    """A measurement of a plan's rates, by one load process, on one database."""

    def __init__(
        self, plan: SpeedPlan, load: LoadProcess, token: str, addresses: Mapping[str, str], database_url: str
    ) -> None:
        self._plan = plan
        self._load = load
        self._token = token
        self._addresses = addresses
        self._database_url = database_url
        self._measurements: defaultdict[str, list[Measurement]] = defaultdict(list)
        self._rates: defaultdict[str, list[float]] = defaultdict(list)

    async def measure(self, seconds: float, steps: StepProgress) -> list[Result]:
        """Measure each rate, and sequential calls, for `seconds` in total.

        Sequential calls take a share of that time in addition.
        """
        connection = await connect(self._database_url)
        if any(rate.is_compared_with_pgbench for rate in self._plan.rates):
            await create_upsert_table(connection)
        for number in range(1, ROUNDS + 1):
            await self._measure_round(f"round {number} of {ROUNDS}", seconds / ROUNDS, connection, steps)
        await connection.close()
        return self._results()

    async def _measure_round(
        self, name: str, seconds: float, connection: asyncpg.Connection, steps: StepProgress
    ) -> None:
        for rate in self._plan.rates:
            steps.begin(f"{name}: {rate.name}")
            await self._measure_rate(rate, seconds)
            if rate.is_compared_with_pgbench:
                steps.begin(f"{name}: {PGBENCH}")
                self._rates[PGBENCH].append(await measure_upserts(self._database_url, seconds))
        if self._plan.has_sequential_calls:
            steps.begin(f"{name}: one call at a time")
            for rate in sequential_rates(self._plan.populations):
                await self._measure_rate(rate, seconds * SEQUENTIAL_SHARE)
            self._measurements[COMMIT].append(await measure_commits(connection, seconds * SEQUENTIAL_SHARE))

    async def _measure_rate(self, rate: Rate, seconds: float) -> None:
        job = Job(
            kind=rate.kind,
            address=self._addresses[rate.server],
            token=self._token,
            population=rate.population,
            in_flight=rate.in_flight,
            seconds=seconds,
            updates=rate.updates,
        )
        measurement = await self._load.run(job)
        self._measurements[rate.name].append(measurement)
        self._rates[rate.name].append(measurement.rate * rate.updates)

    def _results(self) -> list[Result]:
        results = [result for rate in self._plan.rates for result in self._rate_results(rate)]
        if WEBHOOK in self._measurements:
            results.append(Result(f"{WEBHOOK}: p99", self._median(WEBHOOK, "p99_ms"), "ms", "< 200 ms"))
        if HOT in self._measurements:
            late = sum(measurement.late for measurement in self._measurements[HOT])
            calls = sum(measurement.calls for measurement in self._measurements[HOT])
            results.append(Result(f"{HOT}: events that came late", 100 * late / calls, "%"))
        unavailable = sum(measurement.unavailable for rounds in self._measurements.values() for measurement in rounds)
        results.append(Result("all rows: calls answered UNAVAILABLE", unavailable, "calls"))
        return [*results, *self._sequential_results()] if self._plan.has_sequential_calls else results

    def _rate_results(self, rate: Rate) -> list[Result]:
        """Return a result for each bar, or one without a bar.

        A bar needs the measurement of the other rate.
        """
        value = median(self._rates[rate.name])
        results = [
            Result(rate.name, value, rate.unit, bar, value / median(self._rates[other]), other)
            for other, bar in rate.bars
            if other in self._rates
        ]
        if rate.is_compared_with_pgbench:
            results.append(Result(PGBENCH, median(self._rates[PGBENCH]), rate.unit))
        return results or [Result(rate.name, value, rate.unit)]

    def _sequential_results(self) -> list[Result]:
        echo_ms, commit_ms = self._median(SEQUENTIAL_ECHO, "p50_ms"), self._median(COMMIT, "p50_ms")
        apply_ms = self._median(SEQUENTIAL_APPLY, "p50_ms")
        ratio = apply_ms / (echo_ms + commit_ms)
        return [
            Result(SEQUENTIAL_ECHO, echo_ms, "ms"),
            Result(COMMIT, commit_ms, "ms"),
            Result(SEQUENTIAL_APPLY, apply_ms, "ms", "≤ 1.5, aim 1.2", ratio, "the two above together"),
        ]

    def _median(self, name: str, figure: str) -> float:
        return float(median(getattr(measurement, figure) for measurement in self._measurements[name]))


async def measure_commits(connection: asyncpg.Connection, seconds: float) -> Measurement:
    """Measure durable changes of one row, directly on the database."""
    await connection.execute("CREATE TABLE IF NOT EXISTS bench_commits (number bigint NOT NULL)")
    statement = await connection.prepare("INSERT INTO bench_commits VALUES ($1)")
    stopwatch = Stopwatch()
    while stopwatch.elapsed_seconds < seconds:
        with stopwatch.lap():
            await statement.fetch(len(stopwatch.laps))
    return stopwatch.measurement()
