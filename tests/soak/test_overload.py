"""Points updates at twice the sustainable rate, and for long at 0.8 times.

Server and database share one processor, and the client has another, so that it can send more than the server accepts.
SOAK_MINUTES sets how long the sustained load takes; `make soak` sets 30.
"""

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from statistics import median

import asyncpg
import pytest

from pointbook_cli.embedded_postgres import EmbeddedPostgres
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.rpc.listening import WAITING_CALLS_MAX
from support.connections import connected
from support.deployments import Deployment, error_lines, resident_mb
from support.honest_client import P99_NOISE_MS
from support.open_loop import Job, LoadReport, OpenLoopClient, run_open_loop_client
from support.pinning import CAN_PIN, pinned_apart
from support.tokens import make_token

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not CAN_PIN or (os.cpu_count() or 1) < 2, reason="the client needs a processor of its own"),
]

TOKENS = 4
"""Calls of one token at once are limited, so the callers have several."""
CONNECTIONS = 40
ACCOUNTS = 20_000
CLOSED_LOOP = 256
WINDOW_SECONDS = 1.5
WINDOWS = 5
ATTEMPTS = 12
SUSTAINED, OVERLOAD = 0.8, 2.0
LATE_MS_MAX = 2.5
"""The client sends later than this if other processes use its processor; such a window measures the machine."""
FEW_WAITING = 24
"""P99_RATIO_MAX needs 24 to 48, depending on how busy the machine is."""
P99_RATIO_MAX = 3.0
WAIT_RATIO_MAX = 1.25
"""How much longer the slowest calls wait than the average one."""
REFUSED_MS_MAX = 5.0
GOODPUT_MIN = 0.65
"""The share of the sustainable rate that is still accepted under overload."""
REFUSED = "CANCELLED: CANCELLED"
SOAK_MINUTES = float(os.environ.get("SOAK_MINUTES", "1"))
SOAK_WINDOW_SECONDS = 5.0
FLAT_P99_RATIO_MAX = 1.5
MEMORY_RATIO_MAX = 1.05
TABLE_RATIO_MAX = 1.1
DEAD_SHARE_MAX = 0.6
"""Autovacuum starts at a share of 0.2, but looks once a minute only. The share was 0.41 after such a minute."""
TABLES = """
    SELECT max(n_dead_tup::float / greatest(n_live_tup, 1)) FILTER (WHERE relname = 'points_accounts') AS dead_share,
        max(pg_table_size(relid) / 1e6::float) FILTER (WHERE relname = 'points_accounts') AS table_mb,
        sum(autovacuum_count) AS vacuums
    FROM pg_stat_user_tables
"""
BUSY = "other processes use too much of this machine to measure latencies"

Figure = Callable[[str, float | str, str], None]


@contextlib.asynccontextmanager
async def loaded_server(deployment: Deployment, **settings: str) -> AsyncIterator[tuple[OpenLoopClient, int]]:
    """Run a server and a client on processors of their own.

    Yields the client and the server's process id.
    """
    scopes = list(Scope)
    tokens = [await make_token(deployment.database_url, [ALL_MERCHANTS], scopes) for _ in range(TOKENS)]
    shop = deployment.shop
    async with deployment.server(**settings) as server:
        client = await deployment.client()
        await client.close()
        async with run_open_loop_client(
            deployment.grpc_address,
            tokens,
            shop.merchant_id,
            shop.store_id,
            accounts=ACCOUNTS,
            connections=CONNECTIONS,
        ) as load:
            with pinned_apart(load.pid):
                yield load, server.process.pid
        assert error_lines(server.err) == []


async def sustainable_rate(load: OpenLoopClient) -> float:
    """Return the most calls per second that a server completes; also warms it up."""
    reports = [await load.run(Job(WINDOW_SECONDS, in_flight=CLOSED_LOOP)) for _ in range(WINDOWS + 1)]
    return median(report.goodput for report in reports[1:])


async def measure(load: OpenLoopClient, rates: Sequence[float]) -> list[list[LoadReport]]:
    """Return some undisturbed windows at each rate, measured in turn.

    Skips the test if other processes disturb too many.
    """
    windows: list[list[LoadReport]] = [[] for _ in rates]
    for _ in range(ATTEMPTS):
        for rate, reports in zip(rates, windows, strict=True):
            report = await load.run(Job(WINDOW_SECONDS, rate=rate))
            if report.late_p99_ms <= LATE_MS_MAX:
                reports.append(report)
        if min(map(len, windows)) >= WINDOWS:
            return windows
    pytest.skip(BUSY)


def accepted_p99(reports: Sequence[LoadReport]) -> float:
    """Return the median p99 of accepted calls, since they were due."""
    return median(report.accepted.p99_ms for report in reports)


