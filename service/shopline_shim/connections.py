"""Bounds on what strangers can hold: open connections, and bytes of bodies whose sender is not known yet."""

import itertools
import resource
import time
from typing import Protocol

import structlog
from prometheus_client import Counter

_FILES_KEPT_FREE = 128
"""File descriptors for all else: the gRPC channel, listeners, logs, and the connections of the metrics' own address."""
_LOG_INTERVAL_SECONDS = 60.0

log = structlog.get_logger()


class Connection(Protocol):
    """A connection that can be cut."""

    def cut(self) -> None:
        """Close the connection at once, with whatever it has under way."""


class Connections:
    """The open connections: strangers, and those that have had an authentic request, each the oldest first.

    At a bound the first stranger is cut, and never the newcomer refused: strangers who fill all places, or hold large
    bodies back, only cut each other, while an honest request is applied, or waits for its sender's next one.

    An attacker who has captured a body is no stranger. So beyond half of all places the connection is cut whose
    authentic request is the longest ago, and the other half is left to newcomers.
    """

    def __init__(self, *, connections_max: int, bytes_max: int, evicted: Counter) -> None:
        self._connections_max = max(1, min(connections_max, _files_max() - _FILES_KEPT_FREE))
        self._bytes_max = bytes_max
        self._bytes_share = bytes_max // self._connections_max
        """Where all hold too much together, one holds more than this; who holds less, as most bodies do, is not cut."""
        self._strangers: dict[Connection, int] = {}
        """The bytes that each holds, as in the other one."""
        self._authentic: dict[Connection, int] = {}
        self._bytes = 0
        self._evicted = evicted
        self._unlogged = 0
        self._logged_at = float("-inf")

    def add(self, connection: Connection) -> None:
        """Count a new connection, and cut another one where they are too many."""
        self._strangers[connection] = 0
        if len(self._strangers) + len(self._authentic) > self._connections_max:
            has_half = len(self._authentic) > self._connections_max // 2
            self._evict(next(iter(self._authentic if has_half else self._strangers)), "connections")

    def remove(self, connection: Connection) -> None:
        """Forget a connection that has closed."""
        self._bytes -= self._strangers.pop(connection, 0) + self._authentic.pop(connection, 0)

    def hold(self, connection: Connection, size: int) -> None:
        """Count bytes of a body that is still arriving, and cut others that hold many where they are too many."""
        places = self._places_of(connection)
        if places is None:
            return
        places[connection] += size
        self._bytes += size
        while self._bytes > self._bytes_max:
            everyone = itertools.chain(self._strangers.items(), self._authentic.items())
            self._evict(next(each for each, held in everyone if held > self._bytes_share), "bytes")

    def release(self, connection: Connection, *, authentic: bool) -> None:
        """Release the bytes of a body that has been judged; an authentic one makes its connection the latest."""
        places = self._places_of(connection)
        if places is None:
            return
        self._bytes -= places[connection]
        if authentic:
            del places[connection]
            places = self._authentic
        places[connection] = 0

    def _places_of(self, connection: Connection) -> dict[Connection, int] | None:
        return next((each for each in (self._strangers, self._authentic) if connection in each), None)

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
