"""SHOPLINE's webhook bodies as messages of Pointbook's API.

Pure: headers and bytes in, a message or a list of everything that is wrong out. The rules come from SHOPLINE's pages
"Points update", "Customer editing" and "Delete customer data", and from what its deliveries do beyond them (SHOPLINE
facts, The points webhook, Customer topics). A byte-order mark before a body's JSON is no part of it: the signature
covers it, the content does not.
"""

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from pointbook.v1 import customers_pb2, points_pb2, programs_pb2
from pointbook_common.text import phone_text

POINTS_TOPIC = "app_memberSystem_points/challenged"
"""The topic that `points_update` translates."""
REDACT_TOPIC = "customers/redact"
CUSTOMER_TOPICS = {
    "customers/create": customers_pb2.CUSTOMER_UPDATE_KIND_CREATED,
    "customers/update": customers_pb2.CUSTOMER_UPDATE_KIND_UPDATED,
    "customers/delete": customers_pb2.CUSTOMER_UPDATE_KIND_DELETED,
    REDACT_TOPIC: customers_pb2.CUSTOMER_UPDATE_KIND_REDACTED,
}
"""The topics that `customer_update` translates, and what each reports."""
STORE_ERASURE_TOPIC = "merchants/redact"
"""The topic that `store_erasure` translates."""
ERASURE_TOPICS = frozenset({REDACT_TOPIC, STORE_ERASURE_TOPIC})
"""The topics that ask for personal data to be erased."""
TRANSLATED_TOPICS = frozenset({POINTS_TOPIC, STORE_ERASURE_TOPIC, *CUSTOMER_TOPICS})
"""Every topic that is translated. Topics are compared as SHOPLINE writes them, case included."""
Violation = tuple[str, str]
"""A wrong field: its name as SHOPLINE writes it, and what it must be. Never its value, which may be personal data."""

_MERCHANT_ID_HEADER = "X-Shopline-Merchant-Id"
_SHOP_ID_HEADER = "X-Shopline-Shop-Id"
_BODY = "body"
_FIELDS = frozenset(
    {
        "buyer_id",
        "customer",
        "email",
        "id",
        "phone",
        "points_balance",
        "points_expiry_time",
        "shop_id",
        "store_domain",
        "store_id",
        "update_time",
        "update_type",
        "updated_at",
        "updated_scene",
        "updated_value",
    }
)

_ID = re.compile(r"[!-~]{1,64}")
_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_INTERNATIONAL_PREFIX = re.compile(r"\(?00\)?")
_INT64 = range(-(2**63), 2**63)
_INT64_EXPONENTS = range(19)
_TIMES_MS = range(253_402_300_800_000)  # From 1970 to the end of the year 9999, where a Timestamp ends.
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_NEVER_SECONDS = 4_102_415_999  # 2099-12-31T15:59:59Z, which SHOPLINE also writes for "does not expire".

_TYPES = {
    "INCREASE": points_pb2.POINTS_UPDATE_TYPE_INCREASE,
    "DECREASE": points_pb2.POINTS_UPDATE_TYPE_DECREASE,
}
_SCENES = {
    name.removeprefix("POINTS_UPDATE_SCENE_"): value
    for name, value in points_pb2.PointsUpdateScene.items()
    if value != points_pb2.POINTS_UPDATE_SCENE_UNSPECIFIED
}


class MalformedWebhook(ValueError):  # noqa: N818 - it is the webhook that is wrong, not the program.
    """An authentic webhook whose content cannot be read.

    `violations` names every wrong field once, in the order in which they were found. A flaw of the body as a whole
    has the name `body`, a header stands under its own name.
    """

    def __init__(self, violations: Iterable[Violation]) -> None:
        self.violations = tuple(dict.fromkeys(violations))
        super().__init__("; ".join(f"{field} {description}" for field, description in self.violations))


class OutOfBoundsWebhook(MalformedWebhook):
    """An authentic webhook whose fields can all be read, with a time that no Timestamp can hold."""


