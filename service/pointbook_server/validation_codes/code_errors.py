"""Errors of one-time codes."""

from pointbook_server.errors import RETRY_AFTER_SECONDS, PointbookError
from pointbook_server.reasons import Reason


def send_limit_reached(limit: str, retry_after_seconds: float) -> PointbookError:
    """Return the error for a code that a limit forbids to send now."""
    return PointbookError(
        Reason.SEND_LIMIT_REACHED,
        "A limit on sending codes is reached.",
        metadata={"limit": limit},
        retry_after_seconds=retry_after_seconds,
    )


def key_unknown() -> PointbookError:
    """Return the error for a code whose key this server lacks."""
    return PointbookError(
        Reason.CODE_KEY_UNKNOWN,
        "This server lacks the key of the code; see POINTBOOK_CODE_KEYS.",
        retry_after_seconds=RETRY_AFTER_SECONDS,
    )


def delivery_failed(retry_after_seconds: float) -> PointbookError:
    """Return the error for a message that did not reach the provider, or may not have."""
    return PointbookError(
        Reason.DELIVERY_FAILED,
        "The code could not be delivered.",
        retry_after_seconds=max(retry_after_seconds, 0.0),
    )


def no_destination() -> PointbookError:
    """Return the error for a customer who has no contact for any channel."""
    return PointbookError(Reason.NO_DESTINATION, "The customer has no destination for a code.")
