"""Benefits without a server: the relevance rules, and quantities in texts."""

from decimal import Decimal
from itertools import permutations

import pytest

from pointbook_server.benefits.model import ENUM_FIELDS, Measure, read_month_day
from pointbook_server.benefits.relevance import RELEVANCE_RULES, irrelevant_fields


def test_relevance_rules_follow_those_of_the_fields_they_refer_to() -> None:
    """A single pass over the rules can then decide all of them."""
    passed: set[str] = set()
    for name, conditions in RELEVANCE_RULES.items():
        passed.add(name)
        for condition in conditions:
            assert condition.field not in RELEVANCE_RULES or condition.field in passed
            assert set(condition.values) <= set(ENUM_FIELDS[condition.field])


def test_irrelevant_fields_do_not_depend_on_the_order_of_values() -> None:
    values = {
        "membership_type": "LEVEL",
        "benefits_issurance_type": "PERIODICALLY",
        "periodically_days": 1,
        "usage_limits_times": 1,
    }
    for order in permutations(values.items()):
        assert irrelevant_fields(dict(order)) == {"benefits_issurance_type", "periodically_days", "usage_limits_times"}


@pytest.mark.parametrize("value", [None, "", 3, ["PERIODICALLY"], {"a": 1}, True])
def test_a_value_that_is_not_a_text_makes_no_field_relevant(value: object) -> None:
    assert irrelevant_fields({"benefits_issurance_type": value, "periodically_days": 1}) == {"periodically_days"}


def test_quantities_are_exact_decimals() -> None:
    measure = Measure("", Decimal("0.1"), Decimal("0.3"))

    assert measure.read("0.300000000000") == Decimal("0.3")
    assert measure.read("0.300000000001") is None
    assert measure.read("0.099999999999") is None


def test_every_day_of_a_leap_year_is_read() -> None:
    texts = [f"{month:02}-{day:02}" for month in range(100) for day in range(100)]

    assert sum(read_month_day(text) is not None for text in texts) == 366