def points_update(headers: Mapping[str, str], raw_body: bytes) -> points_pb2.PointsUpdate:
    """Translate a delivery of `app_memberSystem_points/challenged`.

    `headers` may be written in any case; only the merchant is taken from them as content, as the body does not name
    it, and the webhook's id, shop domain and API version as metadata. The store is the body's, which is signed.

    Points are whole and times are milliseconds. Longs may be integers, integral floats or decimal strings, ids
    strings or integers, and the type in any case. `updated_value` is a magnitude whose sign the type gives. A scene
    that the API does not list is kept by name. `points_expiry_time` counts for an INCREASE only, where absent, null,
    "", 0 and 2099-12-31T15:59:59Z mean "never"; for a DECREASE it is dropped, but must still be a long.

    The event's id is a digest of its content, so that a body which is delivered again, under another webhook id or
    written in another way, is the same event (The ledger, Identity).

    Raises MalformedWebhook with all that is wrong, OutOfBoundsWebhook where that is times alone.
    Source: SHOPLINE's page "Points update"; SHOPLINE facts, The points webhook.
    """
    lowered = {name.lower(): value for name, value in headers.items()}
    reader = _Reader(raw_body)
    merchant_id = reader.check_id(_MERCHANT_ID_HEADER, lowered.get(_MERCHANT_ID_HEADER.lower()))
    store_id = reader.read_id("store_id")
    buyer_id = reader.read_id("buyer_id")
    update_type = reader.read_type("update_type")
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
        points_expiry_time=None if expiry_ms is None else _timestamp(expiry_ms),
        updated_at=_timestamp(updated_at_ms),
        webhook=points_pb2.WebhookMetadata(
            webhook_id=_metadata(lowered.get("x-shopline-webhook-id"), 128),
            shop_domain=_metadata(lowered.get("x-shopline-shop-domain"), 255),
            api_version=_metadata(lowered.get("x-shopline-api-version"), 64),
        ),
    )


def customer_update(
    topic: str, headers: Mapping[str, str], raw_body: bytes
) -> customers_pb2.ApplyCustomerUpdateRequest:
    """Translate a delivery of one of CUSTOMER_TOPICS.

    A redaction names its store; the other bodies name none, so that the store is the one of a header that is not
    signed. A redaction is one only in its own shape, `customer` and `shop_id`: the topic is not signed either, and no
    body of another topic shall erase anybody's data.

    `phone` and `email` are told where they are there, empty where they are null. SHOPLINE writes the international
    form with 00 in front, as well as with +; invisible characters and digits of other scripts hide neither. Deletions
    and redactions tell neither.

    Raises MalformedWebhook with all that is wrong. Source: SHOPLINE's pages "Customer editing" and "Delete customer
    data"; SHOPLINE facts, Customer topics.
    """
    lowered = {name.lower(): value for name, value in headers.items()}
    reader = _Reader(raw_body)
    merchant_id = reader.check_id(_MERCHANT_ID_HEADER, lowered.get(_MERCHANT_ID_HEADER.lower()))
    phone = email = None
    if topic == REDACT_TOPIC:
        store_id = reader.read_id("shop_id")
        buyer_id = reader.read_id_within("customer", "id")
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
        updated_at=_timestamp(updated_at_ms),
    )


def store_erasure(headers: Mapping[str, str], raw_body: bytes) -> programs_pb2.RequestStoreErasureRequest:
    """Translate a delivery of `merchants/redact`, which asks for the personal data of a store's customers to be erased.

    It is one only in its own shape, `store_id`, `store_domain` and `update_time`, since the topic is not signed. The
    store is the body's, the merchant the header's. Raises MalformedWebhook with all that is wrong. Source: SHOPLINE
    facts, Customer topics.
    """
    lowered = {name.lower(): value for name, value in headers.items()}
    reader = _Reader(raw_body)
    merchant_id = reader.check_id(_MERCHANT_ID_HEADER, lowered.get(_MERCHANT_ID_HEADER.lower()))
    store_id = reader.read_id("store_id")
    reader.read_present_text("store_domain")
    requested_at_ms = reader.read_iso_time("update_time")
    reader.check()
    return programs_pb2.RequestStoreErasureRequest(
        event_id=_event_id(STORE_ERASURE_TOPIC, merchant_id, store_id, requested_at_ms),
        merchant_id=merchant_id,
        store_id=store_id,
        request_time=_timestamp(requested_at_ms),
    )


