"""The delay of refused calls."""

import asyncio
import time

import pytest

from pointbook_server.rpc.pacer import Pacer


async def test_single_caller_never_waits() -> None:
    pacer = Pacer(calls_per_second=1.0)
    for _ in range(10):
        await asyncio.wait_for(pacer.wait(), 0.5)


async def test_delay_grows_with_the_number_of_waiting_callers() -> None:
    pacer = Pacer(calls_per_second=100.0)
    began = time.monotonic()
    await asyncio.gather(*(pacer.wait() for _ in range(50)))
    assert time.monotonic() - began >= 0.49


async def test_number_of_delayed_callers_is_bounded() -> None:
    """Further callers would cost too much memory."""
    pacer = Pacer(calls_per_second=0.01, waiting_max=2)
    first = asyncio.create_task(pacer.wait())
    second = asyncio.create_task(pacer.wait())
    third = asyncio.create_task(pacer.wait())
    await asyncio.wait_for(asyncio.gather(first, third), 0.5)
    assert not second.done()
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
