"""A clock that a test moves, and times in its messages."""

from google.protobuf.timestamp_pb2 import Timestamp

from pointbook_server.db.database import Connection

NOW_MS = 1_780_000_000_000
"""The time at which the tests' clock starts, in May 2026."""


class TestClock:
    """A clock that stands still until a test moves it."""

    __test__ = False

    def __init__(self) -> None:
        self.now_ms = NOW_MS

    def __call__(self) -> int:
        """Return the time."""
        return self.now_ms

    async def read_database(self, _connection: Connection) -> int:
        """Return the database's time, which is always the server's."""
        return self.now_ms

    def move(self, seconds: float) -> None:
        """Move the clock forward."""
        self.now_ms += int(seconds * 1_000)


def at(time_ms: int) -> Timestamp:
    """Return a Timestamp of milliseconds."""
    timestamp = Timestamp()
    timestamp.FromMilliseconds(time_ms)
    return timestamp
