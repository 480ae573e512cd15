"""The supervisor of worker processes, with minimal workers."""

import asyncio
import io
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pointbook_cli.services import supervisor
from pointbook_cli.services.supervisor import (
    BACKOFF_SECONDS,
    BACKOFF_SECONDS_MAX,
    HEALTHY_SECONDS,
    Backoff,
    Supervisor,
    WorkerCommand,
)
from support.json_logs import json_logs
from support.probes import children_of, is_alive, zombies
from support.processes import HAS_PROC, Running
from support.waiting import until

pytestmark = pytest.mark.skipif(not HAS_PROC, reason="processes are looked up in /proc")

BEAT_SECONDS = 0.05
TIMEOUT_SECONDS = 1.5  # On a loaded machine a worker may be late by a second.
WORKER = f"""
import asyncio, os, pathlib, signal, sys, time
from pointbook_cli.services import supervisor
supervisor.HEARTBEAT_SECONDS = {BEAT_SECONDS}
folder, number = pathlib.Path(sys.argv[1]), os.environ["NUMBER"]

async def serve(stop, ready):
    BODY
    ready.set()
    AFTER
    await stop.wait()

async def main():
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await supervisor.run_as_worker(serve, stop)

asyncio.run(main())
"""


def program(folder: Path, before: str = "pass", after: str = "pass") -> tuple[str, ...]:
    """Write a worker with code before and after it is ready."""
    code = WORKER.replace("BODY", before.replace("\n", "\n    ")).replace("AFTER", after.replace("\n", "\n    "))
    path = folder / "worker.py"
    path.write_text(code)
    return (sys.executable, str(path), str(folder))


def command(program: tuple[str, ...], count: int = 2, drain_seconds: float = 2.0) -> WorkerCommand:
    """Return the command of these workers."""
    return WorkerCommand(
        count=count,
        program_of=lambda number: ("/usr/bin/env", f"NUMBER={number}", *program),
        environment={},
        heartbeat_timeout_seconds=TIMEOUT_SECONDS,
        drain_seconds=drain_seconds,
    )


# Busy for less than the timeout at first, then until the test ends it.
SPINS = """
def spin():
    while (folder / 'hang').exists(): pass
time.sleep(0.3)
while not stop.is_set():
    spin()
    await asyncio.sleep(0.02)
"""


class Supervised:
    """A supervisor in this process, and its log lines."""

    def __init__(self, written: io.StringIO) -> None:
        self._written = written
        self.stop = asyncio.Event()

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Return the log lines of an event."""
        lines = [json.loads(line) for line in self._written.getvalue().splitlines()]
        return [line for line in lines if line["event"] == event]

    async def until_served(self, count: int) -> list[dict[str, Any]]:
        """Wait until a number of workers has started to serve; return their log lines."""
        await until(lambda: len(self.logged("worker serves")) >= count)
        return self.logged("worker serves")


@asynccontextmanager
async def supervised(command: WorkerCommand) -> AsyncIterator[Supervised]:
    """Run a supervisor; check that its workers stop cleanly and leave no zombies."""
    with json_logs(supervisor) as written:
        run = Supervised(written)
        running = asyncio.create_task(Supervisor(command).run(run.stop))
        try:
            yield run
        finally:
            run.stop.set()
            await running
    pids = [line["pid"] for line in run.logged("worker started")]
    assert not [pid for pid in pids if pid in children_of(os.getpid())]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the supervisor's timeouts."""
    monkeypatch.setattr(supervisor, "HEARTBEAT_SECONDS", BEAT_SECONDS)
    monkeypatch.setattr(supervisor, "BACKOFF_SECONDS", 0.02)
    monkeypatch.setattr(supervisor, "STOP_SECONDS", 0.5)


def test_pauses_double_up_to_a_maximum_until_a_worker_has_served() -> None:
    longest = Backoff(jitter=lambda _low, high: high)
    pauses = [longest.pause_seconds(served) for served in (0.0, 1.0, 2.0, HEALTHY_SECONDS, 0.0)]

    assert pauses == pytest.approx([0.02, 0.04, 0.08, 0.02, 0.04])
    assert Backoff(jitter=lambda low, _high: low).pause_seconds(0.0) == pytest.approx(0.01)
    assert [longest.pause_seconds(0.0) for _ in range(2_000)][-1] == BACKOFF_SECONDS_MAX
    assert BACKOFF_SECONDS < 1.0


async def test_a_killed_worker_is_replaced_under_its_number(tmp_path: Path) -> None:
    async with supervised(command(program(tmp_path))) as run:
        first = {line["number"]: line["pid"] for line in await run.until_served(2)}
        os.kill(first[1], signal.SIGKILL)
        replaced = (await run.until_served(3))[-1]

        ended = run.logged("worker ended")
        assert [(line["number"], line["pid"], line["cause"]) for line in ended] == [(1, first[1], "SIGKILL")]
        assert (replaced["number"], is_alive(replaced["pid"]), is_alive(first[0])) == (1, True, True)
        assert not zombies(first.values())
    assert {line["cause"] for line in run.logged("worker stopped")} == {"exit code 0"}


async def test_a_worker_that_exits_with_zero_is_replaced(tmp_path: Path) -> None:
    async with supervised(command(program(tmp_path), count=1)) as run:
        os.kill((await run.until_served(1))[0]["pid"], signal.SIGTERM)
        await run.until_served(2)
        assert [line["cause"] for line in run.logged("worker ended")] == ["exit code 0"]


