"""Events of one account, for tests of the pure ledger."""

from typing import Any

from pointbook_server.ledger.fold import fold
from pointbook_server.ledger.model import Account, AccountKey, Entry, Event, UpdateType

ACCOUNT = AccountKey("store", "buyer")


def increase_event(
    at_ms: int, value: int, balance: int | None, expires_at_ms: int | None = None, **changes: Any
) -> Event:
    """Build an increase; its event_id is `at-<at_ms>` by default."""
    scene = changes.pop("scene", "SUCCESSFUL_ORDERS")
    event_id = changes.pop("event_id", f"at-{at_ms}")
    return Event(event_id, ACCOUNT, UpdateType.INCREASE, scene, value, balance, expires_at_ms, at_ms)


def decrease_event(at_ms: int, value: int, balance: int | None, **changes: Any) -> Event:
    """Build a decrease; its event_id is `at-<at_ms>` by default."""
    scene = changes.pop("scene", "REDEEM_COUPON")
    event_id = changes.pop("event_id", f"at-{at_ms}")
    return Event(event_id, ACCOUNT, UpdateType.DECREASE, scene, value, balance, None, at_ms)


def account_after(*events: Event) -> Account:
    """Return the account after some events."""
    return fold(Account(), events)[0]


def last_entry(*events: Event) -> Entry:
    """Return the newest entry of some events."""
    return fold(Account(), events)[1][-1]
