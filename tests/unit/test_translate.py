"""Translation of SHOPLINE's points webhook.

Source: docs/reference/shopline-webhooks.md#points-webhook
"""

import contextlib
import json
import time
from collections.abc import Mapping
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from pointbook.v1 import points_pb2
from shopline_shim.translate import MalformedWebhook, points_update, read_topic

HEADERS = {
    "X-Shopline-Topic": "app_memberSystem_points/challenged",
    "X-Shopline-Shop-Domain": "example.myshopline.com",
    "X-Shopline-Shop-Id": "1718263946864",
    "X-Shopline-Merchant-Id": "2000001234",
    "X-Shopline-API-Version": "v20250601",
    "X-Shopline-Webhook-Id": "b54557e48a5fbf7d70bcd043",
}
BODY: dict[str, Any] = {
    "buyer_id": "2404721679",
    "points_balance": 20,
    "points_expiry_time": None,
    "store_id": "1718263946864",
    "update_type": "INCREASE",
    "updated_at": 1721829526566,
    "updated_scene": "SUCCESSFUL_REGISTRATION",
    "updated_value": 20,
}
EXPIRY_MS = 1753365526566
NEVER_MS = 4102415999000

int64s = st.integers(-(2**63), 2**63 - 1)


def translate(headers: Mapping[str, str] = HEADERS, /, **changes: Any) -> points_pb2.PointsUpdate:
    """Translate the example body with changed fields."""
    return points_update(headers, json.dumps(BODY | changes).encode())


def translate_raw(field: str, literal: str) -> points_pb2.PointsUpdate:
    """Translate the example body with a literal as the value of one field."""
    body = json.dumps(BODY | {field: "@"}).replace('"@"', literal)
    return points_update(HEADERS, body.encode())


def malformed_fields(raw_body: bytes, headers: Mapping[str, str] = HEADERS) -> list[str]:
    """Return the names of the wrong fields of a body."""
    with pytest.raises(MalformedWebhook) as caught:
        points_update(headers, raw_body)
    return [field for field, _ in caught.value.violations]


def wrong_fields_of(**changes: Any) -> list[str]:
    """Return the names of the wrong fields of the example body with changed fields."""
    return malformed_fields(json.dumps(BODY | changes).encode())


def test_every_field_of_a_body_is_translated() -> None:
    actual = translate(points_expiry_time=EXPIRY_MS)

    expected = points_pb2.PointsUpdate(
        event_id=actual.event_id,
        merchant_id="2000001234",
        store_id="1718263946864",
        buyer_id="2404721679",
        update_type=points_pb2.POINTS_UPDATE_TYPE_INCREASE,
        updated_scene=points_pb2.POINTS_UPDATE_SCENE_SUCCESSFUL_REGISTRATION,
        updated_value=20,
        points_balance=20,
        points_expiry_time=Timestamp(seconds=1753365526, nanos=566_000_000),
        updated_at=Timestamp(seconds=1721829526, nanos=566_000_000),
        webhook=points_pb2.WebhookMetadata(
            webhook_id="b54557e48a5fbf7d70bcd043",
            shop_domain="example.myshopline.com",
            api_version="v20250601",
        ),
    )
    assert expected == actual


def test_event_id_of_a_body_never_changes() -> None:
    """The digest is stored, so every release must compute the same one."""
    assert translate().event_id == "shopline-fb9fc7f909e0020bb824650e721094902a6fbc707fcc844a0aa7fed2917cf89b"


@pytest.mark.parametrize("literal", ["20", "20.0", "2e1", "2.0E+1", '"20"', '"20.0"', "200e-1", "20." + "0" * 5000])
@pytest.mark.parametrize("field", ["updated_value", "points_balance"])
def test_integers_integral_floats_and_decimal_strings_are_the_same_event(field: str, literal: str) -> None:
    actual = translate_raw(field, literal)

    assert translate() == actual


@pytest.mark.parametrize("literal", ["1.721829526566e+12", "1721829526566", '"1721829526566"', "1721829526566.0"])
def test_time_in_every_number_format_is_the_same_event(literal: str) -> None:
    assert translate() == translate_raw("updated_at", literal)


@given(number=int64s)
def test_longs_of_64_bits_are_exact(number: int) -> None:
    for literal in (str(number), f"{number}.0", f'"{number}"', f"{number}e0"):
        assert translate_raw("points_balance", literal).points_balance == number


