"""When a server's clock counts as wrong: never after one slow response."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from pointbook_server.db.clock_skew import ClockSkew, ClockSkewError, ClockState, Sample, next_state
from pointbook_server.errors import PointbookError
from pointbook_server.metrics import Metrics
from support.clocks import NOW_MS

GOOD, SKEWED, WRONG, UNKNOWN = ClockState.GOOD, ClockState.SKEWED, ClockState.WRONG, ClockState.UNKNOWN


def samples(*differences: float, tolerance_ms: float = 1) -> list[Sample]:
    """Build samples of one tolerance, by how many seconds the server is ahead."""
    return [Sample(NOW_MS, seconds * 1_000, tolerance_ms) for seconds in differences]


@pytest.mark.parametrize(
    ("seconds", "before", "after"),
    [
        (0, UNKNOWN, GOOD),
        (1.99, UNKNOWN, GOOD),
        (-2.01, UNKNOWN, SKEWED),
        (30.01, UNKNOWN, WRONG),
        (1.99, GOOD, GOOD),
        (2.01, GOOD, SKEWED),
        (-2.01, GOOD, SKEWED),
        (345_600, GOOD, WRONG),
        (-345_600, SKEWED, WRONG),
        (29.9, SKEWED, SKEWED),
        # Hysteresis: a state ends only well below the limit that was exceeded.
        (1.6, SKEWED, SKEWED),
        (1.49, SKEWED, GOOD),
        (29, WRONG, WRONG),
        (22, WRONG, SKEWED),
        (0, WRONG, GOOD),
    ],
)
def test_state_follows_the_difference(seconds: float, before: ClockState, after: ClockState) -> None:
    """Up to 2 s are good, more than 30 s are wrong, in either direction."""
    assert next_state(samples(seconds, seconds, seconds), before) is after


@pytest.mark.parametrize("before", [GOOD, SKEWED, WRONG])
def test_single_agreeing_sample_keeps_the_state(before: ClockState) -> None:
    agreeing = {GOOD: 0.0, SKEWED: 5.0, WRONG: 100.0}[before]
    other = {GOOD: 100.0, SKEWED: 0.0, WRONG: 0.0}[before]
    assert next_state(samples(other, agreeing, other), before) is before


def test_machine_paused_at_the_start_has_no_wrong_clock() -> None:
    assert next_state(samples(-60, 0.01, 0.01), UNKNOWN) is GOOD


@pytest.mark.parametrize("before", [GOOD, SKEWED, WRONG])
def test_slow_responses_keep_the_state(before: ClockState) -> None:
    """Their tolerance allows every state."""
    slow = samples(20, 20, 20, tolerance_ms=20_000)
    assert next_state(slow, before) is before


class Clocks:
    """A server's and a database's clock. `on_read` can make a reading take time."""

    def __init__(self) -> None:
        self.server_ms = self.database_ms = NOW_MS
        self.on_read: Callable[[], None] = lambda: None

    def __call__(self) -> int:
        """Return the server's time."""
        return self.server_ms

    async def read_database(self, _connection: Any) -> int:
        """Return the database's time."""
        self.on_read()
        return self.database_ms


async def test_difference_is_measured_at_the_middle_of_the_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    """A response that takes 10 s has a tolerance of 5 s: the clocks are equal."""
    clocks, metrics, elapsed = Clocks(), Metrics(), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: elapsed[0])
    skew = ClockSkew(clocks, metrics)
    await skew.check(None)  # type: ignore[arg-type] # these clocks need no connection
    assert skew.state is GOOD

    def respond_slowly() -> None:
        elapsed[0] += 10
        clocks.database_ms = clocks.server_ms + 5_000

    clocks.on_read = respond_slowly
    await skew.check(None)  # type: ignore[arg-type] # these clocks need no connection
    assert skew.state is GOOD
    assert metrics.clock_skew_seconds._value.get() == 0


async def test_no_call_is_allowed_before_the_first_comparison() -> None:
    clocks = Clocks()
    skew = ClockSkew(clocks, Metrics())
    with pytest.raises(PointbookError, match="not available"):
        skew.check_call()
    with pytest.raises(ClockSkewError):
        await skew.read_trusted(None)  # type: ignore[arg-type] # these clocks need no connection
    await skew.check(None)  # type: ignore[arg-type] # these clocks need no connection
    skew.check_call()
    assert await skew.read_trusted(None) == NOW_MS  # type: ignore[arg-type] # these clocks need no connection


async def test_clock_that_jumps_just_before_maintenance_is_not_trusted() -> None:
    """The state can be half a second old, so maintenance compares again."""
    clocks = Clocks()
    skew = ClockSkew(clocks, Metrics())
    await skew.check(None)  # type: ignore[arg-type] # these clocks need no connection
    clocks.database_ms += 4 * 86_400_000
    assert skew.state is GOOD
    with pytest.raises(ClockSkewError, match=r"345600\.0 s behind"):
        await skew.read_trusted(None)  # type: ignore[arg-type] # these clocks need no connection
