"""The Batcher: batches, their order and limits, and the result of each item."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from pointbook_server.errors import PointbookError
from pointbook_server.logs import CallRecord, current_call
from pointbook_server.reasons import Reason
from pointbook_server.rpc import batching
from pointbook_server.rpc.batching import QUIET_SECONDS, WAIT_SECONDS_MAX, WAIT_SIZE, Batcher

TURNS = 20
"""More turns of the event loop than the batcher needs to do all it can without a result."""


@dataclass
class Sender:
    """A `send` function that returns at once, or when a test releases it."""

    is_open: bool = True
    batches: list[tuple[str, list[str]]] = field(default_factory=list)
    errors: dict[str, Exception] = field(default_factory=dict)
    gates: dict[str, asyncio.Event] = field(default_factory=dict)

    async def __call__(self, key: str, items: Sequence[str]) -> list[str | PointbookError]:
        """Record a batch, wait until its key is released, and return its results."""
        self.batches.append((key, list(items)))
        if not self.is_open:
            await self.gates.setdefault(key, asyncio.Event()).wait()
        for item in items:
            if item in self.errors:
                raise self.errors[item]
        return [f"{key}:{item}" for item in items]

    def release(self, key: str) -> None:
        """Return the results of a key's current and later batches."""
        self.gates.setdefault(key, asyncio.Event()).set()


def new_batcher(
    sender: Sender, *, batch_max: int = 10, waiting_max: int = 100, max_concurrent_batches: int = 1
) -> Batcher[str, str, str]:
    """Build a batcher that sends to a sender."""
    return Batcher(sender, batch_max=batch_max, waiting_max=waiting_max, max_concurrent_batches=max_concurrent_batches)


def error(reason: Reason = Reason.TRANSACTION_CONFLICT) -> PointbookError:
    """Build an error for all items of a batch."""
    return PointbookError(reason, "Retry.")


async def settle() -> None:
    """Run the event loop until nothing more can happen without a result."""
    for _ in range(TURNS):
        await asyncio.sleep(0)


async def test_idle_batcher_sends_at_once() -> None:
    sender = Sender()
    batcher = new_batcher(sender)

    (result,) = batcher.submit("a", ["1"])
    await settle()

    assert result.done()
    assert await result == "a:1"
    assert sender.batches == [("a", ["1"])]


async def test_items_submitted_during_a_batch_share_the_next_batch() -> None:
    sender = Sender(is_open=False)
    batcher = new_batcher(sender)
    first = batcher.submit("a", ["1"])
    await settle()
    second = batcher.submit("a", ["2", "3"])
    third = batcher.submit("a", ["4"])
    await settle()
    assert sender.batches == [("a", ["1"])]

    sender.release("a")
    results = await asyncio.gather(*first, *second, *third)

    assert sender.batches == [("a", ["1"]), ("a", ["2", "3", "4"])]
    assert results == ["a:1", "a:2", "a:3", "a:4"]


async def test_items_submitted_together_share_a_batch() -> None:
    sender = Sender()
    batcher = new_batcher(sender)

    await asyncio.gather(*batcher.submit("a", ["1"]), *batcher.submit("a", ["2"]))

    assert sender.batches == [("a", ["1", "2"])]


