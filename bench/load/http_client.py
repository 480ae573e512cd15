"""A minimal HTTP/1.1 client.

The calls of httpx take a millisecond, which would distort results.
"""

import asyncio
import re
from types import TracebackType
from typing import Self

_CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


class HttpConnection:
    """A persistent connection for one request at a time.

    Responses must have a Content-Length.
    """

    def __init__(self, address: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)

    async def __aenter__(self) -> Self:
        """Connect."""
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connection."""
        self._writer.close()
        await self._writer.wait_closed()

    async def request(self, request: bytes) -> tuple[int, bytes]:
        """Send an encoded request, and return the status and body of the response."""
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = _CONTENT_LENGTH.search(head)
        body = await self._reader.readexactly(int(length[1])) if length else b""
        return int(head[9:12]), body
