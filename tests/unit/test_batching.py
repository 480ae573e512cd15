"""The waiting line, one small example each: who travels with whom, in what order, and who hears what."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from pointbook_server.errors import PointbookError, Reason
from pointbook_server.rpc.batching import Batcher

SOME_TURNS = 20
"""More turns of the event loop than a line takes to do all that it can without an answer."""


@dataclass
class Sender:
    """What a line sends its batches to: it answers when a test lets it, or at once."""

    is_open: bool = True
    batches: list[tuple[str, list[str]]] = field(default_factory=list)
    errors: dict[str, Exception] = field(default_factory=dict)
    gates: dict[str, asyncio.Event] = field(default_factory=dict)

    async def __call__(self, key: str, items: Sequence[str]) -> list[str | PointbookError]:
        """Note a batch, wait until its key may go on, and answer each item with its own name."""
        self.batches.append((key, list(items)))
        if not self.is_open:
            await self.gates.setdefault(key, asyncio.Event()).wait()
        for item in items:
            if item in self.errors:
                raise self.errors[item]
        return [f"{key}:{item}" for item in items]

    def let_go(self, key: str) -> None:
        """Answer the batches of a key, and those that follow."""
        self.gates.setdefault(key, asyncio.Event()).set()


def new_batcher(
    sender: Sender, *, batch_max: int = 10, waiting_max: int = 100, max_concurrent_batches: int = 1
) -> Batcher[str, str, str]:
    """Make a line that sends to a sender."""
    return Batcher(sender, batch_max=batch_max, waiting_max=waiting_max, max_concurrent_batches=max_concurrent_batches)


def error(reason: Reason = Reason.TRANSACTION_CONFLICT) -> PointbookError:
    """An error that is told to callers."""
    return PointbookError(reason, "Retry.")


async def turns() -> None:
    """Let the event loop do what there is to do."""
    for _ in range(SOME_TURNS):
        await asyncio.sleep(0)


async def test_idle_batcher_sends_at_once() -> None:
    """There is no timer: a call at an idle server waits for nobody."""
    sender = Sender()
    batcher = new_batcher(sender)

    (answer,) = batcher.submit("a", ["1"])
    await turns()

    assert answer.done()
    assert await answer == "a:1"
    assert sender.batches == [("a", ["1"])]


async def test_items_submitted_during_a_batch_share_the_next_batch() -> None:
    """The next batch leaves when the previous one has returned, and takes all that wait, in their order."""
    sender = Sender(is_open=False)
    batcher = new_batcher(sender)
    first = batcher.submit("a", ["1"])
    await turns()
    second = batcher.submit("a", ["2", "3"])
    third = batcher.submit("a", ["4"])
    await turns()
    assert sender.batches == [("a", ["1"])]

    sender.let_go("a")
    answers = await asyncio.gather(*first, *second, *third)

    assert sender.batches == [("a", ["1"]), ("a", ["2", "3", "4"])]
    assert answers == ["a:1", "a:2", "a:3", "a:4"]


async def test_items_submitted_together_share_a_batch() -> None:
    """Items of several calls of one moment share the very first batch."""
    sender = Sender()
    batcher = new_batcher(sender)

    await asyncio.gather(*batcher.submit("a", ["1"]), *batcher.submit("a", ["2"]))

    assert sender.batches == [("a", ["1", "2"])]


async def test_batch_contains_the_items_of_one_key() -> None:
    """A transaction touches one merchant."""
    sender = Sender()
    batcher = new_batcher(sender)

    answers = await asyncio.gather(
        *batcher.submit("a", ["1"]), *batcher.submit("b", ["1"]), *batcher.submit("a", ["2"])
    )

    assert sender.batches == [("a", ["1", "2"]), ("b", ["1"])]
    assert answers == ["a:1", "b:1", "a:2"]


async def test_batches_are_bounded_and_keys_take_turns() -> None:
    """Who sends thousands does not keep the others waiting: behind each of its batches it is their turn."""
    sender = Sender()
    batcher = new_batcher(sender, batch_max=2)

    await asyncio.gather(
        *batcher.submit("a", ["1", "2", "3", "4", "5"]), *batcher.submit("b", ["1"]), *batcher.submit("c", ["1"])
    )

    assert sender.batches == [("a", ["1", "2"]), ("b", ["1"]), ("c", ["1"]), ("a", ["3", "4"]), ("a", ["5"])]


async def test_batches_of_several_keys_run_concurrently() -> None:
    """A merchant whose transaction hangs keeps one lane, and the others go on."""
    sender = Sender(is_open=False)
    batcher = new_batcher(sender, max_concurrent_batches=2)
    slow = batcher.submit("slow", ["1"])
    sender.let_go("b")
    sender.let_go("c")

    answers = await asyncio.gather(*batcher.submit("b", ["1"]), *batcher.submit("c", ["1"]))

    assert answers == ["b:1", "c:1"]
    assert not slow[0].done()
    sender.let_go("slow")
    assert await slow[0] == "slow:1"


async def test_concurrent_batches_are_limited() -> None:
    """Further keys wait until a lane is free."""
    sender = Sender(is_open=False)
    batcher = new_batcher(sender, max_concurrent_batches=2)
    answers = [answer for key in ("a", "b", "c") for answer in batcher.submit(key, ["1"])]
    await turns()
    assert [key for key, _ in sender.batches] == ["a", "b"]

    for key in ("a", "b", "c"):
        sender.let_go(key)
    await asyncio.gather(*answers)

    assert [key for key, _ in sender.batches] == ["a", "b", "c"]


async def test_one_batch_of_a_key_is_in_flight() -> None:
    """Free lanes do not overtake: the items of a key keep their order."""
    sender = Sender(is_open=False)
    batcher = new_batcher(sender, max_concurrent_batches=4, batch_max=1)
    answers = batcher.submit("a", ["1", "2"])
    await turns()
    answers += batcher.submit("a", ["3"])
    await turns()

    assert sender.batches == [("a", ["1"])]
    sender.let_go("a")
    assert await asyncio.gather(*answers) == ["a:1", "a:2", "a:3"]
    assert [items for _, items in sender.batches] == [["1"], ["2"], ["3"]]


async def test_queued_keys_use_every_worker() -> None:
    """Each lane that comes free takes the next of them."""
    sender = Sender(is_open=False)
    batcher = new_batcher(sender, max_concurrent_batches=2)
    answers = [*batcher.submit("a", ["1"]), *batcher.submit("b", ["1"])]
    await turns()
    answers += [answer for key in ("c", "d", "e") for answer in batcher.submit(key, ["1"])]
    sender.let_go("a")
    sender.let_go("b")
    await turns()

    assert [key for key, _ in sender.batches] == ["a", "b", "c", "d"]
    for key in ("c", "d", "e"):
        sender.let_go(key)
    await asyncio.gather(*answers)


@pytest.mark.parametrize("max_concurrent_batches", [1, 2, 4])
async def test_item_submitted_right_after_a_result_is_sent(max_concurrent_batches: int) -> None:
    """A lane that is just ending is none that somebody could wait for."""
    sender = Sender(is_open=False)
    batcher = new_batcher(sender, max_concurrent_batches=max_concurrent_batches)

    async def call_twice(key: str) -> list[str | PointbookError]:
        return [await batcher.submit(key, ["1"])[0], await batcher.submit(key, ["2"])[0]]

    keys = [f"key-{number}" for number in range(max_concurrent_batches)]
    calls = [asyncio.create_task(call_twice(key)) for key in keys]
    await turns()
    for key in keys:
        sender.let_go(key)

    async with asyncio.timeout(5.0):
        assert await asyncio.gather(*calls) == [[f"{key}:1", f"{key}:2"] for key in keys]


async def test_full_queue_accepts_nothing() -> None:
    """A call is admitted wholly or not at all, and told when to come again."""
    sender = Sender(is_open=False)
    batcher = new_batcher(sender, waiting_max=3)
    batcher.submit("a", ["1"])
    await turns()
    # One is on its way, and waits no more.
    waiting = batcher.submit("a", ["2", "3"])
    batcher.check_capacity(1)

    with pytest.raises(PointbookError) as told:
        batcher.check_capacity(2)

    assert told.value.reason is Reason.QUEUE_FULL
    assert told.value.retry_after_seconds is not None
    batcher.check_capacity(1)
    sender.let_go("a")
    await asyncio.gather(*waiting)
    batcher.check_capacity(3)
    assert [items for _, items in sender.batches] == [["1"], ["2", "3"]]


async def test_item_cancelled_before_its_batch_is_not_sent() -> None:
    """Its place in the batch is taken by the next one's, and its place in the line is free."""
    sender = Sender(is_open=False)
    batcher = new_batcher(sender, waiting_max=3)
    batcher.submit("a", ["0"])
    await turns()
    one, two, three = batcher.submit("a", ["1", "2", "3"])
    two.cancel()

    sender.let_go("a")

    assert await one == "a:1"
    assert await three == "a:3"
    assert sender.batches == [("a", ["0"]), ("a", ["1", "3"])]
    batcher.check_capacity(3)


