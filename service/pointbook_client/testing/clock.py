"""The clock of the server, which a test moves forward."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

SetOffset = Callable[[timedelta], None]
"""Sets how far the server's clock is ahead of the real time."""


class PointbookClock:
    """The clock of the server and its database.

    Each test starts at the real time, and the clock goes on from there. Everything that depends on time follows it:
    points and codes expire, holds are released, cooldowns end, caps begin anew with the next day. It only moves
    forward.
    """

    def __init__(self, set_offset: SetOffset) -> None:
        self._set_offset = set_offset
        self._offset = timedelta()

    def now(self) -> datetime:
        """Return the server's time, in UTC."""
        return datetime.now(UTC) + self._offset

    def advance(self, duration: timedelta) -> None:
        """Move the clock forward, and run the work that has become due.

        Holds that have waited too long are released, and old rows are deleted when this returns::

            pointbook.clock.advance(timedelta(days=3))

        Raises ValueError for a negative duration, or one that ends after the year 9999.
        """
        if duration < timedelta():
            raise ValueError(f"the clock only moves forward, not by {duration}")
        if duration > datetime.max.replace(tzinfo=UTC) - self.now():
            raise ValueError(f"the clock ends with the year 9999, before {duration} have passed")
        self._offset += duration
        self._set_offset(self._offset)

    def advance_to(self, moment: datetime) -> None:
        """Move the clock forward to a moment, such as the next midnight.

        Raises ValueError if it has passed, or has no time zone.
        """
        if moment.tzinfo is None:
            raise ValueError("the moment has no time zone")
        self.advance(moment - self.now())
