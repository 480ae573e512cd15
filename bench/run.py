"""`make bench`: measures Pointbook beside an echo on the same machine, prints a table and writes results.json.

Every speed is a ratio to something that was measured in the same run, on a durable database. No ratio fails the run.
"""

import argparse
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import uvloop

import usage
from calls import SECRET
from development import measure_development
from jobs import Job, Kind
from memory import measure_memory
from pointbook_cli.embedded_postgres import EmbeddedPostgres
from prepare import connect, prepare, running, server_environment
from processes import Load, loading, serving
from report import Result, Steps, print_table, write_json
from rows import APPLY, BATCH, IN_FLIGHT, REDEEM, UPDATES_IN_BATCH, VALIDATE, Part, chosen_rows
from shops import Shops, shops_of
from speed import ROUNDS, Plan, Speed
from statements import count_statements, enable_counting

ACCOUNTS = 100_000
SECONDS = 12.0
MEMORY_CALLS = 200_000
MEMORY_SECONDS_MAX = 3_600.0
CODES_PER_SECOND_MAX = 5_000
BENCH = Path(__file__).parent
BUILD = BENCH.parent / "build"


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says."""

    accounts: int
    seconds: float
    memory_calls: int
    parts: Collection[Part]


@dataclass(frozen=True, slots=True)
class Stage:
    """What all parts of a run share."""

    postgres: EmbeddedPostgres
    load: Load
    token: str
    shops: Shops
    steps: Steps


class Counted(NamedTuple):
    """Calls whose statements are counted."""

    name: str
    kind: Kind
    calls: int
    in_flight: int
    updates: int = 1


COUNTED = (
    Counted(APPLY, Kind.APPLY, calls=1_000, in_flight=16),
    Counted(BATCH, Kind.BATCH, calls=20, in_flight=1, updates=UPDATES_IN_BATCH),
    Counted(VALIDATE, Kind.VALIDATE, calls=1_000, in_flight=16),
    Counted(REDEEM, Kind.REDEEM, calls=1_000, in_flight=16),
)
COUNTED_SECONDS_MAX = 30.0


async def main(options: Options) -> None:
    """Measure what is asked for, and end all that was started."""
    parts = options.parts
    shops = shops_of(accounts=options.accounts, customers=int((options.seconds + ROUNDS) * CODES_PER_SECOND_MAX))
    plan = Plan(shops, chosen_rows(shops, parts), is_idle=Part.IDLE in parts)
    results: list[Result] = []
    BUILD.mkdir(exist_ok=True)
    with Steps(_count_steps(plan, parts)) as steps, tempfile.TemporaryDirectory(prefix="bench-", dir=BUILD) as name:
        folder = Path(name)
        if parts != {Part.DEV}:
            results += await _measure_service(plan, options, folder / "postgres", steps)
        if Part.DEV in parts:
            results += await measure_development(folder / "dev", steps)
    print_table(results)
    write_json(results, BENCH / "results.json")


async def _measure_service(plan: Plan, options: Options, folder: Path, steps: Steps) -> list[Result]:
    """Measure whatever needs a database that is filled."""
    results: list[Result] = []
    async with running(folder) as postgres, loading() as load:
        steps.begin(f"filling the database with {options.accounts:,} accounts, twice")
        stage = Stage(postgres, load, await prepare(postgres.url(), plan.shops.stored), plan.shops, steps)
        if plan.steps:
            results += await _measure_speed(stage, plan, options.seconds)
        if Part.MEMORY in options.parts and usage.IS_TOLD:
            results += await _measure_memory(stage, options.memory_calls)
        if Part.STATEMENTS in options.parts:
            results += await _count_statements(stage)
    return results


def _count_steps(plan: Plan, parts: Collection[Part]) -> int:
    steps = {Part.MEMORY: 2, Part.STATEMENTS: len(COUNTED), Part.DEV: 2}
    return 1 + plan.steps + sum(count for part, count in steps.items() if part in parts)


async def _measure_speed(stage: Stage, plan: Plan, seconds: float) -> list[Result]:
    """Measure all speeds with every server running."""
    environment = server_environment(stage.postgres)
    async with (
        serving("echo", {}) as echo,
        serving("plain", environment) as plain,
        serving("pointbook", environment) as pointbook,
        serving("shim", _shim_environment(pointbook.address, stage.token)) as shim,
    ):
        addresses = {"echo": echo.address, "plain": plain.address, "pointbook": pointbook.address, "shim": shim.address}
        speed = Speed(plan, stage.load, stage.token, addresses, stage.postgres.url())
        return await speed.measure(seconds, stage.steps)


async def _measure_memory(stage: Stage, calls: int) -> list[Result]:
    """Measure memory on a server that has done nothing else."""
    async with serving("pointbook", server_environment(stage.postgres)) as server:
        job = Job(
            kind=Kind.APPLY,
            address=server.address,
            token=stage.token,
            population=stage.shops.book,
            in_flight=IN_FLIGHT,
            seconds=MEMORY_SECONDS_MAX,
            warm_up_seconds=0,
            calls_max=calls,
        )
        return await measure_memory(job, server, stage.load, stage.steps)


async def _count_statements(stage: Stage) -> list[Result]:
    """Count statements on the same database, with the counting on and a fresh server."""
    await enable_counting(stage.postgres)
    connection = await connect(stage.postgres.url())
    results = []
    async with serving("pointbook", server_environment(stage.postgres)) as server:
        for counted in COUNTED:
            stage.steps.begin(f"{counted.name}: counting statements")
            job = Job(
                kind=counted.kind,
                address=server.address,
                token=stage.token,
                population=stage.shops.book,
                in_flight=counted.in_flight,
                seconds=COUNTED_SECONDS_MAX,
                warm_up_seconds=0,
                calls_max=counted.calls,
                updates=counted.updates,
            )
            results += await count_statements(counted.name, job, stage.load, connection)
    await connection.close()
    return results


def _shim_environment(grpc_address: str, token: str) -> dict[str, str]:
    return {
        "POINTBOOK_GRPC_ADDRESS": grpc_address,
        "POINTBOOK_TOKEN": token,
        "POINTBOOK_SHOPLINE_SECRETS": SECRET,
    }


def _read_options() -> Options:
    parser = argparse.ArgumentParser(description="Measure Pointbook.")
    parser.add_argument("--accounts", type=int, default=ACCOUNTS, help=f"accounts to fill in ({ACCOUNTS:,})")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"seconds to measure a row ({SECONDS:g})")
    parser.add_argument(
        "--memory-calls",
        type=int,
        default=MEMORY_CALLS,
        help=f"calls after which memory is read, and after as many again ({MEMORY_CALLS:,})",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[part.value for part in Part],
        default=[part.value for part in Part],
        metavar="NAME",
        help=f"measure only some, beside the echo and what they are ratios to: {', '.join(Part)}",
    )
    read = parser.parse_args()
    return Options(read.accounts, read.seconds, read.memory_calls, frozenset(map(Part, read.only)))


if __name__ == "__main__":
    uvloop.run(main(_read_options()))