async def test_batch_of_cancelled_items_is_not_sent() -> None:
    """There is no transaction for nobody, and the next key has its turn."""
    sender = Sender(is_open=False)
    batcher = new_batcher(sender)
    batcher.submit("a", ["0"])
    await turns()
    for answer in batcher.submit("a", ["1", "2"]):
        answer.cancel()
    (other,) = batcher.submit("b", ["1"])
    sender.let_go("a")
    sender.let_go("b")

    assert await other == "b:1"
    assert sender.batches == [("a", ["0"]), ("b", ["1"])]


async def test_item_cancelled_in_flight_affects_no_other_item() -> None:
    """The batch is done to its end, and the others hear their answers."""
    sender = Sender(is_open=False)
    batcher = new_batcher(sender)
    one, two = batcher.submit("a", ["1", "2"])
    await turns()
    one.cancel()
    sender.let_go("a")

    assert await two == "a:2"
    assert one.cancelled()


async def test_error_of_a_batch_fails_all_its_items() -> None:
    """A conflict or an outage is no single item's, and nothing is sent again."""
    sender = Sender(errors={"2": error()})
    batcher = new_batcher(sender)

    answers = await asyncio.gather(*batcher.submit("a", ["1", "2", "3"]))

    assert answers == [sender.errors["2"]] * 3
    assert sender.batches == [("a", ["1", "2", "3"])]


