"""The points webhook's translation: every form that SHOPLINE uses, and everything that is wrong named at once."""

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
from shopline_shim.translate import MalformedWebhook, points_update, topic

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
    """Translate the sample body with some fields changed."""
    return points_update(headers, json.dumps(BODY | changes).encode())


def translate_raw(field: str, literal: str) -> points_pb2.PointsUpdate:
    """Translate the sample body with one field's value written exactly so."""
    body = json.dumps(BODY | {field: "@"}).replace('"@"', literal)
    return points_update(HEADERS, body.encode())


def wrong_fields(raw_body: bytes, headers: Mapping[str, str] = HEADERS) -> list[str]:
    """Name the fields that the translation of a body refuses."""
    with pytest.raises(MalformedWebhook) as caught:
        points_update(headers, raw_body)
    return [field for field, _ in caught.value.violations]


def wrong_fields_of(**changes: Any) -> list[str]:
    """Name the fields that are refused when the sample body is changed."""
    return wrong_fields(json.dumps(BODY | changes).encode())


def test_sample_body() -> None:
    """Every field arrives where the API has it."""
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


def test_event_id_is_stable() -> None:
    """The digest is part of what is stored: a new release must give an old event its old id."""
    assert translate().event_id == "shopline-fb9fc7f909e0020bb824650e721094902a6fbc707fcc844a0aa7fed2917cf89b"


@pytest.mark.parametrize("literal", ["20", "20.0", "2e1", "2.0E+1", '"20"', '"20.0"', "200e-1", "20." + "0" * 5000])
@pytest.mark.parametrize("field", ["updated_value", "points_balance"])
def test_long_forms(field: str, literal: str) -> None:
    """Integers, integral floats and decimal strings are one number, and one event."""
    actual = translate_raw(field, literal)

    assert translate() == actual


@pytest.mark.parametrize("literal", ["1.721829526566e+12", "1721829526566", '"1721829526566"', "1721829526566.0"])
def test_time_forms(literal: str) -> None:
    """A time in scientific notation is the same millisecond."""
    assert translate() == translate_raw("updated_at", literal)


@given(number=int64s)
def test_longs_are_exact(number: int) -> None:
    """All 64 bits arrive, also where a float would round them."""
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
def test_what_is_no_long(field: str, literal: str) -> None:
    """Booleans, fractions and values outside 64 bits are refused, quickly and by name."""
    body = json.dumps(BODY | {field: "@"}).replace('"@"', literal).encode()
    started = time.perf_counter()

    assert wrong_fields(body) == [field]
    assert time.perf_counter() - started < 0.5


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
def test_what_json_does_not_have(literal: str) -> None:
    """NaN and Infinity are refused in a field of ours, by name, and in any other."""
    ours = json.dumps(BODY | {"updated_value": "@"}).replace('"@"', literal).encode()
    other = json.dumps(BODY | {"other": "@"}).replace('"@"', literal).encode()

    assert set(wrong_fields(ours)) == {"body", "updated_value"}
    assert wrong_fields(other) == ["body"]


def test_magnitude_is_never_negative() -> None:
    """The sign is update_type's alone."""
    assert wrong_fields_of(updated_value=-1) == ["updated_value"]
    assert translate(updated_value=0).updated_value == 0


def test_balance_may_be_negative() -> None:
    """SHOPLINE's balance is taken as it is."""
    assert translate(points_balance=-5).points_balance == -5


@pytest.mark.parametrize("update_type", ["INCREASE", "increase", "Increase"])
def test_type_in_any_case(update_type: str) -> None:
    """The documentation writes both cases."""
    assert translate(update_type=update_type).update_type == points_pb2.POINTS_UPDATE_TYPE_INCREASE


@pytest.mark.parametrize(
    "update_type", ["", "ADD", "UNSPECIFIED", "\u0131ncrease", "decrea\u017fe", 1, None, True, ["INCREASE"]]
)
def test_unknown_type(update_type: object) -> None:
    """Without a type there is no sign; letters that only Unicode folds to a type's name do not count."""
    assert wrong_fields_of(update_type=update_type) == ["update_type"]


@pytest.mark.parametrize("name", points_pb2.PointsUpdateScene.keys()[1:])
def test_known_scenes(name: str) -> None:
    """Every scene of the API is recognized by SHOPLINE's name, also those that decrease by their description."""
    actual = translate(updated_scene=name.removeprefix("POINTS_UPDATE_SCENE_"))

    assert points_pb2.PointsUpdateScene.Name(actual.updated_scene) == name
    assert not actual.unrecognized_scene
    assert actual.update_type == points_pb2.POINTS_UPDATE_TYPE_INCREASE


