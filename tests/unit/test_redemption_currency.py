"""Conversion between points and monetary values, by exact arithmetic."""

from dataclasses import replace
from decimal import Decimal

import pytest

from pointbook_server.programs.model import Criteria, Program
from pointbook_server.reasons import Reason
from pointbook_server.redemption.caps import Usage, check_caps
from pointbook_server.redemption.currency import monetary_value, to_points
from pointbook_server.redemption.rules import check_amount
from pointbook_server.redemption.violations import Violation

PROGRAM = Program("m", 1, ("s",), redemption_enabled=True, point_value=Decimal("0.01"), currency_code="USD")


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
def test_currency_value_converts_to_points_exactly(point_value: str, currency_value: str, expected: int) -> None:
    program = replace(PROGRAM, point_value=Decimal(point_value))

    assert expected == to_points(Decimal(currency_value), program)


@pytest.mark.parametrize(
    ("point_value", "currency_value"),
    [("0.01", "0.015"), ("3", "1"), ("0.03", "0.1"), ("0.000000000001", "999999999999"), (None, "1")],
)
def test_fractional_or_excessive_points_are_801(point_value: str | None, currency_value: str) -> None:
    program = replace(PROGRAM, point_value=None if point_value is None else Decimal(point_value))
    violation = to_points(Decimal(currency_value), program)

    assert isinstance(violation, Violation)
    assert (violation.code, violation.reason) == (801, Reason.CURRENCY_VALUE_NOT_WHOLE_POINTS)
    expected = {"currency_value": currency_value, "point_value": point_value or ""}
    assert expected.items() <= violation.metadata.items()


NearestValue = tuple[str, int] | None


@pytest.mark.parametrize(
    ("point_value", "currency_value", "criteria", "lower", "higher"),
    [
        ("0.01", "0.015", {}, ("0.01", 1), ("0.02", 2)),
        ("0.03", "0.1", {}, ("0.09", 3), ("0.12", 4)),
        ("0.7", "2", {}, ("1.4", 2), ("2.1", 3)),
        ("0.333333333333", "1", {}, None, ("333333333.333", 10**9)),  # Fewer points have a value of more decimals.
        ("3", "1000", {}, ("999", 333), ("1002", 334)),
        ("12.5", "30", {}, ("25.0", 2), ("37.5", 3)),
        # Neither 0 nor less than the minimum is redeemable.
        ("3", "1", {}, None, ("3", 1)),
        ("0.01", "0.005", {}, None, ("0.01", 1)),
        ("0.01", "0.555", {"min_points_per_redemption": 100}, None, ("1.00", 100)),
        ("0.01", "0.555", {"min_points_per_redemption": 95, "multiples_of": 10}, None, ("1.00", 100)),
        # Nothing above any maximum.
        ("0.01", "1.995", {"max_points_per_redemption": 199}, ("1.99", 199), None),
        ("0.01", "1.995", {"max_points_per_redemption": 200}, ("1.99", 199), ("2.00", 200)),
        ("0.01", "9.999", {"max_points_per_redemption": 205, "multiples_of": 10}, ("2.00", 200), None),
        ("0.01", "9.999", {"max_points_per_day": 300}, ("3.00", 300), None),
        ("0.01", "9.999", {"max_points_per_week": 400, "max_points_per_day": 500}, ("4.00", 400), None),
        ("0.01", "9.999", {"max_points_per_month": 999}, ("9.99", 999), None),
        # Only multiples.
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
        # It has at most twelve digits before them, and points have a maximum.
        ("400000000000", "900000000000", {}, ("800000000000", 2), None),
        ("0.013", "999999999999.999", {}, ("999999999999.988", 76_923_076_923_076), None),
        ("0.000000000001", "999999999999", {}, ("1000.000", 10**15), None),
        ("0.013", "1.5", {"min_points_per_redemption": 10**14}, None, None),
    ],
)
def test_violation_has_nearest_redeemable_currency_values(
    point_value: str, currency_value: str, criteria: dict[str, int], lower: NearestValue, higher: NearestValue
) -> None:
    program = replace(PROGRAM, point_value=Decimal(point_value), criteria=Criteria(**criteria))
    violation = to_points(Decimal(currency_value), program)

    assert isinstance(violation, Violation)
    for name, expected in (("lower", lower), ("higher", higher)):
        nearest = (violation.metadata.get(f"{name}_currency_value"), violation.metadata.get(f"{name}_points"))
        assert nearest == ((None, None) if expected is None else (expected[0], str(expected[1])))
        if expected is not None:
            assert to_points(Decimal(expected[0]), program) == expected[1]
            assert not [*check_amount(expected[1], program), *check_caps(expected[1], program, Usage())]


def test_no_nearest_values_without_point_value() -> None:
    violation = to_points(Decimal(1), replace(PROGRAM, point_value=None))

    assert isinstance(violation, Violation)
    assert violation.metadata == {"currency_value": "1", "point_value": ""}


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
def test_local_value_is_rounded_half_up_and_base_value_is_not(
    local: str, rate: str | None, points: int, value: str, local_value: str
) -> None:
    program = replace(PROGRAM, local_currency_code=local, local_currency_rate=None if rate is None else Decimal(rate))
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
def test_program_setting_overrides_decimals_of_currency(
    local: str, decimals: int | None, rate: str | None, expected: str
) -> None:
    """150 points are 1.50 in the base currency."""
    program = replace(
        PROGRAM,
        local_currency_code=local,
        local_currency_rate=None if rate is None else Decimal(rate),
        local_currency_decimals=decimals,
    )
    value_of_points = monetary_value(150, program)

    assert value_of_points is not None
    assert (f"{value_of_points.redeem_value:f}", f"{value_of_points.redeem_local_value:f}") == ("1.50", expected)


def test_the_base_value_is_never_rounded() -> None:
    program = replace(
        PROGRAM,
        point_value=Decimal("999999999999.999999999999"),
        local_currency_code="BHD",
        local_currency_rate=Decimal("999999999999.999999999999"),
    )
    value_of_points = monetary_value(10**15 - 1, program)

    assert value_of_points is not None
    assert f"{value_of_points.redeem_value:f}" == "999999999999998999999999000.000000000001"
    assert value_of_points.redeem_local_value.as_tuple().exponent == -3


@pytest.mark.parametrize("points", [0, -1])
def test_no_value_without_points_or_point_value(points: int) -> None:
    assert monetary_value(points, PROGRAM) is None
    assert monetary_value(10, replace(PROGRAM, point_value=None)) is None
