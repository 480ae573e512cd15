"""SHOPLINE's webhook signature: HMAC-SHA256 over the raw body, keyed with the app secret.

Pure: bytes and strings in, a verdict out. Source: SHOPLINE facts, Signature. Its documentation shows the digest in
base64, while its SDKs and live deliveries carry it in hexadecimal, so both are read.
"""

import base64
import hmac
import re
from collections.abc import Iterable

_HEX = re.compile(r"[0-9A-Fa-f]{64}")
_BASE64 = re.compile(r"[0-9A-Za-z+/]{43}=")


def sign(secret: str, raw_body: bytes) -> str:
    """Sign a body as SHOPLINE does: 64 hexadecimal digits, the value of `X-Shopline-Hmac-Sha256`.

    Raises nothing. Source: SHOPLINE facts, Signature.
    """
    return _digest(secret, raw_body).hex()


def verify(secrets: Iterable[str], raw_body: bytes, header_value: str | None) -> bool:
    """Tell whether `header_value` is the signature of `raw_body` under any of the app secrets.

    `header_value` is `X-Shopline-Hmac-Sha256`: 64 hexadecimal digits or 44 base64 characters, None where the header is
    missing. A malformed value is simply a wrong signature; nothing is raised. Source: SHOPLINE facts, Signature.

    Every secret is tried, in constant time each, so that the time taken tells nothing about which one matched.
    """
    claimed = _decode(header_value or "")
    matches = [hmac.compare_digest(_digest(secret, raw_body), claimed) for secret in secrets]
    return any(matches)


def _digest(secret: str, raw_body: bytes) -> bytes:
    return hmac.digest(secret.encode(), raw_body, "sha256")


def _decode(header_value: str) -> bytes:
    """Read the digest that a header claims: 32 bytes, or none where the value is malformed."""
    if _HEX.fullmatch(header_value):
        return bytes.fromhex(header_value)
    if _BASE64.fullmatch(header_value):
        return base64.b64decode(header_value)
    return b""
