"""`make growth`: the cost of calls on a large ledger, as a ratio to a small one.

Both ledgers exist at the same time, each in its own PostgreSQL, and are measured in alternating rounds, so that other
load on the machine affects both alike. No ratio fails the run.
"""

import argparse
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import asyncpg
import uvloop

from load.jobs import WARM_UP_SECONDS, CallKind, Job
from pointbook_common.durations import SECOND_MS
from reporting.progress import StepProgress
from reporting.results import Result, print_table, write_json
from scenarios.populations import Population
from scenarios.rates import APPLY, IN_FLIGHT, UPDATES_IN_BATCH
from servers import process_usage
from servers.bulk_entries import count_steps, insert_entry_pairs
from servers.database import change_setting, connect, prepare_database, run_postgres, server_environment
from servers.subprocesses import LoadProcess, run_load_process, run_server

ENTRIES = 10_000_000
FEW_ENTRIES = 10_000
LONG_ACCOUNT_ENTRIES = 2_000
"""The entries of the one account that also gets late events."""
ACCOUNTS_MAX = 200_000
SHARED_BUFFERS = "2GB"
"""A typical size for a ledger whose indexes take as much."""
BYTES_PER_ENTRY = 1_000
"""The free disk space needed for each entry: half of it for the tables, the rest for the write-ahead log."""
GIGABYTE = 1_000_000_000
SECONDS = 30.0
ROUNDS = 10
LATE_SHARE = 0.25
"""The time for late events, as a share of a round's time."""
LONG_ACCOUNT_SECONDS_MAX = 60.0
RATE = APPLY
TIME = f"{APPLY}: time a call"
CPU = f"{APPLY}: CPU a call"
LATE = "a late event of a long account: p50"
BARS = dict.fromkeys((TIME, CPU), "≤ 1.1, aim 1.0")
BENCH = Path(__file__).parent
BUILD = BENCH.parent / "build"


@dataclass(frozen=True, slots=True)
class LedgerSize:
    """The number of entries of a ledger, and their accounts."""

    entries: int

    @property
    def many_accounts(self) -> Population:
        """The accounts with most of the entries."""
        return Population("many", min(ACCOUNTS_MAX, self.entries - LONG_ACCOUNT_ENTRIES))

    @property
    def long_account(self) -> Population:
        """The one account with many entries.

        They are 10 seconds apart, so that late events fit between two of them.
        """
        return Population(f"long-{self.entries}", accounts=1, spacing_ms=10 * SECOND_MS)

    @property
    def pairs(self) -> int:
        """The pairs of entries of the many accounts, in addition to their opening entries."""
        return (self.entries - LONG_ACCOUNT_ENTRIES - self.many_accounts.accounts) // 2

    @property
    def steps(self) -> int:
        """The number of steps to create and measure the ledger."""
        return 2 + count_steps(self.pairs) + ROUNDS


@dataclass(frozen=True, slots=True)
class MeasuredLedger:
    """A ledger with its own server, and the figures of each round by name."""

    size: LedgerSize
    address: str
    token: str
    pids: dict[str, int]
    figures: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, figure: float) -> None:
        """Add a round's figure."""
        self.figures.setdefault(name, []).append(figure)

    def job(self, kind: CallKind, population: Population, seconds: float, *, in_flight: int = 1) -> Job:
        """Return a job without a warm-up."""
        return Job(kind, self.address, self.token, population, in_flight, seconds, warm_up_seconds=0)

    def cpu_ms(self) -> dict[str, float]:
        """Return the CPU time of each process; empty if the system does not provide it."""
        return {name: SECOND_MS * process_usage.cpu_seconds(pid) for name, pid in self.pids.items()}


async def main(*, entries: int, seconds: float) -> None:
    """Create both ledgers, measure them in turns, and delete them."""
    BUILD.mkdir(exist_ok=True)
    free, needed = shutil.disk_usage(BUILD).free / GIGABYTE, entries * BYTES_PER_ENTRY / GIGABYTE
    if free < needed:
        print(f"Not measured: {entries:,} entries need {needed:.1f} GB of free disk space, but only {free:.1f} GB are.")
        return
    sizes = (LedgerSize(FEW_ENTRIES), LedgerSize(entries))
    with (
        StepProgress(sum(size.steps for size in sizes)) as steps,
        tempfile.TemporaryDirectory(prefix="growth-", dir=BUILD) as name,
    ):
        async with (
            run_load_process() as load,
            _run_ledger(sizes[0], Path(name, "few"), load, steps) as few,
            _run_ledger(sizes[1], Path(name, "many"), load, steps) as many,
        ):
            for number in range(1, ROUNDS + 1):
                for ledger in (few, many):
                    steps.begin(f"round {number} of {ROUNDS}: {ledger.size.entries:,} entries")
                    await _measure(ledger, seconds / ROUNDS, load)
    results = list(_results(few, many))
    print_table(results)
    write_json(results, BENCH / "growth.json")


