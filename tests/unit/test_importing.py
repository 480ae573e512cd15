"""Batches are on their way side by side, as far as the order of their lines does not matter."""

import asyncio
from collections.abc import Callable, Sequence

import pytest

from pointbook.v1 import points_pb2
from pointbook_cli.importing import Importer
from pointbook_cli.points_file import Batch, Line

IN_FLIGHT = 3


def batch(number: int, *, has_balance: bool) -> Batch:
    """A batch of one line."""
    return Batch([Line(number, points_pb2.PointsUpdate(points_balance=1 if has_balance else None))])


def reader(balances: Sequence[bool]) -> Callable[[], Batch | None]:
    """Read batches that tell by their number which they are."""
    batches = iter([batch(number, has_balance=has_balance) for number, has_balance in enumerate(balances)])
    return lambda: next(batches, None)


class Road:
    """Takes batches, and notes which of them met on their way."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.met: set[frozenset[int]] = set()
        self.most = 0
        self._under_way: set[int] = set()

    async def send(self, batch: Batch) -> None:
        """Take a batch a while."""
        number = batch.lines[0].number
        self.met |= {frozenset({number, other}) for other in self._under_way}
        self._under_way.add(number)
        self.most = max(self.most, len(self._under_way))
        await asyncio.sleep(0.02)
        self._under_way.remove(number)
        self.sent.append(number)


async def test_a_batch_with_a_line_without_balance_travels_alone() -> None:
    """It waits for all before it, and all behind wait for it; the others go side by side, never too many."""
    road = Road()
    balances = [True, True, True, True, False, True, True, False, False, True]

    await Importer(road.send, in_flight=IN_FLIGHT, stop=asyncio.Event()).run(reader(balances))

    assert sorted(road.sent) == list(range(10))
    assert road.most == IN_FLIGHT
    alone = {number for number, has_balance in enumerate(balances) if not has_balance}
    assert not any(pair & alone for pair in road.met)
    assert road.sent.index(4) == 4


async def test_no_more_is_read_than_can_be_sent() -> None:
    """A slow server keeps the rest of the file out of memory."""
    read: list[int] = []
    sent: list[int] = []

    def next_batch() -> Batch | None:
        read.append(len(read))
        assert len(read) - len(sent) <= IN_FLIGHT + 1
        return batch(len(read), has_balance=True) if len(read) < 50 else None

    async def send(batch: Batch) -> None:
        await asyncio.sleep(0.001)
        sent.append(batch.lines[0].number)

    await Importer(send, in_flight=IN_FLIGHT, stop=asyncio.Event()).run(next_batch)

    assert len(sent) == 49


async def test_the_first_error_ends_it() -> None:
    """What goes wrong with one batch keeps those behind it from being sent."""
    sent: list[int] = []

    async def send(batch: Batch) -> None:
        sent.append(batch.lines[0].number)
        await asyncio.sleep(0.01)
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        await Importer(send, in_flight=IN_FLIGHT, stop=asyncio.Event()).run(reader([True] * 50))

    assert len(sent) <= IN_FLIGHT + 1


async def test_a_stop_sends_nothing_more() -> None:
    """What is on its way gets a moment to arrive; nothing follows it."""
    stop = asyncio.Event()
    sent: list[int] = []

    async def send(batch: Batch) -> None:
        await asyncio.sleep(0.01)
        sent.append(batch.lines[0].number)
        stop.set()

    await Importer(send, in_flight=IN_FLIGHT, stop=stop).run(reader([True] * 50))

    assert 1 <= len(sent) <= IN_FLIGHT + 1
