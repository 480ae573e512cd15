"""How webhooks are written down: encrypted where there is a key, and known again by a digest of their body.

The topic is not signed, so that a customer's data may come under any. Without a key only what calls itself a customer
webhook, or names no topic, is refused.

Each key gives three, one to encrypt and two for digests, so that no use weakens another. Digests are keyed:
whoever reads a dump of the table cannot search it by guessing bodies.

A key rotation changes the digest that a body gets, so that bodies are looked up under the digests of all keys. A body
is kept twice only where its old key is gone, or while servers disagree about which key is the first.
"""

import hmac
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from pointbook_server.errors import PointbookError, Reason, key_not_configured
from pointbook_server.webhooks.model import Header, Webhook, WebhookContent

NONCE_BYTES = 12
ENCRYPTION = "pointbook.quarantine.encryption.v1"
DIGEST = "pointbook.quarantine.digest.v1"
SUBJECT = "pointbook.quarantine.subject.v1"
RETRY_AFTER_SECONDS = 60.0
"""How long it takes at least until somebody has given a server its key."""


@dataclass(frozen=True, slots=True)
class EncryptedPayload:
    """A webhook's content as it is written down: encrypted under a key, or in clear where `key_id` is None."""

    key_id: str | None
    headers: bytes
    body: bytes | None

    @property
    def size(self) -> int:
        """How many bytes it takes."""
        return len(self.headers) + len(self.body or b"")


class PayloadCipher:
    """Writes contents down and reads them back, by keys of which the first encrypts and all decrypt."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._ciphers = {key_id: AESGCM(_derived(key, ENCRYPTION)) for key_id, key in keys.items()}
        self._digest_keys = [_derived(key, DIGEST) for key in keys.values()]
        self._subject_keys = [_derived(key, SUBJECT) for key in keys.values()]

    def digests(self, webhook: Webhook) -> list[bytes]:
        """Digest a body in every way by which it may be known, the way of new webhooks first.

        Raises KEY_NOT_CONFIGURED where there is no key for a customer webhook, or for one without a topic.
        """
        keyed = [hmac.digest(key, webhook.body, "sha256") for key in self._digest_keys]
        if not webhook.is_personal:
            # It may have come before there was a key.
            return [*keyed, sha256(webhook.body).digest()]
        if not keyed:
            raise key_not_configured("POINTBOOK_QUARANTINE_KEYS", "to encrypt what may be a customer webhook")
        return keyed

    def subject_digests(self, subject: str) -> list[bytes]:
        """Digest whom a body tells of in every way by which they may be known, the way of new webhooks first."""
        keyed = [hmac.digest(key, subject.encode(), "sha256") for key in self._subject_keys]
        return [*keyed, sha256(subject.encode()).digest()]

    def seal(self, webhook: Webhook, merchant_id: str, quarantine_id: str) -> EncryptedPayload:
        """Encrypt a webhook for a merchant's quarantine; `digests` has checked that there is a key if it needs one."""
        headers = json.dumps(webhook.headers, ensure_ascii=False).encode()
        if not self._ciphers:
            return EncryptedPayload(None, headers, webhook.body)
        key_id, cipher = next(iter(self._ciphers.items()))

        def encrypt(part: str, clear: bytes) -> bytes:
            nonce = secrets.token_bytes(NONCE_BYTES)
            return nonce + cipher.encrypt(nonce, clear, _place(merchant_id, quarantine_id, part))

        return EncryptedPayload(key_id, encrypt("headers", headers), encrypt("body", webhook.body))

    def open(self, sealed: EncryptedPayload, merchant_id: str, quarantine_id: str) -> WebhookContent:
        """Read a content back. Raises CODE_KEY_UNKNOWN where its key is not one of ours."""
        if sealed.key_id is None:
            return WebhookContent(_headers(sealed.headers), sealed.body)
        cipher = self._ciphers.get(sealed.key_id)
        if cipher is None:
            raise PointbookError(
                Reason.CODE_KEY_UNKNOWN,
                "The webhook is encrypted with a key that this server does not have.",
                metadata={"key_id": sealed.key_id},
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )

        def decrypt(part: str, text: bytes) -> bytes:
            place = _place(merchant_id, quarantine_id, part)
            return cipher.decrypt(text[:NONCE_BYTES], text[NONCE_BYTES:], place)

        body = None if sealed.body is None else decrypt("body", sealed.body)
        return WebhookContent(_headers(decrypt("headers", sealed.headers)), body)


def _derived(key: bytes, use: str) -> bytes:
    return hmac.digest(key, use.encode(), "sha256")


def _place(merchant_id: str, quarantine_id: str, part: str) -> bytes:
    """Name the place that a ciphertext belongs to, so that it opens at no other."""
    return json.dumps([merchant_id, quarantine_id, part]).encode()


def _headers(encoded: bytes) -> tuple[Header, ...]:
    return tuple((name, value) for name, value in json.loads(encoded))
