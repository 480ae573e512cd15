"""Calls that wait at the same time share a transaction: the next batch leaves when the previous one has returned.

There is no timer, so that a call at an idle server waits for nobody. What a batch is, and what is done with it, is
the business of whoever owns the line.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Generic, TypeVar

from pointbook_server.errors import PointbookError, Reason

RETRY_AFTER_SECONDS = 0.5

QUIET_TURNS = 2
"""A batch leaves once so many turns of the loop, one after the other, have brought no item that joins it.

Callers come in steps, since their requests are read after they were admitted: one quiet turn is often a gap.
"""
TURNS_MAX = 16
"""How many turns of the loop a batch waits at most."""

K = TypeVar("K")
I = TypeVar("I")  # noqa: E741 - an item
R = TypeVar("R")


@dataclass(slots=True)
class _Waiting(Generic[I, R]):
    item: I
    answer: "asyncio.Future[R | PointbookError]"
    call: object
    """The same for all items that were put together."""


class Line(Generic[K, I, R]):
    """A bounded waiting line. A batch holds the items of one key, which have their turns.

    `send` answers each item of a batch with a result or with an error of its own; where it raises, all of them get
    that error, and so do the items behind them that were put together with the last: none is sent where one before it
    was not. Of each key one batch is on its way at a time, so that its items keep their order, and of all keys `lanes`
    batches.
    """

    def __init__(
        self,
        send: Callable[[K, Sequence[I]], Awaitable[Sequence[R | PointbookError]]],
        *,
        batch_max: int,
        waiting_max: int,
        lanes: int,
    ) -> None:
        self._send = send
        self._batch_max = batch_max
        self._waiting_max = waiting_max
        self._lanes_max = lanes
        self._lines: dict[K, deque[_Waiting[I, R]]] = {}
        self._count = 0
        self._on_the_way: set[K] = set()
        self._lanes: set[asyncio.Task[None]] = set()

    def admit(self, count: int) -> None:
        """Raise QUEUE_FULL where so many more items do not fit: a call is taken wholly or not at all."""
        if self._count + count > self._waiting_max:
            raise PointbookError(
                Reason.QUEUE_FULL, "Too many calls wait; retry.", retry_after_seconds=RETRY_AFTER_SECONDS
            )

    def put(self, key: K, items: Sequence[I]) -> "list[asyncio.Future[R | PointbookError]]":
        """Let items wait for their batch, and return their answers to be. Whoever stops waiting cancels them."""
        loop = asyncio.get_running_loop()
        call = object()
        waiting: list[_Waiting[I, R]] = [_Waiting(item, loop.create_future(), call) for item in items]
        self._lines.setdefault(key, deque()).extend(waiting)
        self._count += len(items)
        if key not in self._on_the_way:
            # Otherwise the lane that its batch is on comes back for these.
            self._open_lane()
        return [item.answer for item in waiting]

    async def drain(self) -> None:
        """Wait until nothing is on its way."""
        while self._lanes:
            await asyncio.wait(self._lanes)

    def _open_lane(self) -> None:
        """Open one more lane, if there may be one: where it finds nothing to do it ends."""
        if len(self._lanes) < self._lanes_max:
            # A lane serves many calls, so that it must not log under the name of one.
            lane = asyncio.get_running_loop().create_task(self._work(), context=Context())
            self._lanes.add(lane)

    async def _work(self) -> None:
        """Send batch after batch, as long as anything waits that is not on another lane."""
        try:
            while (key := next((key for key in self._lines if key not in self._on_the_way), None)) is not None:
                self._on_the_way.add(key)
                try:
                    await self._let_join(key)
                    if batch := self._take(key):
                        await self._answer(key, batch)
                finally:
                    self._on_the_way.discard(key)
        finally:
            # At once, and not when the loop comes to it: whoever puts something in between must get a lane.
            self._lanes.difference_update({asyncio.current_task()})

    async def _let_join(self, key: K) -> None:
        """Let whoever is about to be put in line at this very moment come along: larger batches cost less."""
        count = quiet_turns = 0
        for _ in range(TURNS_MAX):
            quiet_turns = quiet_turns + 1 if len(self._lines[key]) == count else 0
            if quiet_turns == QUIET_TURNS:
                return
            count = len(self._lines[key])
            await asyncio.sleep(0)

    def _take(self, key: K) -> list[_Waiting[I, R]]:
        """Take the next batch of a key, without those that nobody waits for any more; the rest waits for its turn."""
        line = self._lines.pop(key)
        taken = [line.popleft() for _ in range(min(len(line), self._batch_max))]
        if line:
            self._lines[key] = line
        self._count -= len(taken)
        return [waiting for waiting in taken if not waiting.answer.cancelled()]

    def _fail_rest(self, key: K, call: object, error: PointbookError) -> None:
        """Answer what is left of a call whose earlier items got an error, all of it the same."""
        line = self._lines.get(key)
        while line and line[0].call is call:
            waiting = line.popleft()
            self._count -= 1
            if not waiting.answer.done():
                waiting.answer.set_result(error)
        if line is not None and not line:
            del self._lines[key]

    async def _answer(self, key: K, batch: list[_Waiting[I, R]]) -> None:
        try:
            answers = await self._send(key, [waiting.item for waiting in batch])
        except PointbookError as error:
            answers = [error] * len(batch)
            self._fail_rest(key, batch[-1].call, error)
        except Exception as error:  # noqa: BLE001 - it is raised again where the answer is awaited
            if len(batch) == 1:
                if not batch[0].answer.done():
                    batch[0].answer.set_exception(error)
                return
            # A defect that one item meets must not become its neighbours'.
            for waiting in batch:
                await self._answer(key, [waiting])
            return
        for waiting, answer in zip(batch, answers, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(answer)
