"""The rules of redemption: criteria, and the order of violations."""

from dataclasses import replace
from decimal import Decimal

import pytest

from pointbook_server.programs.model import Criteria, Program
from pointbook_server.reasons import Reason
from pointbook_server.redemption.caps import Usage, check_caps
from pointbook_server.redemption.rules import Eligibility, check_amount, check_eligibility, check_program
from pointbook_server.redemption.violations import REDEEMABLE, Violation, sort_violations, to_error

EXAMPLE_PROGRAM = Program(
    "m",
    1,
    ("s",),
    redemption_enabled=True,
    criteria=Criteria(multiples_of=10, max_points_per_redemption=200),
    point_value=Decimal("0.01"),
    currency_code="USD",
)
"""Capillary's example: multiples of 10, at most 200 points at a time.

Source: docs/reference/capillary-isredeemable.md#criteria-example
"""


def make_program(**limits: int) -> Program:
    """Build a program with some criteria."""
    return replace(EXAMPLE_PROGRAM, criteria=Criteria(**limits))


def amount_violations(points: int, program: Program) -> list[tuple[int, Reason]]:
    """Return the violations of an amount without earlier redemptions."""
    violations = sort_violations([*check_amount(points, program), *check_caps(points, program, Usage())])
    return [(violation.code, violation.reason) for violation in violations]


def eligibility_violations(points: int, program: Program, *, active: int, lifetime: int) -> list[tuple[int, Reason]]:
    """Return the violations of a customer's eligibility."""
    eligibility = Eligibility(active_points=active, own_active_points=active, lifetime_points=lifetime)
    return [
        (violation.code, violation.reason)
        for violation in sort_violations(check_eligibility(points, program, eligibility))
    ]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        (10, []),
        (200, []),
        (15, [(807, Reason.NOT_A_MULTIPLE)]),
        (210, [(819, Reason.ABOVE_MAX_PER_REDEMPTION)]),
        (205, [(807, Reason.NOT_A_MULTIPLE), (819, Reason.ABOVE_MAX_PER_REDEMPTION)]),
        (0, [(801, Reason.POINTS_NOT_POSITIVE)]),
        (-10, [(801, Reason.POINTS_NOT_POSITIVE)]),
        (-5, [(801, Reason.POINTS_NOT_POSITIVE), (807, Reason.NOT_A_MULTIPLE)]),
    ],
)
def test_example_criteria(points: int, expected: list[tuple[int, Reason]]) -> None:
    assert expected == amount_violations(points, EXAMPLE_PROGRAM)


@pytest.mark.parametrize(
    ("name", "limit", "right", "wrong", "expected"),
    [
        ("multiples_of", 7, 14, 15, (807, Reason.NOT_A_MULTIPLE)),
        ("max_points_per_redemption", 50, 50, 51, (819, Reason.ABOVE_MAX_PER_REDEMPTION)),
        ("max_points_per_day", 50, 50, 51, (819, Reason.ABOVE_MAX_PER_DAY)),
        ("max_points_per_week", 50, 50, 51, (819, Reason.ABOVE_MAX_PER_WEEK)),
        ("max_points_per_month", 50, 50, 51, (819, Reason.ABOVE_MAX_PER_MONTH)),
        ("min_points_per_redemption", 50, 50, 49, (821, Reason.BELOW_MIN_PER_REDEMPTION)),
    ],
)
def test_limit_of_amount_is_inclusive(
    name: str, limit: int, right: int, wrong: int, expected: tuple[int, Reason]
) -> None:
    program = make_program(**{name: limit})

    assert amount_violations(right, program) == []
    assert [expected] == amount_violations(wrong, program)


def test_program_without_criteria_has_no_limits() -> None:
    assert amount_violations(10**15, make_program()) == []


def test_disabled_program_is_827() -> None:
    assert [violation.code for violation in check_program(replace(EXAMPLE_PROGRAM, redemption_enabled=False))] == [827]
    assert not list(check_program(EXAMPLE_PROGRAM))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("min_balance_required", (804, Reason.BALANCE_BELOW_REQUIRED)),
        ("min_lifetime_points", (805, Reason.LIFETIME_POINTS_BELOW_REQUIRED)),
    ],
)
def test_required_points_are_inclusive(name: str, expected: tuple[int, Reason]) -> None:
    program = make_program(**{name: 100})

    assert eligibility_violations(10, program, active=100, lifetime=100) == []
    assert [expected] == eligibility_violations(10, program, active=99, lifetime=99)


def test_only_active_points_are_redeemable() -> None:
    assert eligibility_violations(20, EXAMPLE_PROGRAM, active=20, lifetime=20) == []
    assert eligibility_violations(21, EXAMPLE_PROGRAM, active=20, lifetime=20) == [(803, Reason.INSUFFICIENT_POINTS)]


def test_violations_are_sorted_by_code_then_reason() -> None:
    reasons = [
        Reason.PROGRAM_NOT_FOUND,
        Reason.ABOVE_MAX_PER_WEEK,
        Reason.ABOVE_MAX_PER_REDEMPTION,
        Reason.INSUFFICIENT_POINTS,
        Reason.ABOVE_MAX_PER_DAY,
        Reason.ABOVE_MAX_PER_MONTH,
        Reason.CUSTOMER_NOT_FOUND,
    ]
    ordered = [violation.reason for violation in sort_violations(Violation.of(reason, "") for reason in reasons)]

    assert ordered == [
        Reason.INSUFFICIENT_POINTS,
        Reason.CUSTOMER_NOT_FOUND,
        Reason.ABOVE_MAX_PER_DAY,
        Reason.ABOVE_MAX_PER_MONTH,
        Reason.ABOVE_MAX_PER_REDEMPTION,
        Reason.ABOVE_MAX_PER_WEEK,
        Reason.PROGRAM_NOT_FOUND,
    ]


def test_violation_has_points_and_limit_in_metadata() -> None:
    violation = next(check_amount(15, EXAMPLE_PROGRAM))

    assert violation.metadata == {"points": "15", "multiples_of": "10"}
    assert REDEEMABLE.code == 800


def test_error_has_first_violation_and_lists_all() -> None:
    error = to_error(sort_violations(check_amount(205, EXAMPLE_PROGRAM)))

    assert error.reason is Reason.NOT_A_MULTIPLE
    assert error.metadata == {
        "points": "205",
        "multiples_of": "10",
        "status_code": "807",
        "violations": "807 NOT_A_MULTIPLE, 819 ABOVE_MAX_PER_REDEMPTION",
    }
