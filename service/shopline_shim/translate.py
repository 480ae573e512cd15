"""Translation of SHOPLINE's webhooks into messages of the Pointbook API. Pure.

A byte-order mark before the JSON is skipped: it is part of the signed bytes, but not of the content.

Source: docs/reference/shopline-webhooks.md#points-webhook
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping

from pointbook.v1 import customers_pb2, points_pb2, programs_pb2
from pointbook_common.shopline_webhooks import CUSTOMER_UPDATE_KINDS, POINTS_TOPIC, STORE_ERASURE_TOPIC
from pointbook_common.text import phone_text
from shopline_shim.body_reader import ID, BodyReader, MalformedWebhook, OutOfBoundsWebhook
from shopline_shim.timestamps import to_timestamp

__all__ = [
    "CUSTOMER_TOPICS",
    "ERASURE_TOPICS",
    "POINTS_TOPIC",
    "REDACT_TOPIC",
    "STORE_ERASURE_TOPIC",
    "MalformedWebhook",
    "OutOfBoundsWebhook",
    "customer_update",
    "points_update",
    "read_merchant_id",
    "read_topic",
    "store_erasure",
]

REDACT_TOPIC = "customers/redact"
CUSTOMER_TOPICS = {
    topic: customers_pb2.CustomerUpdateKind.Value(f"CUSTOMER_UPDATE_KIND_{kind}")
    for topic, kind in CUSTOMER_UPDATE_KINDS.items()
}
"""The topics that `customer_update` translates, and the kind of each."""
ERASURE_TOPICS = frozenset({REDACT_TOPIC, STORE_ERASURE_TOPIC})
"""The topics that request the erasure of personal data."""

_MERCHANT_ID_HEADER = "X-Shopline-Merchant-Id"
_SHOP_ID_HEADER = "X-Shopline-Shop-Id"
_INTERNATIONAL_PREFIX = re.compile(r"\(?00\)?")
_SCENES = {
    name.removeprefix("POINTS_UPDATE_SCENE_"): value
    for name, value in points_pb2.PointsUpdateScene.items()
    if value != points_pb2.POINTS_UPDATE_SCENE_UNSPECIFIED
}


def points_update(headers: Mapping[str, str], raw_body: bytes) -> points_pb2.PointsUpdate:
    """Translate a webhook of `app_memberSystem_points/challenged`.

    Header names may have any case. The headers give the merchant, which the body does not name, and the metadata of the
    delivery. The store is that of the signed body.

    Points are whole numbers and times are milliseconds. Longs may be integers, integral floats or decimal strings, ids
    strings or integers, and the type may have any case. `updated_value` is a magnitude; the type gives its sign. An
    unknown scene is passed on by name. `points_expiry_time` counts for an INCREASE only; absent, null, "", 0 and
    2099-12-31T15:59:59Z mean that the points do not expire.

    The event id is a digest of the content, so that a body that is delivered again, with another webhook id or in
    another notation, is the same event. See docs/reference/ledger.md#event-identity

    Raises MalformedWebhook with all violations, OutOfBoundsWebhook if these are only times.

    Source: docs/reference/shopline-webhooks.md#points-webhook
    """
    lowered = {name.lower(): value for name, value in headers.items()}
    reader = BodyReader(raw_body)
    merchant_id = reader.check_id(_MERCHANT_ID_HEADER, lowered.get(_MERCHANT_ID_HEADER.lower()))
    store_id = reader.read_id("store_id")
    buyer_id = reader.read_id("buyer_id")
    update_type = reader.read_update_type("update_type")
    scene = reader.read_scene("updated_scene")
    value = reader.read_magnitude("updated_value")
    balance = reader.read_long("points_balance")
    updated_at_ms = reader.read_time("updated_at")
    increases = update_type == points_pb2.POINTS_UPDATE_TYPE_INCREASE
    expiry_ms = reader.read_expiry("points_expiry_time", relevant=increases)
    reader.check()

    signed_value = value if increases else -value
    return points_pb2.PointsUpdate(
        event_id=_event_id(merchant_id, store_id, buyer_id, updated_at_ms, signed_value, balance, expiry_ms, scene),
        merchant_id=merchant_id,
        store_id=store_id,
        buyer_id=buyer_id,
        update_type=update_type,
        updated_scene=_SCENES.get(scene, points_pb2.POINTS_UPDATE_SCENE_UNSPECIFIED),
        unrecognized_scene="" if scene in _SCENES else scene,
        updated_value=value,
        points_balance=balance,
        points_expiry_time=None if expiry_ms is None else to_timestamp(expiry_ms),
        updated_at=to_timestamp(updated_at_ms),
        webhook=points_pb2.WebhookMetadata(
            webhook_id=_metadata(lowered.get("x-shopline-webhook-id"), 128),
            shop_domain=_metadata(lowered.get("x-shopline-shop-domain"), 255),
            api_version=_metadata(lowered.get("x-shopline-api-version"), 64),
        ),
    )


def customer_update(
    topic: str, headers: Mapping[str, str], raw_body: bytes
) -> customers_pb2.ApplyCustomerUpdateRequest:
    """Translate a webhook of one of CUSTOMER_TOPICS.

    The body of a redaction names its store; that of the other topics does not, so their store is that of the unsigned
    header. A redaction must have its own shape, `customer` and `shop_id`: the topic is not signed either, and no body
    of another topic may erase personal data.

    `phone` and `email` are set if they are present, and empty if they are null. SHOPLINE writes international numbers
    with 00 or +; invisible characters and digits of other scripts are normalized. Deletions and redactions have neither
    a phone number nor an email address.

    Raises MalformedWebhook with all violations.

    Source: docs/reference/shopline-webhooks.md#customer-webhooks
    Source: docs/reference/shopline-webhooks.md#customers-redact
    """
    lowered = {name.lower(): value for name, value in headers.items()}
    reader = BodyReader(raw_body)
    merchant_id = reader.check_id(_MERCHANT_ID_HEADER, lowered.get(_MERCHANT_ID_HEADER.lower()))
    phone = email = None
    if topic == REDACT_TOPIC:
        store_id = reader.read_id("shop_id")
        buyer_id = reader.read_nested_id("customer", "id")
        updated_at_ms = reader.read_iso_time("update_time")
    else:
        store_id = reader.check_id(_SHOP_ID_HEADER, lowered.get(_SHOP_ID_HEADER.lower()))
        buyer_id = reader.read_id("id")
        updated_at_ms = reader.read_iso_time("updated_at")
        phone, email = reader.read_text("phone"), reader.read_text("email")
    reader.check()
    if topic == "customers/delete":
        phone = email = None
    if phone is not None:
        phone = _international(phone)
    return customers_pb2.ApplyCustomerUpdateRequest(
        event_id=_event_id(topic, merchant_id, store_id, buyer_id, updated_at_ms, phone, email),
        merchant_id=merchant_id,
        store_id=store_id,
        buyer_id=buyer_id,
        kind=CUSTOMER_TOPICS[topic],
        mobile=phone,
        email=email,
        updated_at=to_timestamp(updated_at_ms),
    )


def store_erasure(headers: Mapping[str, str], raw_body: bytes) -> programs_pb2.RequestStoreErasureRequest:
    """Translate a webhook of `merchants/redact`.

    It requests the erasure of a store's personal data.

    It must have its own shape, `store_id`, `store_domain` and `update_time`, because the topic is not signed. The
    store is that of the body, the merchant that of the header. Raises MalformedWebhook with all violations.

    Source: docs/reference/shopline-webhooks.md#merchants-redact
    """
    lowered = {name.lower(): value for name, value in headers.items()}
    reader = BodyReader(raw_body)
    merchant_id = reader.check_id(_MERCHANT_ID_HEADER, lowered.get(_MERCHANT_ID_HEADER.lower()))
    store_id = reader.read_id("store_id")
    reader.read_required_text("store_domain")
    requested_at_ms = reader.read_iso_time("update_time")
    reader.check()
    return programs_pb2.RequestStoreErasureRequest(
        event_id=_event_id(STORE_ERASURE_TOPIC, merchant_id, store_id, requested_at_ms),
        merchant_id=merchant_id,
        store_id=store_id,
        request_time=to_timestamp(requested_at_ms),
    )


def read_topic(values: Iterable[str]) -> str:
    """Return the only topic of the X-Shopline-Topic headers, or an empty text.

    A proxy may join repeated headers with commas (https://www.rfc-editor.org/rfc/rfc9110#section-5.3), so a list of
    equal names counts as one.
    """
    names = {name.strip() for value in values for name in value.split(",")} - {""}
    return names.pop() if len(names) == 1 else ""


def read_merchant_id(headers: Mapping[str, str]) -> str:
    """Return the merchant of the headers; empty if it is missing or is not an id."""
    header_value = {name.lower(): value for name, value in headers.items()}.get(_MERCHANT_ID_HEADER.lower(), "")
    return header_value if ID.fullmatch(header_value) else ""


def _international(phone: str) -> str:
    """Return a phone number with + for a leading 00, any other text unchanged."""
    normalized = phone_text(phone)
    prefix = _INTERNATIONAL_PREFIX.match(normalized)
    return phone if prefix is None else f"+{normalized[prefix.end() :]}"


def _event_id(*content: str | int | None) -> str:
    """Return a digest of the content.

    As a JSON array, different contents always have different bytes.
    """
    return "shopline-" + hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _metadata(value: str | None, max_length: int) -> str:
    """Return a header that the API accepts, else an empty text.

    Wrong unsigned metadata must not cost an event.
    """
    if value is None or len(value) > max_length or not re.fullmatch(r"[!-~]*", value):
        return ""
    return value
