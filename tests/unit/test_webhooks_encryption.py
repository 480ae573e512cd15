"""Encryption of webhooks at rest, and the digests of their bodies and subjects."""

from dataclasses import replace
from hashlib import sha256

import pytest
from cryptography.exceptions import InvalidTag

from pointbook_common.shopline_webhooks import POINTS_TOPIC
from pointbook_server.errors import PointbookError
from pointbook_server.reasons import Reason
from pointbook_server.webhooks.encryption import EncryptedPayload, PayloadCipher
from pointbook_server.webhooks.model import QuarantineReason, Webhook

OLD_KEY, NEW_KEY = {"old": b"o" * 32}, {"new": b"n" * 32}
EVERY_BYTE = bytes(range(256)).decode("latin-1")
CUSTOMER_WEBHOOK = Webhook(
    merchant_id="m",
    topic="customers/update",
    reason=QuarantineReason.MALFORMED,
    detail="",
    headers=(("X-Shopline-Topic", "customers/update"), ("x", EVERY_BYTE)),
    body=b'{"email":"ada@example.com"}',
    received_at_ms=1,
)
POINTS_WEBHOOK = replace(CUSTOMER_WEBHOOK, topic=POINTS_TOPIC)
"""The same body under a topic that is not personal."""


def test_encrypted_webhook_is_decrypted_by_any_cipher_with_its_key() -> None:
    payload = PayloadCipher(NEW_KEY).encrypt(CUSTOMER_WEBHOOK, "m", "q")
    content = PayloadCipher(OLD_KEY | NEW_KEY).decrypt(payload, "m", "q")

    assert payload.key_id == "new"
    assert (content.headers, content.body) == (CUSTOMER_WEBHOOK.headers, CUSTOMER_WEBHOOK.body)
    assert b"ada" not in payload.headers + (payload.body or b"")
    assert payload.size == len(payload.headers) + len(CUSTOMER_WEBHOOK.body) + 28


def test_same_webhook_is_encrypted_differently_each_time() -> None:
    """Equal ciphertexts would reveal equal bodies."""
    cipher = PayloadCipher(NEW_KEY)

    assert cipher.encrypt(CUSTOMER_WEBHOOK, "m", "q").body != cipher.encrypt(CUSTOMER_WEBHOOK, "m", "q").body


def test_points_webhook_is_stored_in_clear_without_a_key() -> None:
    payload = PayloadCipher({}).encrypt(POINTS_WEBHOOK, "m", "q")

    assert (payload.key_id, payload.body) == (None, POINTS_WEBHOOK.body)
    assert PayloadCipher({}).decrypt(payload, "m", "q").headers == POINTS_WEBHOOK.headers


def test_points_webhook_is_encrypted_if_there_is_a_key() -> None:
    """The topic is not signed, so a customer's data may arrive under it."""
    assert PayloadCipher(NEW_KEY).encrypt(POINTS_WEBHOOK, "m", "q").key_id == "new"


def test_points_webhook_stored_before_the_first_key_is_found_with_the_key() -> None:
    assert PayloadCipher({}).body_digests(POINTS_WEBHOOK)[0] in PayloadCipher(NEW_KEY).body_digests(POINTS_WEBHOOK)


def test_body_digest_does_not_depend_on_the_topic() -> None:
    cipher = PayloadCipher(NEW_KEY)

    assert cipher.body_digests(POINTS_WEBHOOK)[0] == cipher.body_digests(CUSTOMER_WEBHOOK)[0]


@pytest.mark.parametrize(("owner_id", "quarantine_id"), [("m", "r"), ("n", "q"), ("", "q")])
def test_ciphertext_is_bound_to_its_row(owner_id: str, quarantine_id: str) -> None:
    cipher = PayloadCipher(NEW_KEY)
    payload = cipher.encrypt(CUSTOMER_WEBHOOK, "m", "q")

    with pytest.raises(InvalidTag):
        cipher.decrypt(payload, owner_id, quarantine_id)


def test_headers_and_body_cannot_be_exchanged() -> None:
    cipher = PayloadCipher(NEW_KEY)
    payload = cipher.encrypt(CUSTOMER_WEBHOOK, "m", "q")
    assert payload.body is not None

    with pytest.raises(InvalidTag):
        cipher.decrypt(EncryptedPayload(payload.key_id, payload.body, payload.headers), "m", "q")


def test_headers_are_readable_after_the_body_was_erased() -> None:
    cipher = PayloadCipher(NEW_KEY)
    payload = cipher.encrypt(CUSTOMER_WEBHOOK, "m", "q")

    content = cipher.decrypt(EncryptedPayload(payload.key_id, payload.headers, None), "m", "q")
    assert (content.headers, content.body) == (CUSTOMER_WEBHOOK.headers, None)


def test_unknown_key_is_named_by_its_id() -> None:
    payload = PayloadCipher(NEW_KEY).encrypt(CUSTOMER_WEBHOOK, "m", "q")
    with pytest.raises(PointbookError) as caught:
        PayloadCipher(OLD_KEY).decrypt(payload, "m", "q")

    assert (caught.value.reason, caught.value.metadata) == (Reason.CODE_KEY_UNKNOWN, {"key_id": "new"})


def test_customer_webhook_without_any_key_is_refused() -> None:
    with pytest.raises(PointbookError, match="POINTBOOK_QUARANTINE_KEYS") as caught:
        PayloadCipher({}).body_digests(CUSTOMER_WEBHOOK)

    assert caught.value.reason is Reason.KEY_NOT_CONFIGURED
    assert caught.value.metadata == {"setting": "POINTBOOK_QUARANTINE_KEYS"}


def test_body_digests_are_keyed_and_cover_rotated_keys() -> None:
    """A body cannot be searched for without a key."""
    before = PayloadCipher(OLD_KEY).body_digests(CUSTOMER_WEBHOOK)
    after = PayloadCipher(NEW_KEY | OLD_KEY).body_digests(CUSTOMER_WEBHOOK)

    assert before != [sha256(CUSTOMER_WEBHOOK.body).digest()]
    assert after == [*PayloadCipher(NEW_KEY).body_digests(CUSTOMER_WEBHOOK), *before]
    assert PayloadCipher({}).body_digests(POINTS_WEBHOOK) == [sha256(POINTS_WEBHOOK.body).digest()]
    assert {len(digest) for digest in after} == {32}