@pytest.mark.parametrize("waiting_max", [WAITING_CALLS_MAX, FEW_WAITING])
async def test_overload_delays_accepted_calls_little_and_refuses_others_at_once(
    deployment: Deployment, figure: Figure, waiting_max: int
) -> None:
    async with loaded_server(deployment) as (load, _):
        sustainable = await sustainable_rate(load)
    async with loaded_server(deployment, WAITING_CALLS_MAX=str(waiting_max)) as (load, _):
        await load.run(Job(WINDOW_SECONDS, rate=SUSTAINED * sustainable))
        rates = (SUSTAINED * sustainable, OVERLOAD * sustainable)
        sustained, overloaded = await measure(load, rates)
    before, during = accepted_p99(sustained), accepted_p99(overloaded)
    ratio = during / max(before, P99_NOISE_MS)
    goodput = median(report.goodput for report in overloaded) / sustainable
    refused_ms = median(report.by_result[REFUSED].sent_p99_ms for report in overloaded)
    # Waiting calls are admitted at the rate of accepted ones.
    waiting_ms = WAIT_RATIO_MAX * 1_000 * waiting_max / (goodput * sustainable) + P99_RATIO_MAX * max(
        before, P99_NOISE_MS
    )
    name = f"overload, {waiting_max:,} waiting"
    figure(f"{name}: sustainable rate, calls/s", sustainable, "")
    figure(f"{name}: p99 at {OVERLOAD:g}x / {SUSTAINED:g}x, ms", f"{during:.1f}/{before:.1f}", "")
    figure(f"{name}: ratio of the p99", ratio, "<= 3" if waiting_max == FEW_WAITING else "")
    figure(f"{name}: p99 of accepted calls, ms", during, f"<= {waiting_ms:.0f}")
    figure(f"{name}: p99 of refused calls, ms", refused_ms, "< 5")
    figure(f"{name}: accepted, % of the sustainable rate", 100 * goodput, "> 65")
    assert {result for report in overloaded for result in report.refused} == {REFUSED}
    assert refused_ms < REFUSED_MS_MAX
    assert goodput > GOODPUT_MIN
    assert during <= waiting_ms
    assert waiting_max > FEW_WAITING or ratio <= P99_RATIO_MAX


async def test_burst_up_to_the_limit_of_concurrent_calls_is_accepted(deployment: Deployment, figure: Figure) -> None:
    async with loaded_server(deployment) as (load, _):
        await sustainable_rate(load)
        bursts = [await load.run(Job(0.001, in_flight=WAITING_CALLS_MAX)) for _ in range(WINDOWS)]
    slowest_ms = max(burst.accepted.p99_ms for burst in bursts)
    figure(f"burst of {WAITING_CALLS_MAX:,} calls: p99, ms", slowest_ms, "all accepted")
    assert [burst.refused for burst in bursts] == [{}] * WINDOWS


@dataclass(frozen=True, slots=True)
class Sample:
    """The state of server and database after a window of sustained load."""

    report: LoadReport
    memory_mb: float
    dead_share: float
    """Dead rows of points_accounts for each live one."""
    table_mb: float
    vacuums: int


async def take_sample(connection: asyncpg.Connection, report: LoadReport, pid: int) -> Sample:
    """Return the state after a window."""
    row = await connection.fetchrow(TABLES)
    return Sample(report, resident_mb(pid), row["dead_share"], row["table_mb"], row["vacuums"])


async def test_sustained_load_keeps_memory_latency_and_tables_flat(
    postgres: EmbeddedPostgres, deployment: Deployment, figure: Figure
) -> None:
    async with connected(postgres.url()) as connection, loaded_server(deployment) as (load, pid):
        rate = SUSTAINED * await sustainable_rate(load)
        samples = []
        for _ in range(round(60 * SOAK_MINUTES / SOAK_WINDOW_SECONDS)):
            report = await load.run(Job(SOAK_WINDOW_SECONDS, rate=rate))
            samples.append(await take_sample(connection, report, pid))
    third = len(samples) // 3
    first, last = samples[:third], samples[-third:]
    dead_share = max(each.dead_share for each in samples)
    memory, table = (
        (median(getattr(each, name) for each in first), median(getattr(each, name) for each in last))
        for name in ("memory_mb", "table_mb")
    )
    name = f"{SOAK_MINUTES:g} minutes at {SUSTAINED:g}x"
    figure(f"{name}: calls/s", rate, "")
    figure(f"{name}: memory in the first and last third, MB", f"{memory[0]:.0f}/{memory[1]:.0f}", "+ <= 5 %")
    figure(f"{name}: points_accounts in the first and last third, MB", f"{table[0]:.1f}/{table[1]:.1f}", "+ <= 10 %")
    figure(f"{name}: dead rows of points_accounts, % of live ones", 100 * dead_share, f"<= {100 * DEAD_SHARE_MAX:g}")
    figure(f"{name}: autovacuums", samples[-1].vacuums - samples[0].vacuums, "")
    undisturbed = [[each.report for each in part if each.report.late_p99_ms <= LATE_MS_MAX] for part in (first, last)]
    p99 = [accepted_p99(reports) if reports else 0.0 for reports in undisturbed]
    figure(f"{name}: p99 in the first and last third, ms", f"{p99[0]:.1f}/{p99[1]:.1f}", "ratio <= 1.5")
    assert memory[1] <= MEMORY_RATIO_MAX * memory[0]
    assert table[1] <= TABLE_RATIO_MAX * table[0]
    assert dead_share <= DEAD_SHARE_MAX
    if not all(undisturbed):
        pytest.skip(BUSY)
    assert p99[1] <= FLAT_P99_RATIO_MAX * max(p99[0], P99_NOISE_MS)
    assert [report.refused for reports in undisturbed for report in reports if report.refused] == []