@asynccontextmanager
async def _run_ledger(
    size: LedgerSize, folder: Path, load: LoadProcess, steps: StepProgress
) -> AsyncIterator[MeasuredLedger]:
    """Create a ledger, and run a server on it."""
    async with run_postgres(folder) as postgres:
        await change_setting(postgres, "shared_buffers", SHARED_BUFFERS)
        steps.begin(f"{size.entries:,} entries: opening {size.many_accounts.accounts:,} accounts")
        token = await prepare_database(postgres.url(), (size.many_accounts, size.long_account))
        connection = await connect(postgres.url())
        async for step in insert_entry_pairs(connection, size.many_accounts, size.pairs):
            steps.begin(f"{size.entries:,} entries: {step}")
        # Finish background work of the inserts before measuring.
        steps.begin(f"{size.entries:,} entries: vacuum and checkpoint")
        await connection.execute("VACUUM (ANALYZE) points_accounts, points_entries")
        await connection.execute("CHECKPOINT")
        async with run_server("pointbook", server_environment(postgres)) as server:
            pids = {}
            if process_usage.IS_AVAILABLE:
                pids = {"server": server.pid, "database": await _database_pid(connection)}
            await connection.close()
            ledger = MeasuredLedger(size, server.address, token, pids)
            steps.begin(f"{size.entries:,} entries: {LONG_ACCOUNT_ENTRIES:,} in one account, by calls")
            await _populate_long_account(ledger, load)
            yield ledger


async def _database_pid(connection: asyncpg.Connection) -> int:
    """Return the pid of PostgreSQL's main process."""
    return process_usage.parent_pid(await connection.fetchval("SELECT pg_backend_pid()"))


async def _populate_long_account(ledger: MeasuredLedger, load: LoadProcess) -> None:
    """Populate the long account by calls, so that it has checkpoints."""
    job = ledger.job(CallKind.BATCH, ledger.size.long_account, LONG_ACCOUNT_SECONDS_MAX)
    await load.run(replace(job, calls_max=LONG_ACCOUNT_ENTRIES // UPDATES_IN_BATCH, updates=UPDATES_IN_BATCH))


async def _measure(ledger: MeasuredLedger, seconds: float, load: LoadProcess) -> None:
    """Measure events of the many accounts, then late events of the long account."""
    apply = ledger.job(CallKind.APPLY, ledger.size.many_accounts, seconds, in_flight=IN_FLIGHT)
    await load.run(replace(apply, seconds=WARM_UP_SECONDS))
    before = ledger.cpu_ms()
    applied = await load.run(apply)
    cpu_ms = {name: (ms - before[name]) / applied.calls for name, ms in ledger.cpu_ms().items()}
    late = await load.run(ledger.job(CallKind.LATE, ledger.size.long_account, seconds * LATE_SHARE))
    if late.late < late.calls:
        raise RuntimeError("an event that should have come late did not")
    ledger.add(RATE, applied.rate)
    ledger.add(TIME, SECOND_MS / applied.rate)
    if cpu_ms:
        ledger.add(CPU, sum(cpu_ms.values()))
    for name, ms in cpu_ms.items():
        ledger.add(f"{CPU}, {name} alone", ms)
    ledger.add(LATE, late.p50_ms)


def _results(few: MeasuredLedger, many: MeasuredLedger) -> Iterator[Result]:
    """Return every figure of both ledgers.

    Ratios are medians over rounds, since the machine's load varies.
    """
    few_entries, many_entries = f"{few.size.entries:,} entries", f"{many.size.entries:,} entries"
    for figure, few_rounds in few.figures.items():
        many_rounds = many.figures[figure]
        unit = "calls/s" if figure == RATE else "ms"
        yield Result(f"{figure}, {few_entries}", median(few_rounds), unit)
        ratio = median(after / before for before, after in zip(few_rounds, many_rounds, strict=True))
        yield Result(f"{figure}, {many_entries}", median(many_rounds), unit, BARS.get(figure, ""), ratio, few_entries)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure the cost of calls on a large ledger.")
    parser.add_argument("--entries", type=int, default=ENTRIES, help=f"entries of the large ledger ({ENTRIES:,})")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"seconds per ledger ({SECONDS:g})")
    options = parser.parse_args()
    # SIGTERM must also run the clean-up, which deletes gigabytes.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    uvloop.run(main(entries=options.entries, seconds=options.seconds))
