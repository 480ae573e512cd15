"""What the quarantine keeps of a webhook, and how it is written down, as pure functions."""

from hashlib import sha256
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag

from pointbook_server.errors import PointbookError, Reason
from pointbook_server.webhooks.encryption import EncryptedPayload, PayloadCipher
from pointbook_server.webhooks.model import (
    QuarantineReason,
    Webhook,
    kept_headers,
    new_quarantine_id,
    signed_store,
    subject_of,
)

OLD, NEW = {"old": b"o" * 32}, {"new": b"n" * 32}
EVERY_BYTE = bytes(range(256)).decode("latin-1")
POINTS = "app_memberSystem_points/challenged"


def webhook(**changes: Any) -> Webhook:
    """Make a customer webhook."""
    values: dict[str, Any] = {
        "merchant_id": "m",
        "topic": "customers/update",
        "reason": QuarantineReason.MALFORMED,
        "detail": "",
        "headers": (("X-Shopline-Topic", "customers/update"), ("x", EVERY_BYTE)),
        "body": b'{"email":"ada@example.com"}',
        "received_at_ms": 1,
    }
    return Webhook(**(values | changes))


@pytest.mark.parametrize(
    ("topic", "is_personal"),
    [
        ("customers/create", True),
        ("customers/redact", True),
        ("CUSTOMERS/UPDATE", True),
        ("customers/anything_new", True),
        ("", True),
        (POINTS, False),
        ("orders/customers/", False),
    ],
)
def test_customer_topics_are_personal(topic: str, *, is_personal: bool) -> None:
    """However the topic is written, and also those that do not exist yet."""
    assert webhook(topic=topic).is_personal is is_personal


def test_only_shoplines_own_headers_are_kept() -> None:
    """The first of each name, in any case of letters, in their order; never the signature, and no long value."""
    headers = [
        ("Authorization", "Bearer x"),
        ("X-SHOPLINE-WEBHOOK-ID", "w"),
        ("x-shopline-hmac-sha256", "0" * 64),
        ("cookie", "c"),
        ("x-shopline-topic", "customers/update"),
        ("X-Shopline-Topic", "customers/delete"),
        ("x-shopline-shop-domain", "d" * 256),
        ("x-shopline-shop-domain", "d" * 255),
        ("x-shopline-other", "o"),
    ]

    assert kept_headers(headers) == (
        ("X-SHOPLINE-WEBHOOK-ID", "w"),
        ("x-shopline-topic", "customers/update"),
        ("x-shopline-shop-domain", "d" * 255),
    )


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"store_id": "1718263946864", "shop_id": "2"}', "1718263946864"),
        (b'{"store_id": 1718263946864}', "1718263946864"),
        (b'{"store_id": null, "shop_id": "2"}', "2"),
        (b'{"customer": {"id": "18"}, "shop_id": "2"}', "2"),
        (b'{"id": "17", "email": "ada@example.com"}', ""),
        (b'{"store_id": "a b"}', ""),
        (b'["store_id"]', ""),
        (b"no JSON", ""),
    ],
)
def test_the_store_that_a_body_names(body: bytes, expected: str) -> None:
    """Only the body is signed, so that no header decides it."""
    assert signed_store(body) == expected


def test_ids_are_never_the_same() -> None:
    """Servers make them without asking each other."""
    assert len({new_quarantine_id() for _ in range(1_000)}) == 1_000


def test_what_is_sealed_opens_again() -> None:
    """Every byte of it, and by any server that has the key among others."""
    sealed = PayloadCipher(NEW).seal(webhook(), "m", "q")
    content = PayloadCipher(OLD | NEW).open(sealed, "m", "q")

    assert sealed.key_id == "new"
    assert (content.headers, content.body) == (webhook().headers, webhook().body)
    assert b"ada" not in sealed.headers + (sealed.body or b"")
    assert sealed.size == len(sealed.headers) + len(webhook().body) + 28


def test_the_same_webhook_is_sealed_differently_each_time() -> None:
    """Equal ciphertexts would tell equal bodies."""
    sealer = PayloadCipher(NEW)

    assert sealer.seal(webhook(), "m", "q").body != sealer.seal(webhook(), "m", "q").body


def test_a_points_webhook_needs_no_key() -> None:
    """Where there is none, it stands in clear."""
    sealed = PayloadCipher({}).seal(webhook(topic=POINTS), "m", "q")

    assert (sealed.key_id, sealed.body) == (None, webhook().body)
    assert PayloadCipher({}).open(sealed, "m", "q").headers == webhook().headers


