"""What a call costs a server, in numbers that do not depend on the machine."""

import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

import asyncpg
from google.protobuf.message import Message

from pointbook_server.server import Server

ROUND_TRIP_METHODS = ("fetch", "fetchrow", "execute")
"""The methods of a database connection that cost a round trip each."""


class Cost(NamedTuple):
    """The round trips to the database, and the calls of functions in Python and C."""

    round_trips: float
    function_calls: float


@dataclass
class Details:
    """The details of a call by which gRPC asks for its handler."""

    method: str
    invocation_metadata: tuple[tuple[str, str | bytes], ...] = ()


class DirectContext:
    """The context of a call that does not come over the network."""

    def __init__(self, token: str, request: bytes) -> None:
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._request = request

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the call's metadata."""
        return self._metadata

    def time_remaining(self) -> None:
        """Return no deadline."""

    async def read(self) -> bytes:
        """Return the request."""
        return self._request


class Counter:
    """Counts what the server does in this thread."""

    def __init__(self) -> None:
        self.round_trips = 0
        self.function_calls = 0

    def profile(self, _frame: object, event: str, _argument: object) -> None:
        """Count a call of a function. A coroutine counts each time it continues."""
        self.function_calls += event in {"call", "c_call"}


async def measure_calls(server: Server, token: str, method: str, requests: Sequence[Message]) -> Cost:
    """Return the cost of the cheapest of some calls, made one after another.

    The others may include work in the background, and the preparation of statements. What gRPC itself costs is left
    out, and so are lines of the log, of which a busy server writes few.
    """
    with patch.object(server, "_settings", server._settings.model_copy(update={"call_log_lines_per_second_max": 0})):
        handler: Any = server._build_method_handlers().service(Details(f"/pointbook.v1.{method}"))
    costs = []
    for request in requests:
        context = DirectContext(token, request.SerializeToString())
        with counted() as counter:
            handler.response_serializer(await asyncio.create_task(handler.stream_unary(None, context)))
        costs.append(Cost(counter.round_trips, counter.function_calls))
    return Cost(*map(min, zip(*costs, strict=True)))


@contextmanager
def counted() -> Iterator[Counter]:
    """Count round trips and calls of functions during a block."""
    counter = Counter()
    connection = asyncpg.connection.Connection

    def counting(original: Any) -> Any:
        async def call(*arguments: Any, **options: Any) -> Any:
            counter.round_trips += 1
            return await original(*arguments, **options)

        return call

    replacements = {name: counting(getattr(connection, name)) for name in ROUND_TRIP_METHODS}
    with patch.multiple(connection, **replacements):
        sys.setprofile(counter.profile)
        try:
            yield counter
        finally:
            sys.setprofile(None)
