"""The rules of redemption as pure functions: the seed's criteria, the order of findings, and exact money."""

from dataclasses import replace
from decimal import Decimal

import pytest

from pointbook_server.errors import Reason
from pointbook_server.programs.model import Criteria, Program
from pointbook_server.redemption.cap_windows import Usage, check_caps
from pointbook_server.redemption.currency import monetary_value, to_points
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
"""The seed's example: multiples of 10, at most 200 points at a time."""


def with_criteria(**limits: int) -> Program:
    """Make a program with some criteria."""
    return replace(EXAMPLE_PROGRAM, criteria=Criteria(**limits))


def amount_findings(points: int, program: Program) -> list[tuple[int, Reason]]:
    """Tell what speaks against an amount, where nothing was redeemed before."""
    found = sort_violations([*check_amount(points, program), *check_caps(points, program, Usage())])
    return [(each.code, each.reason) for each in found]


def standing_findings(points: int, program: Program, *, active: int, lifetime: int) -> list[tuple[int, Reason]]:
    """Tell what speaks against a customer."""
    eligibility = Eligibility(active_points=active, own_active_points=active, lifetime_points=lifetime)
    return [(found.code, found.reason) for found in sort_violations(check_eligibility(points, program, eligibility))]


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
    assert expected == amount_findings(points, EXAMPLE_PROGRAM)


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
    assert [found.code for found in check_program(replace(EXAMPLE_PROGRAM, redemption_enabled=False))] == [827]
    assert not list(check_program(EXAMPLE_PROGRAM))


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
    assert standing_findings(20, EXAMPLE_PROGRAM, active=20, lifetime=20) == []
    assert standing_findings(21, EXAMPLE_PROGRAM, active=20, lifetime=20) == [(803, Reason.INSUFFICIENT_POINTS)]


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
    ordered = [found.reason for found in sort_violations(Violation.of(reason, "") for reason in reasons)]

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
    found = next(check_amount(15, EXAMPLE_PROGRAM))

    assert found.metadata == {"points": "15", "multiples_of": "10"}
    assert REDEEMABLE.code == 800


def test_a_refusal_is_the_first_violation() -> None:
    """The error of an RPC has the first violation's reason and values, and names the others."""
    error = to_error(sort_violations(check_amount(205, EXAMPLE_PROGRAM)))

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
    program = replace(EXAMPLE_PROGRAM, point_value=Decimal(point_value))

    assert expected == to_points(Decimal(currency_value), program)


@pytest.mark.parametrize(
    ("point_value", "currency_value"),
    [("0.01", "0.015"), ("3", "1"), ("0.03", "0.1"), ("0.000000000001", "999999999999"), (None, "1")],
)
def test_no_whole_number_of_points(point_value: str | None, currency_value: str) -> None:
    """What is no whole number of points, or more than there can be, is 801; without a point value everything is."""
    program = replace(EXAMPLE_PROGRAM, point_value=None if point_value is None else Decimal(point_value))
    found = to_points(Decimal(currency_value), program)

    assert isinstance(found, Violation)
    assert (found.code, found.reason) == (801, Reason.CURRENCY_VALUE_NOT_WHOLE_POINTS)
    expected = {"currency_value": currency_value, "point_value": point_value or ""}
    assert expected.items() <= found.metadata.items()


Neighbour = tuple[str, int] | None


@pytest.mark.parametrize(
    ("point_value", "currency_value", "criteria", "lower", "higher"),
    [
        ("0.01", "0.015", {}, ("0.01", 1), ("0.02", 2)),
        ("0.03", "0.1", {}, ("0.09", 3), ("0.12", 4)),
        ("0.7", "2", {}, ("1.4", 2), ("2.1", 3)),
        ("0.333333333333", "1", {}, None, ("333333333.333", 10**9)),  # Fewer points have a value of more decimals.
        ("3", "1000", {}, ("999", 333), ("1002", 334)),
        ("12.5", "30", {}, ("25.0", 2), ("37.5", 3)),
        # Nothing can be redeemed for 0, nor for less than the minimum.
        ("3", "1", {}, None, ("3", 1)),
        ("0.01", "0.005", {}, None, ("0.01", 1)),
        ("0.01", "0.555", {"min_points_per_redemption": 100}, None, ("1.00", 100)),
        ("0.01", "0.555", {"min_points_per_redemption": 95, "multiples_of": 10}, None, ("1.00", 100)),
        # Nothing above the maximum, whichever it is.
        ("0.01", "1.995", {"max_points_per_redemption": 199}, ("1.99", 199), None),
        ("0.01", "1.995", {"max_points_per_redemption": 200}, ("1.99", 199), ("2.00", 200)),
        ("0.01", "9.999", {"max_points_per_redemption": 205, "multiples_of": 10}, ("2.00", 200), None),
        ("0.01", "9.999", {"max_points_per_day": 300}, ("3.00", 300), None),
        ("0.01", "9.999", {"max_points_per_week": 400, "max_points_per_day": 500}, ("4.00", 400), None),
        ("0.01", "9.999", {"max_points_per_month": 999}, ("9.99", 999), None),
        # Multiples.
        ("0.01", "0.155", {"multiples_of": 10}, ("0.10", 10), ("0.20", 20)),
        ("0.01", "0.055", {"multiples_of": 10}, None, ("0.10", 10)),
        ("0.03", "1", {"multiples_of": 7}, ("0.84", 28), ("1.05", 35)),
        # A request has three decimals.
        ("0.0003", "1", {}, ("0.999", 3_330), ("1.002", 3_340)),
        ("0.0007", "0.005", {}, None, ("0.007", 10)),
        ("0.0007", "0.01", {"multiples_of": 3}, None, ("0.021", 30)),
        ("0.0004", "0.005", {}, ("0.004", 10), ("0.006", 15)),
        ("0.0125", "0.02", {}, None, ("0.025", 2)),
        ("0.000000000007", "0.01", {}, ("0.007", 10**9), ("0.014", 2 * 10**9)),
        # And at most twelve digits before them, and there are at most so many points.
        ("400000000000", "900000000000", {}, ("800000000000", 2), None),
        ("0.013", "999999999999.999", {}, ("999999999999.988", 76_923_076_923_076), None),
        ("0.000000000001", "999999999999", {}, ("1000.000", 10**15), None),
        ("0.013", "1.5", {"min_points_per_redemption": 10**14}, None, None),
    ],
)
def test_the_nearest_redeemable_currency_values_are_named(
    point_value: str, currency_value: str, criteria: dict[str, int], lower: Neighbour, higher: Neighbour
) -> None:
    """Below and above, as far as there are any, each with its points; asked for in turn they are those points."""
    program = replace(EXAMPLE_PROGRAM, point_value=Decimal(point_value), criteria=Criteria(**criteria))
    found = to_points(Decimal(currency_value), program)

    assert isinstance(found, Violation)
    for name, neighbour in (("lower", lower), ("higher", higher)):
        told = (found.metadata.get(f"{name}_currency_value"), found.metadata.get(f"{name}_points"))
        assert told == ((None, None) if neighbour is None else (neighbour[0], str(neighbour[1])))
        if neighbour is not None:
            assert to_points(Decimal(neighbour[0]), program) == neighbour[1]
            assert amount_findings(neighbour[1], program) == []