@pytest.mark.parametrize("name", ["BRAND_NEW", "UNSPECIFIED", "login_success", "POINTS_UPDATE_SCENE_LOGIN_SUCCESS"])
def test_unknown_scenes_keep_their_name(name: str) -> None:
    """A new scene is no reason to lose a change."""
    actual = translate(updated_scene=name)

    assert actual.updated_scene == points_pb2.POINTS_UPDATE_SCENE_UNSPECIFIED
    assert actual.unrecognized_scene == name


@pytest.mark.parametrize("value", ["", "A" * 65, "A B", "Ä", "\ud800", "\0", None, 7, False])
def test_what_is_no_scene(value: object) -> None:
    """A scene is a name that the API can carry."""
    assert wrong_fields_of(updated_scene=value) == ["updated_scene"]


@pytest.mark.parametrize("field", ["store_id", "buyer_id"])
def test_ids_may_be_integers(field: str) -> None:
    """An id that arrives as a number is the same id."""
    actual = translate(**{field: int(BODY[field])})

    assert translate() == actual


@pytest.mark.parametrize("value", ["", "a b", "A" * 65, "ä", "\ud800", None, True, 1.5, 2**63, {}, []])
@pytest.mark.parametrize("field", ["store_id", "buyer_id"])
def test_what_is_no_id(field: str, value: object) -> None:
    """Ids are 1 to 64 visible ASCII characters."""
    assert wrong_fields_of(**{field: value}) == [field]


@pytest.mark.parametrize("value", [None, "", 0, "0", 0.0, NEVER_MS, NEVER_MS + 999, str(NEVER_MS)])
def test_never_expires(value: object) -> None:
    """All ways to write "never" are one event, absence included."""
    body = {name: field for name, field in BODY.items() if name != "points_expiry_time"}

    assert points_update(HEADERS, json.dumps(body).encode()) == translate(points_expiry_time=value)


@pytest.mark.parametrize("value", [NEVER_MS - 1, NEVER_MS + 1000, 1])
def test_beside_never(value: int) -> None:
    """The seconds around "never" are times like any other."""
    assert translate(points_expiry_time=value).points_expiry_time.ToMilliseconds() == value


def test_expiry_of_a_decrease_is_dropped() -> None:
    """A decrease takes points, so nothing of it can expire; what is no long is refused all the same."""
    plain = translate(update_type="DECREASE")

    assert plain == translate(update_type="DECREASE", points_expiry_time=EXPIRY_MS)
    assert plain == translate(update_type="DECREASE", points_expiry_time=2**62)
    assert not plain.HasField("points_expiry_time")
    assert wrong_fields_of(update_type="DECREASE", points_expiry_time="soon") == ["points_expiry_time"]


@pytest.mark.parametrize("value", [-1, 253402300800000, 2**63 - 1])
@pytest.mark.parametrize("field", ["updated_at", "points_expiry_time"])
def test_times_fit_a_timestamp(field: str, value: int) -> None:
    """A time that no Timestamp can hold is refused here, by its name."""
    assert wrong_fields_of(**{field: value}) == [field]


