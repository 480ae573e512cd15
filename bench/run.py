"""`make bench`: measure Pointbook, print a table, and write results.json.

Every speed is also given as a ratio to one measured in the same run, on a durable database. No ratio fails the run.
"""

import argparse
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import uvloop

from load.jobs import CallKind, Job
from load.requests import SECRET
from pointbook_cli.embedded_postgres import EmbeddedPostgres
from reporting.progress import StepProgress
from reporting.results import Result, print_table, write_json
from scenarios.cpu_time import CPU_SECONDS, WARM_UP_SECONDS, measure_cpu_time
from scenarios.memory import measure_memory
from scenarios.populations import Populations, plan_populations
from scenarios.rates import (
    APPLY,
    BATCH,
    GET,
    IN_FLIGHT,
    POINTBOOK,
    REDEEM,
    UPDATES_IN_BATCH,
    VALIDATE,
    Rate,
    Scenario,
    all_rates,
    selected_rates,
    sequential_rates,
)
from scenarios.speed import ROUNDS, SpeedMeasurement, SpeedPlan
from scenarios.startup import measure_startup
from scenarios.statements import count_statements, enable_statement_counts
from servers import process_usage
from servers.database import connect, prepare_database, run_postgres, server_environment
from servers.subprocesses import LoadProcess, run_load_process, run_server

ACCOUNTS = 100_000
SECONDS = 12.0
MEMORY_CALLS = 200_000
MEMORY_SECONDS_MAX = 3_600.0
CODES_PER_SECOND_MAX = 5_000
COUNTED_SECONDS_MAX = 30.0
BENCH = Path(__file__).parent
BUILD = BENCH.parent / "build"


@dataclass(frozen=True, slots=True)
class Options:
    """The options of the command line."""

    accounts: int
    seconds: float
    memory_calls: int
    scenarios: Collection[Scenario]


@dataclass(frozen=True, slots=True)
class Environment:
    """What all scenarios share.

    The database, the load process and the progress display.
    """

    postgres: EmbeddedPostgres
    load: LoadProcess
    token: str
    populations: Populations
    steps: StepProgress


class CountedCalls(NamedTuple):
    """Calls whose statements are counted."""

    name: str
    kind: CallKind
    calls: int
    in_flight: int
    updates: int = 1


COUNTED_CALLS = (
    CountedCalls(APPLY, CallKind.APPLY, calls=1_000, in_flight=16),
    CountedCalls(BATCH, CallKind.BATCH, calls=20, in_flight=1, updates=UPDATES_IN_BATCH),
    CountedCalls(GET, CallKind.GET, calls=1_000, in_flight=16),
    CountedCalls(VALIDATE, CallKind.VALIDATE, calls=1_000, in_flight=16),
    CountedCalls(REDEEM, CallKind.REDEEM, calls=1_000, in_flight=16),
)


async def main(options: Options) -> None:
    """Measure the selected scenarios, and print and write the results."""
    scenarios = options.scenarios
    populations = plan_populations(
        accounts=options.accounts,
        code_receivers=int((options.seconds + ROUNDS + CPU_SECONDS + WARM_UP_SECONDS) * CODES_PER_SECOND_MAX),
    )
    plan = SpeedPlan(
        populations, selected_rates(populations, scenarios), has_sequential_calls=Scenario.IDLE in scenarios
    )
    results: list[Result] = []
    BUILD.mkdir(exist_ok=True)
    with (
        StepProgress(_count_steps(plan, scenarios)) as steps,
        tempfile.TemporaryDirectory(prefix="bench-", dir=BUILD) as name,
    ):
        folder = Path(name)
        if scenarios != {Scenario.DEV}:
            results += await _measure_services(plan, options, folder / "postgres", steps)
        if Scenario.DEV in scenarios:
            results += await measure_startup(folder / "dev", steps)
    print_table(results)
    write_json(results, BENCH / "results.json")


async def _measure_services(plan: SpeedPlan, options: Options, folder: Path, steps: StepProgress) -> list[Result]:
    """Measure the scenarios that need a populated database."""
    results: list[Result] = []
    async with run_postgres(folder) as postgres, run_load_process() as load:
        steps.begin(f"filling the database with {options.accounts:,} accounts, twice")
        token = await prepare_database(postgres.url(), plan.populations.stored)
        environment = Environment(postgres, load, token, plan.populations, steps)
        if plan.steps:
            results += await _measure_speed(environment, plan, options.seconds)
        if Scenario.CPU in options.scenarios and process_usage.IS_AVAILABLE:
            results += await _measure_cpu_time(environment)
        if Scenario.MEMORY in options.scenarios and process_usage.IS_AVAILABLE:
            results += await _measure_memory(environment, options.memory_calls)
        if Scenario.STATEMENTS in options.scenarios:
            results += await _count_statements(environment)
    return results


