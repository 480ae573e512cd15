"""The rules of redemption: pure functions that yield violations.

The rules of the caps for a day, a week and a month are in caps.py.
Source: docs/reference/redemption.md#criteria
"""

from collections.abc import Iterator
from typing import NamedTuple

from pointbook_server.programs.model import Channel, Program
from pointbook_server.reasons import Reason
from pointbook_server.redemption.violations import Violation


class Eligibility(NamedTuple):
    """The points that decide whether a customer may redeem.

    `active_points` are those of the accounts that may be drawn on; the other numbers are those of the customer's own
    accounts in the program.
    """

    active_points: int
    own_active_points: int
    lifetime_points: int


def check_program(program: Program) -> Iterator[Violation]:
    """Check that the program allows redemption."""
    if not program.redemption_enabled:
        yield Violation.of(Reason.REDEMPTION_DISABLED, "The program's redemption is switched off.")


def check_amount(points: int, program: Program) -> Iterator[Violation]:
    """Check the number of points against the criteria for a single redemption."""
    criteria = program.criteria
    if points <= 0:
        yield Violation.of(Reason.POINTS_NOT_POSITIVE, "At least one point must be redeemed.", points=points)
    if criteria.multiples_of is not None and points % criteria.multiples_of:
        yield Violation.of(
            Reason.NOT_A_MULTIPLE,
            f"Points are redeemed in multiples of {criteria.multiples_of}.",
            points=points,
            multiples_of=criteria.multiples_of,
        )
    low = criteria.min_points_per_redemption
    if low is not None and points < low:
        yield Violation.of(
            Reason.BELOW_MIN_PER_REDEMPTION,
            f"At least {low} points are redeemed at a time.",
            points=points,
            min_points_per_redemption=low,
        )
    high = criteria.max_points_per_redemption
    if high is not None and points > high:
        yield Violation.of(
            Reason.ABOVE_MAX_PER_REDEMPTION,
            f"At most {high} points are redeemed at a time.",
            points=points,
            max_points_per_redemption=high,
        )


def check_missed_call(points: int, program: Program) -> Iterator[Violation]:
    """Check that a missed call may validate the points.

    Programs limit them, because caller ids can be forged.
    Source: docs/reference/validation-codes.md#missed-calls
    """
    high = program.validation.max_points_missed_call
    if Channel.MISSED_CALL not in program.validation.channels:
        yield Violation.of(Reason.MISSED_CALL_NOT_ENABLED, "The program does not validate by missed call.")
    elif high and points > high:
        yield Violation.of(
            Reason.ABOVE_MAX_PER_MISSED_CALL,
            f"A missed call validates at most {high} points.",
            points=points,
            max_points_missed_call=high,
        )


def check_eligibility(points: int, program: Program, eligibility: Eligibility) -> Iterator[Violation]:
    """Check that the customer has enough active and lifetime points."""
    active, own = eligibility.active_points, eligibility.own_active_points
    lifetime = eligibility.lifetime_points
    min_balance = program.criteria.min_balance_required
    min_lifetime = program.criteria.min_lifetime_points
    if points > active:
        yield Violation.of(
            Reason.INSUFFICIENT_POINTS,
            f"Only {active} points are active.",
            points=points,
            active_points=active,
        )
    if min_balance is not None and own < min_balance:
        yield Violation.of(
            Reason.BALANCE_BELOW_REQUIRED,
            f"Redeeming requires at least {min_balance} active points of the customer's own.",
            active_points=own,
            min_balance_required=min_balance,
        )
    if min_lifetime is not None and lifetime < min_lifetime:
        yield Violation.of(
            Reason.LIFETIME_POINTS_BELOW_REQUIRED,
            f"Redeeming requires at least {min_lifetime} lifetime points.",
            lifetime_points=lifetime,
            min_lifetime_points=min_lifetime,
        )
