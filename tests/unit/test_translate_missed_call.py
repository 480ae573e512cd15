"""Translation of a telephony provider's callback.

Source: docs/reference/validation-codes.md#missed-calls
"""

import json
from typing import Any
from urllib.parse import urlencode

import pytest

from pointbook.v1 import redemption_pb2
from shopline_shim import translate_missed_call

NOW_MS = 1_795_000_000_000
CALL = {
    "merchant_id": "2000001234",
    "caller_number": "+8613900000001",
    "called_number": "+862110000002",
    "provider_call_id": "CA17",
    "call_time": "2026-11-22T10:00:00Z",
}
FORM = "application/x-www-form-urlencoded"
JSON = "application/json"


def translate(
    body: dict[str, Any] | str | bytes, media_type: str = JSON, query: str = "", **names: str
) -> redemption_pb2.ConfirmMissedCallRequest:
    """Translate a callback. A dictionary is encoded by the media type."""
    if isinstance(body, dict):
        body = json.dumps(body) if media_type == JSON else urlencode(body)
    raw_body = body.encode() if isinstance(body, str) else body
    return translate_missed_call.missed_call({"content-type": media_type}, query, raw_body, names, NOW_MS)


def malformed_fields(
    body: dict[str, Any] | str | bytes, media_type: str = JSON, query: str = "", **names: str
) -> set[str]:
    """Return the names of the wrong fields of a callback."""
    with pytest.raises(translate_missed_call.MalformedCall) as caught:
        translate(body, media_type, query, **names)
    return set(caught.value.violations)


@pytest.mark.parametrize("media_type", [JSON, FORM, "Application/JSON; charset=utf-8", f"{FORM};charset=UTF-8"])
def test_forms_and_json_give_the_same_call(media_type: str) -> None:
    body = json.dumps(CALL) if "json" in media_type.lower() else urlencode(CALL)
    call = translate(body, media_type)

    assert (call.merchant_id, call.caller_number, call.called_number) == (
        "2000001234",
        "+8613900000001",
        "+862110000002",
    )
    assert (call.provider_call_id, call.call_time.ToJsonString()) == ("CA17", "2026-11-22T10:00:00Z")


@pytest.mark.parametrize(
    "number",
    [
        "+8613900000001",
        "8613900000001",
        8613900000001,
        "008613900000001",
        " 8613900000001",  # A form that does not encode + turns it into a space.
        "+86 139-0000-0001",
        "+86 (139) 0000.0001",
        "00 86 139 0000 0001",
        "(00) 86 139 0000 0001",
        "(+) 86 139 0000 0001",
        "\u202a+8613900000001\u202c",
        "\u200e8613900000001\ufeff",
        "\uff0b\uff18\uff16\u3000139\uff0d0000\uff0d0001",
        "\uff10\uff10 86 139\u00a00000\u20110001",
        "(+86) 139 0000 0001",
        "+\u0668\u0666139\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0661",
    ],
)
@pytest.mark.parametrize("media_type", [JSON, FORM])
def test_international_number_in_every_notation(number: object, media_type: str) -> None:
    assert translate(CALL | {"caller_number": number}, media_type).caller_number == "+8613900000001"


@pytest.mark.parametrize(
    "number",
    [
        "",
        None,
        True,
        [],
        "anonymous",
        "09052161119",
        "000",
        "+",
        "+086139",
        "123456",
        "1" * 16,
        "-8613900000001",
        "+86139x0000001",
        "sip:8613900000001@example.com",
        "+8613900000001\n+8613900000002",
        "\u2460\u2461\u2462\u2463\u2464\u2465\u2466",
        "\u200b",
        "\ud800",
    ],
)
def test_national_withheld_or_malformed_number_is_wrong(number: object) -> None:
    assert malformed_fields(CALL | {"caller_number": number}) == {"caller_number"}
    assert malformed_fields(CALL | {"called_number": number}) == {"called_number"}


@pytest.mark.parametrize(
    ("time", "time_ms"),
    [
        ("2026-11-22T18:00:00.5+08:00", 1_795_341_600_500),
        ("2026-11-22 10:00:00Z", 1_795_341_600_000),
        ("Sun, 22 Nov 2026 10:00:00 +0000", 1_795_341_600_000),
        ("1795341600", 1_795_341_600_000),
        (1795341600, 1_795_341_600_000),
        ("1795341600.123456", 1_795_341_600_123),
        (1795341600.5, 1_795_341_600_500),
        ("1795341600123", 1_795_341_600_123),
        (1795341600123, 1_795_341_600_123),
        ("0", 0),
        ("", NOW_MS),
        (None, NOW_MS),
    ],
)
def test_time_in_every_notation(time: object, time_ms: int) -> None:
    assert translate(CALL | {"call_time": time}).call_time.ToMilliseconds() == time_ms


