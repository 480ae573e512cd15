"""Field checks of requests: the limits, and all violations reported at once."""

from decimal import Decimal

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from pointbook.v1.programs_pb2 import ListStoresRequest
from pointbook_server.errors import PointbookError
from pointbook_server.reasons import Reason
from pointbook_server.rpc.pagination import read_page, write_token
from pointbook_server.rpc.request_fields import Fields, to_decimal_text, to_timestamp

LIST = ("stores", "m")
"""The scope of the page tokens."""


def collected_violations(fields: Fields) -> dict[str, str]:
    """Return the violations of a collector, by field."""
    if fields.is_clean:
        return {}
    with pytest.raises(PointbookError) as caught:
        fields.check()
    assert caught.value.reason is Reason.INVALID_FIELDS
    return {violation.field: violation.description for violation in caught.value.violations}


def test_valid_fields_raise_nothing() -> None:
    fields = Fields()
    fields.identifier("a", "x")

    fields.check()


def test_all_invalid_fields_are_named_at_once() -> None:
    fields = Fields()
    fields.identifier("a.id", "")
    fields.integer("a.count", 11, low=1, high=10)
    fields.present("b", is_present=False)

    with pytest.raises(PointbookError, match=r"a\.id, a\.count, b"):
        fields.check()
    assert collected_violations(fields) == {"a.id": "is required", "a.count": "must be 1 to 10", "b": "is required"}


def test_a_blank_reason_is_refused_unless_allowed() -> None:
    fields = Fields()
    fields.reason("a", " ")
    fields.reason("b", "", may_be_blank=True)

    assert fields.reason("c", " ", may_be_blank=True) == " "
    assert collected_violations(fields) == {"a": "is required", "b": "is required"}


@pytest.mark.parametrize("value", ["x", "!", "~", "x" * 64])
def test_ids_of_1_to_64_visible_ascii_characters_are_valid(value: str) -> None:
    fields = Fields()

    assert value == fields.identifier("id", value)
    assert fields.is_clean


@pytest.mark.parametrize("value", ["", "x" * 65, "a b", "a\n", "\x00", "\x7f", "é", "\uff11"])
def test_other_ids_are_invalid(value: str) -> None:
    fields = Fields()
    fields.identifier("id", value)

    assert set(collected_violations(fields)) == {"id"}


@pytest.mark.parametrize(
    ("value", "is_valid"),
    [
        ("", True),
        ("点 x", True),
        ("x" * 10, True),
        ("x" * 11, False),
        ("a\nb", False),
        ("\x00", False),
        ("\x7f", False),
    ],
)
def test_text_contains_no_control_characters(value: str, *, is_valid: bool) -> None:
    """Control characters could forge lines of a log or a message."""
    fields = Fields()
    fields.text("name", value, length_max=10)

    assert is_valid is fields.is_clean


@pytest.mark.parametrize(("value", "is_valid"), [(0, False), (1, True), (5, True), (6, False), (-1, False)])
def test_integer_bounds_are_inclusive(value: int, *, is_valid: bool) -> None:
    fields = Fields()
    fields.integer("n", value, low=1, high=5)

    assert is_valid is fields.is_clean


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", None),
        ("1", Decimal(1)),
        ("0.01", Decimal("0.01")),
        ("999999999999.999999999999", Decimal("999999999999.999999999999")),
        ("0.000000000001", Decimal("0.000000000001")),
    ],
)
def test_decimals_are_read_exactly(value: str, expected: Decimal | None) -> None:
    fields = Fields()

    assert expected == fields.decimal("value", value)
    assert fields.is_clean


@pytest.mark.parametrize(
    "value",
    [
        "0",
        "0.000",
        "-1",
        "+1",
        "1.",
        ".5",
        "1e3",
        "NaN",
        "Infinity",
        "1,5",
        " 1",
        "1\n",
        "\uff11",
        "1" * 13,
        f"0.{'1' * 13}",
    ],
)
def test_other_decimals_are_invalid(value: str) -> None:
    fields = Fields()

    assert fields.decimal("value", value) is None
    assert set(collected_violations(fields)) == {"value"}


def test_digits_after_the_point_can_be_limited() -> None:
    fields = Fields()

    assert fields.decimal("a", "1.125", digits_after=3) == Decimal("1.125")
    assert fields.decimal("b", "1.1250", digits_after=3) is None
    assert set(collected_violations(fields)) == {"b"}


def test_decimals_are_written_without_exponent() -> None:
    assert to_decimal_text(None) == ""
    assert to_decimal_text(Decimal("1E+3")) == "1000"
    assert to_decimal_text(Decimal("1E-12")) == "0.000000000001"


