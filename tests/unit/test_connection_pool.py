"""The connection pool, with a fake driver."""

import asyncio
import random
from typing import Any

import pytest

from pointbook_server.db import connection_pool
from pointbook_server.db.connection_pool import ConnectionPool, PoolRefusalError


class FakeConnection:
    """A fake connection."""

    def __init__(self) -> None:
        self.closed = False
        self._transport = self

    def get_extra_info(self, _name: str) -> None:
        """Return no socket."""

    def is_closed(self) -> bool:
        """Return whether the connection is closed."""
        return self.closed

    def is_in_transaction(self) -> bool:
        """Return False: no transaction is open."""
        return False

    def terminate(self) -> None:
        """Close the connection."""
        self.closed = True

    async def close(self) -> None:
        """Close the connection."""
        self.closed = True

    async def execute(self, _sql: str) -> None:
        """Return after one turn of the loop. Raises ConnectionResetError if closed."""
        await asyncio.sleep(0)
        if self.closed:
            raise ConnectionResetError


class FakeServer:
    """The connections that a pool opened."""

    def __init__(self) -> None:
        self.opened: list[FakeConnection] = []
        self.hang = False
        self.error: OSError | None = None

    async def connect(self) -> FakeConnection:
        """Open a connection, hang, or fail."""
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        if self.hang:
            await asyncio.Event().wait()
        self.opened.append(FakeConnection())
        return self.opened[-1]

    @property
    def open(self) -> int:
        """The number of open connections."""
        return sum(not driver.closed for driver in self.opened)


@pytest.fixture
def server() -> FakeServer:
    """The fake connections of one test."""
    return FakeServer()


async def use(pool: ConnectionPool) -> Any:
    """Use a connection for a moment and return it."""
    async with pool.acquire() as driver:
        await driver.execute("")
        return driver


async def test_most_recently_used_connection_is_reused_first(server: FakeServer) -> None:
    """Others are opened only for concurrent calls."""
    pool = ConnectionPool(server.connect, 3)
    assert len({id(await use(pool)) for _ in range(5)}) == 1
    async with pool.acquire() as first, pool.acquire() as second:
        assert first is not second
        assert pool.connections_in_use == 2
    assert await use(pool) is first
    assert pool.connections_in_use == 0


async def test_open_connections_never_exceed_the_pool_size(server: FakeServer) -> None:
    pool = ConnectionPool(server.connect, 3)
    await asyncio.gather(*(use(pool) for _ in range(50)))
    assert len(server.opened) == 3


async def test_waiting_for_a_connection_times_out(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_pool, "POOL_TIMEOUT_SECONDS", 0.01)
    pool = ConnectionPool(server.connect, 1)
    async with pool.acquire():
        with pytest.raises(TimeoutError):
            await use(pool)
    await use(pool)


async def test_failed_connect_frees_its_slot(server: FakeServer) -> None:
    pool = ConnectionPool(server.connect, 1)
    server.error = ConnectionRefusedError()
    for _ in range(3):
        with pytest.raises(ConnectionRefusedError):
            await use(pool)
    server.error = None
    await use(pool)


async def test_cut_terminates_connections_and_refuses_callers(server: FakeServer) -> None:
    """Including callers that wait for a slot or for a connection to open."""
    pool = ConnectionPool(server.connect, 2)
    async with pool.acquire() as used:
        server.hang = True
        opening = asyncio.create_task(use(pool))
        waiting = [asyncio.create_task(use(pool)) for _ in range(3)]
        await asyncio.sleep(0.01)
        pool.cut()
        ended = await asyncio.gather(opening, *waiting, return_exceptions=True)
        with pytest.raises(PoolRefusalError):
            await use(pool)
        assert used.closed
    assert {type(end) for end in ended} == {TimeoutError}
    assert server.open == pool.connections_in_use == 0

    server.hang = False
    pool.resume()
    assert await use(pool) is not used
    await asyncio.gather(use(pool), use(pool))


async def test_closed_pool_stays_closed(server: FakeServer) -> None:
    """Even if the database becomes available again."""
    pool = ConnectionPool(server.connect, 2)
    await use(pool)
    await pool.close()
    pool.resume()
    assert server.open == 0
    with pytest.raises(PoolRefusalError):
        await use(pool)


async def test_close_waits_a_moment_and_then_terminates(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transactions whose callers have gone away may still commit."""
    monkeypatch.setattr(connection_pool, "CLOSE_TIMEOUT_SECONDS", 0.05)
    pool = ConnectionPool(server.connect, 2)
    async with pool.acquire() as used:
        await pool.close()
        assert used.closed
    monkeypatch.setattr(connection_pool, "CLOSE_TIMEOUT_SECONDS", 60.0)
    pool = ConnectionPool(server.connect, 2)
    async with pool.acquire() as used:
        closing = asyncio.create_task(pool.close())
        await asyncio.sleep(0.01)
        assert not used.closed
    await closing
    assert used.closed


async def test_expiry_replaces_all_connections_at_most_once_a_second(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Idle ones at once, others when they are released."""
    pool = ConnectionPool(server.connect, 2)
    idle = await use(pool)
    pool.expire()
    assert idle.closed
    monkeypatch.setattr(connection_pool, "EXPIRY_INTERVAL_SECONDS", 0.0)
    async with pool.acquire() as used:
        pool.expire()
        assert not used.closed
    assert used.closed
    monkeypatch.setattr(connection_pool, "EXPIRY_INTERVAL_SECONDS", 1.0)
    fresh = await use(pool)
    pool.expire()
    assert not fresh.closed


async def test_idle_and_much_used_connections_are_replaced(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ConnectionPool(server.connect, 3)
    await asyncio.gather(*(use(pool) for _ in range(3)))
    monkeypatch.setattr(connection_pool, "IDLE_SECONDS_MAX", 0.0)
    await use(pool)
    await use(pool)
    assert server.open == 1
    monkeypatch.setattr(connection_pool, "USES_MAX", 2)
    assert (await use(pool)).closed


async def test_connection_whose_call_timed_out_is_terminated(server: FakeServer) -> None:
    pool = ConnectionPool(server.connect, 1)
    with pytest.raises(TimeoutError):
        async with pool.acquire() as driver:
            raise TimeoutError
    assert driver.closed
    await use(pool)


async def test_no_slot_is_lost_when_calls_fail_or_are_cancelled(server: FakeServer) -> None:
    """Cancels at any moment, with cuts, expiries and failing connections in between."""
    pool = ConnectionPool(server.connect, 4)
    chance = random.Random(7)  # noqa: S311 - not a secret
    for _ in range(300):
        server.error = ConnectionRefusedError() if chance.random() < 0.2 else None
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
        assert server.open <= 4
    server.error = None
    claimed = [await pool.claim() for _ in range(4)]
    assert pool.connections_in_use == 4
    assert server.open == 4
    assert len(claimed) == 4
