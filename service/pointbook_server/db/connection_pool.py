"""A pool of asyncpg's connections that can be cut while they are in use, and goes on with new ones.

asyncpg's own pool ends for good when it is terminated, and waits for a dead connection before it replaces it.
"""

import asyncio
import contextlib
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg

POOL_TIMEOUT_SECONDS = 5.0
CLOSE_TIMEOUT_SECONDS = 1.0
"""How long a closing pool waits for transactions whose callers are gone: a server has 10 s to stop in all."""
SETTLE_TIMEOUT_SECONDS = 0.5
"""How long a connection may take to end what a call has left behind; then it is terminated."""
IDLE_SECONDS_MAX = 300.0
USES_MAX = 200_000
"""After how many uses a connection is replaced, so that what the database caches for it stays bounded."""
EXPIRY_PAUSE_SECONDS = 1.0
"""How often all connections may be replaced, so that a database that goes on refusing is not worn out by it."""
KEEPALIVE_OPTIONS = {
    "TCP_KEEPIDLE": 5,
    "TCP_KEEPINTVL": 2,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 6_000,
}
"""When the system gives up a connection whose other side is gone without a word: seconds, and milliseconds at last.

Each is set where the system has it.
"""
DRIVER_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)


class PoolRefusalError(OSError):
    """The pool gives no connection: the database is known to hang, or the pool is closed."""


@dataclass(slots=True, eq=False)
class PooledConnection:
    """A connection of the pool."""

    driver: Any
    generation: int
    uses: int = 0
    idle_since: float = 0.0


class ConnectionPool:
    """At most `size` connections, opened when they are needed. The one that was used last is used next."""

    def __init__(self, connect: Callable[[], Awaitable[Any]], size: int) -> None:
        self._connect = connect
        self._size = size
        self._places = asyncio.Semaphore(size)
        self._connections: set[PooledConnection] = set()
        self._idle: deque[PooledConnection] = deque()
        self._deadlines: set[asyncio.Timeout] = set()
        """Of those who wait for a connection, so that they can be sent away."""
        self._generation = 0
        self._expired_at = float("-inf")
        self._refusal = ""
        self._is_closed = False
        self._in_use = 0
        self.answered_at = float("-inf")
        """When a connection was last given back in working order, on the monotonic clock."""

    @property
    def connections_in_use(self) -> int:
        """How many connections are taken."""
        return self._in_use

    @property
    def is_empty(self) -> bool:
        """Whether no connection is open, taken or not."""
        return not self._connections

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[Any]:
        """Return a connection of the driver for a block. Raises the driver's errors, and TimeoutError."""
        async with self.returning(await self.take()) as driver:
            yield driver

    async def take(self) -> PooledConnection:
        """Return a connection. Raises the driver's errors, TimeoutError, and PoolRefusalError without waiting."""
        if self._refusal:
            raise PoolRefusalError(self._refusal)
        if not self._places.locked() and (connection := self._pop_idle()):
            # A free place is taken without waiting, so that no other task comes between.
            await self._places.acquire()
        else:
            connection = await self._wait()
        connection.uses += 1
        self._in_use += 1
        return connection

    @asynccontextmanager
    async def returning(self, connection: PooledConnection) -> AsyncIterator[Any]:
        """Return a connection to the pool after a block, fit for the next one, or else terminate it."""
        driver = connection.driver
        try:
            yield driver
        except TimeoutError:
            # It hangs, and so would all that could be asked of it.
            driver.terminate()
            raise
        except asyncio.CancelledError:
            await _settle(driver)
            raise
        finally:
            self._give_back(connection)

    def expire(self) -> None:
        """Replace all connections: the idle ones now, the others when they are given back."""
        now = time.monotonic()
        if now - self._expired_at < EXPIRY_PAUSE_SECONDS:
            return
        self._expired_at = now
        self._generation += 1
        for connection in list(self._idle):
            self._terminate(connection)
        self._idle.clear()

    def cut(self) -> None:
        """Terminate all connections, and refuse new calls and those that wait, until `resume`."""
        self._refuse("the database hangs")
        for connection in list(self._connections):
            self._terminate(connection)
        self._idle.clear()

    def resume(self) -> None:
        """Open connections again after `cut`."""
        if not self._is_closed:
            self._refusal = ""

    async def close(self) -> None:
        """Close all connections for good, and terminate those that are still in use after a moment."""
        self._is_closed = True
        self._refuse("the pool is closed")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_SECONDS):
                for _ in range(self._size):
                    await self._places.acquire()
                closing = [connection.driver.close() for connection in self._connections]
                await asyncio.gather(*closing, return_exceptions=True)
        for connection in list(self._connections):
            self._terminate(connection)
        self._idle.clear()

    async def _wait(self) -> PooledConnection:
        """Wait for a place, and open a connection where none is idle."""
        async with asyncio.timeout(POOL_TIMEOUT_SECONDS) as deadline:
            self._deadlines.add(deadline)
            try:
                await self._places.acquire()
                try:
                    return self._pop_idle() or await self._open()
                except BaseException:
                    self._places.release()
                    raise
            finally:
                self._deadlines.discard(deadline)

    async def _open(self) -> PooledConnection:
        generation = self._generation
        driver = await self._connect()
        _keep_alive(driver)
        connection = PooledConnection(driver, generation)
        self._connections.add(connection)
        return connection

    def _pop_idle(self) -> PooledConnection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.driver.is_closed():
                return connection
            self._connections.discard(connection)
        return None

    def _give_back(self, connection: PooledConnection) -> None:
        self._in_use -= 1
        self._places.release()
        driver = connection.driver
        if driver.is_closed() or driver.is_in_transaction():
            self._terminate(connection)
            return
        now = self.answered_at = connection.idle_since = time.monotonic()
        if self._is_closed or connection.generation != self._generation or connection.uses >= USES_MAX:
            self._terminate(connection)
        else:
            self._idle.append(connection)
        if self._idle and now - self._idle[0].idle_since > IDLE_SECONDS_MAX:
            self._terminate(self._idle.popleft())

    def _terminate(self, connection: PooledConnection) -> None:
        """Drop a connection without waiting for its other side; a call that uses it gets the driver's error."""
        self._connections.discard(connection)
        connection.driver.terminate()

    def _refuse(self, refusal: str) -> None:
        self._refusal = refusal
        for deadline in self._deadlines:
            if not deadline.expired():
                deadline.reschedule(0)


