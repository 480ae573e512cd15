"""Tombstones of redacted buyers, by which late webhooks are ignored.

Source: docs/reference/customers.md#deleting-and-redacting
"""

from collections.abc import Sequence

from pointbook_server.errors import key_not_configured
from pointbook_server.keyed_digest import keyed_digest
from pointbook_server.ledger.model import AccountKey

TOMBSTONE_DOMAIN = "pointbook.tombstone.v1"


class Tombstones:
    """Keyed hashes of redacted buyers: the first key signs, and all keys verify."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self._keys = tuple(keys)

    def digests(self, merchant_id: str, buyer: AccountKey) -> list[bytes]:
        """Return the digests of a buyer under every key, the signing key first."""
        parts = (TOMBSTONE_DOMAIN, merchant_id, buyer.store_id, buyer.buyer_id)
        return [keyed_digest(key, *parts) for key in self._keys]

    def digest(self, merchant_id: str, buyer: AccountKey) -> bytes:
        """Return the digest of a buyer under the signing key. Raises KEY_NOT_CONFIGURED."""
        self.check_key()
        return self.digests(merchant_id, buyer)[0]

    def check_key(self) -> None:
        """Raise KEY_NOT_CONFIGURED if there is no signing key."""
        if not self._keys:
            raise key_not_configured("POINTBOOK_CODE_KEYS", "for the tombstones of redactions")
