"""The rates that a run can measure, what they are ratios to, and the bars for those ratios."""

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from jobs import Kind
from shops import Population, Shops

IN_FLIGHT = 64
BATCHES_IN_FLIGHT = 4
UPDATES_IN_BATCH = 500
ECHO = "echo"
APPLY = "ApplyPointsUpdate"
PLAIN = "ApplyPointsUpdate, written plainly"
HOT = f"{APPLY}, 10 hot accounts"
BATCH = f"BatchApplyPointsUpdates, {UPDATES_IN_BATCH} a call"
PGBENCH = "pgbench, one upsert a commit, 16 clients"
VALIDATE = "ValidateRedemption, no code"
REDEEM = "RedeemPoints"
WEBHOOK = "webhook → shim → server → committed → 200"
IDLE_ECHO = f"{ECHO}, one call at a time: p50"
IDLE_APPLY = f"{APPLY}, one call at a time: p50"


class Part(StrEnum):
    """The words by which a run is confined to some of what it could measure."""

    APPLY = "apply"
    PLAIN = "plain"
    HOT = "hot"
    MERCHANTS = "merchants"
    BATCH = "batch"
    VALIDATE = "validate"
    ISSUE = "issue"
    REDEEM = "redeem"
    WEBHOOK = "webhook"
    IDLE = "idle"
    STATEMENTS = "statements"
    MEMORY = "memory"
    DEV = "dev"


@dataclass(frozen=True, slots=True)
class Row:
    """A rate to measure, the rows that it is a ratio to, and the bars for those ratios.

    The echo belongs to no part: it is measured beside all others. A call may carry many updates, which the rate counts.
    """

    part: Part | None
    name: str
    kind: Kind
    server: str
    population: Population
    bars: tuple[tuple[str, str], ...] = ()
    in_flight: int = IN_FLIGHT
    updates: int = 1

    @property
    def unit(self) -> str:
        """What the rate counts."""
        return "calls/s" if self.updates == 1 else "updates/s"

    @property
    def is_beside_pgbench(self) -> bool:
        """Whether the rate is compared with pgbench's, which is then measured right after it."""
        return any(name == PGBENCH for name, _ in self.bars)


def rows(shops: Shops) -> tuple[Row, ...]:
    """List the rates, with the bars of the specification."""
    return (
        Row(None, ECHO, Kind.APPLY, "echo", shops.echo),
        Row(
            Part.APPLY,
            APPLY,
            Kind.APPLY,
            "pointbook",
            shops.book,
            ((ECHO, "≥ 0.50, aim 0.70"), (PLAIN, "≥ 2.5, aim 4")),
        ),
        Row(Part.PLAIN, PLAIN, Kind.APPLY, "plain", shops.book),
        Row(Part.HOT, HOT, Kind.APPLY, "pointbook", shops.hot, ((APPLY, "≥ 0.9, aim 1.0"),)),
        Row(
            Part.MERCHANTS,
            f"{APPLY}, 1,000 merchants",
            Kind.APPLY,
            "pointbook",
            shops.spread,
            ((APPLY, "≥ 0.3, aim 0.5"),),
        ),
        Row(
            Part.BATCH,
            BATCH,
            Kind.BATCH,
            "pointbook",
            shops.book,
            ((PGBENCH, "≥ 1.0, aim 2.0"),),
            in_flight=BATCHES_IN_FLIGHT,
            updates=UPDATES_IN_BATCH,
        ),
        Row(Part.VALIDATE, VALIDATE, Kind.VALIDATE, "pointbook", shops.book, ((ECHO, "≥ 0.55, aim 0.80"),)),
        Row(
            Part.ISSUE,
            "IssueValidationCode, instant sender",
            Kind.ISSUE,
            "pointbook",
            shops.customers,
            ((ECHO, "≥ 0.25, aim 0.50"),),
        ),
        Row(Part.REDEEM, REDEEM, Kind.REDEEM, "pointbook", shops.redeemers, ((ECHO, "≥ 0.25, aim 0.50"),)),
        Row(Part.WEBHOOK, WEBHOOK, Kind.WEBHOOK, "shim", shops.book, ((ECHO, "≥ 0.20, aim 0.35"),)),
    )


def chosen_rows(shops: Shops, parts: Collection[Part]) -> tuple[Row, ...]:
    """List the rates of some parts, the echo, and what these are ratios to: none where no part is a rate."""
    every = rows(shops)
    chosen = [row for row in every if row.part in parts]
    if not chosen:
        return ()
    names = {ECHO} | {row.name for row in chosen} | {name for row in chosen for name, _ in row.bars}
    return tuple(row for row in every if row.name in names)


def idle_rows(shops: Shops) -> tuple[Row, ...]:
    """List what is also called one at a time."""
    return (
        Row(Part.IDLE, IDLE_ECHO, Kind.APPLY, "echo", shops.echo, in_flight=1),
        Row(Part.IDLE, IDLE_APPLY, Kind.APPLY, "pointbook", shops.book, in_flight=1),
    )
