"""What the run asks of its load process, and what it hears back."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Self

from shops import Population

WARM_UP_SECONDS = 0.5
"""How long a job calls before anything is counted: connections, statements and plans are made then."""


class Kind(StrEnum):
    """What a job calls."""

    APPLY = "APPLY"
    BATCH = "BATCH"
    LATE = "LATE"
    VALIDATE = "VALIDATE"
    ISSUE = "ISSUE"
    REDEEM = "REDEEM"
    WEBHOOK = "WEBHOOK"


@dataclass(frozen=True, slots=True)
class Job:
    """Calls of one kind to one address, so many at a time, until the time or the number of calls is reached."""

    kind: Kind
    address: str
    token: str
    population: Population
    in_flight: int
    seconds: float
    warm_up_seconds: float = WARM_UP_SECONDS
    calls_max: int | None = None
    updates: int = 1
    """How many updates a call of kind BATCH carries."""

    def to_json(self) -> dict[str, Any]:
        """Write the job as an object of JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        return cls(**{**values, "kind": Kind(values["kind"]), "population": Population(**values["population"])})


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a job measured: the calls that were answered well, and beside them those answered UNAVAILABLE.

    Any other answer fails the whole run. `late` counts events, of which a call may carry many.
    """

    calls: int
    rate: float
    p50_ms: float
    p99_ms: float
    late: int
    unavailable: int


@dataclass
class Stopwatch:
    """Times calls, several at once too."""

    laps: list[float] = field(default_factory=list)
    late: int = 0
    unavailable: int = 0
    began: float = field(default_factory=time.perf_counter)

    @property
    def elapsed_seconds(self) -> float:
        """How long it has run."""
        return time.perf_counter() - self.began

    @contextmanager
    def lap(self) -> Iterator[None]:
        """Time one call, if it succeeds."""
        began = time.perf_counter()
        yield
        self.laps.append(time.perf_counter() - began)

    def measurement(self) -> Measurement:
        """Sum up. Raises IndexError where nothing was timed."""
        ordered = sorted(self.laps)
        return Measurement(
            calls=len(ordered),
            rate=len(ordered) / self.elapsed_seconds,
            p50_ms=1_000 * ordered[len(ordered) // 2],
            p99_ms=1_000 * ordered[len(ordered) * 99 // 100],
            late=self.late,
            unavailable=self.unavailable,
        )
