"""Batches are concurrent unless they share an account or an event_id."""

import asyncio
from collections.abc import Callable, Sequence

import pytest

from pointbook.v1 import points_pb2
from pointbook_cli.points_import.batch_sender import BatchScheduler
from pointbook_cli.points_import.sorted_lines import LineBatch, SortedLine

IN_FLIGHT = 3


def batch(number: int, shared: str = "") -> LineBatch:
    """Return a batch of one line with shared keys."""
    line = SortedLine(number, b"", b"", None, points_pb2.PointsUpdate())
    return LineBatch([line], frozenset(letter.encode() for letter in shared))


def reader(shared: Sequence[str]) -> Callable[[], LineBatch | None]:
    """Return a function that reads numbered batches."""
    batches = iter([batch(number, names) for number, names in enumerate(shared)])
    return lambda: next(batches, None)


class Road:
    """A recorder of concurrent batches."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.met: set[frozenset[int]] = set()
        self.most = 0
        self._under_way: set[int] = set()

    async def send(self, batch: LineBatch) -> None:
        """Record the batches that are concurrent with this one."""
        number = batch.lines[0].number
        self.met |= {frozenset({number, other}) for other in self._under_way}
        self._under_way.add(number)
        self.most = max(self.most, len(self._under_way))
        await asyncio.sleep(0.02)
        self._under_way.remove(number)
        self.sent.append(number)


async def test_batches_that_share_an_account_or_event_id_are_never_concurrent() -> None:
    road = Road()
    shared = ["ab", "bc", "cd", "e", "f", "g", "ex", "x", "y", "zx"]

    await BatchScheduler(road.send, in_flight=IN_FLIGHT, stop=asyncio.Event()).run(reader(shared))

    assert sorted(road.sent) == list(range(10))
    assert road.most == IN_FLIGHT
    assert all(set(shared[one]).isdisjoint(shared[other]) for one, other in map(sorted, road.met))
    assert all(
        road.sent.index(one) < road.sent.index(other)
        for other in range(10)
        for one in range(other)
        if not set(shared[one]).isdisjoint(shared[other])
    )


async def test_batches_are_read_only_when_they_can_be_sent() -> None:
    read: list[int] = []
    sent: list[int] = []

    def next_batch() -> LineBatch | None:
        read.append(len(read))
        assert len(read) - len(sent) <= IN_FLIGHT + 1
        return batch(len(read)) if len(read) < 50 else None

    async def send(batch: LineBatch) -> None:
        await asyncio.sleep(0.001)
        sent.append(batch.lines[0].number)

    await BatchScheduler(send, in_flight=IN_FLIGHT, stop=asyncio.Event()).run(next_batch)

    assert len(sent) == 49


async def test_the_first_error_stops_further_batches() -> None:
    sent: list[int] = []

    async def send(batch: LineBatch) -> None:
        sent.append(batch.lines[0].number)
        await asyncio.sleep(0.01)
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        await BatchScheduler(send, in_flight=IN_FLIGHT, stop=asyncio.Event()).run(reader([""] * 50))

    assert len(sent) <= IN_FLIGHT + 1


async def test_after_a_stop_no_further_batch_is_sent() -> None:
    stop = asyncio.Event()
    sent: list[int] = []

    async def send(batch: LineBatch) -> None:
        await asyncio.sleep(0.01)
        sent.append(batch.lines[0].number)
        stop.set()

    await BatchScheduler(send, in_flight=IN_FLIGHT, stop=stop).run(reader([""] * 50))

    assert 1 <= len(sent) <= IN_FLIGHT + 1
