"""The rules of redemption as pure functions: what speaks against redeeming, and what points are worth."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Context, Decimal
from fractions import Fraction
from math import ceil, lcm

from iso4217 import Currency

from pointbook_server.errors import PointbookError, Reason
from pointbook_server.ledger.model import POINTS_MAX
from pointbook_server.programs.model import Channel, Criteria, Program
from pointbook_server.redemption.status_codes import STATUS_CODES

EXACT = Context(prec=100, rounding=ROUND_HALF_UP)
"""Wide enough that no product of points, point value and rate is ever rounded by accident."""
CURRENCY_DECIMALS_MAX = 3
"""How many decimals a currency value that is asked for may have."""
CURRENCY_VALUE_LIMIT = 10**12
"""What every currency value that is asked for lies below."""


@dataclass(frozen=True, slots=True)
class Violation:
    """One finding about a redemption, in words; its metadata never identifies a person."""

    reason: Reason
    message: str
    metadata: Mapping[str, str]

    @property
    def code(self) -> int:
        """Capillary's status code."""
        return STATUS_CODES[self.reason]


def finding(reason: Reason, message: str, **values: object) -> Violation:
    """Make a finding about some values."""
    return Violation(reason, message, {name: str(value) for name, value in values.items()})


REDEEMABLE = finding(Reason.REDEEMABLE, "The points may be redeemed.")


@dataclass(frozen=True, slots=True)
class Eligibility:
    """What a redemption may draw on, and what the customer's own accounts in the program have and ever earned."""

    active_points: int
    own_active_points: int
    lifetime_points: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What a customer has redeemed in a program, and not given back, in the day, week and month of now."""

    day_points: int = 0
    week_points: int = 0
    month_points: int = 0

    def after(self, points: int) -> "Usage":
        """Tell it after so many more points."""
        return Usage(self.day_points + points, self.week_points + points, self.month_points + points)


@dataclass(frozen=True, slots=True)
class MonetaryValue:
    """What points are worth: in the base currency unrounded, in the local one rounded to the program's decimals."""

    redeem_value: Decimal
    redeem_local_value: Decimal


def points_of(currency_value: Decimal, program: Program) -> int | Violation:
    """Turn a value in the base currency into points, exactly; what is no whole number of points is a finding.

    The finding names the nearest values that may be asked for instead.
    """
    neighbours: dict[str, object] = {}
    if program.point_value is None:
        message = "The program gives points no value."
    else:
        points = Fraction(currency_value) / Fraction(program.point_value)
        if points.denominator == 1 and points <= POINTS_MAX:
            return int(points)
        message = f"The currency value is no whole number of points up to {POINTS_MAX}."
        neighbours = dict(_neighbours(points, program.point_value, program.criteria))
    return finding(
        Reason.CURRENCY_VALUE_NOT_WHOLE_POINTS,
        message,
        currency_value=f"{currency_value:f}",
        point_value="" if program.point_value is None else f"{program.point_value:f}",
        **neighbours,
    )


