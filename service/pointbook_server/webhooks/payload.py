"""Reading of the bodies of webhooks."""

import json
import re
from decimal import Decimal, InvalidOperation
from typing import Any

from pointbook_server.rpc.request_fields import ID_LENGTH_MAX
from pointbook_server.webhooks.model import NO_TOPIC, Webhook

SHOP_ID_HEADER = "x-shopline-shop-id"
_ID = re.compile(rf"[!-~]{{1,{ID_LENGTH_MAX}}}")


def read_buyer_id(body: bytes) -> str:
    """Return the id of the buyer that a body is about, or "".

    The topic is not signed, so every body is searched. `customers/redact` names its customer in an object `customer`;
    the bodies of the other customer topics are the customer's own fields.
    """
    fields = _parse_object(body)
    customer = fields.get("customer")
    return _read_id(customer["id"] if isinstance(customer, dict) and "id" in customer else fields.get("id"))


def read_signed_store_id(body: bytes) -> str:
    """Return the id of the store that a body names, or "".

    The body is signed; the headers are not.

    Points webhooks and `merchants/redact` have `store_id`, `customers/redact` has `shop_id`.
    """
    fields = _parse_object(body)
    return _read_id(fields.get("store_id")) or _read_id(fields.get("shop_id"))


def read_customer_store_id(webhook: Webhook) -> str:
    """Return the id of the store whose customer a webhook is about, or "".

    `customers/redact` names its store in the body, the other customer webhooks only in a header. A webhook without a
    topic counts as a customer webhook unless its body has the `store_id` of the other topics.
    """
    fields = _parse_object(webhook.body)
    is_customers = "store_id" not in fields if webhook.topic == NO_TOPIC else webhook.is_personal
    if not (is_customers or read_buyer_id(webhook.body)):
        return ""
    header = next((value for name, value in webhook.headers if name.lower() == SHOP_ID_HEADER), None)
    return _read_id(fields.get("shop_id")) or _read_id(header)


def _parse_object(body: bytes) -> dict[str, Any]:
    """Parse a body as a JSON object; return an empty one if it is anything else."""
    try:
        parsed = json.loads(body, parse_float=Decimal)
    except (ValueError, RecursionError, InvalidOperation):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _read_id(value: object) -> str:
    """Return an id, or "" for any other value.

    An id may be a string, or a whole number in any notation.
    """
    # 1e999999999 is short as text and very long as digits.
    if isinstance(value, Decimal) and value.adjusted() < ID_LENGTH_MAX and value == value.to_integral_value():
        value = int(value)
    text = str(value) if isinstance(value, (str, int)) else ""
    return text if _ID.fullmatch(text) else ""
