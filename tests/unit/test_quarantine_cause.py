"""Why a webhook is quarantined."""

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

from pointbook_client.calls import to_error
from shopline_shim import quarantine_cause, translate


def test_detail_has_at_most_1000_characters() -> None:
    malformed = translate.MalformedWebhook([(f"field-{number}", "must be right") for number in range(100)])

    assert len(quarantine_cause.from_malformed(malformed).detail) == 1_000


@pytest.mark.parametrize("details", [b"", b"\xff\xff", b"\x08\x07", b"\x08\x05\x1a\x02\x0a\x00"])
def test_error_with_unreadable_details_is_refused_with_its_code(details: bytes) -> None:
    error = AioRpcError(
        grpc.StatusCode.NOT_FOUND, Metadata(), Metadata(("grpc-status-details-bin", details)), details="text"
    )
    cause = quarantine_cause.from_error(to_error(error, "request-1"))

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
    assert translate.read_merchant_id(headers) == merchant_id
