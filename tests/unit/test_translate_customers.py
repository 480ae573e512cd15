"""Translation of SHOPLINE's customer webhooks.

Source: docs/reference/shopline-webhooks.md#customer-webhooks
"""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pointbook.v1 import customers_pb2
from shopline_shim.translate import CUSTOMER_TOPICS, MalformedWebhook, customer_update

HEADERS = {"X-Shopline-Merchant-Id": "2000001234", "X-Shopline-Shop-Id": "1718263946864"}
BODY: dict[str, Any] = {
    "id": "2404721679",
    "email": "ada@example.com",
    "phone": "+8613800000000",
    "first_name": "Ada",
    "last_name": "Lovelace",
    "addresses": [{"id": "SL1", "customer_id": "2404721679", "phone": "008613978653472"}],
    "updated_at": "2022-05-31T15:32:46+08:00",
}
REDACTION: dict[str, Any] = {
    "customer": {"id": "2404721679", "email": "ada@example.com", "phone": "00165323713"},
    "orders_to_redact": ["#72348"],
    "shop_domain": "example.myshopline.com",
    "shop_id": "1718263946864",
    "update_time": "2022-05-31T15:32:46+08:00",
}
SECONDS = 1_653_982_366


def translate(topic: str = "customers/update", **changes: Any) -> customers_pb2.ApplyCustomerUpdateRequest:
    """Translate the example body of a topic with changed fields."""
    body = REDACTION if topic == "customers/redact" else BODY
    return customer_update(topic, HEADERS, json.dumps(body | changes).encode())


def malformed_fields(topic: str, body: object, headers: dict[str, str] = HEADERS) -> set[str]:
    """Return the names of the wrong fields of a body."""
    with pytest.raises(MalformedWebhook) as caught:
        customer_update(topic, headers, json.dumps(body).encode())
    assert "ada@example.com" not in str(caught.value)
    return {field for field, _ in caught.value.violations}


@pytest.mark.parametrize("topic", CUSTOMER_TOPICS)
def test_every_topic_is_translated_to_its_kind(topic: str) -> None:
    actual = translate(topic)

    has_contacts = topic in {"customers/create", "customers/update"}
    expected = customers_pb2.ApplyCustomerUpdateRequest(
        event_id=actual.event_id,
        merchant_id="2000001234",
        store_id="1718263946864",
        buyer_id="2404721679",
        kind=CUSTOMER_TOPICS[topic],
        mobile="+8613800000000" if has_contacts else None,
        email="ada@example.com" if has_contacts else None,
    )
    expected.updated_at.FromSeconds(SECONDS)
    assert actual == expected


def test_event_id_depends_on_the_content_and_not_on_its_notation() -> None:
    same = [translate(first_name="Bea"), translate(id=2404721679), translate(updated_at="2022-05-31T07:32:46Z")]
    other = [
        translate(id="1"),
        translate(phone="+8613800000001"),
        translate(phone=None),
        translate(email=""),
        translate(updated_at="2022-05-31T15:32:47+08:00"),
        translate("customers/create"),
        translate("customers/delete"),
        translate("customers/redact"),
    ]

    assert {update.event_id for update in same} == {translate().event_id}
    assert len({update.event_id for update in (*other, translate())}) == len(other) + 1
    assert translate("customers/delete", phone="1").event_id == translate("customers/delete").event_id


@pytest.mark.parametrize(
    ("phone", "expected"),
    [
        ("008613978653472", "+8613978653472"),
        ("+8613978653472", "+8613978653472"),
        ("13978653472", "13978653472"),
        ("\u202a0085291236001\u202c", "+85291236001"),
        ("(00)852 9123 6001", "+852 9123 6001"),
        ("(00 852) 9123 6001", "+ 852) 9123 6001"),
        ("00 (852) 9123 6001", "+ (852) 9123 6001"),
        ("\u200e\uff10\uff10\uff18\uff15\uff12 9123\u20116001", "+852 9123-6001"),
        (" \u00a000 852 9123\u00a06001\n", "+ 852 9123 6001"),
        ("\u202a+85291236001\u202c", "\u202a+85291236001\u202c"),
        ("", ""),
        (None, ""),
    ],
)
def test_phone_number_is_normalized_to_international_form(phone: str | None, expected: str) -> None:
    assert translate(phone=phone).mobile == expected


def test_absent_phone_and_email_are_not_set() -> None:
    body = {name: value for name, value in BODY.items() if name not in {"phone", "email"}}
    update = customer_update("customers/update", HEADERS, json.dumps(body).encode())

    assert not update.HasField("mobile")
    assert not update.HasField("email")


def test_body_of_another_topic_is_no_redaction_and_vice_versa() -> None:
    """Topics are not signed, so no other body may erase personal data."""
    assert malformed_fields("customers/redact", BODY) == {"customer.id", "shop_id", "update_time"}
    for topic in ("customers/create", "customers/update", "customers/delete"):
        assert malformed_fields(topic, REDACTION) == {"id", "updated_at"}


def test_all_violations_are_named_including_headers() -> None:
    wrong = {"id": "", "phone": 13800000000, "email": ["ada@example.com"], "updated_at": "yesterday"}
    names = {"X-Shopline-Merchant-Id", "X-Shopline-Shop-Id", "id", "phone", "email", "updated_at"}
    assert malformed_fields("customers/update", wrong, {}) == names
    assert malformed_fields("customers/redact", {"customer": [], "shop_id": 1.5}, {}) == {
        "X-Shopline-Merchant-Id",
        "shop_id",
        "customer.id",
        "update_time",
    }
    assert malformed_fields("customers/update", []) == {"body"}


@pytest.mark.parametrize(
    "time", ["2022-05-31T15:32:46", "2022-05-31", "", None, 1653982366000, "0001-01-01T00:00:00+23:59", "10000-01-01"]
)
def test_time_without_offset_or_out_of_range_is_wrong(time: object) -> None:
    assert malformed_fields("customers/update", BODY | {"updated_at": time}) == {"updated_at"}


def test_text_with_a_lone_surrogate_is_wrong() -> None:
    raw = json.dumps(BODY).replace("ada@", "\\ud800@").encode()
    with pytest.raises(MalformedWebhook) as caught:
        customer_update("customers/update", HEADERS, raw)
    assert [field for field, _ in caught.value.violations] == ["email"]


@given(
    st.sampled_from(list(CUSTOMER_TOPICS)),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from([*BODY, *REDACTION]), inner),
    ),
)
def test_any_json_body_is_translated_or_malformed(topic: str, body: object) -> None:
    try:
        update = customer_update(topic, HEADERS, json.dumps(body).encode())
    except MalformedWebhook as malformed:
        assert malformed.violations  # noqa: PT017 - the body may also be valid
    else:
        assert update.SerializeToString()
