"""Which token's expiry is shown: that of the next one that is in use."""

from typing import Any

import pytest

from pointbook_common.durations import DAY_MS, HOUR_MS, MINUTE_MS
from pointbook_server.access.model import Token
from pointbook_server.access.token_cache import TokenCache
from support.clocks import NOW_MS

EXPIRY_MS = NOW_MS + 10 * DAY_MS


def next_expiry_ms(**changes: Any) -> int | None:
    """Return the next expiry if there is one token, used a minute ago but for changes."""
    values = {"expires_at_ms": EXPIRY_MS, "last_used_at_ms": NOW_MS - MINUTE_MS} | changes
    token = Token("t", b"", "name", ("*",), ("admin",), 0, **values)
    transactions: Any = None  # Nothing is loaded.
    cache = TokenCache(transactions, lambda: NOW_MS, staleness_seconds=30)
    cache._tokens = {token.token_id: token}
    return cache.next_expiry_ms()


def test_expiry_of_a_token_in_use_is_shown() -> None:
    assert next_expiry_ms() == EXPIRY_MS
    assert next_expiry_ms(last_used_at_ms=NOW_MS - 6 * DAY_MS) == EXPIRY_MS


@pytest.mark.parametrize(
    "changes",
    [
        {"expires_at_ms": None},
        {"expires_at_ms": NOW_MS},
        {"revoked_at_ms": NOW_MS - 1},
        {"last_used_at_ms": None},
        {"last_used_at_ms": NOW_MS - 8 * DAY_MS},
        {"rotated_to": "u", "last_used_at_ms": NOW_MS - 2 * HOUR_MS},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_expiry_that_concerns_no_caller_is_not_shown(changes: dict[str, Any]) -> None:
    assert next_expiry_ms(**changes) is None


def test_expiry_of_a_rotated_token_is_shown_while_its_caller_uses_it() -> None:
    assert next_expiry_ms(rotated_to="u") == EXPIRY_MS