def test_a_points_webhook_is_sealed_where_there_is_a_key() -> None:
    """Its topic is not signed: a customer's data may come under it. What came before the key is still known."""
    points = webhook(topic=POINTS)

    assert PayloadCipher(NEW).seal(points, "m", "q").key_id == "new"
    assert PayloadCipher({}).digests(points)[0] in PayloadCipher(NEW).digests(points)
    assert PayloadCipher(NEW).digests(points)[0] == PayloadCipher(NEW).digests(webhook())[0]


@pytest.mark.parametrize(("merchant_id", "quarantine_id"), [("m", "r"), ("n", "q"), ("", "q")])
def test_a_ciphertext_is_bound_to_its_place(merchant_id: str, quarantine_id: str) -> None:
    """Moved to another row it does not open."""
    sealer = PayloadCipher(NEW)
    sealed = sealer.seal(webhook(), "m", "q")

    with pytest.raises(InvalidTag):
        sealer.open(sealed, merchant_id, quarantine_id)


def test_headers_and_body_cannot_change_places() -> None:
    """Each is bound to what it is."""
    sealer = PayloadCipher(NEW)
    sealed = sealer.seal(webhook(), "m", "q")
    assert sealed.body is not None

    with pytest.raises(InvalidTag):
        sealer.open(EncryptedPayload(sealed.key_id, sealed.body, sealed.headers), "m", "q")


def test_an_erased_body_stays_erased() -> None:
    """The headers can still be read."""
    sealer = PayloadCipher(NEW)
    sealed = sealer.seal(webhook(), "m", "q")

    content = sealer.open(EncryptedPayload(sealed.key_id, sealed.headers, None), "m", "q")
    assert (content.headers, content.body) == (webhook().headers, None)


def test_a_key_that_is_not_there_is_named() -> None:
    """By its id; without any key nothing is sealed, and the setting is named."""
    with pytest.raises(PointbookError) as unknown:
        PayloadCipher(OLD).open(PayloadCipher(NEW).seal(webhook(), "m", "q"), "m", "q")
    with pytest.raises(PointbookError, match="POINTBOOK_QUARANTINE_KEYS") as missing:
        PayloadCipher({}).digests(webhook())

    assert (unknown.value.reason, unknown.value.metadata) == (Reason.CODE_KEY_UNKNOWN, {"key_id": "new"})
    assert missing.value.reason is Reason.KEY_NOT_CONFIGURED
    assert missing.value.metadata == {"setting": "POINTBOOK_QUARANTINE_KEYS"}


def test_digests_of_bodies_are_keyed() -> None:
    """Nobody without a key can search for a body; the digest of a rotated key still finds it."""
    before, after = PayloadCipher(OLD).digests(webhook()), PayloadCipher(NEW | OLD).digests(webhook())

    assert before != [sha256(webhook().body).digest()]
    assert after == [*PayloadCipher(NEW).digests(webhook()), *before]
    assert PayloadCipher({}).digests(webhook(topic=POINTS)) == [sha256(webhook().body).digest()]
    assert {len(digest) for digest in after} == {32}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"id": "17", "email": "ada@example.com"}', "17"),
        (b'{"id": 2404721679}', "2404721679"),
        (b'{"customer": {"id": "18"}, "id": "17"}', "18"),
        (b'{"customer": null, "id": "17"}', "17"),
        (b'{"customer": {"level": 2}, "id": "17"}', "17"),
        (b'{"customer": {"id": null}, "id": "17"}', ""),
        (b'{"id": 17.0}', "17"),
        (b'{"id": 1.721829526566e+12}', "1721829526566"),
        (b'{"id": 1234567890123456.789e3}', "1234567890123456789"),
        (b'{"id": 17.5}', ""),
        (b'{"id": 1e999999999}', ""),
        (b'{"id": 1e99999999999999999999}', ""),
        (b'{"id": NaN}', ""),
        (b'{"buyer_id": "17"}', ""),
        (b'{"id": "\\ud800"}', ""),
        (b'{"id": "a b"}', ""),
        (b'{"id": ["17"], "x": 1}', ""),
        (b'{"id": ' + b"9" * 5_000 + b"}", ""),
        (b"[" * 100_000, ""),
        (b'"17"', ""),
        (b"\xff", ""),
        (b"", ""),
    ],
)
def test_whom_a_body_tells_of(body: bytes, expected: str) -> None:
    """As far as it can be told, whatever the body: a redaction finds it by that."""
    assert subject_of(body) == expected
