"""A telephony provider's callback as a message, as pure functions."""

import base64
import json
from typing import Any
from urllib.parse import urlencode

import pytest

from pointbook.v1 import redemption_pb2
from shopline_shim import callback_secret, translate_missed_call

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


def read(
    body: dict[str, Any] | str | bytes, media_type: str = JSON, query: str = "", **names: str
) -> redemption_pb2.ConfirmMissedCallRequest:
    """Read a callback; fields come as JSON, unless they shall be a form."""
    if isinstance(body, dict):
        body = json.dumps(body) if media_type == JSON else urlencode(body)
    raw_body = body.encode() if isinstance(body, str) else body
    return translate_missed_call.confirm_missed_call({"content-type": media_type}, query, raw_body, names, NOW_MS)


def wrong(body: dict[str, Any] | str | bytes, media_type: str = JSON, query: str = "", **names: str) -> set[str]:
    """Tell which fields of a callback are wrong."""
    with pytest.raises(translate_missed_call.MalformedCall) as caught:
        read(body, media_type, query, **names)
    return set(caught.value.violations)


def basic(user: str, password: str) -> str:
    """Write user and password as HTTP clients do that find them in a URL."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize("media_type", [JSON, FORM, "Application/JSON; charset=utf-8", f"{FORM};charset=UTF-8"])
def test_forms_and_json_tell_the_same(media_type: str) -> None:
    """Most providers post forms; what the charset is called is no matter."""
    body = json.dumps(CALL) if "json" in media_type.lower() else urlencode(CALL)
    call = read(body, media_type)

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
        " 8613900000001",
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
def test_international_numbers(number: object, media_type: str) -> None:
    """However they are written: the blank was a plus until a form lost it."""
    assert read(CALL | {"caller_number": number}, media_type).caller_number == "+8613900000001"


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
def test_what_is_no_international_number(number: object) -> None:
    """A withheld number is none, and of a national one nobody knows the country."""
    assert wrong(CALL | {"caller_number": number}) == {"caller_number"}
    assert wrong(CALL | {"called_number": number}) == {"called_number"}


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
def test_times(time: object, time_ms: int) -> None:
    """RFC 3339, RFC 5322, seconds, milliseconds, or none: then it is now."""
    assert read(CALL | {"call_time": time}).call_time.ToMilliseconds() == time_ms


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
def test_what_is_no_time(time: object) -> None:
    """A time without an offset is any, and one beyond the calendar none."""
    assert wrong(CALL | {"call_time": time}) == {"call_time"}


@pytest.mark.parametrize("value", ["", None, "two words", "\x00", "\u00fc", "x" * 129, False, {}, "\ud800"])
def test_ids(value: object) -> None:
    """Visible ASCII, of some length."""
    assert wrong(CALL | {"provider_call_id": value, "merchant_id": value}) == {"provider_call_id", "merchant_id"}
    assert wrong(CALL | {"merchant_id": "x" * 65}) == {"merchant_id"}
    assert read(CALL | {"provider_call_id": 17, "merchant_id": 18}).merchant_id == "18"


def test_everything_wrong_is_named_and_nothing_quoted() -> None:
    """By the names that the provider has for it."""
    body = {"From": "private", "To": "1", "CallSid": "private id", "call_time": "private time"}
    names = {"caller_number": "From", "called_number": "To", "provider_call_id": "CallSid"}
    with pytest.raises(translate_missed_call.MalformedCall) as caught:
        read(body, **names)

    assert list(caught.value.violations) == ["merchant_id", "From", "To", "CallSid", "call_time"]
    assert "private" not in str(caught.value)
    assert str(caught.value).startswith("merchant_id must be an id of 1 to 64 visible ASCII characters; From must be ")


def test_mapped_names() -> None:
    """Our names mean nothing where the provider has its own; what else it tells is left alone."""
    names = {name: name.upper() for name in CALL}
    told = {name.upper(): value for name, value in CALL.items()} | {"caller_number": "other", "CITY": ["M\u00fcnchen"]}

    assert read(told, **names) == read(CALL)
    assert wrong(CALL, **names) == {name.upper() for name in CALL if name != "call_time"}
    assert read(urlencode(told).encode() + b"&NOTE=M%FCnchen&NOTE=\xfc", FORM, **names) == read(CALL)


def test_the_merchant_may_stand_in_the_query() -> None:
    """By our name, whatever the provider calls it; nothing else may."""
    rest = {name: value for name, value in CALL.items() if name != "merchant_id"}

    assert read(rest, query="merchant_id=2000001234") == read(CALL)
    assert read(CALL, query="merchant_id=2000001234") == read(CALL)
    assert read(rest, query="a=b&merchant_id=2000001234", merchant_id="Account") == read(CALL)
    assert wrong(CALL, query="merchant_id=2000001235") == {"merchant_id"}
    assert wrong(rest, query="merchant_id=1&merchant_id=2") == {"merchant_id"}
    assert wrong(rest, query="") == {"merchant_id"}
    assert wrong({"merchant_id": "m"}, query=urlencode(CALL)) == set(CALL) - {"call_time"}


def test_a_field_with_two_values() -> None:
    """Nobody knows which of them is meant; twice the same is once."""
    assert wrong(urlencode(CALL) + "&caller_number=8613900000009", FORM) == {"caller_number"}
    assert read(urlencode(CALL) + "&provider_call_id=CA17", FORM) == read(CALL)
    assert wrong(json.dumps(CALL)[:-1] + ', "call_time": "1795341600"}') == {"call_time"}


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"1", b"\xff{}", b'{"a":' * 100_000, b"\xef\xbb\xbf", b"[[1, 2]]"]
)
def test_what_is_no_json_object(body: bytes) -> None:
    """The body is named, as no field can be."""
    assert wrong(body) == {"body"}


def test_forms_that_are_none() -> None:
    """Thousands of fields are an attack; noise has no fields."""
    assert wrong("a=b&" * 1_001, FORM) == {"body"}
    assert wrong(bytes(range(256)), FORM) == set(CALL) - {"call_time"}


@pytest.mark.parametrize("media_type", ["", "text/plain", "multipart/form-data; boundary=x", "application/jsonp"])
def test_other_media_types(media_type: str) -> None:
    """What a body means is not guessed."""
    assert wrong(json.dumps(CALL), media_type) == {"Content-Type"}


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer old"},
        {"authorization": "bearer  new "},
        {"authorization": basic("", "old")},
        {"authorization": basic("any user", "new").replace("Basic", "BASIC")},
        {"x-pointbook-secret": "new"},
        {"authorization": "Bearer of-a-gateway", "x-pointbook-secret": "old"},
    ],
    ids=str,
)
def test_ways_to_know_a_secret(headers: dict[str, str]) -> None:
    """As providers can send it, by any of the secrets."""
    assert callback_secret.verify(["new", "old"], headers)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "new"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer newer"},
        {"authorization": "Bearer new,old"},
        {"authorization": "Digest new"},
        {"authorization": "Basic new"},
        {"authorization": "Basic \u00fc"},
        {"authorization": basic("new", "")},
        {"authorization": basic("user", "new:")},
        {"x-pointbook-secret": "NEW"},
        {"x-pointbook-secret": "\u00fc"},
    ],
    ids=str,
)
def test_strangers(headers: dict[str, str]) -> None:
    """Whatever is wrong with what they claim, nothing is raised."""
    assert not callback_secret.verify(["new", "old"], headers)
    assert not callback_secret.verify([], headers)


@pytest.mark.parametrize("media_type", [JSON, FORM])
def test_a_byte_order_mark_is_no_part_of_the_callback(media_type: str) -> None:
    """Providers on Windows write one."""
    raw_body = (json.dumps(CALL) if media_type == JSON else urlencode(CALL)).encode()

    assert read(b"\xef\xbb\xbf" + raw_body, media_type) == read(raw_body, media_type)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_other_encodings_than_utf_8_are_refused(encoding: str) -> None:
    """JSON travels in UTF-8 alone."""
    assert wrong(json.dumps(CALL).encode(encoding)) == {"body"}