def topic(values: Iterable[str]) -> str:
    """Return the topic that the X-Shopline-Topic headers of a delivery name; empty for none, or for different ones.

    A proxy may join repeated headers with commas (RFC 9110, 5.3), so a list of equal names counts as one.
    """
    names = {name.strip() for value in values for name in value.split(",")} - {""}
    return names.pop() if len(names) == 1 else ""


def merchant_id(headers: Mapping[str, str]) -> str:
    """Answer the merchant that a delivery's headers name; empty where they name none, or none that is an id."""
    claimed = {name.lower(): value for name, value in headers.items()}.get(_MERCHANT_ID_HEADER.lower(), "")
    return claimed if _ID.fullmatch(claimed) else ""


class _Reader:
    """Reads the body's fields and collects what is wrong with them, so that one answer names it all.

    A method that finds its field wrong returns a placeholder of the right type, which is never used: `check` raises
    before anything is built.
    """

    def __init__(self, raw_body: bytes) -> None:
        self._body, self._violations = _parse(raw_body)
        self._are_bounds = not self._violations

    def check(self) -> None:
        """Raise MalformedWebhook with everything that is wrong, OutOfBoundsWebhook where that is times alone."""
        if self._violations:
            raise (OutOfBoundsWebhook if self._are_bounds else MalformedWebhook)(self._violations)

    def read_id(self, name: str) -> str:
        return self.check_id(name, _id_of(self._body.get(name)))

    def read_id_within(self, parent: str, name: str) -> str:
        """Read an id out of an object inside the body."""
        value = self._body.get(parent)
        return self.check_id(f"{parent}.{name}", _id_of(value.get(name)) if isinstance(value, dict) else None)

    def check_id(self, name: str, value: object) -> str:
        if isinstance(value, str) and _ID.fullmatch(value):
            return value
        self._refuse(name, "must be an id of 1 to 64 visible ASCII characters")
        return ""

    def read_text(self, name: str) -> str | None:
        """Read a text that need not be there; null is an empty one."""
        if name not in self._body:
            return None
        value = self._body[name]
        if value is None:
            return ""
        if isinstance(value, str) and _is_utf8(value):
            return value
        self._refuse(name, "must be a text")
        return ""

    def read_present_text(self, name: str) -> str:
        """Read a text that has to be there."""
        text = self.read_text(name)
        if text is None:
            self._refuse(name, "must be a text")
        return text or ""

    def read_iso_time(self, name: str) -> int:
        """Read a time with its offset from UTC as milliseconds."""
        value = self._body.get(name)
        with contextlib.suppress(ValueError, OverflowError):
            time = datetime.fromisoformat(value) if isinstance(value, str) else None
            if time is not None and time.tzinfo is not None:
                time_ms = (time - _EPOCH) // _MILLISECOND
                if time_ms in _TIMES_MS:
                    return time_ms
        self._refuse(name, "must be an ISO 8601 time since 1970 with its offset from UTC")
        return 0

    def read_scene(self, name: str) -> str:
        value = self._body.get(name)
        if isinstance(value, str) and _ID.fullmatch(value):
            return value
        self._refuse(name, "must be a name of 1 to 64 visible ASCII characters")
        return ""

    def read_type(self, name: str) -> points_pb2.PointsUpdateType.ValueType:
        value = self._body.get(name)
        # Upper case is ASCII's here: in Unicode, letters such as the dotless i would turn into a type's name.
        if isinstance(value, str) and value.isascii() and value.upper() in _TYPES:
            return _TYPES[value.upper()]
        self._refuse(name, "must be INCREASE or DECREASE")
        return points_pb2.POINTS_UPDATE_TYPE_UNSPECIFIED

    def read_long(self, name: str) -> int:
        integer = _integer(self._body.get(name))
        if integer is None:
            self._refuse(name, "must be a whole number of 64 bits")
            return 0
        return integer

    def read_magnitude(self, name: str) -> int:
        integer = _integer(self._body.get(name))
        if integer is None or integer < 0:
            self._refuse(name, "must be a whole number of 64 bits, not negative: update_type gives the sign")
            return 0
        return integer

    def read_time(self, name: str) -> int:
        integer = _integer(self._body.get(name))
        if integer is None or integer not in _TIMES_MS:
            description = "must be a time in milliseconds since 1970, before the year 10000"
            self._refuse(name, description, is_bound=integer is not None)
            return 0
        return integer

    def read_expiry(self, name: str, *, relevant: bool) -> int | None:
        value = self._body.get(name)
        if value is None or value == "":
            return None
        if not relevant:
            self.read_long(name)
            return None
        expiry_ms = self.read_time(name)
        return None if expiry_ms == 0 or expiry_ms // 1000 == _NEVER_SECONDS else expiry_ms

    def _refuse(self, name: str, description: str, *, is_bound: bool = False) -> None:
        self._violations.append((name, description))
        self._are_bounds = self._are_bounds and is_bound


