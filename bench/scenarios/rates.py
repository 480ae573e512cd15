"""The rates that a run can measure, and the bars for their ratios.

Source: docs/reference/performance-bars.md#speed
"""

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from load.jobs import CallKind
from scenarios.populations import Population, Populations

IN_FLIGHT = 64
BATCHES_IN_FLIGHT = 4
UPDATES_IN_BATCH = 500
POINTBOOK = "pointbook"
ECHO = "echo"
APPLY = "ApplyPointsUpdate"
PLAIN = "ApplyPointsUpdate, written plainly"
UNMEASURED = f"{APPLY} without metrics and a log"
HOT = f"{APPLY}, 10 hot accounts"
HOT_GAINS = f"{HOT}, credits only"
HOT_TWO_SERVERS = f"{HOT}, two server processes"
BATCH = f"BatchApplyPointsUpdates, {UPDATES_IN_BATCH} a call"
PGBENCH = "pgbench, one upsert a commit, 16 clients"
GET = "GetPointsAccount"
VALIDATE = "ValidateRedemption, no code"
REDEEM = "RedeemPoints"
WEBHOOK = "webhook → shim → server → committed → 200"
SEQUENTIAL_ECHO = f"{ECHO}, one call at a time: p50"
SEQUENTIAL_APPLY = f"{APPLY}, one call at a time: p50"


class Scenario(StrEnum):
    """The scenarios that `--only` selects."""

    APPLY = "apply"
    PLAIN = "plain"
    METRICS = "metrics"
    HOT = "hot"
    HOT_GAINS = "gains"
    HOT_TWO_SERVERS = "two"
    MERCHANTS = "merchants"
    BATCH = "batch"
    GET = "get"
    VALIDATE = "validate"
    ISSUE = "issue"
    REDEEM = "redeem"
    WEBHOOK = "webhook"
    IDLE = "idle"
    CPU = "cpu"
    STATEMENTS = "statements"
    MEMORY = "memory"
    DEV = "dev"


@dataclass(frozen=True, slots=True)
class Rate:
    """A rate to measure, and the bars for its ratios to other rates.

    `bars` are pairs of another rate's name and a bar. The echo belongs to no scenario: it is measured with all others.
    A rate counts updates, of which a call may have several.
    """

    scenario: Scenario | None
    name: str
    kind: CallKind
    server: str
    population: Population
    bars: tuple[tuple[str, str], ...] = ()
    in_flight: int = IN_FLIGHT
    updates: int = 1

    @property
    def unit(self) -> str:
        """The unit of the rate."""
        return "calls/s" if self.updates == 1 else "updates/s"

    @property
    def is_compared_with_pgbench(self) -> bool:
        """Whether the rate is compared with pgbench's, measured right after it."""
        return any(name == PGBENCH for name, _ in self.bars)


def all_rates(populations: Populations) -> tuple[Rate, ...]:
    """Return all rates of concurrent calls."""
    return (
        Rate(None, ECHO, CallKind.APPLY, "echo", populations.echo),
        Rate(
            Scenario.APPLY,
            APPLY,
            CallKind.APPLY,
            POINTBOOK,
            populations.ledger,
            ((ECHO, "≥ 0.70, aim 0.80"), (PLAIN, "≥ 5, aim 7"), (UNMEASURED, "≥ 0.97")),
        ),
        Rate(Scenario.PLAIN, PLAIN, CallKind.APPLY, "plain", populations.ledger),
        Rate(Scenario.METRICS, UNMEASURED, CallKind.APPLY, "unmeasured", populations.ledger),
        Rate(Scenario.HOT, HOT, CallKind.APPLY, POINTBOOK, populations.hot, ((APPLY, "≥ 1.0, aim 1.1"),)),
        Rate(
            Scenario.HOT_GAINS,
            HOT_GAINS,
            CallKind.APPLY,
            POINTBOOK,
            populations.gaining,
            ((HOT, "≥ 0.9, aim 1.0"),),
        ),
        Rate(
            Scenario.HOT_TWO_SERVERS,
            HOT_TWO_SERVERS,
            CallKind.APPLY,
            "two pointbooks",
            populations.hot,
            ((HOT, "≥ 0.9, aim 1.2"),),
        ),
        Rate(
            Scenario.MERCHANTS,
            f"{APPLY}, 1,000 merchants",
            CallKind.APPLY,
            POINTBOOK,
            populations.spread,
            ((APPLY, "≥ 0.60, aim 0.8"),),
        ),
        Rate(
            Scenario.BATCH,
            BATCH,
            CallKind.BATCH,
            POINTBOOK,
            populations.ledger,
            ((PGBENCH, "≥ 1.5, aim 2.0"),),
            in_flight=BATCHES_IN_FLIGHT,
            updates=UPDATES_IN_BATCH,
        ),
        Rate(Scenario.GET, GET, CallKind.GET, POINTBOOK, populations.ledger, ((ECHO, "≥ 0.75, aim 0.85"),)),
        Rate(
            Scenario.VALIDATE,
            VALIDATE,
            CallKind.VALIDATE,
            POINTBOOK,
            populations.ledger,
            ((ECHO, "≥ 0.75, aim 0.85"),),
        ),
        Rate(
            Scenario.ISSUE,
            "IssueValidationCode, instant sender",
            CallKind.ISSUE,
            POINTBOOK,
            populations.code_receivers,
            ((ECHO, "≥ 0.50, aim 0.70"),),
        ),
        Rate(
            Scenario.REDEEM,
            REDEEM,
            CallKind.REDEEM,
            POINTBOOK,
            populations.redeemers,
            ((ECHO, "≥ 0.60, aim 0.70"),),
        ),
        Rate(Scenario.WEBHOOK, WEBHOOK, CallKind.WEBHOOK, "shim", populations.ledger, ((ECHO, "≥ 0.50, aim 0.60"),)),
    )


def selected_rates(populations: Populations, scenarios: Collection[Scenario]) -> tuple[Rate, ...]:
    """Return the rates of scenarios, with those that they are compared with.

    None if no scenario has a rate.
    """
    rates = all_rates(populations)
    selected = [rate for rate in rates if rate.scenario in scenarios]
    if not selected:
        return ()
    names = {ECHO} | {rate.name for rate in selected} | {name for rate in selected for name, _ in rate.bars}
    return tuple(rate for rate in rates if rate.name in names)


def sequential_rates(populations: Populations) -> tuple[Rate, ...]:
    """Return the calls that are also measured one at a time, for their latency."""
    return (
        Rate(Scenario.IDLE, SEQUENTIAL_ECHO, CallKind.APPLY, "echo", populations.echo, in_flight=1),
        Rate(Scenario.IDLE, SEQUENTIAL_APPLY, CallKind.APPLY, POINTBOOK, populations.ledger, in_flight=1),
    )