async def test_error_of_a_batch_does_not_fail_the_next_batch() -> None:
    """The lane goes on."""
    sender = Sender(errors={"1": error()})
    batcher = new_batcher(sender, batch_max=1)

    answers = await asyncio.gather(
        *batcher.submit("a", ["1"]), *batcher.submit("a", ["2"]), *batcher.submit("b", ["3"])
    )

    assert answers == [sender.errors["1"], "a:2", "b:3"]


async def test_defect_of_one_item_fails_only_that_item() -> None:
    """Where a batch breaks unexpectedly each item is sent by itself, so that the guilty one alone hears of it."""
    sender = Sender(errors={"2": ZeroDivisionError("a defect")})
    batcher = new_batcher(sender)

    one, two, three = await asyncio.gather(*batcher.submit("a", ["1", "2", "3"]), return_exceptions=True)

    assert (one, three) == ("a:1", "a:3")
    assert two is sender.errors["2"]
    assert [items for _, items in sender.batches] == [["1", "2", "3"], ["1"], ["2"], ["3"]]


async def test_defect_of_a_single_item_ends_no_worker() -> None:
    """It is raised where its answer is awaited; if nobody awaits it any more, nowhere."""
    sender = Sender(is_open=False, errors={"1": ZeroDivisionError("a defect")})
    batcher = new_batcher(sender)
    (guilty,) = batcher.submit("a", ["1"])
    await turns()
    guilty.cancel()
    sender.let_go("a")

    assert await batcher.submit("a", ["2"])[0] == "a:2"
    with pytest.raises(ZeroDivisionError):
        await batcher.submit("a", ["1"])[0]
    assert await batcher.submit("a", ["3"])[0] == "a:3"


async def test_idle_batcher_is_drained() -> None:
    """There is nothing to wait for."""
    async with asyncio.timeout(5.0):
        await new_batcher(Sender()).drain()


async def test_drain_waits_for_all_results() -> None:
    """Also what waits for its batch by then, and whether or not somebody waits for the answer."""
    sender = Sender(is_open=False)
    batcher = new_batcher(sender, batch_max=1, max_concurrent_batches=2)
    answers = [*batcher.submit("a", ["1", "2"]), *batcher.submit("b", ["1"])]
    draining = asyncio.create_task(batcher.drain())
    await turns()
    assert not draining.done()
    sender.let_go("b")
    await turns()
    answers[0].cancel()
    assert not draining.done()

    sender.let_go("a")
    async with asyncio.timeout(5.0):
        await draining

    assert [answer.done() for answer in answers] == [True, True, True]
    assert sender.batches == [("a", ["1"]), ("b", ["1"]), ("a", ["2"])]


async def test_rest_of_a_call_is_not_sent_after_its_batch_failed() -> None:
    """An item is judged by those before it: sent without them, it would get an answer for good that is wrong."""
    away = error(Reason.DATABASE_UNAVAILABLE)
    sent: list[list[int]] = []

    async def send(_key: str, items: Sequence[int]) -> list[int]:
        sent.append(list(items))
        if items[0] == 1:
            raise away
        return list(items)

    batcher: Batcher[str, int, int] = Batcher(send, batch_max=2, waiting_max=7, max_concurrent_batches=1)
    answers = [*batcher.submit("a", [1, 2, 3, 4, 5]), *batcher.submit("a", [6]), *batcher.submit("b", [7])]
    answered = await asyncio.gather(*answers)

    assert answered == [away] * 5 + [6, 7]
    assert sent == [[1, 2], [7], [6]]
    batcher.check_capacity(7)
