"""A pool of asyncpg connections that can be terminated while in use.

It then opens new ones. asyncpg's own pool cannot be used again after it was terminated, and waits for a dead connection
before replacing it.
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
"""How long a closing pool waits for transactions of cancelled callers: a server has 10 s in total to stop."""
SETTLE_TIMEOUT_SECONDS = 0.5
"""How long a connection may take to end what a cancelled call left running; then it is terminated."""
IDLE_SECONDS_MAX = 300.0
USES_MAX = 200_000
"""A connection is replaced after this many uses, so that what the database caches for it stays bounded."""
EXPIRY_INTERVAL_SECONDS = 1.0
"""All connections are replaced at most this often, to spare a database that keeps refusing."""
KEEPALIVE_OPTIONS = {
    "TCP_KEEPIDLE": 5,
    "TCP_KEEPINTVL": 2,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 6_000,
}
"""When the system gives up a connection whose peer has disappeared: seconds, TCP_USER_TIMEOUT in milliseconds.

Options that the system lacks are skipped.
"""
DRIVER_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)


class PoolRefusalError(OSError):
    """The pool refuses connections, because the database hangs or the pool is closed."""


@dataclass(slots=True, eq=False)
class PooledConnection:
    """A connection of the pool."""

    driver: Any
    generation: int
    uses: int = 0
    idle_since: float = 0.0


class ConnectionPool:
    """At most `size` connections, opened when needed and reused last in, first out.

    `observe_wait` gets the seconds that callers wait for a connection, unless one is idle.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Any]],
        size: int,
        observe_wait: Callable[[float], None] = lambda _seconds: None,
    ) -> None:
        self._connect = connect
        self._observe_wait = observe_wait
        self._size = size
        self._slots = asyncio.Semaphore(size)
        self._connections: set[PooledConnection] = set()
        self._idle: deque[PooledConnection] = deque()
        self._deadlines: set[asyncio.Timeout] = set()
        """The deadlines of waiting callers, so that they can be refused at once."""
        self._generation = 0
        self._expired_at = float("-inf")
        self._refusal = ""
        self._is_closed = False
        self._in_use = 0
        self.answered_at = float("-inf")
        """When a working connection was last released, by the monotonic clock."""

    @property
    def connections_in_use(self) -> int:
        """How many connections are in use."""
        return self._in_use

    @property
    def is_empty(self) -> bool:
        """Whether no connection is open, idle or in use."""
        return not self._connections

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[Any]:
        """Acquire a driver's connection for a block.

        Raises the driver's errors, and TimeoutError.
        """
        async with self.releasing(await self.claim()) as driver:
            yield driver

    async def claim(self) -> PooledConnection:
        """Return a connection.

        Raises the driver's errors, TimeoutError, and PoolRefusalError at once.
        """
        if self._refusal:
            raise PoolRefusalError(self._refusal)
        if not self._slots.locked() and (connection := self._pop_idle()):
            # Does not yield to the loop, because a slot is free.
            await self._slots.acquire()
        else:
            connection = await self._wait()
        connection.uses += 1
        self._in_use += 1
        return connection

    @asynccontextmanager
    async def releasing(self, connection: PooledConnection) -> AsyncIterator[Any]:
        """Release a connection after a block, clean for its next use, or terminate it."""
        driver = connection.driver
        try:
            yield driver
        except TimeoutError:
            # It hangs, so a rollback would hang as well.
            driver.terminate()
            raise
        except asyncio.CancelledError:
            await _end_leftovers(driver)
            raise
        finally:
            self._release(connection)

    def expire(self) -> None:
        """Replace all connections: idle ones now, the others when they are released."""
        now = time.monotonic()
        if now - self._expired_at < EXPIRY_INTERVAL_SECONDS:
            return
        self._expired_at = now
        self._generation += 1
        for connection in list(self._idle):
            self._terminate(connection)
        self._idle.clear()

    def cut(self) -> None:
        """Terminate all connections, and refuse new and waiting callers, until `resume`."""
        self._refuse("the database hangs")
        for connection in list(self._connections):
            self._terminate(connection)
        self._idle.clear()

    def resume(self) -> None:
        """Open connections again after `cut`."""
        if not self._is_closed:
            self._refusal = ""

    async def close(self) -> None:
        """Close all connections for good.

        Those that are still in use after a moment are terminated.
        """
        self._is_closed = True
        self._refuse("the pool is closed")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_SECONDS):
                for _ in range(self._size):
                    await self._slots.acquire()
                closing = [connection.driver.close() for connection in self._connections]
                await asyncio.gather(*closing, return_exceptions=True)
        for connection in list(self._connections):
            self._terminate(connection)
        self._idle.clear()

    async def _wait(self) -> PooledConnection:
        """Wait for a slot, and open a connection if none is idle."""
        started = time.monotonic()
        async with asyncio.timeout(POOL_TIMEOUT_SECONDS) as deadline:
            self._deadlines.add(deadline)
            try:
                await self._slots.acquire()
                try:
                    return self._pop_idle() or await self._open()
                except BaseException:
                    self._slots.release()
                    raise
            finally:
                self._deadlines.discard(deadline)
                self._observe_wait(time.monotonic() - started)

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

    def _release(self, connection: PooledConnection) -> None:
        self._in_use -= 1
        self._slots.release()
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
        """Drop a connection without waiting for its peer.

        A call that uses it gets the driver's error.
        """
        self._connections.discard(connection)
        connection.driver.terminate()

    def _refuse(self, refusal: str) -> None:
        self._refusal = refusal
        for deadline in self._deadlines:
            if not deadline.expired():
                deadline.reschedule(0)


async def _end_leftovers(driver: Any) -> None:
    """End a cancelled call's statement and transaction, or terminate the connection.

    If the call was cancelled between preparing and running a statement, the driver still has to synchronize, which the
    next statement does. If that statement fails, the transaction has failed or the connection is lost.
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
    """Roll back an open transaction, or terminate an unresponsive connection."""
    # A lost connection has already ended its transaction.
    if driver.is_closed() or not driver.is_in_transaction():
        return
    try:
        async with asyncio.timeout(SETTLE_TIMEOUT_SECONDS):
            await driver.execute("ROLLBACK")
    except (*DRIVER_ERRORS, asyncio.CancelledError):
        driver.terminate()
        raise


def _keep_alive(driver: Any) -> None:
    """Turn on TCP keepalive, which detects a peer that has disappeared.

    asyncpg has no option for it.
    """
    tcp_socket = driver._transport.get_extra_info("socket")  # noqa: SLF001 - asyncpg does not expose the socket
    if tcp_socket is None or tcp_socket.family not in {socket.AF_INET, socket.AF_INET6}:
        return
    tcp_socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE_OPTIONS.items():
        if (option := getattr(socket, name, None)) is not None:
            tcp_socket.setsockopt(socket.IPPROTO_TCP, option, value)