@pytest.mark.parametrize(
    "literal",
    [
        "null",
        "true",
        "false",
        "[]",
        "{}",
        '""',
        '" 20"',
        '"20 points"',
        '"\u0662\u0660"',
        '"0x14"',
        '"NaN"',
        '"Infinity"',
        '"1_000"',
        "0.5",
        "1e-999999999",
        "9223372036854775808",
        "-9223372036854775809",
        "1e19",
        "1e999999999",
        "1e99999999999999999999999",
        '"1e999999999"',
        "9" * 200_000,
        '"' + "9" * 200_000 + '"',
    ],
)
@pytest.mark.parametrize("field", ["updated_value", "points_balance", "updated_at"])
def test_value_that_is_not_a_long_is_wrong_and_read_quickly(field: str, literal: str) -> None:
    body = json.dumps(BODY | {field: "@"}).replace('"@"', literal).encode()
    started = time.perf_counter()

    assert malformed_fields(body) == [field]
    assert time.perf_counter() - started < 0.5


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
def test_nan_and_infinity_are_wrong_in_every_field(literal: str) -> None:
    ours = json.dumps(BODY | {"updated_value": "@"}).replace('"@"', literal).encode()
    other = json.dumps(BODY | {"other": "@"}).replace('"@"', literal).encode()

    assert set(malformed_fields(ours)) == {"body", "updated_value"}
    assert malformed_fields(other) == ["body"]


def test_negative_magnitude_is_wrong() -> None:
    assert wrong_fields_of(updated_value=-1) == ["updated_value"]
    assert translate(updated_value=0).updated_value == 0


def test_balance_may_be_negative() -> None:
    assert translate(points_balance=-5).points_balance == -5


@pytest.mark.parametrize("update_type", ["INCREASE", "increase", "Increase"])
def test_type_may_have_any_case(update_type: str) -> None:
    assert translate(update_type=update_type).update_type == points_pb2.POINTS_UPDATE_TYPE_INCREASE


@pytest.mark.parametrize(
    "update_type", ["", "ADD", "UNSPECIFIED", "\u0131ncrease", "decrea\u017fe", 1, None, True, ["INCREASE"]]
)
def test_unknown_type_is_wrong(update_type: object) -> None:
    """Letters that upper() maps to those of a type do not count."""
    assert wrong_fields_of(update_type=update_type) == ["update_type"]


@pytest.mark.parametrize("name", points_pb2.PointsUpdateScene.keys()[1:])
def test_every_scene_of_the_api_is_recognized(name: str) -> None:
    actual = translate(updated_scene=name.removeprefix("POINTS_UPDATE_SCENE_"))

    assert points_pb2.PointsUpdateScene.Name(actual.updated_scene) == name
    assert not actual.unrecognized_scene
    assert actual.update_type == points_pb2.POINTS_UPDATE_TYPE_INCREASE


@pytest.mark.parametrize("name", ["BRAND_NEW", "UNSPECIFIED", "login_success", "POINTS_UPDATE_SCENE_LOGIN_SUCCESS"])
def test_unknown_scene_is_passed_on_by_name(name: str) -> None:
    actual = translate(updated_scene=name)

    assert actual.updated_scene == points_pb2.POINTS_UPDATE_SCENE_UNSPECIFIED
    assert actual.unrecognized_scene == name


@pytest.mark.parametrize("value", ["", "A" * 65, "A B", "Ä", "\ud800", "\0", None, 7, False])
def test_scene_that_is_not_visible_ascii_is_wrong(value: object) -> None:
    assert wrong_fields_of(updated_scene=value) == ["updated_scene"]


@pytest.mark.parametrize("field", ["store_id", "buyer_id"])
def test_id_may_be_an_integer(field: str) -> None:
    actual = translate(**{field: int(BODY[field])})

    assert translate() == actual


@pytest.mark.parametrize("value", ["", "a b", "A" * 65, "ä", "\ud800", None, True, 1.5, 2**63, {}, []])
@pytest.mark.parametrize("field", ["store_id", "buyer_id"])
def test_id_that_is_not_visible_ascii_is_wrong(field: str, value: object) -> None:
    assert wrong_fields_of(**{field: value}) == [field]


