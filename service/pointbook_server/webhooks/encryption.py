"""Encryption of webhooks at rest, and the keyed digests by which they are found.

Three keys are derived from each configured one, one for encryption and two for digests, so that no use weakens
another. A copy of the table cannot be searched by guessing bodies without the key.

Because the topic is not signed, a customer's data may arrive under any topic. Without a key only webhooks with a
customer topic, or with no topic, are refused.

The first key writes, and bodies are looked up under the digests of all keys. So a body is stored twice only if its old
key was removed, or while servers disagree about which key is the first.

Source: docs/reference/shopline-webhooks.md#quarantine
"""

import hmac
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pointbook_server.errors import PointbookError, key_not_configured
from pointbook_server.reasons import Reason
from pointbook_server.webhooks.model import Header, Webhook, WebhookContent

NONCE_BYTES = 12
ENCRYPTION_DOMAIN = "pointbook.quarantine.encryption.v1"
BODY_DIGEST_DOMAIN = "pointbook.quarantine.digest.v1"
SUBJECT_DIGEST_DOMAIN = "pointbook.quarantine.subject.v1"
KEY_UNKNOWN_RETRY_SECONDS = 60.0
"""An operator must add the key first."""


@dataclass(frozen=True, slots=True)
class EncryptedPayload:
    """A webhook's content as stored: encrypted, or in clear if `key_id` is None."""

    key_id: str | None
    headers: bytes
    body: bytes | None

    @property
    def size(self) -> int:
        """The number of bytes stored."""
        return len(self.headers) + len(self.body or b"")


class PayloadCipher:
    """A cipher with several keys: the first encrypts, each decrypts its own."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._ciphers = {key_id: AESGCM(_derive_key(key, ENCRYPTION_DOMAIN)) for key_id, key in keys.items()}
        self._body_digest_keys = [_derive_key(key, BODY_DIGEST_DOMAIN) for key in keys.values()]
        self._subject_digest_keys = [_derive_key(key, SUBJECT_DIGEST_DOMAIN) for key in keys.values()]

    def body_digests(self, webhook: Webhook) -> list[bytes]:
        """Return the digests of a body, the one for new webhooks first.

        Bodies are stored under the digest of the key that was the first one then.

        Raises KEY_NOT_CONFIGURED for a webhook with a customer topic, or with no topic, if there is no key.
        """
        keyed = [hmac.digest(key, webhook.body, "sha256") for key in self._body_digest_keys]
        if not webhook.is_personal:
            # A copy may have been stored before a key was configured.
            return [*keyed, sha256(webhook.body).digest()]
        if not keyed:
            raise key_not_configured("POINTBOOK_QUARANTINE_KEYS", "to encrypt what may be a customer webhook")
        return keyed

    def subject_digests(self, subject: str) -> list[bytes]:
        """Return the digests of a buyer or store, the one for new webhooks first."""
        keyed = [hmac.digest(key, subject.encode(), "sha256") for key in self._subject_digest_keys]
        return [*keyed, sha256(subject.encode()).digest()]

    def encrypt(self, webhook: Webhook, owner_id: str, quarantine_id: str) -> EncryptedPayload:
        """Encrypt a webhook for one row.

        `body_digests` has checked that there is a key if one is required.
        """
        headers = json.dumps(webhook.headers, ensure_ascii=False).encode()
        if not self._ciphers:
            return EncryptedPayload(None, headers, webhook.body)
        key_id, cipher = next(iter(self._ciphers.items()))

        def encrypt_part(part: str, plaintext: bytes) -> bytes:
            nonce = secrets.token_bytes(NONCE_BYTES)
            return nonce + cipher.encrypt(nonce, plaintext, _associated_data(owner_id, quarantine_id, part))

        return EncryptedPayload(key_id, encrypt_part("headers", headers), encrypt_part("body", webhook.body))

    def decrypt(self, payload: EncryptedPayload, owner_id: str, quarantine_id: str) -> WebhookContent:
        """Decrypt the content of a row.

        Raises CODE_KEY_UNKNOWN if this server lacks its key.
        """
        if payload.key_id is None:
            return WebhookContent(_decode_headers(payload.headers), payload.body)
        cipher = self._ciphers.get(payload.key_id)
        if cipher is None:
            raise PointbookError(
                Reason.CODE_KEY_UNKNOWN,
                "The webhook is encrypted with a key that this server does not have.",
                metadata={"key_id": payload.key_id},
                retry_after_seconds=KEY_UNKNOWN_RETRY_SECONDS,
            )

        def decrypt_part(part: str, ciphertext: bytes) -> bytes:
            associated_data = _associated_data(owner_id, quarantine_id, part)
            return cipher.decrypt(ciphertext[:NONCE_BYTES], ciphertext[NONCE_BYTES:], associated_data)

        body = None if payload.body is None else decrypt_part("body", payload.body)
        return WebhookContent(_decode_headers(decrypt_part("headers", payload.headers)), body)


def _derive_key(key: bytes, domain: str) -> bytes:
    return hmac.digest(key, domain.encode(), "sha256")


def _associated_data(owner_id: str, quarantine_id: str, part: str) -> bytes:
    """Return the associated data that binds a ciphertext to its row and column."""
    return json.dumps([owner_id, quarantine_id, part]).encode()


def _decode_headers(encoded: bytes) -> tuple[Header, ...]:
    return tuple((name, value) for name, value in json.loads(encoded))
