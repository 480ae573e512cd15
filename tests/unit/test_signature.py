"""The webhook signature: two encodings, several secrets, and no way to make it raise."""

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
    """Encode as SHOPLINE's documentation shows it."""
    return base64.b64encode(bytes.fromhex(signature.sign(secret, body))).decode()


def test_sign_is_hmac_sha256_in_hex() -> None:
    """The digest is the standard library's, by the long way."""
    expected = hmac.new(b"app-secret", BODY, hashlib.sha256).hexdigest()

    assert signature.sign(SECRET, BODY) == expected


def test_sign_knows_a_published_vector() -> None:
    """RFC 4231, test case 2."""
    expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"

    assert signature.sign("Jefe", b"what do ya want for nothing?") == expected


@given(secret=st.text(min_size=1).filter(lambda text: text.isprintable()), body=st.binary())
def test_both_encodings_verify(secret: str, body: bytes) -> None:
    """What is signed verifies, in hex of either case and in base64."""
    digest = signature.sign(secret, body)

    assert signature.verify([secret], body, digest)
    assert signature.verify([secret], body, digest.upper())
    assert signature.verify([secret], body, base64_signature(secret, body))


@pytest.mark.parametrize("position", [0, 1, 2])
def test_any_secret_may_match(position: int) -> None:
    """During a rotation the matching secret may stand anywhere."""
    secrets = ["old", "older", "oldest"]
    secrets[position] = SECRET

    assert signature.verify(secrets, BODY, signature.sign(SECRET, BODY))


def test_wrong_secret_or_body_is_refused() -> None:
    """Neither another secret nor another body verifies, and no secret verifies nothing."""
    digest = signature.sign(SECRET, BODY)

    assert not signature.verify(["other"], BODY, digest)
    assert not signature.verify([SECRET], BODY + b" ", digest)
    assert not signature.verify([], BODY, digest)


def malformed_headers() -> list[str | None]:
    """List what is nearly the signature of the body, or nothing like one."""
    digest = signature.sign(SECRET, BODY)
    encoded = base64_signature(SECRET, BODY)
    hexadecimal = [digest[:-1], digest + "0", digest + "\n", " " + digest[1:], "sha256=" + digest]
    padded = [encoded[:-1], encoded[:-1] + "A", encoded + "=", "=" * 44, encoded.replace("=", "\n")]
    foreign = ["\u00e4" * 64, "\u0660" * 64, "\u00e9" * 44]
    return [None, "", *hexadecimal, *padded, *foreign]


@pytest.mark.parametrize("header", malformed_headers())
def test_malformed_header_is_a_wrong_signature(header: str | None) -> None:
    """A header that is missing or malformed is refused, never an exception."""
    assert not signature.verify([SECRET], BODY, header)


@given(header=st.none() | st.text() | st.text("0123456789abcdefABCDEF", min_size=64, max_size=64))
def test_no_header_raises(header: str | None) -> None:
    """Whatever text the header holds, the answer is a plain no."""
    assert not signature.verify([SECRET, "second"], BODY, header)
