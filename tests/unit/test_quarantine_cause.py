"""Why a webhook is quarantined, and which of its headers are stored."""

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

from shopline_shim import quarantine_cause, translate

SHOPLINE = [(b"x-shopline-topic", b"t"), (b"x-shopline-merchant-id", b"m")]


def test_only_shoplines_short_unrepeated_headers_are_stored_without_signature() -> None:
    domain = (b"X-Shopline-Shop-Domain", bytes(range(1, 256)))
    others = [(b"cookie", b"1"), (b"x-shopline-hmac-sha256", b"0" * 64), (b"x-shopline-webhook-id", b"w" * 256)]
    raw_headers = [*others, *SHOPLINE, domain, *[(name, b"again") for name, _ in SHOPLINE]]
    stored = quarantine_cause.stored_headers(raw_headers)

    assert [(header.name.encode(), header.value.encode("latin-1")) for header in stored] == [*SHOPLINE, domain]


def test_detail_has_at_most_1000_characters() -> None:
    malformed = translate.MalformedWebhook([(f"field-{number}", "must be right") for number in range(100)])

    assert len(quarantine_cause.from_malformed(malformed).detail) == 1_000


@pytest.mark.parametrize("details", [b"", b"\xff\xff", b"\x08\x07", b"\x08\x05\x1a\x02\x0a\x00"])
def test_error_with_unreadable_details_is_refused_with_its_code(details: bytes) -> None:
    error = AioRpcError(
        grpc.StatusCode.NOT_FOUND, Metadata(), Metadata(("grpc-status-details-bin", details)), details="text"
    )
    cause = quarantine_cause.from_error(error)

    assert cause is not None
    assert (cause.name, cause.detail) == ("REFUSED", "the server returned NOT_FOUND")


@pytest.mark.parametrize(
    ("headers", "merchant_id"),
    [
        ({"x-shopline-merchant-id": "2000001234"}, "2000001234"),
        ({"X-SHOPLINE-MERCHANT-ID": "m"}, "m"),
        ({"x-shopline-merchant-id": "two words"}, ""),
        ({"x-shopline-merchant-id": "m" * 65}, ""),
        ({"x-shopline-merchant-id": ""}, ""),
        ({}, ""),
    ],
)
def test_merchant_header_that_is_no_id_names_no_merchant(headers: dict[str, str], merchant_id: str) -> None:
    assert translate.merchant_id(headers) == merchant_id
