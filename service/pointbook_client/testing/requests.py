"""Requests of a parent to a child process over its standard input and output."""

import asyncio
import json
import os
import sys
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

PARENT_CHECK_SECONDS = 1.0
"""The interval at which a child checks whether its parent has ended."""
Handler = Callable[..., Awaitable[dict[str, Any]]]
"""Does the work of a request, and returns the content of the reply."""


async def serve_requests(parent: int, handlers: Mapping[str, Handler]) -> None:
    """Run the parent's requests in order, until it sends an empty line or ends.

    Each request is a line of JSON with a number, the name of a handler and its arguments. The reply is a line of JSON
    with the same number.
    """
    # What libraries print must not reach the parent as a reply.
    replies = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    watch = asyncio.create_task(_end_with(parent, reader))
    while line := (await reader.readline()).strip():
        request = json.loads(line)
        number = request.pop("number")
        reply = await _reply(handlers, request)
        os.write(replies, json.dumps({"number": number, **reply}).encode() + b"\n")
    watch.cancel()


async def _end_with(parent: int, reader: asyncio.StreamReader) -> None:
    """End the input when the parent has ended.

    Until then it is the parent of this process. The end of the pipe is not enough: a fork of the parent, such as one of
    multiprocessing, holds it open.
    """
    while os.getppid() == parent:  # noqa: ASYNC110 - nothing sets an event
        await asyncio.sleep(PARENT_CHECK_SECONDS)
    reader.feed_eof()


async def _reply(handlers: Mapping[str, Handler], request: dict[str, Any]) -> dict[str, Any]:
    handler = handlers[request.pop("request")]
    try:
        return await handler(**request)
    except Exception as error:  # noqa: BLE001 - the parent raises it
        traceback.print_exc()
        return {"error": str(error) or type(error).__name__}
