"""The accounts that several servers change at the same time."""

from collections.abc import Collection

from pointbook_server.ledger.model import AccountKey

CONTENDED_MS = 1_000
"""How long an account counts as contended after another server changed it during a batch."""
ACCOUNTS_MAX = 10_000
"""The most accounts to remember; beyond it, all are forgotten, which only costs a conflict each."""


class ContendedAccounts:
    """A short memory of accounts that another server changed during a batch.

    Applying their events without locks would most likely fail again.
    """

    def __init__(self) -> None:
        self._until_ms: dict[tuple[str, AccountKey], int] = {}

    def add(self, merchant_id: str, keys: Collection[AccountKey], now_ms: int) -> None:
        """Remember accounts of a merchant."""
        if len(self._until_ms) + len(keys) > ACCOUNTS_MAX:
            self._until_ms.clear()
        self._until_ms.update(dict.fromkeys(((merchant_id, key) for key in keys), now_ms + CONTENDED_MS))

    def has_any(self, merchant_id: str, keys: Collection[AccountKey], now_ms: int) -> bool:
        """Return whether any account of a merchant is contended."""
        if not self._until_ms:
            return False
        return any(self._until_ms.get((merchant_id, key), now_ms) > now_ms for key in keys)