async def _settle(driver: Any) -> None:
    """End what a call began that was broken off anywhere, for the next user of the connection, or terminate it.

    Between preparing a statement and running it, the driver has not sent yet where a transaction ends: the next
    statement does. Where that fails, the transaction has, or the connection is lost.
    """
    try:
        async with asyncio.timeout(SETTLE_TIMEOUT_SECONDS):
            with contextlib.suppress(asyncpg.PostgresError):
                await driver.execute("SELECT")
            await roll_back(driver)
    except DRIVER_ERRORS:
        driver.terminate()
    except asyncio.CancelledError:
        driver.terminate()
        raise


async def roll_back(driver: Any) -> None:
    """Roll back a transaction, if one is open, by terminating the connection where it does not answer in time."""
    # A connection that is lost has taken its transaction with it.
    if driver.is_closed() or not driver.is_in_transaction():
        return
    try:
        async with asyncio.timeout(SETTLE_TIMEOUT_SECONDS):
            await driver.execute("ROLLBACK")
    except (*DRIVER_ERRORS, asyncio.CancelledError):
        driver.terminate()
        raise


def _keep_alive(driver: Any) -> None:
    """Turn on TCP keepalive, which finds a connection whose other side is gone; asyncpg has no option for it."""
    connected = driver._transport.get_extra_info("socket")  # noqa: SLF001 - asyncpg offers no way to the socket
    if connected is None or connected.family not in {socket.AF_INET, socket.AF_INET6}:
        return
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE_OPTIONS.items():
        if (option := getattr(socket, name, None)) is not None:
            connected.setsockopt(socket.IPPROTO_TCP, option, value)
