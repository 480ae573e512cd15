"""A server with a wrong clock: it releases, deletes and redeems nothing."""

import json

import grpc
import pytest

from pointbook_server.db import clock_skew as clock_skew_module
from pointbook_server.db import database_health as database_health_module
from pointbook_server.db.clock_skew import ClockState, SystemClock
from pointbook_server.db.database import Database
from pointbook_server.maintenance import Maintenance
from pointbook_server.metrics import Metrics
from support.clients import Client
from support.clocks import at
from support.json_logs import json_logs
from support.probes import grpc_health
from support.redemption import PENDING, get_redemption, redeem, redeem_request
from support.refusals import refused
from support.servers import running_server
from support.shops import Shop
from support.store_erasures import erase_store, erasure_outcome, request_erasure
from support.unique_names import unique
from support.waiting import until

DAY_MS = 86_400_000


class ShiftedClock(SystemClock):
    """A machine's clock that is ahead of the database's."""

    def __init__(self, ahead_ms: int = 0) -> None:
        self.ahead_ms = ahead_ms

    def __call__(self) -> int:
        """Return the machine's time."""
        return super().__call__() + self.ahead_ms


async def put_points(client: Client) -> Shop:
    """Create a shop with a program and a buyer who has 100 points."""
    shop = Shop(unique("merchant"), unique("store"))
    await client.put_store(shop.merchant_id, shop.store_id)
    await client.put_program(shop.merchant_id, shop.store_id, criteria={})
    yesterday = at(SystemClock()() - DAY_MS)
    await client.apply(shop.update("buyer", updated_value=100, points_balance=100, updated_at=yesterday))
    return shop


@pytest.mark.parametrize("days", [4, -4])
async def test_server_with_a_wrong_clock_releases_and_redeems_nothing(
    database_url: str, admin_token: str, days: int
) -> None:
    """By its clock all holds are overdue, so points could be redeemed twice."""
    async with running_server(database_url, admin_token, clock=ShiftedClock()) as (_, good):
        shop = await put_points(good)
        redemption = await redeem(good, redeem_request(shop, 100))
        with json_logs(database_health_module, clock_skew_module) as written:
            async with running_server(database_url, admin_token, clock=ShiftedClock(days * DAY_MS)) as (server, skewed):
                assert await grpc_health(f"127.0.0.1:{server.port}") == "NOT_SERVING"
                await server.maintenance.run_jobs()
                refusal = await refused(redeem(skewed, redeem_request(shop, 100)))

        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "CLOCK_WRONG")
        assert refusal.retry_seconds == 1.0
        assert (await get_redemption(good, redemption)).state == PENDING
        assert (await refused(redeem(good, redeem_request(shop, 100)))).reason == "INSUFFICIENT_POINTS"
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    (wrong_line,) = [line for line in lines if line["event"] == "clock is wrong, refusing calls"]
    assert wrong_line["level"] == "error"
    assert wrong_line["ahead_seconds"] == pytest.approx(days * 86_400, abs=1)
    assert f"345600.0 s {'ahead of' if days > 0 else 'behind'} the database's" in wrong_line["cause"]
    (health_line,) = [line for line in lines if line["event"] == "the database cannot be used"]
    assert health_line["cause"] == wrong_line["cause"]


async def test_each_change_of_the_clock_state_is_logged_once(database_url: str, admin_token: str) -> None:
    """Calls succeed while the difference is small."""
    clock = ShiftedClock()
    with json_logs(clock_skew_module) as written:
        async with running_server(database_url, admin_token, clock=clock) as (server, client):
            shop = await put_points(client)
            for ahead_ms, state in ((5_000, ClockState.SKEWED), (60_000, ClockState.WRONG), (0, ClockState.GOOD)):
                clock.ahead_ms = ahead_ms
                await until(lambda state=state: server._skew.state is state)  # type: ignore[misc] # mypy infers no defaults
                assert server.metrics.clock_skew_seconds._value.get() == pytest.approx(ahead_ms / 1_000, abs=0.5)
                account = client.account(shop.merchant_id, shop.store_id, "buyer")
                if state is ClockState.WRONG:
                    assert (await refused(account)).reason == "CLOCK_WRONG"
                    assert await grpc_health(f"127.0.0.1:{server.port}") == "NOT_SERVING"
                else:
                    assert (await account).points_balance == 100
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    assert [(line["level"], line["event"]) for line in lines if "ahead_seconds" in line] == [
        ("warning", "clocks differ, suspending maintenance"),
        ("error", "clock is wrong, refusing calls"),
        ("info", "clocks agree again"),
    ]


class Jobs:
    """The jobs of maintenance, which record the times they get."""

    def __init__(self) -> None:
        self.times_ms: list[int] = []
        self.refresh_count = 0

    async def release_overdue(self, now_ms: int) -> int:
        """Record the time."""
        self.times_ms.append(now_ms)
        return 0

    name = "jobs"
    clean_up = release_overdue

    async def backlog(self, _now_ms: int) -> int:
        """Return that nothing is left."""
        return 0

    async def refresh_metrics(self, _now_ms: int) -> None:
        """Count the calls."""
        self.refresh_count += 1


@pytest.mark.parametrize(("ahead_ms", "jobs_run"), [(0, 3), (1_000, 3), (3_000, 0), (-3_000, 0)])
async def test_maintenance_reads_the_databases_clock_once_per_round(
    database_url: str, ahead_ms: int, jobs_run: int
) -> None:
    """While the clocks differ, only jobs that change nothing run."""
    database, jobs = Database(database_url, pool_size=1), Jobs()
    clock, metrics = ShiftedClock(ahead_ms), Metrics()
    skew = clock_skew_module.ClockSkew(clock, metrics)
    async with database.autocommit() as connection:
        await skew.check(connection)
    maintenance = Maintenance(
        database,
        clock,
        skew,
        metrics,
        tokens=None,
        redemptions=jobs,
        clean_ups=(jobs, jobs),
        sources={"jobs": jobs},
    )
    await maintenance.run_jobs()
    await database.dispose()

    assert len(jobs.times_ms) == jobs_run
    assert len(set(jobs.times_ms)) <= 1
    # The database's time, not that of the server, which is a second ahead.
    assert all(abs(now_ms - SystemClock()()) < 900 for now_ms in jobs.times_ms)
    assert jobs.refresh_count == 1


async def test_erasure_starts_at_the_databases_time(database_url: str, admin_token: str) -> None:
    """By a clock that is ahead, it would cover requests that come later."""
    async with running_server(database_url, admin_token, clock=ShiftedClock(10_000)) as (_, client):
        shop = Shop(unique("merchant"), unique("store"))
        await client.put_store(shop.merchant_id, shop.store_id)
        erased = await erase_store(client, shop)
        assert erased.erasure.HasField("close_time")
        later = await request_erasure(client, shop, request_time=at(SystemClock()() + 1_000))

    assert erasure_outcome(later) == "REQUESTED"