def test_a_program_without_a_point_value_has_no_redeemable_currency_values() -> None:
    """The answer names none."""
    found = to_points(Decimal(1), replace(EXAMPLE_PROGRAM, point_value=None))

    assert isinstance(found, Violation)
    assert found.metadata == {"currency_value": "1", "point_value": ""}


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
    program = replace(
        EXAMPLE_PROGRAM, local_currency_code=local, local_currency_rate=None if rate is None else Decimal(rate)
    )
    value_of_points = monetary_value(points, program)

    assert value_of_points is not None
    assert (value, local_value) == (f"{value_of_points.redeem_value:f}", f"{value_of_points.redeem_local_value:f}")


@pytest.mark.parametrize(
    ("local", "decimals", "rate", "expected"),
    [
        ("TWD", None, "31.67", "47.51"),  # 47.505
        ("TWD", 0, "31.67", "48"),
        ("TWD", 0, "31.66", "47"),
        ("TWD", 0, "31", "47"),  # 46.5
        ("TWD", 1, "31.67", "47.5"),
        ("HUF", None, "355.55", "533.33"),  # 533.325
        ("HUF", 0, "355.55", "533"),
        ("HUF", 0, "355", "533"),  # 532.5
        ("IDR", None, "15843.33", "23765.00"),
        ("IDR", 0, "15843.33", "23765"),
        ("KRW", None, "1345.1", "2018"),  # 2017.65
        ("KRW", 2, "1345.1", "2017.65"),
        ("JPY", None, "150.5", "226"),  # 225.75
        ("JPY", 4, "150.5", "225.7500"),
        ("BHD", None, "0.3763", "0.564"),  # 0.56445
        ("BHD", 2, "0.3763", "0.56"),
        ("BHD", 4, "0.3763", "0.5645"),
        ("CLF", None, "0.0285", "0.0428"),  # 0.04275
        ("CLF", 0, "0.0285", "0"),
        ("", None, None, "1.50"),
        ("", 0, None, "2"),
        ("", 3, None, "1.500"),
    ],
)
def test_a_programs_own_decimals_take_the_place_of_the_minor_unit(
    local: str, decimals: int | None, rate: str | None, expected: str
) -> None:
    """Of 150 points, value_of_points 1.50; none at all is a choice, too."""
    program = replace(
        EXAMPLE_PROGRAM,
        local_currency_code=local,
        local_currency_rate=None if rate is None else Decimal(rate),
        local_currency_decimals=decimals,
    )
    value_of_points = monetary_value(150, program)

    assert value_of_points is not None
    assert (f"{value_of_points.redeem_value:f}", f"{value_of_points.redeem_local_value:f}") == ("1.50", expected)


def test_the_base_value_is_never_rounded() -> None:
    """The smallest point value times the most points keeps every digit, and so does a product in another currency."""
    program = replace(
        EXAMPLE_PROGRAM,
        point_value=Decimal("999999999999.999999999999"),
        local_currency_code="BHD",
        local_currency_rate=Decimal("999999999999.999999999999"),
    )
    value_of_points = monetary_value(10**15 - 1, program)

    assert value_of_points is not None
    assert f"{value_of_points.redeem_value:f}" == "999999999999998999999999000.000000000001"
    assert value_of_points.redeem_local_value.as_tuple().exponent == -3


@pytest.mark.parametrize("points", [0, -1])
def test_no_points_are_worth_nothing(points: int) -> None:
    """No value is told of what cannot be redeemed, or has none."""
    assert monetary_value(points, EXAMPLE_PROGRAM) is None
    assert monetary_value(10, replace(EXAMPLE_PROGRAM, point_value=None)) is None
