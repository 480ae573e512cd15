"""Keyed digests of several texts."""

import hmac


def keyed_digest(key: bytes, *parts: str) -> bytes:
    """Return the HMAC-SHA-256 of some texts.

    Each text has its length before it, so that no character can move from one text to the next.
    """
    encoded = [part.encode() for part in parts]
    return hmac.digest(key, b"".join(len(part).to_bytes(4, "big") + part for part in encoded), "sha256")