@pytest.mark.parametrize(
    "time",
    [
        "2026-11-22 10:00:00",
        "2026-11-22",
        "yesterday",
        "-1",
        "1e12",
        "9" * 16,
        "9" * 5_000,
        "NaN",
        float("nan"),
        "1969-12-31T23:59:59Z",
        "0001-01-01T00:00:00+23:59",
        True,
        [1],
        {"seconds": 1},
        "\ud800",
    ],
)
def test_time_without_offset_or_out_of_range_is_wrong(time: object) -> None:
    assert malformed_fields(CALL | {"call_time": time}) == {"call_time"}


@pytest.mark.parametrize("value", ["", None, "two words", "\x00", "\u00fc", "x" * 129, False, {}, "\ud800"])
def test_ids_are_visible_ascii_of_limited_length(value: object) -> None:
    assert malformed_fields(CALL | {"provider_call_id": value, "merchant_id": value}) == {
        "provider_call_id",
        "merchant_id",
    }
    assert malformed_fields(CALL | {"merchant_id": "x" * 65}) == {"merchant_id"}
    assert translate(CALL | {"provider_call_id": 17, "merchant_id": 18}).merchant_id == "18"


def test_all_violations_are_named_without_their_values() -> None:
    body = {"From": "private", "To": "1", "CallSid": "private id", "call_time": "private time"}
    names = {"caller_number": "From", "called_number": "To", "provider_call_id": "CallSid"}
    with pytest.raises(translate_missed_call.MalformedCall) as caught:
        translate(body, **names)

    assert list(caught.value.violations) == ["merchant_id", "From", "To", "CallSid", "call_time"]
    assert "private" not in str(caught.value)
    assert str(caught.value).startswith("merchant_id must be an id of 1 to 64 visible ASCII characters; From must be ")


def test_mapped_names_replace_ours() -> None:
    names = {name: name.upper() for name in CALL}
    body = {name.upper(): value for name, value in CALL.items()} | {"caller_number": "other", "CITY": ["M\u00fcnchen"]}

    assert translate(body, **names) == translate(CALL)
    assert malformed_fields(CALL, **names) == {name.upper() for name in CALL if name != "call_time"}
    assert translate(urlencode(body).encode() + b"&NOTE=M%FCnchen&NOTE=\xfc", FORM, **names) == translate(CALL)


def test_merchant_may_be_in_the_query_under_our_name() -> None:
    rest = {name: value for name, value in CALL.items() if name != "merchant_id"}

    assert translate(rest, query="merchant_id=2000001234") == translate(CALL)
    assert translate(CALL, query="merchant_id=2000001234") == translate(CALL)
    assert translate(rest, query="a=b&merchant_id=2000001234", merchant_id="Account") == translate(CALL)
    assert malformed_fields(CALL, query="merchant_id=2000001235") == {"merchant_id"}
    assert malformed_fields(rest, query="merchant_id=1&merchant_id=2") == {"merchant_id"}
    assert malformed_fields(rest, query="") == {"merchant_id"}
    assert malformed_fields({"merchant_id": "m"}, query=urlencode(CALL)) == set(CALL) - {"call_time"}


def test_field_with_two_different_values_is_wrong() -> None:
    assert malformed_fields(urlencode(CALL) + "&caller_number=8613900000009", FORM) == {"caller_number"}
    assert translate(urlencode(CALL) + "&provider_call_id=CA17", FORM) == translate(CALL)
    assert malformed_fields(json.dumps(CALL)[:-1] + ', "call_time": "1795341600"}') == {"call_time"}


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"1", b"\xff{}", b'{"a":' * 100_000, b"\xef\xbb\xbf", b"[[1, 2]]"]
)
def test_body_that_is_not_a_json_object_is_wrong(body: bytes) -> None:
    assert malformed_fields(body) == {"body"}


def test_form_with_too_many_fields_or_without_fields_is_wrong() -> None:
    assert malformed_fields("a=b&" * 1_001, FORM) == {"body"}
    assert malformed_fields(bytes(range(256)), FORM) == set(CALL) - {"call_time"}


@pytest.mark.parametrize("media_type", ["", "text/plain", "multipart/form-data; boundary=x", "application/jsonp"])
def test_other_media_types_are_wrong(media_type: str) -> None:
    assert malformed_fields(json.dumps(CALL), media_type) == {"Content-Type"}


@pytest.mark.parametrize("media_type", [JSON, FORM])
def test_leading_byte_order_mark_is_skipped(media_type: str) -> None:
    raw_body = (json.dumps(CALL) if media_type == JSON else urlencode(CALL)).encode()

    assert translate(b"\xef\xbb\xbf" + raw_body, media_type) == translate(raw_body, media_type)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_encodings_other_than_utf_8_are_wrong(encoding: str) -> None:
    assert malformed_fields(json.dumps(CALL).encode(encoding)) == {"body"}
