"""The buyer and the store of a webhook's body."""

import pytest

from pointbook_server.webhooks.payload import read_buyer_id, read_signed_store_id


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
def test_signed_store_is_read_from_the_body(body: bytes, expected: str) -> None:
    assert read_signed_store_id(body) == expected


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
def test_buyer_is_read_from_any_body(body: bytes, expected: str) -> None:
    """A redaction finds webhooks by this id, so no malformed body may fail."""
    assert read_buyer_id(body) == expected
