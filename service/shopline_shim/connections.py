"""Bounds on what strangers can hold: open connections, and bytes of bodies whose sender is not known yet."""

import resource
import time
from typing import Protocol

import structlog
from prometheus_client import Counter

_FILES_KEPT_FREE = 64
"""File descriptors for all that is no connection of a client: the gRPC channel, listeners, logs."""
_LOG_INTERVAL_SECONDS = 60.0

log = structlog.get_logger()


class Connection(Protocol):
    """A connection that can be cut."""

    def cut(self) -> None:
        """Close the connection at once, with whatever it has under way."""


class Connections:
    """The open connections, from the one that was longest without an authentic request to the latest.

    At a bound the first of them is cut, and never the newcomer refused: strangers who fill all places, or hold large
    bodies back, only cut each other, and an honest request is in and out within milliseconds.
    """

    def __init__(self, *, connections_max: int, bytes_max: int, evicted: Counter) -> None:
        self._connections_max = max(1, min(connections_max, _files_max() - _FILES_KEPT_FREE))
        self._bytes_max = bytes_max
        self._bytes_held: dict[Connection, int] = {}
        """The bytes that each holds; the order is the order of eviction."""
        self._bytes = 0
        self._evicted = evicted
        self._unlogged = 0
        self._logged_at = float("-inf")

    def add(self, connection: Connection) -> None:
        """Count a new connection, and cut another one where they are too many."""
        self._bytes_held[connection] = 0
        if len(self._bytes_held) > self._connections_max:
            self._evict(next(iter(self._bytes_held)), "connections")

    def remove(self, connection: Connection) -> None:
        """Forget a connection that has closed."""
        self._bytes -= self._bytes_held.pop(connection, 0)

    def hold(self, connection: Connection, size: int) -> None:
        """Count bytes of a body that is still arriving, and cut others that hold some where they are too many."""
        if connection not in self._bytes_held:
            return
        self._bytes_held[connection] += size
        self._bytes += size
        while self._bytes > self._bytes_max:
            self._evict(next(each for each, held in self._bytes_held.items() if held), "bytes")

    def release(self, connection: Connection, *, authentic: bool) -> None:
        """Release the bytes of a body that has been judged; an authentic one puts its connection last in the order."""
        held = self._bytes_held.get(connection)
        if held is None:
            return
        self._bytes -= held
        if authentic:
            del self._bytes_held[connection]
        self._bytes_held[connection] = 0

    def _evict(self, connection: Connection, bound: str) -> None:
        self.remove(connection)
        self._evicted.labels(bound).inc()
        self._unlogged += 1
        now = time.monotonic()
        if now >= self._logged_at + _LOG_INTERVAL_SECONDS:
            log.warning("connections are cut to make room", bound=bound, count=self._unlogged)
            self._unlogged, self._logged_at = 0, now
        connection.cut()


def _files_max() -> int:
    """Return how many files this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1_000_000 if soft == resource.RLIM_INFINITY else soft