@pytest.mark.parametrize("value", [None, "", 0, "0", 0.0, NEVER_MS, NEVER_MS + 999, str(NEVER_MS)])
def test_every_notation_of_no_expiry_is_the_same_event(value: object) -> None:
    body = {name: field for name, field in BODY.items() if name != "points_expiry_time"}

    assert points_update(HEADERS, json.dumps(body).encode()) == translate(points_expiry_time=value)


@pytest.mark.parametrize("value", [NEVER_MS - 1, NEVER_MS + 1000, 1])
def test_times_next_to_the_no_expiry_second_are_expiry_times(value: int) -> None:
    assert translate(points_expiry_time=value).points_expiry_time.ToMilliseconds() == value


def test_expiry_of_a_decrease_is_dropped_but_must_be_a_long() -> None:
    without_expiry = translate(update_type="DECREASE")

    assert without_expiry == translate(update_type="DECREASE", points_expiry_time=EXPIRY_MS)
    assert without_expiry == translate(update_type="DECREASE", points_expiry_time=2**62)
    assert not without_expiry.HasField("points_expiry_time")
    assert wrong_fields_of(update_type="DECREASE", points_expiry_time="soon") == ["points_expiry_time"]


@pytest.mark.parametrize("value", [-1, 253402300800000, 2**63 - 1])
@pytest.mark.parametrize("field", ["updated_at", "points_expiry_time"])
def test_time_that_a_timestamp_cannot_hold_is_wrong(field: str, value: int) -> None:
    assert wrong_fields_of(**{field: value}) == [field]


@given(time_ms=st.integers(1, 253402300799999).filter(lambda ms: ms // 1000 != NEVER_MS // 1000))
def test_times_are_exact_to_the_millisecond(time_ms: int) -> None:
    actual = translate(updated_at=time_ms, points_expiry_time=time_ms)

    assert actual.updated_at.ToMilliseconds() == time_ms
    assert actual.points_expiry_time.ToMilliseconds() == time_ms


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("buyer_id", "2404721680"),
        ("store_id", "1718263946865"),
        ("update_type", "DECREASE"),
        ("updated_at", 1721829526567),
        ("updated_scene", "LOGIN_SUCCESS"),
        ("updated_scene", "BRAND_NEW"),
        ("updated_value", 21),
        ("points_balance", 21),
        ("points_expiry_time", EXPIRY_MS),
    ],
)
def test_change_of_any_content_field_is_another_event(field: str, value: object) -> None:
    assert translate(**{field: value}).event_id != translate().event_id


def test_same_body_of_another_merchant_is_another_event() -> None:
    assert translate(HEADERS | {"X-Shopline-Merchant-Id": "2"}).event_id != translate().event_id


def test_same_characters_split_differently_between_fields_are_another_event() -> None:
    one = translate(store_id="12", buyer_id="345")
    other = translate(store_id="123", buyer_id="45")

    assert one.event_id != other.event_id


def test_headers_key_order_and_unknown_fields_do_not_change_the_event() -> None:
    headers = {name.lower(): value for name, value in HEADERS.items()} | {"x-shopline-webhook-id": "another"}
    reordered = json.dumps({"new_field": {"deep": [1, 2]}} | dict(reversed(BODY.items())), indent=2)

    actual = points_update(headers, reordered.encode())

    assert actual.webhook.webhook_id == "another"
    actual.webhook.webhook_id = HEADERS["X-Shopline-Webhook-Id"]
    assert translate() == actual


@pytest.mark.parametrize("value", ["", "w" * 129, "w 1", "ä", "w\n"])
def test_wrong_metadata_is_dropped_and_does_not_change_the_event(value: str) -> None:
    actual = translate(HEADERS | {"X-Shopline-Webhook-Id": value})

    assert not actual.webhook.webhook_id
    assert actual.event_id == translate().event_id


@pytest.mark.parametrize("value", [None, "", "a b", "ä", "1" * 65])
def test_missing_or_malformed_merchant_header_is_wrong(value: str | None) -> None:
    headers = {name: text for name, text in HEADERS.items() if name != "X-Shopline-Merchant-Id"}
    if value is not None:
        headers["X-Shopline-Merchant-Id"] = value

    assert malformed_fields(json.dumps(BODY).encode(), headers) == ["X-Shopline-Merchant-Id"]


