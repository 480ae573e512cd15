"""The rules of redemption as pure functions: the seed's criteria, the order of findings, and exact money."""

from dataclasses import replace
from decimal import Decimal

import pytest

from pointbook_server.errors import Reason
from pointbook_server.programs.model import Criteria, Program
from pointbook_server.redemption.model import (
    REDEEMABLE,
    Finding,
    Standing,
    Usage,
    check_amount,
    check_caps,
    check_program,
    check_standing,
    finding,
    in_order,
    points_of,
    refusal,
    worth_of,
)

SEED = Program(
    "m",
    1,
    ("s",),
    redemption_enabled=True,
    criteria=Criteria(multiples_of=10, max_points_per_redemption=200),
    point_value=Decimal("0.01"),
    currency_code="USD",
)
"""The seed's example: multiples of 10, at most 200 points at a time."""


def with_criteria(**limits: int) -> Program:
    """Make a program with some criteria."""
    return replace(SEED, criteria=Criteria(**limits))


def amount_findings(points: int, program: Program) -> list[tuple[int, Reason]]:
    """Tell what speaks against an amount, where nothing was redeemed before."""
    found = in_order([*check_amount(points, program), *check_caps(points, program, Usage())])
    return [(each.code, each.reason) for each in found]


def standing_findings(points: int, program: Program, *, active: int, lifetime: int) -> list[tuple[int, Reason]]:
    """Tell what speaks against a customer."""
    standing = Standing(active_points=active, own_active_points=active, lifetime_points=lifetime)
    return [(found.code, found.reason) for found in in_order(check_standing(points, program, standing))]


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
def test_the_seeds_example(points: int, expected: list[tuple[int, Reason]]) -> None:
    """Multiples of 10 and at most 200 points at a time."""
    assert expected == amount_findings(points, SEED)


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
def test_each_criterion_of_an_amount(
    name: str, limit: int, right: int, wrong: int, expected: tuple[int, Reason]
) -> None:
    """A limit itself is allowed; the next point is not."""
    program = with_criteria(**{name: limit})

    assert amount_findings(right, program) == []
    assert [expected] == amount_findings(wrong, program)


def test_no_criteria_do_not_limit() -> None:
    """A program without criteria lets any amount through that is positive."""
    assert amount_findings(10**15, with_criteria()) == []


def test_a_program_that_is_switched_off() -> None:
    """827, whatever the amount."""
    assert [found.code for found in check_program(replace(SEED, redemption_enabled=False))] == [827]
    assert not list(check_program(SEED))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("min_balance_required", (804, Reason.BALANCE_BELOW_REQUIRED)),
        ("min_lifetime_points", (805, Reason.LIFETIME_POINTS_BELOW_REQUIRED)),
    ],
)
def test_each_criterion_of_a_customer(name: str, expected: tuple[int, Reason]) -> None:
    """The required points themselves suffice."""
    program = with_criteria(**{name: 100})

    assert standing_findings(10, program, active=100, lifetime=100) == []
    assert [expected] == standing_findings(10, program, active=99, lifetime=99)


def test_more_than_active() -> None:
    """All active points may go, and not one more."""
    assert standing_findings(20, SEED, active=20, lifetime=20) == []
    assert standing_findings(21, SEED, active=20, lifetime=20) == [(803, Reason.INSUFFICIENT_POINTS)]


def test_findings_are_ordered_by_code_then_reason() -> None:
    """The order is fixed, so that the first finding, which gives the status, is always the same."""
    reasons = [
        Reason.PROGRAM_NOT_FOUND,
        Reason.ABOVE_MAX_PER_WEEK,
        Reason.ABOVE_MAX_PER_REDEMPTION,
        Reason.INSUFFICIENT_POINTS,
        Reason.ABOVE_MAX_PER_DAY,
        Reason.ABOVE_MAX_PER_MONTH,
        Reason.CUSTOMER_NOT_FOUND,
    ]
    ordered = [found.reason for found in in_order(finding(reason, "") for reason in reasons)]

    assert ordered == [
        Reason.INSUFFICIENT_POINTS,
        Reason.CUSTOMER_NOT_FOUND,
        Reason.ABOVE_MAX_PER_DAY,
        Reason.ABOVE_MAX_PER_MONTH,
        Reason.ABOVE_MAX_PER_REDEMPTION,
        Reason.ABOVE_MAX_PER_WEEK,
        Reason.PROGRAM_NOT_FOUND,
    ]


