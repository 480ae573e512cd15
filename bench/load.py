"""The load process: reads jobs from standard input, one line of JSON each, and answers each with its measurement."""

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import uvloop

from calls import Call, Requests, open_calls
from jobs import Job, Measurement


@dataclass
class Tally:
    """What was seen in one stretch of time."""

    seconds: list[float] = field(default_factory=list)
    late: int = 0


async def main() -> None:
    """Do jobs until standard input ends."""
    requests = Requests()
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        measurement = await _measure(Job.from_json(json.loads(line)), requests)
        print(json.dumps(asdict(measurement)), flush=True)


async def _measure(job: Job, requests: Requests) -> Measurement:
    async with AsyncExitStack() as stack:
        calls = await open_calls(job, stack)
        stream = itertools.islice(requests.of(job), job.calls_max)
        await _drive(calls, stream, job.warm_up_seconds)
        began = time.perf_counter()
        tally = await _drive(calls, stream, job.seconds)
        elapsed = time.perf_counter() - began
    ordered = sorted(tally.seconds)
    return Measurement(
        calls=len(ordered),
        rate=len(ordered) / elapsed,
        p50_ms=1_000 * ordered[len(ordered) // 2],
        p99_ms=1_000 * ordered[len(ordered) * 99 // 100],
        late=tally.late,
    )


async def _drive(calls: list[Call], requests: Iterator[Any], seconds: float) -> Tally:
    """Have every caller call again and again until the time is over or no request is left."""
    tally = Tally()
    deadline = time.perf_counter() + seconds
    async with asyncio.TaskGroup() as callers:
        for call in calls:
            callers.create_task(_repeat(call, requests, deadline, tally))
    return tally


async def _repeat(call: Call, requests: Iterator[Any], deadline: float, tally: Tally) -> None:
    while (began := time.perf_counter()) < deadline:
        request = next(requests, None)
        if request is None:
            return
        tally.late += await call(request)
        tally.seconds.append(time.perf_counter() - began)


if __name__ == "__main__":
    uvloop.run(main())
