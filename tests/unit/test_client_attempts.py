"""When the refusal of a redemption is final, although another attempt was cut off."""

import gc
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import grpc
import pytest

from pointbook_client import attempts as attempts_module
from pointbook_client.attempts import SETTLE_SECONDS, Attempts
from pointbook_client.errors import PointbookError
from pointbook_server.db.database import SESSION_SETTINGS

REFUSED = grpc.StatusCode.FAILED_PRECONDITION
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
TIMEOUT_SECONDS = 10.0


class Clock:
    """The monotonic clock of the attempts."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that stands still until a test moves it."""
    clock = Clock()
    monkeypatch.setattr(attempts_module, "time", clock)
    return clock


@pytest.fixture
def attempts(clock: Clock) -> Attempts:
    """The attempts of a call with a deadline of ten seconds."""
    assert clock.now
    return Attempts(TIMEOUT_SECONDS)


@contextmanager
def failing(attempts: Attempts, code: grpc.StatusCode) -> Iterator[PointbookError]:
    """Make an attempt in the block that fails at its end; yield its error."""
    error = PointbookError(code, "No.", reason="INSUFFICIENT_POINTS")
    with suppress(PointbookError), attempts.attempt():
        yield error
        raise error


def fail(attempts: Attempts, code: grpc.StatusCode) -> bool:
    """Make an attempt that fails, and return whether its outcome is unknown."""
    with failing(attempts, code) as error:
        pass
    return error.outcome_unknown


def test_refusal_alone_is_final(attempts: Attempts) -> None:
    assert not fail(attempts, REFUSED)
    assert not fail(attempts, REFUSED)


def test_refusal_after_a_lost_answer_is_final_once_that_call_has_ended(attempts: Attempts, clock: Clock) -> None:
    assert fail(attempts, UNAVAILABLE)
    assert fail(attempts, REFUSED)

    clock.now += TIMEOUT_SECONDS + SETTLE_SECONDS - 0.1
    assert fail(attempts, REFUSED)

    clock.now += 0.1
    assert not fail(attempts, REFUSED)


def test_refusal_beside_a_running_attempt_is_not_final(attempts: Attempts) -> None:
    with attempts.attempt():
        assert fail(attempts, REFUSED)

    assert not fail(attempts, REFUSED)


def test_refusals_of_concurrent_attempts_end_with_a_final_one(attempts: Attempts) -> None:
    with failing(attempts, REFUSED) as first, failing(attempts, REFUSED) as second:
        pass

    assert [second.outcome_unknown, first.outcome_unknown] == [True, False]


def test_cancelled_attempt_counts_as_a_lost_answer(attempts: Attempts) -> None:
    with pytest.raises(KeyboardInterrupt), attempts.attempt():
        raise KeyboardInterrupt

    assert fail(attempts, REFUSED)


def test_attempts_against_a_dead_server_need_no_memory(attempts: Attempts, clock: Clock) -> None:
    def try_often() -> None:
        for _ in range(2_000):
            assert fail(attempts, UNAVAILABLE)
            clock.now += 0.001

    try_often()
    tracemalloc.start()
    try:
        try_often()
        gc.collect()  # the errors and their tracebacks
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert held < 10_000
    assert fail(attempts, REFUSED)


def test_refusal_waits_for_the_last_of_many_lost_attempts(attempts: Attempts, clock: Clock) -> None:
    with failing(attempts, UNAVAILABLE):
        clock.now += 5
        assert fail(attempts, UNAVAILABLE)
        clock.now += TIMEOUT_SECONDS - 5

    clock.now += SETTLE_SECONDS + 4.9
    assert fail(attempts, REFUSED)

    clock.now += 0.1
    assert not fail(attempts, REFUSED)


def test_attempt_settles_within_the_limits_of_the_server() -> None:
    limits = (int(SESSION_SETTINGS[name].removesuffix("s")) for name in ("lock_timeout", "statement_timeout"))

    assert sum(limits) == SETTLE_SECONDS
