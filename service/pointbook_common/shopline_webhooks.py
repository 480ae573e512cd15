"""Names in SHOPLINE's webhooks, and the headers that the quarantine stores.

Source: docs/reference/shopline-webhooks.md#quarantine
"""

from collections.abc import Iterable

POINTS_TOPIC = "app_memberSystem_points/challenged"
STORE_ERASURE_TOPIC = "merchants/redact"
CUSTOMER_UPDATE_KINDS = {
    "customers/create": "CREATED",
    "customers/update": "UPDATED",
    "customers/delete": "DELETED",
    "customers/redact": "REDACTED",
}
"""The kind of update that each customer topic reports: the names of CustomerUpdateKind in customers.proto.

Source: docs/reference/shopline-webhooks.md#customer-webhooks
"""
TRANSLATED_TOPICS = frozenset({POINTS_TOPIC, STORE_ERASURE_TOPIC, *CUSTOMER_UPDATE_KINDS})
"""All topics that the shim translates. Topics are case-sensitive."""
STORED_HEADERS = frozenset(
    {
        "x-shopline-topic",
        "x-shopline-shop-domain",
        "x-shopline-shop-id",
        "x-shopline-merchant-id",
        "x-shopline-api-version",
        "x-shopline-webhook-id",
    }
)
"""SHOPLINE's headers without the signature, with which a reader of the quarantine could send the webhook again."""
STORED_VALUE_LENGTH_MAX = 255


def select_headers(headers: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Return the headers to store: of each name the first one that is not too long.

    Headers are not signed, so anyone on the way may have added or repeated some.
    """
    selected: dict[str, tuple[str, str]] = {}
    for name, value in headers:
        if name.lower() in STORED_HEADERS and len(value) <= STORED_VALUE_LENGTH_MAX:
            selected.setdefault(name.lower(), (name, value))
    return tuple(selected.values())