def test_findings_name_their_values() -> None:
    """An error says which limit was missed by which points."""
    found = next(check_amount(15, SEED))

    assert found.metadata == {"points": "15", "multiples_of": "10"}
    assert REDEEMABLE.code == 800


def test_a_refusal_is_the_first_violation() -> None:
    """The error of an RPC has the first violation's reason and values, and names the others."""
    error = refusal(in_order(check_amount(205, SEED)))

    assert error.reason is Reason.NOT_A_MULTIPLE
    assert error.metadata == {
        "points": "205",
        "multiples_of": "10",
        "status_code": "807",
        "violations": "807 NOT_A_MULTIPLE, 819 ABOVE_MAX_PER_REDEMPTION",
    }


@pytest.mark.parametrize(
    ("point_value", "currency_value", "expected"),
    [
        ("0.01", "0.15", 15),
        ("0.03", "0.09", 3),  # In binary floating point it is 2.9999999999999996.
        ("0.1", "0.3", 3),
        ("3", "9", 3),
        ("0.000000000001", "1", 10**12),
        ("0.001", "1000000000000", 10**15),
    ],
)
def test_currency_becomes_points_exactly(point_value: str, currency_value: str, expected: int) -> None:
    """Rational arithmetic: no point is lost to binary fractions."""
    program = replace(SEED, point_value=Decimal(point_value))

    assert expected == points_of(Decimal(currency_value), program)


@pytest.mark.parametrize(
    ("point_value", "currency_value"),
    [("0.01", "0.015"), ("3", "1"), ("0.03", "0.1"), ("0.000000000001", "999999999999"), (None, "1")],
)
def test_no_whole_number_of_points(point_value: str | None, currency_value: str) -> None:
    """What is no whole number of points, or more than there can be, is 801; without a point value everything is."""
    program = replace(SEED, point_value=None if point_value is None else Decimal(point_value))
    found = points_of(Decimal(currency_value), program)

    assert isinstance(found, Finding)
    assert (found.code, found.reason) == (801, Reason.CURRENCY_VALUE_NOT_WHOLE_POINTS)
    assert found.metadata == {"currency_value": currency_value, "point_value": point_value or ""}


@pytest.mark.parametrize(
    ("local", "rate", "points", "value", "local_value"),
    [
        ("", None, 15, "0.15", "0.15"),
        ("USD", "1", 15, "0.15", "0.15"),
        ("JPY", "150", 1, "0.01", "2"),  # 1.5 yen: half up, to no decimals.
        ("JPY", "149.9", 1, "0.01", "1"),
        ("BHD", "0.376", 1, "0.01", "0.004"),  # 0.00376 dinars, of a thousand fils.
        ("BHD", "0.35", 1, "0.01", "0.004"),
        ("CNY", "7.25", 10, "0.10", "0.73"),  # 0.725: half up, not half even.
        ("CNY", "7.2499", 10, "0.10", "0.72"),
    ],
)
def test_what_points_are_worth(local: str, rate: str | None, points: int, value: str, local_value: str) -> None:
    """The base currency is not rounded; the local one is, half up, to its minor unit."""
    program = replace(SEED, local_currency_code=local, local_currency_rate=None if rate is None else Decimal(rate))
    worth = worth_of(points, program)

    assert worth is not None
    assert (value, local_value) == (f"{worth.redeem_value:f}", f"{worth.redeem_local_value:f}")


def test_the_base_value_is_never_rounded() -> None:
    """The smallest point value times the most points keeps every digit, and so does a product in another currency."""
    program = replace(
        SEED,
        point_value=Decimal("999999999999.999999999999"),
        local_currency_code="BHD",
        local_currency_rate=Decimal("999999999999.999999999999"),
    )
    worth = worth_of(10**15 - 1, program)

    assert worth is not None
    assert f"{worth.redeem_value:f}" == "999999999999998999999999000.000000000001"
    assert worth.redeem_local_value.as_tuple().exponent == -3


@pytest.mark.parametrize("points", [0, -1])
def test_no_points_are_worth_nothing(points: int) -> None:
    """No value is told of what cannot be redeemed, or has none."""
    assert worth_of(points, SEED) is None
    assert worth_of(10, replace(SEED, point_value=None)) is None
