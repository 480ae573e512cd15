"""Batches are on their way side by side, unless they share an account or an event_id."""

import asyncio
from collections.abc import Callable, Sequence

import pytest

from pointbook.v1 import points_pb2
from pointbook_cli.importing import Importer
from pointbook_cli.sorted_lines import Batch, SortedLine

IN_FLIGHT = 3


def batch(number: int, shared: str = "") -> Batch:
    """A batch of one line, and the names that it shares with others."""
    line = SortedLine(number, b"", b"", None, points_pb2.PointsUpdate())
    return Batch([line], frozenset(letter.encode() for letter in shared))


def reader(shared: Sequence[str]) -> Callable[[], Batch | None]:
    """Read batches that tell by their number which they are."""
    batches = iter([batch(number, names) for number, names in enumerate(shared)])
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


async def test_batches_that_share_something_never_meet() -> None:
    """The later one waits for the earlier; the others go side by side, never too many."""
    road = Road()
    shared = ["ab", "bc", "cd", "e", "f", "g", "ex", "x", "y", "zx"]

    await Importer(road.send, in_flight=IN_FLIGHT, stop=asyncio.Event()).run(reader(shared))

    assert sorted(road.sent) == list(range(10))
    assert road.most == IN_FLIGHT
    assert all(set(shared[one]).isdisjoint(shared[other]) for one, other in map(sorted, road.met))
    assert all(
        road.sent.index(one) < road.sent.index(other)
        for other in range(10)
        for one in range(other)
        if not set(shared[one]).isdisjoint(shared[other])
    )


async def test_no_more_is_read_than_can_be_sent() -> None:
    """A slow server keeps the rest of the file out of memory."""
    read: list[int] = []
    sent: list[int] = []

    def next_batch() -> Batch | None:
        read.append(len(read))
        assert len(read) - len(sent) <= IN_FLIGHT + 1
        return batch(len(read)) if len(read) < 50 else None

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
        await Importer(send, in_flight=IN_FLIGHT, stop=asyncio.Event()).run(reader([""] * 50))

    assert len(sent) <= IN_FLIGHT + 1


async def test_a_stop_sends_nothing_more() -> None:
    """What is on its way gets a moment to arrive; nothing follows it."""
    stop = asyncio.Event()
    sent: list[int] = []

    async def send(batch: Batch) -> None:
        await asyncio.sleep(0.01)
        sent.append(batch.lines[0].number)
        stop.set()

    await Importer(send, in_flight=IN_FLIGHT, stop=stop).run(reader([""] * 50))

    assert 1 <= len(sent) <= IN_FLIGHT + 1
