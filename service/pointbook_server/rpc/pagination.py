"""Pages of lists, and page tokens: where the next page starts, valid only for the list they were issued for."""

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TypeVar

from google.protobuf.message import Message

from pointbook_server.rpc.request_fields import Fields

TOKEN_LENGTH_MAX = 1_000
PAGE_BYTES_MAX = 2 * 1024 * 1024
"""Half of the 4 MiB that gRPC clients accept by default."""
DIGEST_LENGTH = 16
INTEGER_MAX = 2**63 - 1

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class PageQuery:
    """Which rows of a list to read, newest first: from a time on, before a position (time in ms, id)."""

    start_ms: int
    before_ms: int
    before_id: str
    limit: int


def fit(messages: Iterable[M], size: int, bytes_max: int = PAGE_BYTES_MAX, *, least: int = 1) -> list[M]:
    """Return the first `size` messages, or fewer if they exceed `bytes_max`, but `least` at least."""
    page: list[M] = []
    bytes_left = bytes_max
    for message in messages:
        bytes_left -= message.ByteSize()
        if len(page) == size or (len(page) >= least and bytes_left < 0):
            break
        page.append(message)
    return page


def write_token(scope: object, position: Sequence[int | str]) -> str:
    """Return the token of the page after `position`, in the list that `scope` describes."""
    return urlsafe_b64encode(json.dumps([_digest(scope), *position]).encode()).decode()


def read_token(
    fields: Fields, field: str, token: str, scope: object, kinds: Sequence[type]
) -> tuple[int | str, ...] | None:
    """Return the position in a token; None for the first page, and for an invalid token, which is a violation."""
    if not token:
        return None
    try:
        digest, *position = json.loads(urlsafe_b64decode(token[:TOKEN_LENGTH_MAX].encode()))
    except (ValueError, TypeError, RecursionError):
        digest, position = "", []
    fits = [type(item) for item in position] == list(kinds)
    if not fits or not all(map(_is_comparable, position)) or digest != _digest(scope):
        fields.wrong(field, "must be a next_page_token from a response to the same request")
        return None
    return tuple(position)


def _is_comparable(item: int | str) -> bool:
    """Return whether the database can compare with an item: tokens are not signed, so callers can forge them."""
    return item.isascii() and item.isprintable() if isinstance(item, str) else abs(item) <= INTEGER_MAX


def _digest(scope: object) -> str:
    """Return a digest of a list's filters, so that a token of another list is refused."""
    return sha256(repr(scope).encode()).hexdigest()[:DIGEST_LENGTH]
