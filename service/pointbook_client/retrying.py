"""Retries that gRPC does not make itself: of the updates in a batch."""

import random
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta

import grpc

from pointbook.v1 import points_pb2
from pointbook_client.calls import REQUEST_BYTES_MAX, size_error, to_update_error
from pointbook_client.errors import PointbookError

RETRY_SECONDS = 120.0
"""How long updates are sent again before the client gives up."""
PAUSE_SECONDS_MIN = 0.1
PAUSE_SECONDS_MAX = 4.0
"""The pause before a retry doubles from the minimum to the maximum."""
UPDATES_MAX = 1_000
"""The most updates of a call."""
_OPTIONS_BYTES = points_pb2.BatchApplyPointsUpdatesRequest(outcomes_only=True).ByteSize()
_FRAME_BYTES_MAX = 5
"""The most bytes of an update's tag and length in a request."""
UpdateResult = points_pb2.ApplyPointsUpdateResponse | PointbookError
_RETRIABLE_CODES = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        # gRPC refuses calls with it while too many wait for the server.
        grpc.StatusCode.CANCELLED,
    }
)


def may_succeed_later(error: PointbookError) -> bool:
    """Return whether the same update may be accepted when it is sent again."""
    return error.grpc_code in _RETRIABLE_CODES


def retry_pauses() -> Iterator[float]:
    """Yield the pauses before the retries of a call, in seconds, with jitter."""
    pause = PAUSE_SECONDS_MIN
    while True:
        yield random.uniform(pause / 2, pause)  # noqa: S311 - only jitter
        pause = min(pause * 2, PAUSE_SECONDS_MAX)


def pause_before_retry(pause: float, failures: Sequence[PointbookError]) -> float:
    """Return a pause that is not shorter than the server asks for."""
    delays = (error.retry_delay or timedelta(0) for error in failures)
    return max([pause, *(delay.total_seconds() for delay in delays)])


class UpdateBatch:
    """Updates on their way, each until it has a result."""

    def __init__(self, updates: Iterable[points_pb2.PointsUpdate], *, outcomes_only: bool) -> None:
        self._updates = tuple(updates)
        self._outcomes_only = outcomes_only
        self._sizes = [update.ByteSize() + _FRAME_BYTES_MAX for update in self._updates]
        # An update that fits into no request fails by itself, as one with wrong fields does.
        self._results: list[UpdateResult | None] = [size_error(size + _OPTIONS_BYTES) for size in self._sizes]
        self._open = [index for index, result in enumerate(self._results) if result is None]
        self._sent: list[int] = []

    def request(self) -> points_pb2.BatchApplyPointsUpdatesRequest | None:
        """Return the request for the next updates without a result; None if all have one."""
        if not self._open:
            return None
        self._sent = self._open[: self._count_that_fits()]
        return points_pb2.BatchApplyPointsUpdatesRequest(
            updates=[self._updates[index] for index in self._sent], outcomes_only=self._outcomes_only
        )

    def receive(self, response: points_pb2.BatchApplyPointsUpdatesResponse) -> list[PointbookError]:
        """Store the results of the last request.

        Returns the errors of updates that are to be sent again.
        """
        self._open = self._open[len(self._sent) :]
        failures = []
        for index, result in zip(self._sent, response.results, strict=True):
            error = to_update_error(result.error) if result.HasField("error") else None
            if error is not None and may_succeed_later(error):
                failures.append(error)
                self._open.append(index)
            else:
                self._results[index] = error or result.response
        # An account's updates keep their order.
        self._open.sort()
        return failures

    def results(self) -> list[UpdateResult]:
        """Return the result of each update, in their order."""
        return [result for result in self._results if result is not None]

    def _count_that_fits(self) -> int:
        """Return how many of the next updates a request can have: one at least."""
        size = _OPTIONS_BYTES
        for count, index in enumerate(self._open[:UPDATES_MAX]):
            size += self._sizes[index]
            if size > REQUEST_BYTES_MAX:
                return count
        return min(len(self._open), UPDATES_MAX)
