"""Keyed digests of codes and destinations.

Source: docs/reference/validation-codes.md#stored-digest
"""

from collections.abc import Mapping

from pointbook_server.errors import key_not_configured
from pointbook_server.keyed_digest import keyed_digest
from pointbook_server.validation_codes.model import Purpose, Route

CODE_DOMAIN = "pointbook.code.v1"
DESTINATION_DOMAIN = "pointbook.destination.v1"


class KeyRing:
    """The keys of digests by their ids: the first signs, all verify."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._keys = dict(keys)

    @property
    def signing_id(self) -> str:
        """The id of the signing key. Raises KEY_NOT_CONFIGURED if there is none."""
        if not self._keys:
            raise key_not_configured("POINTBOOK_CODE_KEYS", "to sign codes with")
        return next(iter(self._keys))

    def __contains__(self, key_id: str) -> bool:
        """Return whether there is a key with this id."""
        return key_id in self._keys

    def code_digest(self, key_id: str, code: str, challenge_id: str, purpose: Purpose, route: Route) -> bytes:
        """Return the digest of a code and of everything that the code is bound to."""
        return keyed_digest(
            self._keys[key_id],
            CODE_DOMAIN,
            key_id,
            challenge_id,
            purpose.merchant_id,
            purpose.customer,
            str(purpose.program_id),
            str(purpose.points),
            str(purpose.group_redemption),
            purpose.group_id,
            route.channel.value,
            route.bound_to,
            code,
        )

    def destination_digest(self, key_id: str, merchant_id: str, destination: str) -> bytes:
        """Return the digest of a destination, which is stored in no other form."""
        return keyed_digest(self._keys[key_id], DESTINATION_DOMAIN, key_id, merchant_id, destination)

    def destination_digests(self, merchant_id: str, destination: str) -> list[bytes]:
        """Return the digest of a destination under every key, the signing key first."""
        return [self.destination_digest(key_id, merchant_id, destination) for key_id in self._keys]
