"""The request to erase a store.

Source: docs/reference/customers.md#erasing-a-store
"""

from dataclasses import dataclass
from enum import StrEnum

from pointbook_common.durations import DAY_MS

DUE_AFTER_MS = 30 * DAY_MS

ErasurePosition = tuple[int, int, str]
"""A position in lists of requests: a rank (0 for open, 1 for closed), a time, and the event_id."""
FIRST_POSITION: ErasurePosition = (-1, 0, "")


class ErasureOutcome(StrEnum):
    """The effect of a request: the names of StoreErasureOutcome in programs.proto."""

    REQUESTED = "REQUESTED"
    ALREADY_REQUESTED = "ALREADY_REQUESTED"
    ALREADY_ERASED = "ALREADY_ERASED"


@dataclass(frozen=True, slots=True)
class StoreErasure:
    """A request to erase the personal data of a store's customers, and its progress."""

    event_id: str
    merchant_id: str
    store_id: str
    requested_at_ms: int
    due_at_ms: int
    begun_at_ms: int | None = None
    erased_to: str = ""
    """The last buyer_id that is erased; buyers are erased in the order of their ids."""
    closed_at_ms: int | None = None
    reason: str = ""

    @property
    def is_open(self) -> bool:
        """Whether the erasure has not been completed."""
        return self.closed_at_ms is None

    @property
    def position(self) -> ErasurePosition:
        """The position in lists.

        Open requests come first, by their due time; then closed ones, the latest first.
        """
        if self.closed_at_ms is None:
            return 0, self.due_at_ms, self.event_id
        return 1, -self.closed_at_ms, self.event_id

    def begun_before(self, request: "StoreErasure") -> bool:
        """Return whether the erasure began before another request was made.

        If so, it may have missed newer data.
        """
        return self.begun_at_ms is not None and self.begun_at_ms < request.requested_at_ms

    def covers(self, request: "StoreErasure") -> bool:
        """Return whether another request needs no erasure of its own.

        An open erasure covers every request; a closed one covers its own, and those made before it began.
        """
        return self.is_open or self.event_id == request.event_id or (self.begun_at_ms or 0) >= request.requested_at_ms


@dataclass(frozen=True, slots=True)
class ErasureProgress:
    """The result of one EraseStore call: the buyers erased, and the items left."""

    erasure: StoreErasure
    erased: int
    remaining: int


def new_erasure(event_id: str, merchant_id: str, store_id: str, requested_at_ms: int) -> StoreErasure:
    """Return a request, which is due 30 days later.

    Source: docs/reference/shopline-webhooks.md#merchants-redact
    """
    return StoreErasure(event_id, merchant_id, store_id, requested_at_ms, requested_at_ms + DUE_AFTER_MS)
