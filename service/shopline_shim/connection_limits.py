"""Limits for clients before authentication: connections and buffered bytes."""

import itertools
import resource
import time
from typing import Protocol

import structlog
from prometheus_client import Counter

_RESERVED_FILES = 128
"""File descriptors for the gRPC channel, listeners, logs, and the connections of a separate metrics address."""
_LOG_INTERVAL_SECONDS = 60.0

log = structlog.get_logger()


class Connection(Protocol):
    """A connection that can be closed."""

    def abort(self) -> None:
        """Close the connection at once, including any request in progress."""


class ConnectionLimits:
    """The open connections, unauthenticated and authenticated, each by age.

    An authenticated connection has had an authentic request.

    When a limit is reached, the oldest unauthenticated connection is closed, and a new one is always accepted. So
    clients that hold idle connections or unfinished bodies displace only each other, and a connection whose request was
    authentic stays open for its next one.

    A captured body makes an attacker's connections authentic. So when more than half of all connections are
    authenticated, the one with the oldest authentic request is closed instead, and new clients keep the other half.
    """

    def __init__(self, *, connections_max: int, bytes_max: int, evicted: Counter) -> None:
        self._connections_max = max(1, min(connections_max, _open_files_max() - _RESERVED_FILES))
        self._bytes_max = bytes_max
        self._fair_share_bytes = bytes_max // self._connections_max
        """At the byte limit some connection holds more than this. Those that hold less are not closed."""
        self._unauthenticated: dict[Connection, int] = {}
        """The bytes that each connection holds, as in the next dictionary."""
        self._authenticated: dict[Connection, int] = {}
        self._bytes = 0
        self._evicted = evicted
        self._unlogged_count = 0
        self._logged_at = float("-inf")

    def add(self, connection: Connection) -> None:
        """Add a new connection, and close another one if there are too many."""
        self._unauthenticated[connection] = 0
        if len(self._unauthenticated) + len(self._authenticated) > self._connections_max:
            has_half = len(self._authenticated) > self._connections_max // 2
            oldest = next(iter(self._authenticated if has_half else self._unauthenticated))
            self._evict(oldest, "connections")

    def remove(self, connection: Connection) -> None:
        """Remove a closed connection."""
        self._bytes -= self._unauthenticated.pop(connection, 0) + self._authenticated.pop(connection, 0)

    def hold(self, connection: Connection, size: int) -> None:
        """Count bytes of an unverified body.

        At the limit, the oldest connections above their share are closed.
        """
        group = self._group_of(connection)
        if group is None:
            return
        group[connection] += size
        self._bytes += size
        while self._bytes > self._bytes_max:
            held_bytes = itertools.chain(self._unauthenticated.items(), self._authenticated.items())
            self._evict(next(each for each, held in held_bytes if held > self._fair_share_bytes), "bytes")

    def release(self, connection: Connection, *, authentic: bool) -> None:
        """Release the bytes of a verified body.

        An authentic body makes its connection the newest authenticated one.
        """
        group = self._group_of(connection)
        if group is None:
            return
        self._bytes -= group[connection]
        if authentic:
            del group[connection]
            group = self._authenticated
        group[connection] = 0

    def _group_of(self, connection: Connection) -> dict[Connection, int] | None:
        return next((group for group in (self._unauthenticated, self._authenticated) if connection in group), None)

    def _evict(self, connection: Connection, limit: str) -> None:
        self.remove(connection)
        self._evicted.labels(limit).inc()
        self._unlogged_count += 1
        now = time.monotonic()
        if now >= self._logged_at + _LOG_INTERVAL_SECONDS:
            log.warning("connections closed at a limit", bound=limit, count=self._unlogged_count)
            self._unlogged_count, self._logged_at = 0, now
        connection.abort()


def _open_files_max() -> int:
    """Return the soft limit on open files of this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1_000_000 if soft == resource.RLIM_INFINITY else soft