@given(time_ms=st.integers(1, 253402300799999).filter(lambda ms: ms // 1000 != NEVER_MS // 1000))
def test_times_are_exact(time_ms: int) -> None:
    """Milliseconds arrive as they were sent."""
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
def test_other_content_is_another_event(field: str, value: object) -> None:
    """Each field of the content tells events apart."""
    assert translate(**{field: value}).event_id != translate().event_id


def test_other_merchant_is_another_event() -> None:
    """The merchant belongs to the account, though only a header names it."""
    assert translate(HEADERS | {"X-Shopline-Merchant-Id": "2"}).event_id != translate().event_id


def test_neighbouring_fields_do_not_run_together() -> None:
    """The same characters split otherwise between two ids are another event."""
    one = translate(store_id="12", buyer_id="345")
    other = translate(store_id="123", buyer_id="45")

    assert one.event_id != other.event_id


def test_delivery_does_not_make_an_event() -> None:
    """The webhook's id, the header's case, the key order, spaces and unknown fields are not content."""
    headers = {name.lower(): value for name, value in HEADERS.items()} | {"x-shopline-webhook-id": "another"}
    reordered = json.dumps({"new_field": {"deep": [1, 2]}} | dict(reversed(BODY.items())), indent=2)

    actual = points_update(headers, reordered.encode())

    assert actual.webhook.webhook_id == "another"
    actual.webhook.webhook_id = HEADERS["X-Shopline-Webhook-Id"]
    assert translate() == actual


@pytest.mark.parametrize("value", ["", "w" * 129, "w 1", "ä", "w\n"])
def test_wrong_metadata_is_left_out(value: str) -> None:
    """What nobody signed and nothing depends on never costs an event."""
    actual = translate(HEADERS | {"X-Shopline-Webhook-Id": value})

    assert not actual.webhook.webhook_id
    assert actual.event_id == translate().event_id


@pytest.mark.parametrize("value", [None, "", "a b", "ä", "1" * 65])
def test_merchant_header_is_required(value: str | None) -> None:
    """The body names no merchant."""
    headers = {name: text for name, text in HEADERS.items() if name != "X-Shopline-Merchant-Id"}
    if value is not None:
        headers["X-Shopline-Merchant-Id"] = value

    assert wrong_fields(json.dumps(BODY).encode(), headers) == ["X-Shopline-Merchant-Id"]


def test_everything_wrong_is_named() -> None:
    """One answer names all fields, in one order, and repeats no value."""
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
def test_duplicate_keys(field: str) -> None:
    """Parsers differ in which of two values they take, so neither is taken."""
    text = json.dumps(BODY)[:-1] + f', "{field}": {json.dumps(BODY[field])}}}'

    assert wrong_fields(text.encode()) == [field]


def test_duplicate_unknown_keys_are_not_repeated() -> None:
    """An unknown name is refused without being told back, and once."""
    text = json.dumps(BODY)[:-1] + ', "private": 1, "private": 2, "p2": {"a": 1, "a": 2}}'

    assert wrong_fields(text.encode()) == ["body"]


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
def test_what_is_no_json_object(raw_body: bytes) -> None:
    """Bytes that are no JSON object in UTF-8 are malformed as a whole, however deep they go."""
    assert wrong_fields(raw_body) == ["body"]


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=8,
)


@given(changes=st.dictionaries(st.sampled_from(sorted(BODY)), json_values))
def test_any_json_is_translated_or_malformed(changes: dict[str, Any]) -> None:
    """Whatever stands in the fields, the answer is a message that the wire can carry, or a list of wrong fields."""
    with contextlib.suppress(MalformedWebhook):
        update = translate(**changes)
        assert points_pb2.PointsUpdate.FromString(update.SerializeToString()) == update


@given(raw_body=st.binary())
def test_any_bytes_are_malformed(raw_body: bytes) -> None:
    """Random bytes never raise anything else."""
    assert wrong_fields(raw_body)


MARK = b"\xef\xbb\xbf"
RAW_BODY = json.dumps(BODY).encode()


@pytest.mark.parametrize("before", [MARK, MARK + b"\n", MARK + b" \r\n\t"])
def test_a_byte_order_mark_is_no_part_of_the_event(before: bytes) -> None:
    """The event_id, a digest of the content, is the same too."""
    assert points_update(HEADERS, before + RAW_BODY) == points_update(HEADERS, RAW_BODY)


@pytest.mark.parametrize(
    "raw_body",
    [
        MARK,
        MARK + MARK + RAW_BODY,
        b" " + MARK + RAW_BODY,
        RAW_BODY + MARK,
        MARK[:2] + RAW_BODY,
        json.dumps(BODY).encode("utf-16"),
        json.dumps(BODY).encode("utf-16-le"),
        json.dumps(BODY).encode("utf-32"),
        b"\xff\xfe" + RAW_BODY,
    ],
)
def test_only_one_leading_mark_of_utf_8_is_skipped(raw_body: bytes) -> None:
    """Other marks, other encodings and marks at other places are malformed."""
    assert wrong_fields(raw_body) == ["body"]


T = "app_memberSystem_points/challenged"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([T], T),
        ([T, T], T),
        ([f"{T}, {T}"], T),
        ([f"  {T}\t"], T),
        (["", T], T),
        (["customers/update", f"customers/update ,{T}"], ""),
        ([T, "customers/redact"], ""),
        ([], ""),
        ([""], ""),
        ([" \t"], ""),
        ([",", " , "], ""),
        ([T.upper()], T.upper()),
    ],
)
def test_the_topic_is_the_one_name_of_all_its_headers(values: list[str], expected: str) -> None:
    """Blanks around it do not matter, its case does."""
    assert topic(values) == expected