def _count_steps(plan: SpeedPlan, scenarios: Collection[Scenario]) -> int:
    cpu_rates = len(_cpu_rates(plan.populations))
    steps = {Scenario.CPU: cpu_rates, Scenario.MEMORY: 2, Scenario.STATEMENTS: len(COUNTED_CALLS), Scenario.DEV: 2}
    return 1 + plan.steps + sum(count for scenario, count in steps.items() if scenario in scenarios)


async def _measure_speed(environment: Environment, plan: SpeedPlan, seconds: float) -> list[Result]:
    """Measure all rates, while all servers run."""
    variables = server_environment(environment.postgres)
    async with (
        run_server("echo", {}) as echo,
        run_server("plain", variables) as plain,
        run_server(POINTBOOK, variables) as pointbook,
        run_server(POINTBOOK, variables) as second,
        run_server("unmeasured", variables) as unmeasured,
        run_server("shim", _shim_environment(pointbook.address, environment.token)) as shim,
    ):
        addresses = {
            "echo": echo.address,
            "plain": plain.address,
            POINTBOOK: pointbook.address,
            "unmeasured": unmeasured.address,
            "two pointbooks": f"ipv4:{pointbook.address},{second.address}",
            "shim": shim.address,
        }
        speed = SpeedMeasurement(plan, environment.load, environment.token, addresses, environment.postgres.url())
        return await speed.measure(seconds, environment.steps)


async def _measure_cpu_time(environment: Environment) -> list[Result]:
    """Measure the CPU time of each kind of call, on a new server."""
    connection = await connect(environment.postgres.url())
    results = []
    async with run_server(POINTBOOK, server_environment(environment.postgres)) as server:
        for rate in _cpu_rates(environment.populations):
            environment.steps.begin(f"{rate.name}: CPU time")
            job = Job(
                kind=rate.kind,
                address=server.address,
                token=environment.token,
                population=rate.population,
                in_flight=rate.in_flight,
                seconds=CPU_SECONDS,
                warm_up_seconds=0,
                updates=rate.updates,
            )
            results += await measure_cpu_time(
                rate.name.removesuffix(": p50"), job, server, environment.load, connection
            )
    await connection.close()
    return results


def _cpu_rates(populations: Populations) -> list[Rate]:
    """Return the rates of one server, and its calls one at a time."""
    return [rate for rate in (*all_rates(populations), *sequential_rates(populations)) if rate.server == POINTBOOK]


async def _measure_memory(environment: Environment, calls: int) -> list[Result]:
    """Measure memory on a new server."""
    async with run_server(POINTBOOK, server_environment(environment.postgres)) as server:
        job = Job(
            kind=CallKind.APPLY,
            address=server.address,
            token=environment.token,
            population=environment.populations.ledger,
            in_flight=IN_FLIGHT,
            seconds=MEMORY_SECONDS_MAX,
            warm_up_seconds=0,
            calls_max=calls,
        )
        return await measure_memory(job, server, environment.load, environment.steps)


async def _count_statements(environment: Environment) -> list[Result]:
    """Count statements per call, on a new server.

    The database is restarted with counting enabled.
    """
    await enable_statement_counts(environment.postgres)
    connection = await connect(environment.postgres.url())
    results = []
    async with run_server(POINTBOOK, server_environment(environment.postgres)) as server:
        for counted in COUNTED_CALLS:
            environment.steps.begin(f"{counted.name}: counting statements")
            job = Job(
                kind=counted.kind,
                address=server.address,
                token=environment.token,
                population=environment.populations.ledger,
                in_flight=counted.in_flight,
                seconds=COUNTED_SECONDS_MAX,
                warm_up_seconds=0,
                calls_max=counted.calls,
                updates=counted.updates,
            )
            results += await count_statements(counted.name, job, environment.load, connection)
    await connection.close()
    return results


def _shim_environment(grpc_address: str, token: str) -> dict[str, str]:
    return {
        "POINTBOOK_GRPC_ADDRESS": grpc_address,
        "POINTBOOK_TOKEN": token,
        "POINTBOOK_SHOPLINE_SECRETS": SECRET,
    }


def _parse_options() -> Options:
    parser = argparse.ArgumentParser(description="Measure Pointbook.")
    parser.add_argument("--accounts", type=int, default=ACCOUNTS, help=f"number of accounts ({ACCOUNTS:,})")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"seconds per rate ({SECONDS:g})")
    parser.add_argument(
        "--memory-calls",
        type=int,
        default=MEMORY_CALLS,
        help=f"calls before memory is read, and before it is read again ({MEMORY_CALLS:,})",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[scenario.value for scenario in Scenario],
        default=[scenario.value for scenario in Scenario],
        metavar="NAME",
        help=f"measure only these, with the echo and the rates that they are compared with: {', '.join(Scenario)}",
    )
    parsed = parser.parse_args()
    return Options(parsed.accounts, parsed.seconds, parsed.memory_calls, frozenset(map(Scenario, parsed.only)))


if __name__ == "__main__":
    uvloop.run(main(_parse_options()))
