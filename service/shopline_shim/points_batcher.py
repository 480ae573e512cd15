"""Points updates of concurrent webhooks, sent to the server in shared calls."""

import asyncio
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context
from dataclasses import dataclass, field

import grpc

from pointbook.v1 import points_pb2
from pointbook_client import DeadlineExceededError, InternalError
from pointbook_client.calls import to_update_error
from pointbook_client.retrying import UpdateResult
from shopline_shim.server_client import CallContext, ServerClient

UPDATES_MAX = 500
"""The most updates of a call: about half of the server's largest message."""
CALLS_MAX = 2
"""Concurrent calls of a merchant: the server writes one batch of it at a time, and receives the next one meanwhile."""


@dataclass(slots=True)
class _QueuedUpdate:
    update: points_pb2.PointsUpdate
    context: CallContext
    result: "asyncio.Future[points_pb2.ApplyPointsUpdateResponse]"


@dataclass(slots=True)
class _Queue:
    """The waiting updates of one merchant, and how many of its calls are running."""

    updates: deque[_QueuedUpdate] = field(default_factory=deque)
    calls: int = 0


class PointsBatcher:
    """Sends the updates that arrive during a call together in the next one.

    There is no timer, so a single webhook does not wait. Calls are separate for each merchant: one that is slow, or
    that the token does not cover, affects no other.
    """

    def __init__(self, client: ServerClient, observe_size: Callable[[int], None]) -> None:
        self._client = client
        self._observe_size = observe_size
        self._queues: dict[str, _Queue] = {}
        self._senders: set[asyncio.Task[None]] = set()

    async def apply(
        self, update: points_pb2.PointsUpdate, context: CallContext
    ) -> points_pb2.ApplyPointsUpdateResponse:
        """Apply an update; its response means that the change is committed.

        Raises PointbookError, a DeadlineExceededError at the context's deadline.
        """
        queued = _QueuedUpdate(update, context, asyncio.get_running_loop().create_future())
        queue = self._queues.setdefault(update.merchant_id, _Queue())
        queue.updates.append(queued)
        if queue.calls < CALLS_MAX:
            queue.calls += 1
            # A sender serves many webhooks, so it must not carry the context of one of them.
            sending = self._send_all(update.merchant_id, queue)
            sender = asyncio.get_running_loop().create_task(sending, context=Context())
            self._senders.add(sender)
            sender.add_done_callback(self._senders.discard)
        try:
            async with asyncio.timeout(context.seconds_left()):
                return await queued.result
        except TimeoutError:
            raise DeadlineExceededError(grpc.StatusCode.DEADLINE_EXCEEDED, "No call ended in time.") from None

    async def _send_all(self, merchant_id: str, queue: _Queue) -> None:
        """Send a merchant's updates until none is waiting."""
        batch: Sequence[_QueuedUpdate] = ()
        try:
            while queue.updates:
                batch = _pop_batch(queue)
                if batch:
                    await self._send(batch)
        finally:
            queue.calls -= 1
            # An update without a result is left only if the shim stops. Its webhook must not wait.
            for queued in (*batch, *(() if queue.calls else queue.updates)):
                queued.result.cancel()
            if not queue.calls:
                del self._queues[merchant_id]

    async def _send(self, batch: Sequence[_QueuedUpdate]) -> None:
        """Send updates, and pass each its response or error."""
        responses: Sequence[points_pb2.ApplyPointsUpdateResponse | Exception]
        try:
            responses = await self._call(batch)
        except Exception as error:  # noqa: BLE001 - raised again where the result is awaited
            responses = [error] * len(batch)
        for queued, response in zip(batch, responses, strict=True):
            if queued.result.done():
                continue
            if isinstance(response, Exception):
                queued.result.set_exception(response)
            else:
                queued.result.set_result(response)

    async def _call(self, batch: Sequence[_QueuedUpdate]) -> list[UpdateResult]:
        """Call the server, and return a response or an error for each update.

        A single update keeps its request id, which the server's log then has.
        """
        client = self._client
        self._observe_size(len(batch))
        if len(batch) == 1:
            (queued,) = batch
            request = points_pb2.ApplyPointsUpdateRequest(update=queued.update)
            applied = await client.call(client.points.ApplyPointsUpdate, request, queued.context)
            return [applied]
        # Each webhook waits until its own deadline.
        context = CallContext(secrets.token_hex(16), max(queued.context.deadline for queued in batch))
        updates = [queued.update for queued in batch]
        batch_request = points_pb2.BatchApplyPointsUpdatesRequest(updates=updates, outcomes_only=True)
        with self._shared_span(batch):
            response = await client.call(client.points.BatchApplyPointsUpdates, batch_request, context)
        if len(response.results) != len(batch):
            raise InternalError(grpc.StatusCode.INTERNAL, "The response has another number of results.")
        return [
            to_update_error(result.error, context.request_id) if result.HasField("error") else result.response
            for result in response.results
        ]

    def _shared_span(self, batch: Sequence[_QueuedUpdate]) -> AbstractContextManager[None]:
        """Return a context whose span the webhooks of a batch share, if they are traced."""
        if self._client.tracing is None:
            return nullcontext()
        spans = (queued.context.span for queued in batch if queued.context.span is not None)
        return self._client.tracing.share("batch updates", {"pointbook.batch.size": len(batch)}, spans)


def _pop_batch(queue: _Queue) -> list[_QueuedUpdate]:
    """Remove and return the next updates, without those whose webhook has ended."""
    popped = [queue.updates.popleft() for _ in range(min(len(queue.updates), UPDATES_MAX))]
    return [queued for queued in popped if not queued.result.done()]
