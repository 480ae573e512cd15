"""Rules of tokens: how they are created, rotated and verified."""

import hmac
import secrets
from collections.abc import Collection, Iterable
from dataclasses import replace
from hashlib import sha256

from pointbook_server.access.model import Principal, Scope, Token, token_invalid
from pointbook_server.errors import PointbookError
from pointbook_server.reasons import Reason

TOKEN_PREFIX = "pb"  # noqa: S105 - the prefix by which scanners recognise leaked tokens


def new_token(
    name: str,
    merchants: Collection[str],
    scopes: Iterable[Scope],
    now_ms: int,
    expires_at_ms: int | None,
    *,
    client_names: Collection[str] = (),
) -> tuple[Token, str]:
    """Return a new token, and its bearer string, which is shown once and not stored."""
    token_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    token = Token(
        token_id=token_id,
        secret_hash=_hash(secret),
        name=name,
        merchants=tuple(sorted(set(merchants))),
        scopes=tuple(sorted(set(scopes))),
        created_at_ms=now_ms,
        expires_at_ms=expires_at_ms,
        client_names=tuple(sorted(set(client_names))),
    )
    return token, f"{TOKEN_PREFIX}_{token_id}_{secret}"


def rotate(token: Token, now_ms: int, overlap_ms: int) -> tuple[Token, Token, str]:
    """Return the old token, its replacement, and the bearer string of the replacement.

    The new token has the name, merchants, scopes, client names and lifetime of the old one. The old one stays valid for
    the overlap, or until it expires if that is earlier.
    """
    lifetime_ms = None if token.expires_at_ms is None else token.expires_at_ms - token.created_at_ms
    expires_at_ms = None if lifetime_ms is None else now_ms + lifetime_ms
    new, bearer = new_token(
        token.name,
        token.merchants,
        map(Scope, token.scopes),
        now_ms,
        expires_at_ms,
        client_names=token.client_names,
    )
    end_ms = now_ms + overlap_ms
    old = replace(
        token,
        expires_at_ms=end_ms if token.expires_at_ms is None else min(token.expires_at_ms, end_ms),
        rotated_to=new.token_id,
    )
    return old, new, bearer


def split_bearer(bearer: str) -> tuple[str, str]:
    """Return token id and secret of a bearer string; both empty if malformed."""
    prefix, _, rest = bearer.partition("_")
    token_id, _, secret = rest.partition("_")
    return (token_id, secret) if prefix == TOKEN_PREFIX and token_id and secret else ("", "")


def authenticate(token: Token | None, secret: str, now_ms: int) -> Principal:
    """Return the caller that presents a token's secret.

    Raises TOKEN_INVALID and TOKEN_EXPIRED.
    """
    secret_hash = b"" if token is None else token.secret_hash
    matches = hmac.compare_digest(_hash(secret), secret_hash)
    if token is None or not matches or token.revoked_at_ms is not None:
        raise token_invalid()
    if token.expires_at_ms is not None and token.expires_at_ms <= now_ms:
        raise PointbookError(
            Reason.TOKEN_EXPIRED, "The bearer token has expired.", metadata={"token_id": token.token_id}
        )
    return Principal(frozenset(token.merchants), frozenset(token.scopes), token.token_id, frozenset(token.client_names))


def _hash(secret: str) -> bytes:
    """Return the hash of a secret: a fast one, since the secret is 32 random bytes."""
    return sha256(secret.encode()).digest()
