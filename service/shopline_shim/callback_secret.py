"""The shared secret of a telephony provider's callbacks. Pure.

Source: docs/reference/validation-codes.md#missed-calls
"""

import base64
import contextlib
import hmac
from collections.abc import Iterable, Mapping
from hashlib import sha256


def verify(secrets: Iterable[str], headers: Mapping[str, str]) -> bool:
    """Return whether the headers, with names in lower case, hold any secret.

    A secret is the bearer token or the password of any user in `Authorization`: most providers support only a user and
    password in the callback's URL. It may also be in `X-Pointbook-Secret`, for gateways that use `Authorization`
    themselves. Every pair is compared in constant time, so that the duration does not reveal which one matched.
    """
    candidates = [
        _authorization_secret(headers.get("authorization", "")),
        headers.get("x-pointbook-secret", "").encode(),
    ]
    matches = [
        hmac.compare_digest(_digest(secret.encode()), _digest(candidate))
        for secret in secrets
        for candidate in candidates
    ]
    return any(matches)


def _authorization_secret(authorization: str) -> bytes:
    """Return the token or password of an Authorization header, or no bytes."""
    scheme, _, credentials = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip().encode()
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            return base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
    return b""


def _digest(secret: bytes) -> bytes:
    """Return a digest of a secret.

    compare_digest takes longer for longer values, and digests have the same length.
    """
    return sha256(secret).digest()
