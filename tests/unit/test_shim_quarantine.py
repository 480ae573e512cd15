"""What the shim keeps of a webhook that cannot be applied, and for which reason, as pure functions."""

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

from shopline_shim import quarantine_cause, translate

SHOPLINE = [(b"x-shopline-topic", b"t"), (b"x-shopline-merchant-id", b"m")]


def test_shoplines_own_headers_are_kept() -> None:
    """In their order, the first of each name, every byte included; no others, no long value and no signature."""
    domain = (b"X-Shopline-Shop-Domain", bytes(range(1, 256)))
    others = [(b"cookie", b"1"), (b"x-shopline-hmac-sha256", b"0" * 64), (b"x-shopline-webhook-id", b"w" * 256)]
    raw_headers = [*others, *SHOPLINE, domain, *[(name, b"again") for name, _ in SHOPLINE]]
    kept = quarantine_cause.stored_headers(raw_headers)

    assert [(header.name.encode(), header.value.encode("latin-1")) for header in kept] == [*SHOPLINE, domain]


def test_a_long_list_of_wrong_fields_is_cut() -> None:
    """A detail has at most 1,000 characters."""
    malformed = translate.MalformedWebhook([(f"field-{number}", "must be right") for number in range(100)])

    assert len(quarantine_cause.from_malformed(malformed).detail) == 1_000


@pytest.mark.parametrize("details", [b"", b"\xff\xff", b"\x08\x07", b"\x08\x05\x1a\x02\x0a\x00"])
def test_details_that_cannot_be_read_are_none(details: bytes) -> None:
    """The code alone then tells that the server refuses the event."""
    error = AioRpcError(
        grpc.StatusCode.NOT_FOUND, Metadata(), Metadata(("grpc-status-details-bin", details)), details="text"
    )
    finding = quarantine_cause.from_error(error)

    assert finding is not None
    assert (finding.name, finding.detail) == ("REFUSED", "the server returned NOT_FOUND")


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
def test_the_merchant_of_the_headers(headers: dict[str, str], merchant_id: str) -> None:
    """A header that is no id names no merchant."""
    assert translate.merchant_id(headers) == merchant_id