@pytest.mark.parametrize("time_ms", [-62_135_596_800_000, -1, 0, 1_780_000_000_123, 253_402_300_799_999])
def test_times_round_trip(time_ms: int) -> None:
    fields = Fields()

    assert time_ms == fields.time_ms("time", to_timestamp(time_ms))
    assert fields.is_clean


@pytest.mark.parametrize(
    "value",
    [
        Timestamp(seconds=0, nanos=-1),
        Timestamp(seconds=0, nanos=1_000_000_000),
        Timestamp(seconds=-62_135_596_801),
        Timestamp(seconds=253_402_300_800),
        Timestamp(seconds=2**63 - 1),
        Timestamp(seconds=-(2**63)),
    ],
)
def test_impossible_times_are_invalid(value: Timestamp) -> None:
    fields = Fields()
    fields.time_ms("time", value)

    assert set(collected_violations(fields)) == {"time"}


@pytest.mark.parametrize("time_ms", [-1, 0, 1_798_761, 1_798_761_600, 946_684_799_999])
def test_time_before_2000_hints_at_seconds_taken_for_milliseconds(time_ms: int) -> None:
    """Only where the field's range begins in 2000: a filter may begin earlier."""
    fields = Fields()
    fields.time_ms("event", to_timestamp(time_ms), low=946_684_800_000)
    fields.time_ms("filter", to_timestamp(-2_000), low=-1_000)

    violations = collected_violations(fields)
    assert "before 2000: a value in seconds may have been taken for milliseconds" in violations["event"]
    assert "seconds" not in violations["filter"]


def test_time_bounds_are_inclusive_and_named() -> None:
    fields = Fields()
    fields.time_ms("a", to_timestamp(1_000), low=1_000, high=2_000)
    fields.time_ms("b", to_timestamp(2_000), low=1_000, high=2_000)
    fields.time_ms("c", to_timestamp(999), low=1_000, high=2_000)
    fields.time_ms("d", to_timestamp(2_001), low=1_000, high=2_000)

    limits = "must be 1970-01-01T00:00:01Z to 1970-01-01T00:00:02Z"
    assert collected_violations(fields) == {"c": limits, "d": limits}


def test_page_size_is_1_to_1000_and_50_by_default() -> None:
    fields = Fields()

    assert [fields.page_size("size", value) for value in (0, 1, 1_000)] == [50, 1, 1_000]
    assert fields.is_clean
    fields.page_size("big", 1_001)
    fields.page_size("small", -1)
    assert set(collected_violations(fields)) == {"big", "small"}


def test_list_violations_name_the_list_or_the_item() -> None:
    fields = Fields()

    assert fields.each("ids", ["a", "b"], fields.identifier, count_max=2) == ("a", "b")
    assert fields.is_clean
    fields.each("long", ["a", "b", "c"], fields.identifier, count_max=2)
    fields.each("short", [], fields.identifier, count_max=2, count_min=1)
    fields.each("twice", ["a", "a"], fields.identifier, count_max=2)
    fields.each("items", ["a", "b c"], fields.identifier, count_max=2)
    assert set(collected_violations(fields)) == {"long", "short", "twice", "items[1]"}


def test_page_token_returns_its_position() -> None:
    fields = Fields()
    token = write_token(LIST, ("s-1", 7))

    assert read_page(fields, ListStoresRequest(page_token=token), LIST, first=("", 0)).after == ("s-1", 7)
    assert read_page(fields, ListStoresRequest(), LIST, first=("", 0)).after == ("", 0)
    assert fields.is_clean


@pytest.mark.parametrize(
    "token",
    [
        write_token(("stores", "other"), ("s-1",)),
        write_token(LIST, (7,)),
        write_token(LIST, ("s-1", "s-2")),
        write_token(LIST, ()),
        write_token(LIST, (True,)),
        # Positions that no list has and that no database can compare.
        write_token(LIST, ("\x00",)),
        write_token(LIST, ("\ud800",)),
        "nonsense",
        "é",
        "x" * 2_000,
        "W1tbW1tbW1tbW1tbW1tbW1tbW1tb" * 20,
        "bnVsbA==",
        "e30=",
        "IngiCg==",
        "W10=",
    ],
)
def test_other_page_tokens_are_invalid(token: str) -> None:
    fields = Fields()

    assert read_page(fields, ListStoresRequest(page_token=token), LIST, first=("",)).after == ("",)
    assert set(collected_violations(fields)) == {"page_token"}


@pytest.mark.parametrize("position", [2**63, -(2**63) - 1, 10**30])
def test_numbers_beyond_64_bits_are_invalid_positions(position: int) -> None:
    fields = Fields()

    request = ListStoresRequest(page_token=write_token(LIST, (position,)))

    assert read_page(fields, request, LIST, first=(0,)).after == (0,)
    assert set(collected_violations(fields)) == {"page_token"}
