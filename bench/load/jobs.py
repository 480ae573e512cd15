"""The jobs of the load process, and their measurements."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Self

from scenarios.populations import Population

WARM_UP_SECONDS = 0.5
"""The time of calls before the measurement, to open connections and prepare statements."""


class CallKind(StrEnum):
    """A kind of call."""

    APPLY = "APPLY"
    BATCH = "BATCH"
    LATE = "LATE"
    GET = "GET"
    VALIDATE = "VALIDATE"
    ISSUE = "ISSUE"
    REDEEM = "REDEEM"
    WEBHOOK = "WEBHOOK"


@dataclass(frozen=True, slots=True)
class Job:
    """Calls of one kind to one address, until a time or number of calls is reached."""

    kind: CallKind
    address: str
    token: str
    population: Population
    in_flight: int
    seconds: float
    warm_up_seconds: float = WARM_UP_SECONDS
    calls_max: int | None = None
    updates: int = 1
    """The number of updates per call of kind BATCH."""

    def to_json(self) -> dict[str, Any]:
        """Return the job as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Parse the result of `to_json`."""
        return cls(**{**values, "kind": CallKind(values["kind"]), "population": Population(**values["population"])})


@dataclass(frozen=True, slots=True)
class Measurement:
    """The measurement of a job: successful calls, and those that returned UNAVAILABLE.

    Any other result fails the run. `late` counts events, of which a call may have several.
    """

    calls: int
    rate: float
    p50_ms: float
    p99_ms: float
    late: int
    unavailable: int


@dataclass
class Stopwatch:
    """The durations of concurrent calls."""

    laps: list[float] = field(default_factory=list)
    late: int = 0
    unavailable: int = 0
    started: float = field(default_factory=time.perf_counter)

    @property
    def elapsed_seconds(self) -> float:
        """The time since the start."""
        return time.perf_counter() - self.started

    @contextmanager
    def lap(self) -> Iterator[None]:
        """Record the duration of a call, if it succeeds."""
        started = time.perf_counter()
        yield
        self.laps.append(time.perf_counter() - started)

    def measurement(self) -> Measurement:
        """Return the summary. Raises IndexError without any successful call."""
        ordered = sorted(self.laps)
        return Measurement(
            calls=len(ordered),
            rate=len(ordered) / self.elapsed_seconds,
            p50_ms=1_000 * ordered[len(ordered) // 2],
            p99_ms=1_000 * ordered[len(ordered) * 99 // 100],
            late=self.late,
            unavailable=self.unavailable,
        )
