"""Batches of concurrent calls that share one transaction."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context
from dataclasses import dataclass
from time import monotonic
from typing import Generic, Protocol, TypeVar

from pointbook_server.errors import PointbookError
from pointbook_server.logs import CallRecord, current_call
from pointbook_server.reasons import Reason

RETRY_AFTER_SECONDS = 0.5

CONCURRENT_CALLS_MIN = 2.5
"""Batches wait for more items while recent ones had the items of at least this many calls on average."""
CALLS_COUNTED_MAX = 8
"""A batch of more calls counts as this many, so that batches soon stop waiting once calls follow each other."""
RECENT_WEIGHT = 0.3
"""The weight of the latest batch in the average of recent batches."""
WAIT_SECONDS_MAX = 0.003
"""The longest time that a batch waits for more items."""
WAIT_SIZE = 32
"""A batch of this size does not wait: more items would hardly make it cheaper per item."""
QUIET_SECONDS = 0.0002
"""A batch leaves after this time without a new item, and QUIET_TURNS turns of the event loop.

gRPC admits one call per turn and reads its request in several more, so an empty turn is often just a gap.
"""
QUIET_TURNS = 2

K = TypeVar("K")
I = TypeVar("I")  # noqa: E741 - an item
R = TypeVar("R")


class BatchObserver(Protocol):
    """Observes a batcher."""

    def watch(self, count_waiting: Callable[[], int]) -> None:
        """Start to observe how many items wait."""

    def batch(self, size: int, wait_seconds: float, calls: Iterable[CallRecord]) -> AbstractContextManager[None]:
        """Observe a batch that leaves now, and return a context for its work.

        `wait_seconds` is how long its oldest item has waited. `calls` has the gRPC call of each item, if any.
        """


class _Unobserved:
    def watch(self, count_waiting: Callable[[], int]) -> None:
        """Do nothing."""

    def batch(self, size: int, wait_seconds: float, calls: Iterable[CallRecord]) -> AbstractContextManager[None]:  # noqa: ARG002 - of the protocol
        """Return a context that does nothing."""
        return nullcontext()


UNOBSERVED = _Unobserved()


@dataclass(slots=True)
class _QueuedItem(Generic[I, R]):
    item: I
    result: "asyncio.Future[R | PointbookError]"
    call: object
    """The same object for all items that were submitted together."""
    record: CallRecord | None
    """The gRPC call that submitted the item, if any."""
    queued_at: float


class Batcher(Generic[K, I, R]):
    """A bounded queue whose items are sent in batches, each with the items of one key.

    The next batch of a key leaves when the previous one has returned. While calls are concurrent, it first waits a
    moment for the items of more calls; calls that follow each other never wait. At most one batch of each key is in
    flight, so its items keep their order, and at most `max_concurrent_batches` of all keys.

    `send` returns a result or an error for each item of a batch. If it raises PointbookError, every item of the batch
    gets that error, and so do the queued items that were submitted together with the last one: an item is never sent
    after an earlier item of the same call was not.

    With `send_together`, the waiting batches of several keys are sent by one call, which returns results by key. Keys
    that it leaves out, and all if it raises an error, are then sent separately, each by the next free worker: one that
    is slow delays no other. So are all keys while `may_send_together` returns False.
    """

    def __init__(
        self,
        send: Callable[[K, Sequence[I]], Awaitable[Sequence[R | PointbookError]]],
        *,
        batch_max: int,
        waiting_max: int,
        max_concurrent_batches: int,
        observer: BatchObserver = UNOBSERVED,
        send_together: Callable[[Mapping[K, Sequence[I]]], Awaitable[Mapping[K, Sequence[R | PointbookError]]]]
        | None = None,
        may_send_together: Callable[[], bool] = lambda: True,
    ) -> None:
        self._send = send
        self._send_together = send_together
        self._may_send_together = may_send_together
        self._batch_max = batch_max
        self._waiting_max = waiting_max
        self._max_concurrent_batches = max_concurrent_batches
        self._observer = observer
        observer.watch(lambda: self._count)
        self._queues: dict[K, deque[_QueuedItem[I, R]]] = {}
        self._count = 0
        self._recent_calls = 1.0
        """How many calls shared a batch, as an average of recent ones. Batches sent together count as one."""
        self._keys_in_flight: set[K] = set()
        self._separate_keys: set[K] = set()
        """The queued keys whose next batch must not be sent together with others."""
        self._is_collecting = False
        """Whether a worker is about to take the waiting items of all keys."""
        self._workers: set[asyncio.Task[None]] = set()

    def check_capacity(self, count: int) -> None:
        """Raise QUEUE_FULL if `count` more items do not fit.

        A call is accepted as a whole or refused.
        """
        if self._count + count > self._waiting_max:
            raise PointbookError(
                Reason.QUEUE_FULL, "Too many calls are waiting; retry.", retry_after_seconds=RETRY_AFTER_SECONDS
            )

    def submit(self, key: K, items: Sequence[I]) -> "list[asyncio.Future[R | PointbookError]]":
        """Queue items, and return a future for each.

        Cancel a future to drop its item from the queue.
        """
        loop = asyncio.get_running_loop()
        call, record, now = object(), current_call.get(), monotonic()
        queued: list[_QueuedItem[I, R]] = [_QueuedItem(item, loop.create_future(), call, record, now) for item in items]
        self._queues.setdefault(key, deque()).extend(queued)
        self._count += len(items)
        if key not in self._keys_in_flight:
            # Otherwise the worker that sends this key's batch picks these items up next.
            self._start_worker()
        return [item.result for item in queued]

    async def run(self, key: K, item: I) -> R:
        """Queue an item, and return its result. Raises its error."""
        (future,) = self.submit(key, [item])
        result = await future
        if isinstance(result, PointbookError):
            raise result
        return result

    async def drain(self) -> None:
        """Wait until no batch is in flight."""
        while self._workers:
            await asyncio.wait(self._workers)

    def _start_worker(self) -> None:
        """Start one more worker unless the limit is reached.

        A worker without work ends at once.
        """
        if len(self._workers) < self._max_concurrent_batches:
            # A worker serves many calls, so its log lines must not carry the context of one of them.
            worker = asyncio.get_running_loop().create_task(self._work(), context=Context())
            self._workers.add(worker)

    async def _work(self) -> None:
        """Send batches until every queued key is in flight with another worker."""
        try:
            while (key := self._next_key()) is not None:
                self._keys_in_flight.add(key)
                batches: dict[K, list[_QueuedItem[I, R]]] = {key: []}
                try:
                    await self._wait_for_more(key)
                    batches = self._pop_batches(key)
                    await self._send_batches(batches)
                finally:
                    self._keys_in_flight.difference_update(batches)
        finally:
            # Removed here and not by a callback: an item submitted before the callback runs would get no worker.
            self._workers.difference_update({asyncio.current_task()})

    def _next_key(self) -> K | None:
        """Return the key that waits longest for a worker, if any."""
        waiting = (key for key in self._queues if key not in self._keys_in_flight)
        if self._is_collecting:
            return next((key for key in waiting if key in self._separate_keys), None)
        return next(waiting, None)

    async def _wait_for_more(self, key: K) -> None:
        """Yield to the loop so that concurrent calls can join this batch.

        Larger batches cost less per item. While the loop is busy, it admits more calls meanwhile; while it is idle,
        waiting costs QUIET_SECONDS of the processor's time.
        """
        if self._recent_calls < CONCURRENT_CALLS_MIN or key in self._separate_keys:
            return  # A separate batch has waited before.
        together = self._merges_keys()
        self._is_collecting |= together
        try:
            await self._wait_until_quiet(key, together=together)
        finally:
            if together:
                self._is_collecting = False

    async def _wait_until_quiet(self, key: K, *, together: bool) -> None:
        count = turns = 0
        started = changed = now = monotonic()
        while now - started < WAIT_SECONDS_MAX:
            waiting = self._waiting_size(key, together=together)
            if waiting >= min(WAIT_SIZE, self._batch_max) or (not together and self._lacks_worker()):
                return
            if waiting != count:
                count, turns, changed = waiting, 0, now
            elif turns >= QUIET_TURNS and now - changed >= QUIET_SECONDS:
                return
            await asyncio.sleep(0)
            turns += 1
            now = monotonic()

    def _waiting_size(self, key: K, *, together: bool) -> int:
        """Return how many items would leave with the next batch of a key.

        Counting ends at WAIT_SIZE.
        """
        size = len(self._queues[key])
        if together:
            excluded = self._keys_in_flight | self._separate_keys
            for other, queue in self._queues.items():
                if size >= WAIT_SIZE:
                    break
                if other not in excluded:
                    size += len(queue)
        return size

    def _lacks_worker(self) -> bool:
        """Return whether a key waits because all workers are busy."""
        return len(self._workers) >= self._max_concurrent_batches and self._next_key() is not None

    def _merges_keys(self) -> bool:
        return self._send_together is not None and self._may_send_together()

    def _pop_batches(self, key: K) -> dict[K, list[_QueuedItem[I, R]]]:
        """Remove and return the next batch of a key, with those to send together with it.

        Together they have at most `batch_max` items. All their keys are in flight then.
        """
        batches = {key: self._pop_batch(key, self._batch_max)}
        if key in self._separate_keys:
            self._separate_keys.discard(key)
            return batches
        if self._merges_keys():
            count = len(batches[key])
            excluded = self._keys_in_flight | self._separate_keys
            for other in [other for other in self._queues if other not in excluded]:
                if count >= self._batch_max:
                    break
                self._keys_in_flight.add(other)
                batches[other] = self._pop_batch(other, self._batch_max - count)
                count += len(batches[other])
        calls = {queued.call for batch in batches.values() for queued in batch}
        self._recent_calls += RECENT_WEIGHT * (min(len(calls), CALLS_COUNTED_MAX) - self._recent_calls)
        return batches

    def _pop_batch(self, key: K, count_max: int) -> list[_QueuedItem[I, R]]:
        """Remove and return the next items of a key, without cancelled ones."""
        queue = self._queues.pop(key)
        popped = [queue.popleft() for _ in range(min(len(queue), count_max))]
        if queue:
            self._queues[key] = queue  # at the end: other keys come first
        self._count -= len(popped)
        return [queued for queued in popped if not queued.result.cancelled()]

    def _requeue(self, key: K, batch: list[_QueuedItem[I, R]]) -> None:
        """Return a batch to the start of its key's queue, to be sent separately."""
        if batch:
            now = monotonic()
            for queued in batch:
                queued.queued_at = now
            self._queues[key] = deque([*batch, *self._queues.get(key, ())])
            self._count += len(batch)
            self._separate_keys.add(key)
        self._keys_in_flight.discard(key)

    def _fail_rest(self, key: K, call: object, error: PointbookError) -> None:
        """Fail the queued items of a call whose earlier items failed, with the same error."""
        queue = self._queues.get(key)
        while queue and queue[0].call is call:
            queued = queue.popleft()
            self._count -= 1
            if not queued.result.done():
                queued.result.set_result(error)
        if queue is not None and not queue:
            del self._queues[key]

    async def _send_batches(self, batches: dict[K, list[_QueuedItem[I, R]]]) -> None:
        """Send batches, and queue those again that must be sent separately."""
        self._start_worker_for_rest()
        size, wait_seconds = _end_waits(batches.values())
        if not size:
            return  # All were cancelled.
        records = (queued.record for batch in batches.values() for queued in batch)
        calls = (record for record in records if record is not None)
        with self._observer.batch(size, wait_seconds, calls):
            await self._send_or_requeue(batches)

    async def _send_or_requeue(self, batches: dict[K, list[_QueuedItem[I, R]]]) -> None:
        if len(batches) == 1:
            ((key, batch),) = batches.items()
            if batch:
                await self._send_batch(key, batch)
            return
        for key, results in (await self._send_all(batches)).items():
            _set_results(batches.pop(key), results)
            self._keys_in_flight.discard(key)
        for key in list(batches):
            self._requeue(key, batches.pop(key))

    def _start_worker_for_rest(self) -> None:
        """Start a worker for the waiting keys, if any, while this one is busy."""
        if not self._queues.keys() <= self._keys_in_flight:
            self._start_worker()

    async def _send_all(self, batches: Mapping[K, list[_QueuedItem[I, R]]]) -> Mapping[K, Sequence[R | PointbookError]]:
        """Return the results of the batches that could be sent together."""
        sent = {key: [queued.item for queued in batch] for key, batch in batches.items() if batch}
        if self._send_together is None or len(sent) <= 1:
            return {}
        try:
            return await self._send_together(sent)
        except Exception:  # noqa: BLE001 - the error of one batch must not fail the others; it occurs again
            return {}

    async def _send_batch(self, key: K, batch: list[_QueuedItem[I, R]]) -> None:
        try:
            results = await self._send(key, [queued.item for queued in batch])
        except PointbookError as error:
            results = [error] * len(batch)
            self._fail_rest(key, batch[-1].call, error)
        except Exception as error:  # noqa: BLE001 - raised again where the result is awaited
            if len(batch) == 1:
                if not batch[0].result.done():
                    batch[0].result.set_exception(error)
                return
            # Send the items one by one: a defect that one item hits must not fail the others.
            for queued in batch:
                await self._send_batch(key, [queued])
            return
        _set_results(batch, results)


def _end_waits(batches: Iterable[Sequence[_QueuedItem[I, R]]]) -> tuple[int, float]:
    """Add the waits of items to their calls.

    Return the number of items and the longest wait in seconds.
    """
    size, longest, now = 0, 0.0, monotonic()
    for batch in batches:
        size += len(batch)
        for queued in batch:
            longest = max(longest, now - queued.queued_at)
            if queued.record is not None:
                queued.record.add_wait(queued.queued_at, now)
    return size, longest


def _set_results(batch: Sequence[_QueuedItem[I, R]], results: Sequence[R | PointbookError]) -> None:
    for queued, result in zip(batch, results, strict=True):
        if not queued.result.done():
            queued.result.set_result(result)
