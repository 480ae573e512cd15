"""The pool's places and connections, with a driver that does what a test says."""

import asyncio
import random
from typing import Any

import pytest

from pointbook_server.db import connection_pool
from pointbook_server.db.connection_pool import ConnectionPool, PoolRefusalError


class Driver:
    """A connection of the driver, without a database."""

    def __init__(self) -> None:
        self.closed = False
        self._transport = self

    def get_extra_info(self, _name: str) -> None:
        """Return no socket."""

    def is_closed(self) -> bool:
        """Return whether it was closed."""
        return self.closed

    def is_in_transaction(self) -> bool:
        """Return that no transaction is open."""
        return False

    def terminate(self) -> None:
        """Close it."""
        self.closed = True

    async def close(self) -> None:
        """Close it."""
        self.closed = True

    async def execute(self, _sql: str) -> None:
        """Answer after a moment."""
        await asyncio.sleep(0)
        if self.closed:
            raise ConnectionResetError


class Drivers:
    """The connections that a pool has opened."""

    def __init__(self) -> None:
        self.opened: list[Driver] = []
        self.hang = False
        self.error: OSError | None = None

    async def connect(self) -> Driver:
        """Open a connection, or hang, or fail."""
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        if self.hang:
            await asyncio.Event().wait()
        self.opened.append(Driver())
        return self.opened[-1]

    @property
    def open(self) -> int:
        """How many connections are open."""
        return sum(not driver.closed for driver in self.opened)


@pytest.fixture
def drivers() -> Drivers:
    """The connections of one test."""
    return Drivers()


async def use(pool: ConnectionPool) -> Any:
    """Use a connection for a moment, and return it."""
    async with pool.acquire() as driver:
        await driver.execute("")
        return driver


async def test_most_recently_used_connection_is_reused_first(drivers: Drivers) -> None:
    """Others are there for calls at the same time."""
    pool = ConnectionPool(drivers.connect, 3)
    assert len({id(await use(pool)) for _ in range(5)}) == 1
    async with pool.acquire() as first, pool.acquire() as second:
        assert first is not second
        assert pool.connections_in_use == 2
    assert await use(pool) is first
    assert pool.connections_in_use == 0


async def test_open_connections_never_exceed_the_pool_size(drivers: Drivers) -> None:
    """Calls wait for them."""
    pool = ConnectionPool(drivers.connect, 3)
    await asyncio.gather(*(use(pool) for _ in range(50)))
    assert len(drivers.opened) == 3


