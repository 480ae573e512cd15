"""The load process: it reads jobs from standard input, and prints measurements.

Each is one line of JSON.
"""

import asyncio
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import asdict
from typing import Any

import uvloop

from load.calls import Call, is_unavailable, open_calls
from load.jobs import Job, Measurement, Stopwatch
from load.requests import RequestGenerator


async def main() -> None:
    """Run jobs until standard input ends."""
    generator = RequestGenerator()
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        measurement = await _measure(Job.from_json(json.loads(line)), generator)
        print(json.dumps(asdict(measurement)), flush=True)


async def _measure(job: Job, generator: RequestGenerator) -> Measurement:
    async with AsyncExitStack() as stack:
        calls = await open_calls(job, stack)
        stream = itertools.islice(generator.requests(job), job.calls_max)
        await _run_callers(calls, stream, job.warm_up_seconds)
        return (await _run_callers(calls, stream, job.seconds)).measurement()


async def _run_callers(calls: list[Call], requests: Iterator[Any], seconds: float) -> Stopwatch:
    """Run all callers until the time is over or no request is left."""
    stopwatch = Stopwatch()
    async with asyncio.TaskGroup() as callers:
        for call in calls:
            callers.create_task(_repeat(call, requests, seconds, stopwatch))
    return stopwatch


async def _repeat(call: Call, requests: Iterator[Any], seconds: float, stopwatch: Stopwatch) -> None:
    while stopwatch.elapsed_seconds < seconds and (request := next(requests, None)) is not None:
        try:
            with stopwatch.lap():
                stopwatch.late += await call(request)
        except Exception as error:
            if not is_unavailable(error):
                raise
            stopwatch.unavailable += 1


if __name__ == "__main__":
    uvloop.run(main())
