"""SHOPLINE's webhook signature.

Source: docs/reference/shopline-webhooks.md#signature
"""

import base64
import hashlib
import hmac

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shopline_shim import signature

BODY = b'{"points_balance":20}'
SECRET = "app-secret"


def base64_signature(secret: str, body: bytes) -> str:
    """Return a signature in the encoding of SHOPLINE's documentation."""
    return base64.b64encode(bytes.fromhex(signature.sign(secret, body))).decode()


def test_sign_is_hmac_sha256_in_hex() -> None:
    expected = hmac.new(b"app-secret", BODY, hashlib.sha256).hexdigest()

    assert signature.sign(SECRET, BODY) == expected


def test_sign_gives_the_digest_of_a_published_test_vector() -> None:
    # Source: https://www.rfc-editor.org/rfc/rfc4231#section-4.3
    expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"

    assert signature.sign("Jefe", b"what do ya want for nothing?") == expected


@given(secret=st.text(min_size=1).filter(lambda text: text.isprintable()), body=st.binary())
def test_hex_of_either_case_and_base64_verify(secret: str, body: bytes) -> None:
    digest = signature.sign(secret, body)

    assert signature.verify([secret], body, digest)
    assert signature.verify([secret], body, digest.upper())
    assert signature.verify([secret], body, base64_signature(secret, body))


@pytest.mark.parametrize("position", [0, 1, 2])
def test_any_of_several_secrets_verifies(position: int) -> None:
    secrets = ["old", "older", "oldest"]
    secrets[position] = SECRET

    assert signature.verify(secrets, BODY, signature.sign(SECRET, BODY))


def test_wrong_secret_wrong_body_or_no_secret_does_not_verify() -> None:
    digest = signature.sign(SECRET, BODY)

    assert not signature.verify(["other"], BODY, digest)
    assert not signature.verify([SECRET], BODY + b" ", digest)
    assert not signature.verify([], BODY, digest)


def malformed_headers() -> list[str | None]:
    """Return headers that resemble the signature of the body, or do not at all."""
    digest = signature.sign(SECRET, BODY)
    encoded = base64_signature(SECRET, BODY)
    hexadecimal = [digest[:-1], digest + "0", digest + "\n", " " + digest[1:], "sha256=" + digest]
    padded = [encoded[:-1], encoded[:-1] + "A", encoded + "=", "=" * 44, encoded.replace("=", "\n")]
    non_ascii = ["\u00e4" * 64, "\u0660" * 64, "\u00e9" * 44]
    return [None, "", *hexadecimal, *padded, *non_ascii]


@pytest.mark.parametrize("header", malformed_headers())
def test_malformed_or_missing_header_does_not_verify(header: str | None) -> None:
    assert not signature.verify([SECRET], BODY, header)


@given(header=st.none() | st.text() | st.text("0123456789abcdefABCDEF", min_size=64, max_size=64))
def test_no_text_in_the_header_raises(header: str | None) -> None:
    assert not signature.verify([SECRET, "second"], BODY, header)