async def test_waiting_for_a_connection_times_out(drivers: Drivers, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one behind it gets the place."""
    monkeypatch.setattr(connection_pool, "POOL_TIMEOUT_SECONDS", 0.01)
    pool = ConnectionPool(drivers.connect, 1)
    async with pool.acquire():
        with pytest.raises(TimeoutError):
            await use(pool)
    await use(pool)


async def test_failed_connect_frees_its_slot(drivers: Drivers) -> None:
    """The next call tries again."""
    pool = ConnectionPool(drivers.connect, 1)
    drivers.error = ConnectionRefusedError()
    for _ in range(3):
        with pytest.raises(ConnectionRefusedError):
            await use(pool)
    drivers.error = None
    await use(pool)


async def test_cut_terminates_connections_and_refuses_callers(drivers: Drivers) -> None:
    """Those that wait for a place, and those that wait for a connection to open."""
    pool = ConnectionPool(drivers.connect, 2)
    async with pool.acquire() as used:
        drivers.hang = True
        opening = asyncio.create_task(use(pool))
        waiting = [asyncio.create_task(use(pool)) for _ in range(3)]
        await asyncio.sleep(0.01)
        pool.cut()
        ended = await asyncio.gather(opening, *waiting, return_exceptions=True)
        with pytest.raises(PoolRefusalError):
            await use(pool)
        assert used.closed
    assert {type(end) for end in ended} == {TimeoutError}
    assert drivers.open == pool.connections_in_use == 0

    drivers.hang = False
    pool.resume()
    assert await use(pool) is not used
    await asyncio.gather(use(pool), use(pool))


async def test_a_closed_pool_stays_closed(drivers: Drivers) -> None:
    """Also where the database answers again."""
    pool = ConnectionPool(drivers.connect, 2)
    await use(pool)
    await pool.close()
    pool.resume()
    assert drivers.open == 0
    with pytest.raises(PoolRefusalError):
        await use(pool)


async def test_close_waits_a_moment_and_then_terminates(drivers: Drivers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transactions whose callers are gone end in order where they can."""
    monkeypatch.setattr(connection_pool, "CLOSE_TIMEOUT_SECONDS", 0.05)
    pool = ConnectionPool(drivers.connect, 2)
    async with pool.acquire() as used:
        await pool.close()
        assert used.closed
    monkeypatch.setattr(connection_pool, "CLOSE_TIMEOUT_SECONDS", 60.0)
    pool = ConnectionPool(drivers.connect, 2)
    async with pool.acquire() as used:
        closing = asyncio.create_task(pool.close())
        await asyncio.sleep(0.01)
        assert not used.closed
    await closing
    assert used.closed


async def test_expiry_replaces_all_connections_at_most_once_a_second(
    drivers: Drivers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The idle ones at once, the others when they are given back."""
    pool = ConnectionPool(drivers.connect, 2)
    idle = await use(pool)
    pool.expire()
    assert idle.closed
    monkeypatch.setattr(connection_pool, "EXPIRY_INTERVAL_SECONDS", 0.0)
    async with pool.acquire() as used:
        pool.expire()
        assert not used.closed
    assert used.closed
    monkeypatch.setattr(connection_pool, "EXPIRY_INTERVAL_SECONDS", 1.0)
    kept = await use(pool)
    pool.expire()
    assert not kept.closed


async def test_worn_and_idle_connections_are_replaced(drivers: Drivers, monkeypatch: pytest.MonkeyPatch) -> None:
    """After many uses, and those that calls of now do not need."""
    pool = ConnectionPool(drivers.connect, 3)
    await asyncio.gather(*(use(pool) for _ in range(3)))
    monkeypatch.setattr(connection_pool, "IDLE_SECONDS_MAX", 0.0)
    await use(pool)
    await use(pool)
    assert drivers.open == 1
    monkeypatch.setattr(connection_pool, "USES_MAX", 2)
    assert (await use(pool)).closed


async def test_a_connection_whose_call_timed_out_is_terminated(drivers: Drivers) -> None:
    """Nothing more is asked of it."""
    pool = ConnectionPool(drivers.connect, 1)
    with pytest.raises(TimeoutError):
        async with pool.acquire() as driver:
            raise TimeoutError
    assert driver.closed
    await use(pool)


async def test_no_slot_is_lost_when_calls_fail_or_are_cancelled(drivers: Drivers) -> None:
    """Cancellation at any moment, cuts, expiries and failing connections."""
    pool = ConnectionPool(drivers.connect, 4)
    chance = random.Random(7)  # noqa: S311 - it need not be a secret
    for _ in range(300):
        drivers.error = ConnectionRefusedError() if chance.random() < 0.2 else None
        calls = [asyncio.create_task(use(pool)) for _ in range(12)]
        for _ in range(chance.randrange(6)):
            await asyncio.sleep(0)
        for call in chance.sample(calls, 6):
            call.cancel()
        if chance.random() < 0.3:
            pool.cut()
        await asyncio.gather(*calls, return_exceptions=True)
        pool.resume()
        assert pool.connections_in_use == 0
        assert drivers.open <= 4
    drivers.error = None
    held = [await pool.claim() for _ in range(4)]
    assert pool.connections_in_use == 4
    assert drivers.open == 4
    assert len(held) == 4