def test_all_violations_are_named_in_order_without_their_values() -> None:
    body = {"buyer_id": "secret buyer", "updated_value": -7, "points_expiry_time": "soon"}

    with pytest.raises(MalformedWebhook) as caught:
        points_update({}, json.dumps(body).encode())

    assert [field for field, _ in caught.value.violations] == [
        "X-Shopline-Merchant-Id",
        "store_id",
        "buyer_id",
        "update_type",
        "updated_scene",
        "updated_value",
        "points_balance",
        "updated_at",
        "points_expiry_time",
    ]
    assert "secret" not in str(caught.value)
    assert "soon" not in str(caught.value)


@pytest.mark.parametrize("field", ["buyer_id", "points_balance", "store_id", "update_type", "updated_at"])
def test_repeated_field_is_wrong(field: str) -> None:
    text = json.dumps(BODY)[:-1] + f', "{field}": {json.dumps(BODY[field])}}}'

    assert malformed_fields(text.encode()) == [field]


def test_repeated_unknown_name_is_wrong_and_not_quoted() -> None:
    text = json.dumps(BODY)[:-1] + ', "private": 1, "private": 2, "p2": {"a": 1, "a": 2}}'

    assert malformed_fields(text.encode()) == ["body"]


@pytest.mark.parametrize(
    "raw_body",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"20",
        b"{",
        b"{}{}",
        b"\xff",
        b'{"buyer_id": "\xff"}',
        json.dumps(BODY).encode("utf-16"),
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b"{'buyer_id': 1}",
        b"buyer_id=1",
    ],
)
def test_body_that_is_not_a_json_object_in_utf_8_is_wrong(raw_body: bytes) -> None:
    assert malformed_fields(raw_body) == ["body"]


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=8,
)


@given(changes=st.dictionaries(st.sampled_from(sorted(BODY)), json_values))
def test_any_json_value_is_translated_to_a_valid_message_or_malformed(changes: dict[str, Any]) -> None:
    with contextlib.suppress(MalformedWebhook):
        update = translate(**changes)
        assert points_pb2.PointsUpdate.FromString(update.SerializeToString()) == update


@given(raw_body=st.binary())
def test_random_bytes_are_malformed(raw_body: bytes) -> None:
    assert malformed_fields(raw_body)


BYTE_ORDER_MARK = b"\xef\xbb\xbf"
RAW_BODY = json.dumps(BODY).encode()


@pytest.mark.parametrize("prefix", [BYTE_ORDER_MARK, BYTE_ORDER_MARK + b"\n", BYTE_ORDER_MARK + b" \r\n\t"])
def test_leading_byte_order_mark_does_not_change_the_event(prefix: bytes) -> None:
    assert points_update(HEADERS, prefix + RAW_BODY) == points_update(HEADERS, RAW_BODY)


@pytest.mark.parametrize(
    "raw_body",
    [
        BYTE_ORDER_MARK,
        BYTE_ORDER_MARK + BYTE_ORDER_MARK + RAW_BODY,
        b" " + BYTE_ORDER_MARK + RAW_BODY,
        RAW_BODY + BYTE_ORDER_MARK,
        BYTE_ORDER_MARK[:2] + RAW_BODY,
        json.dumps(BODY).encode("utf-16"),
        json.dumps(BODY).encode("utf-16-le"),
        json.dumps(BODY).encode("utf-32"),
        b"\xff\xfe" + RAW_BODY,
    ],
)
def test_other_byte_order_marks_and_encodings_are_wrong(raw_body: bytes) -> None:
    assert malformed_fields(raw_body) == ["body"]


TOPIC = "app_memberSystem_points/challenged"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([TOPIC], TOPIC),
        ([TOPIC, TOPIC], TOPIC),
        ([f"{TOPIC}, {TOPIC}"], TOPIC),
        ([f"  {TOPIC}\t"], TOPIC),
        (["", TOPIC], TOPIC),
        (["customers/update", f"customers/update ,{TOPIC}"], ""),
        ([TOPIC, "customers/redact"], ""),
        ([], ""),
        ([""], ""),
        ([" \t"], ""),
        ([",", " , "], ""),
        ([TOPIC.upper()], TOPIC.upper()),
    ],
)
def test_topic_is_the_only_name_in_its_headers(values: list[str], expected: str) -> None:
    assert read_topic(values) == expected