@dataclass
class StoppedClock:
    """A clock that a test moves."""

    now: float = 0.0

    def __call__(self) -> float:
        """Return its time."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StoppedClock:
    """Return the clock by which batches wait."""
    clock = StoppedClock()
    monkeypatch.setattr(batching, "monotonic", clock)
    return clock


async def make_busy(batcher: Batcher[str, str, str]) -> None:
    """Send a batch of several calls."""
    await asyncio.gather(*(result for number in "12345678" for result in batcher.submit("busy", [number])))


@pytest.fixture
async def busy(clock: StoppedClock) -> tuple[Batcher[str, str, str], Sender, StoppedClock]:
    """Return a batcher whose latest batch had several calls, and its clock."""
    sender = Sender()
    batcher = new_batcher(sender, batch_max=100)
    await make_busy(batcher)
    sender.batches.clear()
    return batcher, sender, clock


async def submit_apart(
    batcher: Batcher[str, str, str], clock: StoppedClock, *items: tuple[str, str]
) -> "list[asyncio.Future[str | PointbookError]]":
    """Submit keys with items, each after half of the time that ends a wait."""
    results = []
    for key, item in items:
        results += batcher.submit(key, [item])
        await settle()
        clock.now += QUIET_SECONDS / 2
    await settle()
    return results


@pytest.mark.parametrize("count", [1, 2, 31])
@pytest.mark.usefixtures("clock")
async def test_calls_that_follow_each_other_never_wait(count: int) -> None:
    sender = Sender()
    batcher = new_batcher(sender, batch_max=100)

    for number in range(5):
        results = batcher.submit("a", [f"{number}"] * count)
        await settle()
        assert all(result.done() for result in results)

    assert [items for _, items in sender.batches] == [[f"{number}"] * count for number in range(5)]


async def test_concurrent_calls_join_a_batch_until_none_arrives(
    busy: tuple[Batcher[str, str, str], Sender, StoppedClock],
) -> None:
    batcher, sender, clock = busy
    results = await submit_apart(batcher, clock, ("a", "4"), ("a", "5"))
    assert not sender.batches

    await drain(batcher, clock)

    assert await asyncio.gather(*results) == ["a:4", "a:5"]
    assert sender.batches == [("a", ["4", "5"])]


async def test_batch_leaves_in_time_even_if_items_keep_arriving(
    busy: tuple[Batcher[str, str, str], Sender, StoppedClock],
) -> None:
    batcher, sender, clock = busy
    results = []
    while not sender.batches:
        results += batcher.submit("a", ["item"])
        await settle()
        clock.now += QUIET_SECONDS * 0.75

    assert 1 < len(sender.batches[0][1]) < WAIT_SIZE
    assert WAIT_SECONDS_MAX <= clock.now < 2 * WAIT_SECONDS_MAX
    await drain(batcher, clock)


async def test_large_batch_does_not_wait(busy: tuple[Batcher[str, str, str], Sender, StoppedClock]) -> None:
    batcher, sender, _ = busy

    await asyncio.gather(*batcher.submit("a", ["item"] * WAIT_SIZE))

    assert [len(items) for _, items in sender.batches] == [WAIT_SIZE]


async def test_batches_stop_waiting_once_calls_follow_each_other(
    busy: tuple[Batcher[str, str, str], Sender, StoppedClock],
) -> None:
    batcher, _, clock = busy
    for _ in range(20):
        (result,) = batcher.submit("a", ["item"])
        await settle()
        if result.done():
            return
        await drain(batcher, clock)

    pytest.fail("each call waited")


async def test_a_long_turn_of_the_loop_does_not_end_the_wait(
    busy: tuple[Batcher[str, str, str], Sender, StoppedClock],
) -> None:
    """The loop has admitted no call meanwhile."""
    batcher, sender, clock = busy
    results = batcher.submit("a", ["4"])
    await settle()
    clock.now += QUIET_SECONDS / 2
    results += batcher.submit("a", ["5"])
    await asyncio.sleep(0)
    clock.now += QUIET_SECONDS * 2
    await asyncio.sleep(0)
    results += batcher.submit("a", ["6"])
    await drain(batcher, clock)

    assert sender.batches == [("a", ["4", "5", "6"])]
    assert all(result.done() for result in results)


async def test_full_batch_does_not_wait(clock: StoppedClock) -> None:
    sender = Sender()
    batcher = new_batcher(sender, batch_max=4)
    await make_busy(batcher)

    await asyncio.gather(*batcher.submit("a", ["1", "2", "3", "4"]))

    assert sender.batches[-1] == ("a", ["1", "2", "3", "4"])
    assert clock.now == 0.0


async def test_batch_does_not_wait_while_another_key_lacks_a_worker(
    busy: tuple[Batcher[str, str, str], Sender, StoppedClock],
) -> None:
    batcher, sender, _ = busy
    results = batcher.submit("a", ["1"])
    await settle()
    assert not sender.batches

    results += batcher.submit("b", ["1"])
    await settle()

    assert sender.batches[0] == ("a", ["1"])
    await drain(batcher, busy[2])
    assert all(result.done() for result in results)


@dataclass
class SharedSender:
    """A `send_together` function that records what it is given."""

    sent: list[dict[str, list[str]]] = field(default_factory=list)

    async def __call__(self, batches: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """Record batches, and return their results."""
        self.sent.append({key: list(items) for key, items in batches.items()})
        return {key: [f"{key}:{item}" for item in items] for key, items in batches.items()}


async def test_keys_join_those_that_wait_to_be_sent_together(clock: StoppedClock) -> None:
    together = SharedSender()
    batcher = Batcher(Sender(), batch_max=100, waiting_max=100, max_concurrent_batches=2, send_together=together)
    await make_busy(batcher)
    results = await submit_apart(batcher, clock, ("a", "1"), ("b", "1"))
    assert not together.sent

    await drain(batcher, clock)

    assert await asyncio.gather(*results) == ["a:1", "b:1"]
    assert together.sent == [{"a": ["1"], "b": ["1"]}]


async def test_items_of_a_slow_key_do_not_end_the_wait_of_others(clock: StoppedClock) -> None:
    """They cannot be sent yet."""
    sender, together = Sender(is_open=False), SharedSender()
    sender.release("busy")
    batcher = Batcher(sender, batch_max=100, waiting_max=100, max_concurrent_batches=3, send_together=together)
    await make_busy(batcher)
    results = [result for number in "123" for result in batcher.submit("slow", [number])]
    await settle()
    clock.now += QUIET_SECONDS * 2
    await settle()
    results += batcher.submit("slow", ["item"] * WAIT_SIZE)

    results += batcher.submit("a", ["1"])
    await settle()
    results += batcher.submit("b", ["1"])
    await settle()
    assert not together.sent
    clock.now += QUIET_SECONDS * 2
    await settle()

    assert together.sent == [{"a": ["1"], "b": ["1"]}]
    sender.release("slow")
    await drain(batcher, clock)
    assert all(result.done() for result in results)


async def drain(batcher: Batcher[str, str, str], clock: StoppedClock) -> None:
    """Wait for all batches while the clock moves."""
    draining = asyncio.create_task(batcher.drain())
    while not draining.done():
        clock.now += QUIET_SECONDS
        await settle()


async def test_batch_contains_the_items_of_one_key() -> None:
    """A transaction writes one merchant."""
    sender = Sender()
    batcher = new_batcher(sender)

    results = await asyncio.gather(
        *batcher.submit("a", ["1"]), *batcher.submit("b", ["1"]), *batcher.submit("a", ["2"])
    )

    assert sender.batches == [("a", ["1", "2"]), ("b", ["1"])]
    assert results == ["a:1", "b:1", "a:2"]


async def test_batches_are_bounded_and_keys_take_turns() -> None:
    """A caller with thousands of items delays other keys by one batch only."""
    sender = Sender()
    batcher = new_batcher(sender, batch_max=2)

    await asyncio.gather(
        *batcher.submit("a", ["1", "2", "3", "4", "5"]), *batcher.submit("b", ["1"]), *batcher.submit("c", ["1"])
    )

    assert sender.batches == [("a", ["1", "2"]), ("b", ["1"]), ("c", ["1"]), ("a", ["3", "4"]), ("a", ["5"])]


async def test_batches_of_several_keys_run_concurrently() -> None:
    """A hanging transaction of one merchant occupies one worker."""
    sender = Sender(is_open=False)
    batcher = new_batcher(sender, max_concurrent_batches=2)
    slow = batcher.submit("slow", ["1"])
    sender.release("b")
    sender.release("c")

    results = await asyncio.gather(*batcher.submit("b", ["1"]), *batcher.submit("c", ["1"]))

    assert results == ["b:1", "c:1"]
    assert not slow[0].done()
    sender.release("slow")
    assert await slow[0] == "slow:1"


async def test_concurrent_batches_are_limited() -> None:
    sender = Sender(is_open=False)
    batcher = new_batcher(sender, max_concurrent_batches=2)
    results = [result for key in ("a", "b", "c") for result in batcher.submit(key, ["1"])]
    await settle()
    assert [key for key, _ in sender.batches] == ["a", "b"]

    for key in ("a", "b", "c"):
        sender.release(key)
    await asyncio.gather(*results)

    assert [key for key, _ in sender.batches] == ["a", "b", "c"]


async def test_one_batch_of_a_key_is_in_flight() -> None:
    """The items of a key keep their order, even if workers are free."""
    sender = Sender(is_open=False)
    batcher = new_batcher(sender, max_concurrent_batches=4, batch_max=1)
    results = batcher.submit("a", ["1", "2"])
    await settle()
    results += batcher.submit("a", ["3"])
    await settle()

    assert sender.batches == [("a", ["1"])]
    sender.release("a")
    assert await asyncio.gather(*results) == ["a:1", "a:2", "a:3"]
    assert [items for _, items in sender.batches] == [["1"], ["2"], ["3"]]


async def test_each_free_worker_sends_the_next_key() -> None:
    sender = Sender(is_open=False)
    batcher = new_batcher(sender, max_concurrent_batches=2)
    results = [*batcher.submit("a", ["1"]), *batcher.submit("b", ["1"])]
    await settle()
    results += [result for key in ("c", "d", "e") for result in batcher.submit(key, ["1"])]
    sender.release("a")
    sender.release("b")
    await settle()

    assert [key for key, _ in sender.batches] == ["a", "b", "c", "d"]
    for key in ("c", "d", "e"):
        sender.release(key)
    await asyncio.gather(*results)


@pytest.mark.parametrize("max_concurrent_batches", [1, 2, 4])
async def test_item_submitted_right_after_a_result_is_sent(max_concurrent_batches: int) -> None:
    """The worker that is about to end must not be relied on to send it."""
    sender = Sender(is_open=False)
    batcher = new_batcher(sender, max_concurrent_batches=max_concurrent_batches)

    async def call_twice(key: str) -> list[str | PointbookError]:
        return [await batcher.submit(key, ["1"])[0], await batcher.submit(key, ["2"])[0]]

    keys = [f"key-{number}" for number in range(max_concurrent_batches)]
    calls = [asyncio.create_task(call_twice(key)) for key in keys]
    await settle()
    for key in keys:
        sender.release(key)

    async with asyncio.timeout(5.0):
        assert await asyncio.gather(*calls) == [[f"{key}:1", f"{key}:2"] for key in keys]


async def test_full_queue_accepts_nothing() -> None:
    """A call is accepted as a whole or refused."""
    sender = Sender(is_open=False)
    batcher = new_batcher(sender, waiting_max=3)
    batcher.submit("a", ["1"])
    await settle()
    # One item is in flight, and no longer counts.
    waiting = batcher.submit("a", ["2", "3"])
    batcher.check_capacity(1)

    with pytest.raises(PointbookError) as caught:
        batcher.check_capacity(2)

    assert caught.value.reason is Reason.QUEUE_FULL
    assert caught.value.retry_after_seconds is not None
    batcher.check_capacity(1)
    sender.release("a")
    await asyncio.gather(*waiting)
    batcher.check_capacity(3)
    assert [items for _, items in sender.batches] == [["1"], ["2", "3"]]


async def test_item_cancelled_before_its_batch_is_not_sent() -> None:
    """It takes up no capacity of the batch or the queue."""
    sender = Sender(is_open=False)
    batcher = new_batcher(sender, waiting_max=3)
    batcher.submit("a", ["0"])
    await settle()
    one, two, three = batcher.submit("a", ["1", "2", "3"])
    two.cancel()

    sender.release("a")

    assert await one == "a:1"
    assert await three == "a:3"
    assert sender.batches == [("a", ["0"]), ("a", ["1", "3"])]
    batcher.check_capacity(3)


async def test_batch_of_cancelled_items_is_not_sent() -> None:
    sender = Sender(is_open=False)
    batcher = new_batcher(sender)
    batcher.submit("a", ["0"])
    await settle()
    for result in batcher.submit("a", ["1", "2"]):
        result.cancel()
    (other,) = batcher.submit("b", ["1"])
    sender.release("a")
    sender.release("b")

    assert await other == "b:1"
    assert sender.batches == [("a", ["0"]), ("b", ["1"])]


async def test_item_cancelled_in_flight_affects_no_other_item() -> None:
    sender = Sender(is_open=False)
    batcher = new_batcher(sender)
    one, two = batcher.submit("a", ["1", "2"])
    await settle()
    one.cancel()
    sender.release("a")

    assert await two == "a:2"
    assert one.cancelled()


async def test_error_of_a_batch_fails_all_its_items() -> None:
    sender = Sender(errors={"2": error()})
    batcher = new_batcher(sender)

    results = await asyncio.gather(*batcher.submit("a", ["1", "2", "3"]))

    assert results == [sender.errors["2"]] * 3
    assert sender.batches == [("a", ["1", "2", "3"])]


async def test_error_of_a_batch_does_not_fail_the_next_batch() -> None:
    sender = Sender(errors={"1": error()})
    batcher = new_batcher(sender, batch_max=1)

    results = await asyncio.gather(
        *batcher.submit("a", ["1"]), *batcher.submit("a", ["2"]), *batcher.submit("b", ["3"])
    )

    assert results == [sender.errors["1"], "a:2", "b:3"]


async def test_defect_of_one_item_fails_only_that_item() -> None:
    """After an unexpected error, each item is sent again by itself."""
    sender = Sender(errors={"2": ZeroDivisionError("a defect")})
    batcher = new_batcher(sender)

    one, two, three = await asyncio.gather(*batcher.submit("a", ["1", "2", "3"]), return_exceptions=True)

    assert (one, three) == ("a:1", "a:3")
    assert two is sender.errors["2"]
    assert [items for _, items in sender.batches] == [["1", "2", "3"], ["1"], ["2"], ["3"]]


async def test_defect_of_a_single_item_does_not_end_the_worker() -> None:
    """The exception is raised only where the result is awaited."""
    sender = Sender(is_open=False, errors={"1": ZeroDivisionError("a defect")})
    batcher = new_batcher(sender)
    (defective,) = batcher.submit("a", ["1"])
    await settle()
    defective.cancel()
    sender.release("a")

    assert await batcher.submit("a", ["2"])[0] == "a:2"
    with pytest.raises(ZeroDivisionError):
        await batcher.submit("a", ["1"])[0]
    assert await batcher.submit("a", ["3"])[0] == "a:3"


async def test_idle_batcher_drains_at_once() -> None:
    async with asyncio.timeout(5.0):
        await new_batcher(Sender()).drain()


async def test_drain_waits_for_all_results() -> None:
    """Including queued items, and items whose callers have gone away."""
    sender = Sender(is_open=False)
    batcher = new_batcher(sender, batch_max=1, max_concurrent_batches=2)
    results = [*batcher.submit("a", ["1", "2"]), *batcher.submit("b", ["1"])]
    draining = asyncio.create_task(batcher.drain())
    await settle()
    assert not draining.done()
    sender.release("b")
    await settle()
    results[0].cancel()
    assert not draining.done()

    sender.release("a")
    async with asyncio.timeout(5.0):
        await draining

    assert [result.done() for result in results] == [True, True, True]
    assert sender.batches == [("a", ["1"]), ("b", ["1"]), ("a", ["2"])]


async def test_rest_of_a_call_is_not_sent_after_its_batch_failed() -> None:
    """Items depend on earlier ones: without them, results would be wrong."""
    outage = error(Reason.DATABASE_UNAVAILABLE)
    sent: list[list[int]] = []

    async def send(_key: str, items: Sequence[int]) -> list[int]:
        sent.append(list(items))
        if items[0] == 1:
            raise outage
        return list(items)

    batcher: Batcher[str, int, int] = Batcher(send, batch_max=2, waiting_max=7, max_concurrent_batches=1)
    results = [*batcher.submit("a", [1, 2, 3, 4, 5]), *batcher.submit("a", [6]), *batcher.submit("b", [7])]
    returned = await asyncio.gather(*results)

    assert returned == [outage] * 5 + [6, 7]
    assert sent == [[1, 2], [7], [6]]
    batcher.check_capacity(7)


@dataclass
class TogetherSender:
    """A `send_together` function that serves all keys but some."""

    refused: frozenset[str] = frozenset()
    error: Exception | None = None
    calls: list[dict[str, list[str]]] = field(default_factory=list)

    async def __call__(self, batches: Mapping[str, Sequence[str]]) -> dict[str, list[str | PointbookError]]:
        """Record a call, and return the results of the keys that it serves."""
        self.calls.append({key: list(items) for key, items in batches.items()})
        if self.error is not None:
            raise self.error
        return {key: [f"{key}:{item}" for item in items] for key, items in batches.items() if key not in self.refused}


def new_merging_batcher(
    sender: Sender,
    together: Callable[[Mapping[str, Sequence[str]]], Awaitable[dict[str, list[str | PointbookError]]]],
    *,
    batch_max: int = 10,
    max_concurrent_batches: int = 1,
    may_send_together: bool = True,
) -> Batcher[str, str, str]:
    """Build a batcher that can send several keys together."""
    return Batcher(
        sender,
        batch_max=batch_max,
        waiting_max=100,
        max_concurrent_batches=max_concurrent_batches,
        send_together=together,
        may_send_together=lambda: may_send_together,
    )


async def test_waits_of_a_call_count_once(clock: StoppedClock) -> None:
    """All items waited 1 s for the first batch, and two 1 s more for the second."""
    sender = Sender(is_open=False)
    batcher = new_batcher(sender, batch_max=2)
    batcher.submit("a", ["earlier"])
    await settle()
    call = CallRecord("PointsService/BatchApplyPointsUpdates", "id", clock.now)
    current_call.set(call)
    results = batcher.submit("a", ["1", "2", "3", "4"])
    gate = sender.gates["a"]

    for number in (1, 2):
        clock.now += 1
        gate.set()
        sender.gates["a"] = next_gate = asyncio.Event()
        await settle()
        assert call.queue_seconds == number
        gate = next_gate

    gate.set()
    assert await asyncio.gather(*results) == ["a:1", "a:2", "a:3", "a:4"]


async def test_the_failure_to_send_together_is_no_wait(clock: StoppedClock) -> None:
    async def fail_slowly(_batches: Mapping[str, Sequence[str]]) -> dict[str, list[str | PointbookError]]:
        clock.now += 1
        raise error()

    batcher = new_merging_batcher(Sender(), fail_slowly)
    call = CallRecord("PointsService/ApplyPointsUpdate", "id", clock.now)
    current_call.set(call)

    await asyncio.gather(*batcher.submit("a", ["1"]), *batcher.submit("b", ["2"]))

    assert call.queue_seconds == 0


async def test_waiting_keys_are_sent_together() -> None:
    sender, together = Sender(), TogetherSender()
    batcher = new_merging_batcher(sender, together, batch_max=3)

    results = [*batcher.submit("a", ["1", "2"]), *batcher.submit("b", ["3", "4"]), *batcher.submit("c", ["5"])]

    assert await asyncio.gather(*results) == ["a:1", "a:2", "b:3", "b:4", "c:5"]
    assert together.calls == [{"a": ["1", "2"], "b": ["3"]}, {"c": ["5"], "b": ["4"]}]
    assert sender.batches == []


async def test_keys_that_may_not_be_sent_together_do_not_wait_for_each_other() -> None:
    sender, together = Sender(is_open=False), TogetherSender()
    batcher = new_merging_batcher(sender, together, max_concurrent_batches=2, may_send_together=False)
    results = [*batcher.submit("a", ["1", "2"]), *batcher.submit("b", ["3"]), *batcher.submit("c", ["4"])]
    await settle()
    assert sender.batches == [("a", ["1", "2"]), ("b", ["3"])]

    sender.release("b")
    await settle()
    assert sender.batches[2:] == [("c", ["4"])]

    sender.release("a")
    sender.release("c")
    assert await asyncio.gather(*results) == ["a:1", "a:2", "b:3", "c:4"]
    assert together.calls == []


async def test_one_waiting_key_is_sent_by_itself() -> None:
    sender, together = Sender(), TogetherSender()

    await asyncio.gather(*new_merging_batcher(sender, together).submit("a", ["1", "2"]))

    assert (sender.batches, together.calls) == ([("a", ["1", "2"])], [])


async def test_keys_that_were_not_served_together_are_sent_separately() -> None:
    """A slow one delays neither the others nor the next items of the served ones."""
    sender, together = Sender(is_open=False), TogetherSender(refused=frozenset("ac"))
    batcher = new_merging_batcher(sender, together, max_concurrent_batches=2)
    (a,), (b,), (c,) = (batcher.submit(key, ["1"]) for key in "abc")
    await settle()
    assert [result.done() for result in (a, b, c)] == [False, True, False]
    assert sender.batches == [("a", ["1"]), ("c", ["1"])]

    (next_of_b,), (next_of_c,) = batcher.submit("b", ["2"]), batcher.submit("c", ["2"])
    sender.release("b")
    sender.release("c")
    assert [await result for result in (c, next_of_b, next_of_c)] == ["c:1", "b:2", "c:2"]
    assert not a.done()

    sender.release("a")
    assert await a == "a:1"
    await batcher.drain()
    batcher.check_capacity(100)


async def test_items_keep_their_order_when_their_batch_is_sent_separately() -> None:
    sender, together = Sender(), TogetherSender(error=error())
    batcher = new_merging_batcher(sender, together, batch_max=2)

    await asyncio.gather(*batcher.submit("a", ["1"]), *batcher.submit("b", ["2", "3", "4"]))

    assert together.calls[0] == {"a": ["1"], "b": ["2"]}
    assert [item for key, items in sender.batches if key == "b" for item in items] == ["2", "3", "4"]


async def test_a_key_that_must_be_sent_separately_is_so_once() -> None:
    sender, together = Sender(), TogetherSender(refused=frozenset("ab"))
    batcher = new_merging_batcher(sender, together)

    for _ in range(2):
        await asyncio.gather(*batcher.submit("a", ["1"]), *batcher.submit("b", ["2"]))

    assert together.calls == [{"a": ["1"], "b": ["2"]}] * 2


@pytest.mark.parametrize("cause", [ValueError("a defect"), error()])
async def test_error_of_a_call_for_several_keys_fails_only_the_items_that_cause_it(cause: Exception) -> None:
    sender = Sender(errors={"2": ValueError("a defect")})
    batcher = new_merging_batcher(sender, TogetherSender(error=cause))

    results = [*batcher.submit("a", ["1"]), *batcher.submit("b", ["2", "3"])]
    returned = await asyncio.gather(*results, return_exceptions=True)

    assert [returned[0], returned[2]] == ["a:1", "b:3"]
    assert isinstance(returned[1], ValueError)


async def test_cancelled_items_are_not_sent_together() -> None:
    sender, together = Sender(), TogetherSender()
    batcher = new_merging_batcher(sender, together)
    (a,), (b,) = batcher.submit("a", ["1"]), batcher.submit("b", ["2"])
    a.cancel()

    assert await b == "b:2"
    await batcher.drain()
    batcher.check_capacity(100)
