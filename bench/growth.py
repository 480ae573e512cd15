"""`make growth`: what a call costs on a book of 10,000,000 entries, as a ratio to what it costs on one of 10,000.

Both books are there at the same time, each in a PostgreSQL of its own, and are measured in rounds that take turns: so
what else the machine does burdens both alike. No ratio fails the run.
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

import usage
from filling import count_statements, fill
from jobs import WARM_UP_SECONDS, Job, Kind
from prepare import change_setting, connect, prepare, running, server_environment
from processes import Load, loading, serving
from report import Result, Steps, print_table, write_json
from rows import APPLY, IN_FLIGHT, UPDATES_IN_BATCH
from shops import Population

ENTRIES = 10_000_000
FEW_ENTRIES = 10_000
LONG_ENTRIES = 2_000
"""How many of a book's entries are in the one account whose events also come late."""
ACCOUNTS_MAX = 200_000
SHARED_BUFFERS = "2GB"
"""As an operator sizes it for a book whose indexes take as much."""
BYTES_AN_ENTRY = 1_000
"""What must be free on the disk for each entry: the tables take about half of it, the log of changes some more."""
GIGABYTE = 1_000_000_000
SECONDS = 30.0
ROUNDS = 10
LATE_SHARE = 0.25
"""How much of a round's time is spent on late events."""
FILLING_SECONDS_MAX = 60.0
RATE = APPLY
TIME = f"{APPLY}: time a call"
CPU = f"{APPLY}: CPU a call"
LATE = "a late event of a long account: p50"
BARS = dict.fromkeys((TIME, CPU), "≤ 1.3, aim 1.1")
BENCH = Path(__file__).parent
BUILD = BENCH.parent / "build"


@dataclass(frozen=True, slots=True)
class Size:
    """How many entries a book has, and in which accounts."""

    entries: int

    @property
    def many(self) -> Population:
        """The accounts among which most entries are spread."""
        return Population("many", min(ACCOUNTS_MAX, self.entries - LONG_ENTRIES))

    @property
    def long(self) -> Population:
        """The one account of many entries: so far apart that late ones find room between two of them."""
        return Population(f"long-{self.entries}", accounts=1, spacing_ms=10_000)

    @property
    def pairs(self) -> int:
        """How many pairs of entries the many accounts have besides those that opened them."""
        return (self.entries - LONG_ENTRIES - self.many.accounts) // 2

    @property
    def steps(self) -> int:
        """How many steps it takes to make the book and to measure it."""
        return 2 + count_statements(self.pairs) + ROUNDS


@dataclass(frozen=True, slots=True)
class Book:
    """A book under a server of its own, and what was measured on it, by the names of the figures."""

    size: Size
    address: str
    token: str
    pids: dict[str, int]
    figures: dict[str, list[float]] = field(default_factory=dict)

    def note(self, name: str, figure: float) -> None:
        """Keep one round's figure."""
        self.figures.setdefault(name, []).append(figure)

    def job(self, kind: Kind, population: Population, seconds: float, *, in_flight: int = 1) -> Job:
        """Write a job that counts from its first call on."""
        return Job(kind, self.address, self.token, population, in_flight, seconds, warm_up_seconds=0)

    def cpu_ms(self) -> dict[str, float]:
        """Read how long each of the book's processes has computed; nothing where the system does not tell."""
        return {name: 1_000 * usage.cpu_seconds(pid) for name, pid in self.pids.items()}


async def main(*, entries: int, seconds: float) -> None:
    """Make both books, measure them in turns, and leave nothing behind."""
    BUILD.mkdir(exist_ok=True)
    free, needed = shutil.disk_usage(BUILD).free / GIGABYTE, entries * BYTES_AN_ENTRY / GIGABYTE
    if free < needed:
        print(f"Not measured: {entries:,} entries want {needed:.1f} GB free on the disk, and {free:.1f} GB are.")
        return
    sizes = (Size(FEW_ENTRIES), Size(entries))
    with (
        Steps(sum(size.steps for size in sizes)) as steps,
        tempfile.TemporaryDirectory(prefix="growth-", dir=BUILD) as name,
    ):
        async with (
            loading() as load,
            _book(sizes[0], Path(name, "few"), load, steps) as few,
            _book(sizes[1], Path(name, "many"), load, steps) as many,
        ):
            for number in range(1, ROUNDS + 1):
                for book in (few, many):
                    steps.begin(f"round {number} of {ROUNDS}: {book.size.entries:,} entries")
                    await _measure(book, seconds / ROUNDS, load)
    results = list(_results(few, many))
    print_table(results)
    write_json(results, BENCH / "growth.json")


