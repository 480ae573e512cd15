"""Damage of ids by spreadsheets is detected, and valid ids are not damage."""

import pytest

from pointbook_cli.points_import.spreadsheets import id_damage, may_be_rounded

DAMAGED = {
    "in scientific notation": [
        *("1.72E+12", "1,72E+12", "1.72e12", "1.72182952656614E+18", "1.72182952656614E+018", "1E+12", "1e+05"),
        *("-1.5E+20", "12.3E+6", "2.00E-04", "1E-05", "1.E+12", "172E+10"),
    ],
    "starts with an apostrophe": ["'1718263946864", "'", "\u2019123", "\u2018b", "'abc'"],
    "is a formula": ['="123"', "=\u201c123\u201d", "=A1+B1", "=", "@SUM(A1:A2)", "+SUM(A1)", "-ABS(B2)", "=1"],
    "error value of a spreadsheet": [
        *("#REF!", "#N/A", "#NAME?", "#VALUE!", "#DIV/0!", "#NUM!", "#NULL!", "#SPILL!", "#BEZUG!", "#N/D"),
        *("####", "##", "Err:502", "#ERROR!", "#NV", "#N/B", "#I/T", "#N/V"),
    ],
    "a number with decimals": ["1718263946864.0", "17,00", "0.0", "-3.0"],
    "thousands separators": [
        *("1,718,263", "1'718'263", "1\u2019718\u2019263", "1 718 263", "1\u00a0718\u202f263", "1,718,263.00", "1,718"),
    ],
}
IDS = [
    *("1718263946864", "2404721679", "12E5", "3E7", "1E5", "0e0", "12E-5", "0x1E+5", "a1.72E+12", "1.72E+12a"),
    *("#1001", "#A12", "#", "@ada", "+8613800000000", "-", "-5", "--", "e-1", "E-05", "O'Neill", "b'"),
    *("1.2.3", "1.718.263", "10.5", "v1.0", "1.0.0", "1,2", "12,34", "1718,263", "0", "00123", "N/A", "REF!"),
    *("550e8400-e29b-41d4-a716-446655440000", "6e8bc430-9c3a-11d9-9669-0800200c9a66", "gid://shopline/Customer/1"),
    "1718263946864000000",
]


@pytest.mark.parametrize(("cause", "value"), [(cause, value) for cause, values in DAMAGED.items() for value in values])
def test_id_damage_has_cause_and_remedy(cause: str, value: str) -> None:
    damage = id_damage(value)

    assert damage is not None
    assert cause in damage
    assert "format the column as text" in damage


@pytest.mark.parametrize("value", IDS)
def test_valid_ids_are_not_damage(value: str) -> None:
    assert id_damage(value) is None


@pytest.mark.parametrize(
    ("value", "is_suspect"),
    [
        ("1718263946864520000", True),
        ("123456789012345000", True),
        ("100000000000000000000", True),
        ("12345678901234500", False),
        ("1718263946864523000", False),
        ("1718263946000", False),
        ("a123456789012345000", False),
    ],
)
def test_a_long_number_that_ends_in_zeros_may_be_rounded(value: str, *, is_suspect: bool) -> None:
    assert may_be_rounded(value) is is_suspect
