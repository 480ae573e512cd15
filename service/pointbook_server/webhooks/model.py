"""Webhooks in quarantine: what is kept of them, and what is never."""

import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from enum import StrEnum
from typing import Any

KEPT_HEADERS = frozenset(
    {
        "x-shopline-topic",
        "x-shopline-shop-domain",
        "x-shopline-shop-id",
        "x-shopline-merchant-id",
        "x-shopline-api-version",
        "x-shopline-webhook-id",
    }
)
"""SHOPLINE's headers, without the signature: with it, a reader of the quarantine could send the webhook again."""
KEPT_VALUE_LENGTH_MAX = 255
SHARED = ""
"""The merchant_id of the quarantine of all webhooks whose body does not prove their merchant."""
RECOUNT_MS = 60_000
"""A repetition sooner than this after the last one that was counted changes nothing: counting costs a write."""
POINTS_TOPIC = "app_memberSystem_points/challenged"
STORE_ERASURE_TOPIC = "merchants/redact"
CUSTOMER_TOPICS = "customers/"
"""How the topics begin whose webhooks are personal data."""
NO_TOPIC = ""
"""The topic of a webhook that names none: it may be a customer's."""

SHOP_ID_HEADER = "x-shopline-shop-id"

ID_LENGTH_MAX = 64

_ID = re.compile(rf"[!-~]{{1,{ID_LENGTH_MAX}}}")

Header = tuple[str, str]
"""A header's name, and its value with its bytes read as ISO 8859-1."""


class QuarantineReason(StrEnum):
    """Why a webhook could not be applied: the names of webhooks.proto."""

    MALFORMED = "MALFORMED"
    OUT_OF_BOUNDS = "OUT_OF_BOUNDS"
    STORE_UNKNOWN = "STORE_UNKNOWN"
    MERCHANT_MISMATCH = "MERCHANT_MISMATCH"
    SHOP_ID_MISMATCH = "SHOP_ID_MISMATCH"
    EVENT_ID_REUSED = "EVENT_ID_REUSED"
    REFUSED = "REFUSED"
    TOPIC_MISSING = "TOPIC_MISSING"
    TOO_OLD = "TOO_OLD"
    ENDPOINT_MISMATCH = "ENDPOINT_MISMATCH"


class QuarantineState(StrEnum):
    """How far a webhook in quarantine has come."""

    QUARANTINED = "QUARANTINED"
    REPLAYED = "REPLAYED"


@dataclass(frozen=True, slots=True)
class WebhookContent:
    """What a request carried; the body is None where it was erased with its customer."""

    headers: tuple[Header, ...]
    body: bytes | None


@dataclass(frozen=True, slots=True)
class Webhook:
    """An authentic webhook that cannot be applied."""

    merchant_id: str
    topic: str
    reason: QuarantineReason
    detail: str
    headers: tuple[Header, ...]
    body: bytes
    received_at_ms: int
    names_merchant_itself: bool = False
    """Whether the token that brought it is for some merchants only, and so proves the merchant as no header does."""

    @property
    def is_personal(self) -> bool:
        """Whether it may be personal data by its topic, or for want of one: it is kept encrypted or not at all."""
        return self.topic == NO_TOPIC or self.topic.lower().startswith(CUSTOMER_TOPICS)


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A webhook in quarantine, without its content; `merchant_id` is the merchant that its header named."""

    merchant_id: str
    quarantine_id: str
    reason: QuarantineReason
    detail: str
    topic: str
    body_size: int
    body_erased: bool
    state: QuarantineState
    received_at_ms: int
    last_received_at_ms: int
    receive_count: int
    replayed_at_ms: int | None


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much a quarantine may hold."""

    webhooks_max: int
    bytes_max: int

    def half(self) -> "Bounds":
        """Return half of it."""
        return Bounds((self.webhooks_max + 1) // 2, (self.bytes_max + 1) // 2)


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of each merchant's own quarantine, of the shared one, and of all of them together."""

    merchant: Bounds
    shared: Bounds
    total: Bounds


@dataclass(frozen=True, slots=True)
class View:
    """What a caller finds of a merchant's webhooks.

    A webhook whose copies name different merchants is found only by a token for all of them: any of its names may be a
    stranger's, who would have one merchant read or drop what is another's.
    """

    merchant_id: str
    sees_contested: bool


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to replay a webhook as one event, which a server takes before it applies the event."""

    merchant_id: str
    quarantine_id: str
    event_id: str
    topic: str


def new_quarantine_id() -> str:
    """Make an id that no other server makes."""
    return f"q-{secrets.token_hex(12)}"


def subject_of(body: bytes) -> str:
    """Tell which buyer the body of a customer webhook tells of, whatever its topic says; empty where it cannot be told.

    A redaction names its customer in an object of that name, the other topics are the customer's own fields. An id may
    be any number that is whole, as the shim reads it.
    """
    own = _parse(body)
    customer = own.get("customer")
    return _id_of(customer["id"] if isinstance(customer, dict) and "id" in customer else own.get("id"))


def signed_store(body: bytes) -> str:
    """Return the store that a body names, which is signed; empty for none.

    `store_id` is the field of points webhooks and store erasures, `shop_id` that of redactions.
    """
    own = _parse(body)
    return _id_of(own.get("store_id")) or _id_of(own.get("shop_id"))


def store_of(webhook: Webhook) -> str:
    """Return the store whose customer a webhook is about; empty for other webhooks, or where it names no store.

    A redaction names its store; for the other customer webhooks only a header does. A webhook without a topic counts
    as a customer's, also where its body cannot be read, unless the body has the `store_id` of the other topics.
    """
    body = _parse(webhook.body)
    is_customers = "store_id" not in body if webhook.topic == NO_TOPIC else webhook.is_personal
    if not (is_customers or subject_of(webhook.body)):
        return ""
    named = next((value for name, value in webhook.headers if name.lower() == SHOP_ID_HEADER), None)
    return _id_of(body.get("shop_id")) or _id_of(named)


def _parse(body: bytes) -> dict[str, Any]:
    """Parse a body as a JSON object; empty where it is none."""
    try:
        parsed = json.loads(body, parse_float=Decimal)
    except (ValueError, RecursionError, InvalidOperation):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _id_of(value: object) -> str:
    """Return an id that may be written as a number; empty where it is none."""
    # 1e999999999 is short here and very long as digits.
    if isinstance(value, Decimal) and value.adjusted() < ID_LENGTH_MAX and value == value.to_integral_value():
        value = int(value)
    text = str(value) if isinstance(value, (str, int)) else ""
    return text if _ID.fullmatch(text) else ""


def kept_headers(headers: Iterable[Header]) -> tuple[Header, ...]:
    """Return the headers that are kept, in their order: the first of each name, unless its value is too long."""
    kept: dict[str, Header] = {}
    for name, value in headers:
        if name.lower() in KEPT_HEADERS and len(value) <= KEPT_VALUE_LENGTH_MAX:
            kept.setdefault(name.lower(), (name, value))
    return tuple(kept.values())
