"""SHOPLINE's webhook signature, HMAC-SHA256 of the raw body. Pure.

SHOPLINE's documentation shows the digest in base64, its SDKs and deliveries use hexadecimal. Both are accepted.

Source: docs/reference/shopline-webhooks.md#signature
"""

import base64
import hmac
import re
from collections.abc import Iterable

_HEX = re.compile(r"[0-9A-Fa-f]{64}")
_BASE64 = re.compile(r"[0-9A-Za-z+/]{43}=")


def sign(secret: str, raw_body: bytes) -> str:
    """Return the X-Shopline-Hmac-Sha256 header of a body: 64 hexadecimal digits."""
    return _digest(secret, raw_body).hex()


def verify(secrets: Iterable[str], raw_body: bytes, header_value: str | None) -> bool:
    """Return whether a header is the signature of a body with any of the secrets.

    A missing or malformed X-Shopline-Hmac-Sha256 is a wrong signature. Every secret is compared in constant time, so
    that the duration does not reveal which one matched.
    """
    header_digest = _decode(header_value or "")
    matches = [hmac.compare_digest(_digest(secret, raw_body), header_digest) for secret in secrets]
    return any(matches)


def _digest(secret: str, raw_body: bytes) -> bytes:
    return hmac.digest(secret.encode(), raw_body, "sha256")


def _decode(header_value: str) -> bytes:
    """Return the 32 bytes of a signature header, or no bytes if it is malformed."""
    if _HEX.fullmatch(header_value):
        return bytes.fromhex(header_value)
    if _BASE64.fullmatch(header_value):
        return base64.b64decode(header_value)
    return b""
