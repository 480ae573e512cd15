"""Conversion between points and monetary values, by exact arithmetic.

Source: docs/reference/redemption.md#currency-input
"""

from collections.abc import Iterator
from decimal import ROUND_HALF_UP, Context, Decimal
from fractions import Fraction
from functools import cache
from math import ceil, lcm
from typing import NamedTuple

from iso4217 import Currency

from pointbook_server.ledger.model import POINTS_MAX
from pointbook_server.programs.model import Criteria, Program
from pointbook_server.reasons import Reason
from pointbook_server.redemption.violations import Violation

EXACT = Context(prec=100, rounding=ROUND_HALF_UP)
"""A precision at which no product of points, point value and rate is rounded."""
CURRENCY_DECIMALS_MAX = 3
"""The most decimals of a requested currency value."""
CURRENCY_VALUE_LIMIT = 10**12
"""The bound below which every requested currency value lies."""


class MonetaryValue(NamedTuple):
    """The value of points in the base and in the local currency.

    It is exact in the base currency, and rounded to the program's decimals in the local one.
    """

    redeem_value: Decimal
    redeem_local_value: Decimal


def monetary_value(points: int, program: Program) -> MonetaryValue | None:
    """Return the value of points; None if the program gives points no value."""
    if program.point_value is None or points <= 0:
        return None
    value, rate = EXACT.multiply(points, program.point_value), program.local_currency_rate
    local_value = value if rate is None else EXACT.multiply(value, rate)
    return MonetaryValue(value, EXACT.quantize(local_value, _local_unit(program)))


def _local_unit(program: Program) -> Decimal:
    """Return the smallest local value: by the program's decimals, else by ISO 4217."""
    if program.local_currency_decimals is not None:
        return _unit(program.local_currency_decimals)
    return _unit(_iso_decimals(program.local_currency_code or program.currency_code))


@cache
def _unit(decimals: int) -> Decimal:
    return Decimal(1).scaleb(-decimals)


@cache
def _iso_decimals(currency_code: str) -> int:
    return Currency(currency_code).exponent or 0


def to_points(currency_value: Decimal, program: Program) -> int | Violation:
    """Convert a base currency value to points; a violation if they are not whole.

    The violation's metadata contain the nearest values that can be requested instead.
    """
    nearest: dict[str, object] = {}
    if program.point_value is None:
        message = "The program gives points no value."
    else:
        points = Fraction(currency_value) / Fraction(program.point_value)
        if points.denominator == 1 and points <= POINTS_MAX:
            return int(points)
        message = f"The currency value is not a whole number of points up to {POINTS_MAX}."
        nearest = dict(_nearest_values(points, program.point_value, program.criteria))
    return Violation.of(
        Reason.CURRENCY_VALUE_NOT_WHOLE_POINTS,
        message,
        currency_value=f"{currency_value:f}",
        point_value="" if program.point_value is None else f"{program.point_value:f}",
        **nearest,
    )


def _nearest_values(points: Fraction, point_value: Decimal, criteria: Criteria) -> Iterator[tuple[str, object]]:
    """Yield the next lower and higher points with their values, if they exist.

    Both satisfy the program's criteria for one redemption, and their values fit into a request.
    """
    step = lcm((Fraction(point_value) * 10**CURRENCY_DECIMALS_MAX).denominator, criteria.multiples_of or 1)
    low = criteria.min_points_per_redemption or 1
    maxima = (
        criteria.max_points_per_redemption,
        criteria.max_points_per_day,
        criteria.max_points_per_week,
        criteria.max_points_per_month,
    )
    requestable = ceil(CURRENCY_VALUE_LIMIT / Fraction(point_value)) - 1
    high = min(POINTS_MAX, requestable, *(maximum for maximum in maxima if maximum is not None))
    lower = min(int(points), high) // step * step
    higher = -(-max(ceil(points), low) // step) * step
    for name, candidate in (("lower", lower), ("higher", higher)):
        if low <= candidate <= high:
            value = EXACT.multiply(Decimal(candidate), point_value)
            yield f"{name}_currency_value", _to_currency_value(value)
            yield f"{name}_points", candidate


def _to_currency_value(value: Decimal) -> str:
    """Format a value as in a request, without more decimals than a request may have."""
    whole, point, decimals = f"{value:f}".partition(".")
    return whole + point + decimals[:CURRENCY_DECIMALS_MAX]
