"""Deadlines of running calls, in orders that gRPC can hardly be made to produce."""

import asyncio
import time

import pytest

from pointbook_server.rpc.running_calls import RunningCalls, current_task

SECONDS = 0.01
LONG_AFTER = 0.3


async def test_a_call_is_cancelled_at_its_deadline_and_can_send_its_status() -> None:
    calls, task = RunningCalls(), current_task()
    calls.add(task, time.monotonic() + SECONDS)

    with pytest.raises(asyncio.CancelledError):
        await asyncio.Event().wait()

    assert calls.accept_deadline(task)
    calls.lift_deadline(task)
    await asyncio.sleep(LONG_AFTER)
    assert not task.cancelling()
    calls.discard(task)
    assert len(calls) == 0


async def test_a_call_whose_deadline_was_lifted_is_not_cancelled() -> None:
    """A refused call may have to wait for its turn to send the status."""
    calls, task = RunningCalls(), current_task()
    calls.add(task, time.monotonic() + SECONDS)
    calls.lift_deadline(task)

    await asyncio.sleep(LONG_AFTER)

    assert not task.cancelling()
    calls.discard(task)


async def test_a_cancelled_call_is_left_to_its_clean_up() -> None:
    calls = RunningCalls()
    cleaned_up = False

    async def call() -> None:
        nonlocal cleaned_up
        calls.add(current_task(), time.monotonic() + SECONDS)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            assert not calls.accept_deadline(current_task())
            await asyncio.sleep(LONG_AFTER)
            cleaned_up = True
            raise
        finally:
            calls.discard(current_task())

    task = asyncio.create_task(call())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})

    assert task.cancelled()
    assert cleaned_up
