"""What the run asks of its load process, and what it hears back."""

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Self

from shops import Population


class Kind(StrEnum):
    """What a job calls."""

    APPLY = "APPLY"
    VALIDATE = "VALIDATE"
    ISSUE = "ISSUE"
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
    warm_up_seconds: float = 0.5
    calls_max: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Write the job as an object of JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        return cls(**{**values, "kind": Kind(values["kind"]), "population": Population(**values["population"])})


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a job measured: the calls that were answered well. Any other answer fails the whole run."""

    calls: int
    rate: float
    p50_ms: float
    p99_ms: float
    late: int
