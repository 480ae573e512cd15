"""What benefits are, without a server: the table of rules, and numbers in texts."""

from decimal import Decimal
from itertools import permutations

import pytest

from pointbook_server.benefits.model import ENUMS, RULES, Measure, irrelevant_fields, read_month_day


def test_a_rule_stands_behind_those_of_the_fields_it_cites() -> None:
    """So that one walk over the table knows what is irrelevant before anything relies on it."""
    seen: set[str] = set()
    for name, conditions in RULES.items():
        seen.add(name)
        for condition in conditions:
            assert condition.field not in RULES or condition.field in seen
            assert set(condition.values) <= set(ENUMS[condition.field])


def test_the_order_of_values_does_not_matter() -> None:
    """Nor does what is irrelevant make anything relevant."""
    values = {
        "membership_type": "LEVEL",
        "benefits_issurance_type": "PERIODICALLY",
        "periodically_days": 1,
        "usage_limits_times": 1,
    }
    for order in permutations(values.items()):
        assert irrelevant_fields(dict(order)) == {"benefits_issurance_type", "periodically_days", "usage_limits_times"}


@pytest.mark.parametrize("value", [None, "", 3, ["PERIODICALLY"], {"a": 1}, True])
def test_a_value_that_is_no_name_makes_nothing_relevant(value: object) -> None:
    """Whatever a file has in the place of an enum."""
    assert irrelevant_fields({"benefits_issurance_type": value, "periodically_days": 1}) == {"periodically_days"}


def test_a_measure_reads_exactly() -> None:
    """No binary fraction comes between."""
    measure = Measure("", Decimal("0.1"), Decimal("0.3"))

    assert measure.read("0.300000000000") == Decimal("0.3")
    assert measure.read("0.300000000001") is None
    assert measure.read("0.099999999999") is None


def test_every_day_of_a_leap_year_is_read() -> None:
    """366 days, and no more."""
    texts = [f"{month:02}-{day:02}" for month in range(100) for day in range(100)]

    assert sum(read_month_day(text) is not None for text in texts) == 366