def _parse(raw_body: bytes) -> tuple[dict[str, Any], list[Violation]]:
    """Parse a body into an object whose numbers are all Decimals, and the flaws of the JSON itself.

    A name that appears twice is a flaw, because parsers differ in which value they take, and so are NaN and Infinity,
    which JSON does not have. A leading byte-order mark is skipped (RFC 8259, 8.1); other encodings than UTF-8 are not
    read. Raises MalformedWebhook where the body is no object.
    """
    flaws: list[Violation] = []

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            repeated = [name for name, count in counts.items() if count > 1]
            flaws.extend((name if name in _FIELDS else _BODY, "must not name a member twice") for name in repeated)
        return parsed

    def constant(_: str) -> Decimal:
        flaws.append((_BODY, "must not hold NaN or Infinity"))
        return Decimal("NaN")

    try:
        body = json.loads(
            raw_body.decode("utf-8-sig"),
            object_pairs_hook=members,
            parse_constant=constant,
            parse_float=_decimal,
            parse_int=_decimal,
        )
    except (ValueError, RecursionError):  # RecursionError: nested more deeply than anything SHOPLINE would send.
        raise MalformedWebhook([(_BODY, "must be JSON in UTF-8")]) from None
    if not isinstance(body, dict):
        raise MalformedWebhook([(_BODY, "must be a JSON object")])
    return body, flaws


def _decimal(literal: str) -> Decimal:
    """Read a number exactly: a float would round a long, and int() refuses or burns time on thousands of digits."""
    try:
        return Decimal(literal)
    except InvalidOperation:  # The exponent is beyond any arithmetic.
        return Decimal("NaN")


def _integer(value: object) -> int | None:
    """Answer a long in any of its forms as an integer of 64 bits, None where it is none.

    The exponent is looked at before the digits are written out: 1e999999999 is short here and very long there.
    """
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = _decimal(value)
    if not isinstance(value, Decimal) or not value.is_finite():
        return None
    if value.is_zero():
        return 0
    if value.adjusted() not in _INT64_EXPONENTS or value != value.to_integral_value():
        return None
    integer = int(value)
    return integer if integer in _INT64 else None


def _id_of(value: object) -> object:
    """Answer an id that was written as a number as the text that it is."""
    integer = _integer(value) if isinstance(value, Decimal) else None
    return value if integer is None else str(integer)


def _international(phone: str) -> str:
    """Return a phone number with + for a leading 00, and any other text as it is."""
    written = phone_text(phone)
    prefix = _INTERNATIONAL_PREFIX.match(written)
    return phone if prefix is None else f"+{written[prefix.end() :]}"


def _is_utf8(text: str) -> bool:
    """Tell whether a text can be sent on: JSON may escape halves of characters that are none."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _event_id(*content: str | int | None) -> str:
    """Digest an event's content. A JSON array is unambiguous: no two contents are written alike."""
    return "shopline-" + hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _timestamp(time_ms: int) -> Timestamp:
    seconds, rest_ms = divmod(time_ms, 1000)
    return Timestamp(seconds=seconds, nanos=rest_ms * 1_000_000)


def _metadata(value: str | None, max_length: int) -> str:
    """Keep a header that the API can carry. Unsigned metadata must never cost an event, so a wrong one is left out."""
    if value is None or len(value) > max_length or not re.fullmatch(r"[!-~]*", value):
        return ""
    return value
