"""Entities of the quarantine.

Source: docs/reference/shopline-webhooks.md#quarantine
"""

import secrets
from dataclasses import dataclass
from enum import StrEnum

from pointbook_common.durations import MINUTE_MS

SHARED = ""
"""The owner of the shared quarantine: webhooks whose body does not prove their merchant."""
NO_TOPIC = ""
"""The topic of a webhook without a topic header; its body may be a customer's data."""
CUSTOMER_TOPIC_PREFIX = "customers/"
"""Webhooks of these topics carry personal data."""
RECOUNT_MS = MINUTE_MS
"""A repetition within this time of the last counted one is not counted, because counting costs a write."""

Header = tuple[str, str]
"""A header's name, and its value with its bytes decoded as ISO 8859-1."""


class QuarantineReason(StrEnum):
    """Why a webhook could not be applied: the names in webhooks.proto."""

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
    """Whether a webhook in quarantine was replayed."""

    QUARANTINED = "QUARANTINED"
    REPLAYED = "REPLAYED"


@dataclass(frozen=True, slots=True)
class WebhookContent:
    """The headers and body of a request.

    The body is None after it was erased with its customer.
    """

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
    is_merchant_proven: bool = False
    """Whether the caller's token is limited to some merchants. It proves the merchant; a header does not."""

    @property
    def is_personal(self) -> bool:
        """Whether the webhook may carry personal data.

        Such a webhook is stored encrypted or not at all.
        """
        return self.topic == NO_TOPIC or self.topic.lower().startswith(CUSTOMER_TOPIC_PREFIX)


@dataclass(frozen=True, slots=True)
class QuarantinedWebhook:
    """A webhook in quarantine without its content.

    `merchant_id` is the merchant that its header named.
    """

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
class QuarantineFilter:
    """The webhooks of a merchant to list; a reason or topic of None matches all."""

    state: QuarantineState
    reason: QuarantineReason | None
    topic: str | None
    start_ms: int
    end_ms: int


@dataclass(frozen=True, slots=True)
class Capacity:
    """The most that a quarantine stores."""

    webhooks_max: int
    bytes_max: int

    def used_ratio(self, webhooks: int, size: int) -> float:
        """Return the used share of the limit that is nearer."""
        return max(webhooks / self.webhooks_max, size / self.bytes_max)

    def half(self) -> "Capacity":
        """Return half of this capacity, rounded up."""
        return Capacity((self.webhooks_max + 1) // 2, (self.bytes_max + 1) // 2)


@dataclass(frozen=True, slots=True)
class QuarantineLimits:
    """The capacity of a merchant's quarantine, of the shared one, and of all."""

    merchant: Capacity
    shared: Capacity
    total: Capacity


@dataclass(frozen=True, slots=True)
class Visibility:
    """The webhooks of a merchant that a caller may see.

    A webhook is contested if its copies name different merchants. Only a token for all merchants sees those: any of the
    names may be forged, and would let one merchant read or drop another's webhook.
    """

    merchant_id: str
    sees_contested: bool


@dataclass(frozen=True, slots=True)
class ReplayClaim:
    """The right to replay a webhook as one event.

    A server claims it before it applies the event.
    """

    owner_id: str
    quarantine_id: str
    event_id: str
    topic: str


def new_quarantine_id() -> str:
    """Return a new random id."""
    return f"q-{secrets.token_hex(12)}"
