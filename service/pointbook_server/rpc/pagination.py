"""Page tokens: the place where the next page starts, good only for the list that it was given for."""

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
"""Clients take 4 MiB unless told otherwise."""
DIGEST_LENGTH = 16
INTEGER_MAX = 2**63 - 1

M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class PageQuery:
    """Which rows of a list to read, the newest first: from a time on, and before a place (time in ms, id)."""

    start_ms: int
    before_ms: int
    before_id: str
    limit: int


def fit(messages: Iterable[M], size: int, bytes_max: int = PAGE_BYTES_MAX, *, least: int = 1) -> list[M]:
    """Take a page of messages: as many as were asked for, or as fit into an answer, and at least one or none."""
    page: list[M] = []
    room = bytes_max
    for message in messages:
        room -= message.ByteSize()
        if len(page) == size or (len(page) >= least and room < 0):
            break
        page.append(message)
    return page


def write_token(scope: object, place: Sequence[int | str]) -> str:
    """Write a token for the page that starts behind a place, in the list that `scope` describes."""
    return urlsafe_b64encode(json.dumps([_digest(scope), *place]).encode()).decode()


def read_token(
    fields: Fields, field: str, token: str, scope: object, kinds: Sequence[type]
) -> tuple[int | str, ...] | None:
    """Read a token back: the place, None for the first page or when the token is wrong, which is noted."""
    if not token:
        return None
    try:
        digest, *place = json.loads(urlsafe_b64decode(token[:TOKEN_LENGTH_MAX].encode()))
    except (ValueError, TypeError, RecursionError):
        digest, place = "", []
    fits = [type(item) for item in place] == list(kinds)
    if not fits or not all(map(_is_comparable, place)) or digest != _digest(scope):
        fields.wrong(field, "must be a next_page_token that was answered for the same request")
        return None
    return tuple(place)


def _is_comparable(item: int | str) -> bool:
    """Tell whether the database can compare with an item: tokens are not signed, so anybody can write one."""
    return item.isascii() and item.isprintable() if isinstance(item, str) else abs(item) <= INTEGER_MAX


def _digest(scope: object) -> str:
    """Name a list by its filters, so that a token of another list is refused instead of answered wrongly."""
    return sha256(repr(scope).encode()).hexdigest()[:DIGEST_LENGTH]