@asynccontextmanager
async def _book(size: Size, folder: Path, load: Load, steps: Steps) -> AsyncIterator[Book]:
    """Make a book, and serve it."""
    async with running(folder) as postgres:
        await change_setting(postgres, "shared_buffers", SHARED_BUFFERS)
        steps.begin(f"{size.entries:,} entries: opening {size.many.accounts:,} accounts")
        token = await prepare(postgres.url(), (size.many, size.long))
        connection = await connect(postgres.url())
        async for what in fill(connection, size.many, size.pairs):
            steps.begin(f"{size.entries:,} entries: {what}")
        # What the filling left to be done in the background must not be measured.
        steps.begin(f"{size.entries:,} entries: tidying up")
        await connection.execute("VACUUM (ANALYZE) points_accounts, points_entries")
        await connection.execute("CHECKPOINT")
        async with serving("pointbook", server_environment(postgres)) as server:
            pids = {"server": server.pid, "database": await _pid_of(connection)} if usage.IS_TOLD else {}
            await connection.close()
            book = Book(size, server.address, token, pids)
            steps.begin(f"{size.entries:,} entries: {LONG_ENTRIES:,} in one account, by calls")
            await _lengthen(book, load)
            yield book


async def _pid_of(connection: asyncpg.Connection) -> int:
    """Find the process that started all processes of the database."""
    return usage.parent_of(await connection.fetchval("SELECT pg_backend_pid()"))


async def _lengthen(book: Book, load: Load) -> None:
    """Have the service itself write the long account, with its checkpoints."""
    job = book.job(Kind.BATCH, book.size.long, FILLING_SECONDS_MAX)
    await load.run(replace(job, calls_max=LONG_ENTRIES // UPDATES_IN_BATCH, updates=UPDATES_IN_BATCH))


async def _measure(book: Book, seconds: float, load: Load) -> None:
    """Measure events all over the book, and then late ones of the long account."""
    apply = book.job(Kind.APPLY, book.size.many, seconds, in_flight=IN_FLIGHT)
    await load.run(replace(apply, seconds=WARM_UP_SECONDS))
    before = book.cpu_ms()
    applied = await load.run(apply)
    cpu_ms = {name: (ms - before[name]) / applied.calls for name, ms in book.cpu_ms().items()}
    late = await load.run(book.job(Kind.LATE, book.size.long, seconds * LATE_SHARE))
    if late.late < late.calls:
        raise RuntimeError("an event that should have come late did not")
    book.note(RATE, applied.rate)
    book.note(TIME, 1_000 / applied.rate)
    if cpu_ms:
        book.note(CPU, sum(cpu_ms.values()))
    for name, ms in cpu_ms.items():
        book.note(f"{CPU}, {name} alone", ms)
    book.note(LATE, late.p50_ms)


def _results(few: Book, many: Book) -> Iterator[Result]:
    """Tell every figure of both books; rounds are compared one by one, because the machine changes between them."""
    few_entries, many_entries = f"{few.size.entries:,} entries", f"{many.size.entries:,} entries"
    for figure, rounds in few.figures.items():
        grown = many.figures[figure]
        unit = "calls/s" if figure == RATE else "ms"
        yield Result(f"{figure}, {few_entries}", median(rounds), unit)
        ratio = median(after / before for before, after in zip(rounds, grown, strict=True))
        yield Result(f"{figure}, {many_entries}", median(grown), unit, BARS.get(figure, ""), ratio, few_entries)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure what a call costs on a large book.")
    parser.add_argument("--entries", type=int, default=ENTRIES, help=f"entries of the large book ({ENTRIES:,})")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"seconds to measure a book ({SECONDS:g})")
    options = parser.parse_args()
    # A termination is as good as an interrupt: it must not leave gigabytes behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    uvloop.run(main(entries=options.entries, seconds=options.seconds))