async def test_a_worker_that_fails_at_its_first_start_stops_all(tmp_path: Path) -> None:
    workers = program(tmp_path, before="if number == '1': sys.exit(3)")
    with pytest.raises(OSError, match=r"^worker 1 did not start \(exit code 3\); see its log$"):
        async with supervised(command(workers)) as run:
            await asyncio.wait_for(run.stop.wait(), 10)
    assert not [line for line in run.logged("worker started") if is_alive(line["pid"])]


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
async def test_a_worker_that_is_killed_before_it_serves_is_replaced(tmp_path: Path, name: str) -> None:
    kill_once = f"""
first = folder / "first"
if not first.exists():
    first.touch()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.{name})
    await asyncio.sleep(60)
"""
    async with supervised(command(program(tmp_path, before=kill_once), count=1)) as run:
        await run.until_served(1)
        assert [line["cause"] for line in run.logged("worker ended")] == [name]


async def test_a_worker_that_never_serves_is_a_failed_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "START_SECONDS_MAX", 1.0)
    workers = program(tmp_path, before="await asyncio.sleep(60)")
    with pytest.raises(OSError, match=r"worker 0 did not start \(not serving after 1 s\)"):
        async with supervised(command(workers, count=1)) as run:
            await asyncio.wait_for(run.stop.wait(), 10)


async def test_a_crash_loop_backs_off_and_recovers(tmp_path: Path) -> None:
    workers = program(tmp_path, before="if (folder / 'broken').exists(): sys.exit(3)")
    async with supervised(command(workers, count=1)) as run:
        served = await run.until_served(1)
        (tmp_path / "broken").touch()
        os.kill(served[0]["pid"], signal.SIGKILL)
        await until(lambda: len(run.logged("worker ended")) >= 5)
        (tmp_path / "broken").unlink()
        await run.until_served(2)

        ended = run.logged("worker ended")
        assert [line["cause"] for line in ended[:3]] == ["SIGKILL", "exit code 3", "exit code 3"]
        for number, line in enumerate(ended):
            assert 0.009 * 2**number <= line["restart_seconds"] + 0.005 <= 0.02 * 2**number + 0.01


async def test_a_hanging_worker_is_replaced_and_its_stacks_are_logged(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with supervised(command(program(tmp_path, after=SPINS), count=1)) as run:
        hung = (await run.until_served(1))[0]["pid"]
        # Long enough to kill a worker that was wrongly considered hanging.
        await asyncio.sleep(1.2 * TIMEOUT_SECONDS)
        assert not run.logged("worker hangs")
        (tmp_path / "hang").touch()
        await until(lambda: bool(run.logged("worker ended")))
        (tmp_path / "hang").unlink()
        await run.until_served(2)

        assert [line["pid"] for line in run.logged("worker hangs")] == [hung]
        assert run.logged("worker ended")[0]["cause"].startswith("no heartbeat for 1.5")
        run.stop.set()
    assert "in spin" in capfd.readouterr().err


async def test_a_stopped_process_is_replaced(tmp_path: Path) -> None:
    async with supervised(command(program(tmp_path), count=1)) as run:
        os.kill((await run.until_served(1))[0]["pid"], signal.SIGSTOP)
        await run.until_served(2)


async def test_a_worker_that_does_not_stop_in_time_is_killed(tmp_path: Path) -> None:
    workers = program(tmp_path, after="if number == '0': stop = asyncio.Event()")
    with pytest.raises(OSError, match=r"^not all workers stopped cleanly: worker 0 ended by SIGKILL$"):
        async with supervised(command(workers, drain_seconds=0.5)) as run:
            await run.until_served(2)
    assert [line["number"] for line in run.logged("worker killed: it did not stop in time")] == [0]


SUPERVISOR = f"""
import asyncio, signal, sys
from pointbook_cli.services import supervisor
from pointbook_server.logs import configure_logs
configure_logs("INFO", json=True)
supervisor.HEARTBEAT_SECONDS = {BEAT_SECONDS}

async def main():
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await supervisor.Supervisor(supervisor.WorkerCommand(
        2, lambda number: ("/usr/bin/env", f"NUMBER={{number}}", *sys.argv[1:]), {{}}, {TIMEOUT_SECONDS}, 2.0
    )).run(stop)

asyncio.run(main())
"""


@asynccontextmanager
async def supervisor_process(folder: Path, program: tuple[str, ...]) -> AsyncIterator[Running]:
    """Run a supervisor in another process; both workers serve."""
    process = await Running.start(
        sys.executable, "-c", SUPERVISOR, *program, environment=dict(os.environ), folder=folder
    )
    try:

        async def both() -> bool:
            return process.err.count('"worker serves"') == 2

        await process.until(both)
        yield process
    finally:
        await process.kill()


async def test_no_worker_is_replaced_after_a_suspension_of_the_machine(tmp_path: Path) -> None:
    async with supervisor_process(tmp_path, program(tmp_path)) as process:
        workers = process.workers()
        os.killpg(process.process.pid, signal.SIGSTOP)
        # The suspension, then the time in which a worker would be replaced.
        await asyncio.sleep(1.5 * TIMEOUT_SECONDS)
        os.killpg(process.process.pid, signal.SIGCONT)
        await asyncio.sleep(1.2 * TIMEOUT_SECONDS)

        assert process.workers() == workers
        assert '"worker hangs"' not in process.err
        assert (await process.terminate())[0] == 0
        assert not any(map(is_alive, workers))


async def test_workers_end_with_a_killed_supervisor(tmp_path: Path) -> None:
    async with supervisor_process(tmp_path, program(tmp_path)) as process:
        workers = process.workers()
        await process.kill()
        await until(lambda: not any(map(is_alive, workers)))
