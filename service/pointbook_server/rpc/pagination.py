"""Pages of lists, and page tokens.

A token says where the next page starts; it is valid only for the list it was issued for.
"""

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Generic, Protocol, TypeVar, cast

from google.protobuf.message import Message

from pointbook_server.rpc.request_fields import Fields

TOKEN_LENGTH_MAX = 1_000
PAGE_BYTES_MAX = 2 * 1024 * 1024
"""Half of the 4 MiB that gRPC clients accept by default."""
PORTION_ROWS = 200
DIGEST_LENGTH = 16
INTEGER_MAX = 2**63 - 1

M = TypeVar("M", bound=Message)
T = TypeVar("T")
P = TypeVar("P", bound=tuple[int | str, ...])


class ListRequest(Protocol):
    """The request of a List method."""

    page_size: int
    page_token: str


@dataclass(frozen=True, slots=True)
class PageQuery:
    """Which rows of a list to read, newest first.

    They are from `start_ms` on, and before the position (`before_ms`, `before_id`).
    """

    start_ms: int
    before_ms: int
    before_id: str
    limit: int


@dataclass(frozen=True, slots=True)
class PageRequest(Generic[P]):
    """The requested page: up to `size` rows after a position in the list of `scope`."""

    scope: object
    size: int
    after: P

    @property
    def limit(self) -> int:
        """How many rows to read: one more than `size` shows whether a page follows."""
        return self.size + 1

    def build(
        self,
        rows: Sequence[T],
        write: Callable[[T], M],
        position_of: Callable[[T], P],
        bytes_max: int = PAGE_BYTES_MAX,
    ) -> tuple[list[M], str]:
        """Return the page's messages and the next page's token, empty on the last one."""
        page = _fit(map(write, rows), self.size, bytes_max)
        if len(page) == len(rows):
            return page, ""
        return page, write_token(self.scope, position_of(rows[len(page) - 1]))

    async def build_in_portions(
        self,
        read: Callable[[P, int], Awaitable[Sequence[T]]],
        write: Callable[[T], M],
        position_of: Callable[[T], P],
    ) -> tuple[list[M], str]:
        """Return the same as `build`, but read at most PORTION_ROWS rows at a time.

        `read(after, limit)` is called for each portion. Other calls run between two portions, and rows that cannot fit
        into the response are not read.
        """
        page: list[M] = []
        after = self.after
        bytes_left = PAGE_BYTES_MAX
        while True:
            count = min(self.size - len(page), PORTION_ROWS)
            rows = await read(after, count + 1)
            portion = _fit(map(write, rows), count, bytes_left, least=0 if page else 1)
            page += portion
            if len(portion) == len(rows):
                return page, ""
            if portion:
                after = position_of(rows[len(portion) - 1])
            bytes_left -= sum(message.ByteSize() for message in portion)
            if len(portion) < count or len(page) == self.size:
                return page, write_token(self.scope, after)


def read_page(fields: Fields, request: ListRequest, scope: object, *, first: P) -> PageRequest[P]:
    """Read the requested page.

    `first` is the position before the first row; positions in tokens have its types.
    """
    size = fields.page_size("page_size", request.page_size)
    return PageRequest(scope, size, _read_position(fields, request.page_token, scope, first))


def write_token(scope: object, position: Sequence[int | str]) -> str:
    """Return the token of the page after `position` in a list, which `scope` names."""
    return urlsafe_b64encode(json.dumps([_digest(scope), *position]).encode()).decode()


def _fit(messages: Iterable[M], size: int, bytes_max: int = PAGE_BYTES_MAX, *, least: int = 1) -> list[M]:
    """Return the first `size` messages, or fewer if they exceed `bytes_max`.

    At least `least` of them are returned.
    """
    page: list[M] = []
    bytes_left = bytes_max
    for message in messages:
        bytes_left -= message.ByteSize()
        if len(page) == size or (len(page) >= least and bytes_left < 0):
            break
        page.append(message)
    return page


def _read_position(fields: Fields, token: str, scope: object, first: P) -> P:
    """Return the position in a token; `first` if the token is empty or invalid.

    An invalid token is a violation.
    """
    if not token:
        return first
    try:
        digest, *items = json.loads(urlsafe_b64decode(token[:TOKEN_LENGTH_MAX].encode()))
    except (ValueError, TypeError, RecursionError):
        digest, items = "", []
    has_types = [type(item) for item in items] == [type(item) for item in first]
    if not has_types or not all(map(_is_comparable, items)) or digest != _digest(scope):
        fields.wrong("page_token", "must be a next_page_token from a response to the same request")
        return first
    return cast("P", tuple(items))


def _is_comparable(item: int | str) -> bool:
    """Return whether the database can compare with an item.

    Tokens are not signed, so callers can forge them.
    """
    return item.isascii() and item.isprintable() if isinstance(item, str) else abs(item) <= INTEGER_MAX


def _digest(scope: object) -> str:
    """Return a digest of a list's filters, so that a token of another list is refused."""
    return sha256(repr(scope).encode()).hexdigest()[:DIGEST_LENGTH]