def _neighbours(points: Fraction, point_value: Decimal, criteria: Criteria) -> Iterator[tuple[str, object]]:
    """Yield the points next below and next above some, and their values, as far as there are any.

    They are points that one redemption may have by the program's criteria, and whose value a request can express.
    """
    step = lcm((Fraction(point_value) * 10**CURRENCY_DECIMALS_MAX).denominator, criteria.multiples_of or 1)
    low = criteria.min_points_per_redemption or 1
    maxima = (
        criteria.max_points_per_redemption,
        criteria.max_points_per_day,
        criteria.max_points_per_week,
        criteria.max_points_per_month,
    )
    expressible = ceil(CURRENCY_VALUE_LIMIT / Fraction(point_value)) - 1
    high = min(POINTS_MAX, expressible, *(maximum for maximum in maxima if maximum is not None))
    lower = min(int(points), high) // step * step
    higher = -(-max(ceil(points), low) // step) * step
    for name, neighbour in (("lower", lower), ("higher", higher)):
        if low <= neighbour <= high:
            value = EXACT.multiply(Decimal(neighbour), point_value)
            yield f"{name}_currency_value", _to_currency_value(value)
            yield f"{name}_points", neighbour


def _to_currency_value(value: Decimal) -> str:
    """Write a value as a request does, which has no room for more zeros."""
    whole, point, decimals = f"{value:f}".partition(".")
    return whole + point + decimals[:CURRENCY_DECIMALS_MAX]


def worth_of(points: int, program: Program) -> MonetaryValue | None:
    """Return what points are worth; None where the program gives them no value."""
    if program.point_value is None or points <= 0:
        return None
    value = EXACT.multiply(Decimal(points), program.point_value)
    rate = Decimal(1) if program.local_currency_rate is None else program.local_currency_rate
    minor_unit = Decimal(1).scaleb(-_local_decimals(program))
    return MonetaryValue(value, EXACT.multiply(value, rate).quantize(minor_unit, context=EXACT))


def _local_decimals(program: Program) -> int:
    """Return how many decimals local values have: the program's own choice, else those of ISO 4217."""
    if program.local_currency_decimals is not None:
        return program.local_currency_decimals
    return Currency(program.local_currency_code or program.currency_code).exponent or 0


def check_program(program: Program) -> Iterator[Violation]:
    """Find what speaks against redeeming at all."""
    if not program.redemption_enabled:
        yield finding(Reason.REDEMPTION_DISABLED, "The program's redemption is switched off.")


def check_amount(points: int, program: Program) -> Iterator[Violation]:
    """Find what speaks against redeeming so many points, whoever the customer is."""
    criteria = program.criteria
    if points <= 0:
        yield finding(Reason.POINTS_NOT_POSITIVE, "At least one point must be redeemed.", points=points)
    if criteria.multiples_of is not None and points % criteria.multiples_of:
        yield finding(
            Reason.NOT_A_MULTIPLE,
            f"Points are redeemed in multiples of {criteria.multiples_of}.",
            points=points,
            multiples_of=criteria.multiples_of,
        )
    low = criteria.min_points_per_redemption
    if low is not None and points < low:
        yield finding(
            Reason.BELOW_MIN_PER_REDEMPTION,
            f"At least {low} points are redeemed at a time.",
            points=points,
            min_points_per_redemption=low,
        )
    high = criteria.max_points_per_redemption
    if high is not None and points > high:
        yield finding(
            Reason.ABOVE_MAX_PER_REDEMPTION,
            f"At most {high} points are redeemed at a time.",
            points=points,
            max_points_per_redemption=high,
        )


def check_missed_call(points: int, program: Program) -> Iterator[Violation]:
    """Find what speaks against validating so many points by a missed call: caller ids can be forged."""
    high = program.validation.max_points_missed_call
    if Channel.MISSED_CALL not in program.validation.channels:
        yield finding(Reason.MISSED_CALL_NOT_ENABLED, "The program does not validate by missed call.")
    elif high and points > high:
        yield finding(
            Reason.ABOVE_MAX_PER_MISSED_CALL,
            f"A missed call validates {high} points at most.",
            points=points,
            max_points_missed_call=high,
        )


def check_caps(points: int, program: Program, usage: Usage) -> Iterator[Violation]:
    """Find what speaks against so many points on top of what was redeemed in the day, week and month."""
    criteria = program.criteria
    for reason, name, span, redeemed, high in (
        (Reason.ABOVE_MAX_PER_DAY, "max_points_per_day", "day", usage.day_points, criteria.max_points_per_day),
        (Reason.ABOVE_MAX_PER_WEEK, "max_points_per_week", "week", usage.week_points, criteria.max_points_per_week),
        (
            Reason.ABOVE_MAX_PER_MONTH,
            "max_points_per_month",
            "month",
            usage.month_points,
            criteria.max_points_per_month,
        ),
    ):
        if high is not None and points + redeemed > high:
            message = f"At most {high} points are redeemed a {span}."
            yield finding(reason, message, **{"points": points, "redeemed_points": redeemed, name: high})


def check_standing(points: int, program: Program, standing: Eligibility) -> Iterator[Violation]:
    """Find what speaks against this customer redeeming so many points."""
    active, own, lifetime = standing.active_points, standing.own_active_points, standing.lifetime_points
    required = program.criteria.min_balance_required
    earned = program.criteria.min_lifetime_points
    if points > active:
        yield finding(
            Reason.INSUFFICIENT_POINTS,
            f"Only {active} points are active.",
            points=points,
            active_points=active,
        )
    if required is not None and own < required:
        yield finding(
            Reason.BALANCE_BELOW_REQUIRED,
            f"Redeeming takes at least {required} active points of one's own.",
            active_points=own,
            min_balance_required=required,
        )
    if earned is not None and lifetime < earned:
        yield finding(
            Reason.LIFETIME_POINTS_BELOW_REQUIRED,
            f"Redeeming takes at least {earned} points earned altogether.",
            lifetime_points=lifetime,
            min_lifetime_points=earned,
        )


def sort_violations(findings: Iterable[Violation]) -> list[Violation]:
    """Order findings by ascending code, then reason: the first one gives the status."""
    return sorted(findings, key=lambda found: (found.code, found.reason))


class RefusedError(PointbookError):
    """The RPC error of findings, which it keeps."""

    findings: list[Violation]


def to_error(violations: list[Violation], *, retry_after_seconds: float | None = None) -> RefusedError:
    """Turn violations into the RPC error of the first one; its metadata names them all."""
    first = violations[0]
    error = RefusedError(
        first.reason,
        first.message,
        metadata={
            **first.metadata,
            "status_code": str(first.code),
            "violations": ", ".join(f"{found.code} {found.reason}" for found in violations),
        },
        retry_after_seconds=retry_after_seconds,
    )
    error.findings = violations
    return error
