"""An honest client in a separate process.

The load of the test does not distort its latencies.

Run as a program, it reads a number of seconds per line, sends calls for that long, and prints a report as a line of
JSON.
"""

import asyncio
import base64
import hmac
import itertools
import json
import os
import secrets
import statistics
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from pointbook.v1 import points_pb2, points_pb2_grpc

CALLERS = 4
PAUSE_SECONDS = 0.01
CALL_SECONDS_MAX = 10.0
CALLS_PER_CONNECTION = 25
"""Calls per connection, so that some calls use new connections, like a client that has just started."""
P99_RATIO_MAX = 2.0
"""The maximum ratio of the p99 during or after an attack to the p99 before it."""
P99_NOISE_MS = 10.0
"""A p99 that a few milliseconds may grow to without an attack, on a machine with two shared cores."""
TOPIC = "app_memberSystem_points/challenged"


@dataclass(frozen=True, slots=True)
class LatencyReport:
    """Latencies and failures of honest calls."""

    calls: int
    p50_ms: float
    p99_ms: float
    failures: Mapping[str, int]

    @property
    def failed(self) -> int:
        """The number of failed calls."""
        return sum(self.failures.values())


class HonestClient:
    """The client's process, controlled by a test."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def call(self, seconds: float) -> LatencyReport:
        """Send calls for some seconds, and return the report."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{seconds}\n".encode())
        async with asyncio.timeout(seconds + 3 * CALL_SECONDS_MAX):
            line = await self._process.stdout.readline()
        assert line, "the honest client ended; its error is printed above"
        return LatencyReport(**json.loads(line))

    async def rounds(self, count: int, seconds: float) -> list[LatencyReport]:
        """Return the reports of several rounds."""
        return [await self.call(seconds) for _ in range(count)]


@asynccontextmanager
async def run_honest_client(
    kind: str, address: str, secret: str, merchant_id: str, store_id: str
) -> AsyncIterator[HonestClient]:
    """Run an honest client during the block.

    Its kind is `grpc`, with a token, or `webhooks`, with an app secret.
    """
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    arguments = (kind, address, merchant_id, store_id)
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, *arguments, stdin=PIPE, stdout=PIPE, env={**environment, "HONEST_SECRET": secret}
    )
    try:
        yield HonestClient(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def median_p99_ms(rounds: list[LatencyReport]) -> float:
    """Return the median of the rounds' p99, to ignore a single disturbed round."""
    return statistics.median(each.p99_ms for each in rounds)


def p99_ratio(before: list[LatencyReport], after: list[LatencyReport]) -> float:
    """Return the ratio of the median p99.

    It exceeds P99_RATIO_MAX only if the later p99 exceeds P99_NOISE_MS.
    """
    return median_p99_ms(after) / max(median_p99_ms(before), P99_NOISE_MS / P99_RATIO_MAX)


def _update(merchant_id: str, store_id: str, caller: int) -> points_pb2.PointsUpdate:
    now = Timestamp()
    now.FromMilliseconds(int(time.time() * 1_000))
    return points_pb2.PointsUpdate(
        event_id=secrets.token_hex(8),
        merchant_id=merchant_id,
        store_id=store_id,
        buyer_id=f"honest-{caller}",
        update_type=points_pb2.POINTS_UPDATE_TYPE_INCREASE,
        updated_scene=points_pb2.POINTS_UPDATE_SCENE_SUCCESSFUL_ORDERS,
        updated_value=1,
        updated_at=now,
    )


async def _grpc_calls(address: str, secret: str, merchant_id: str, store_id: str, caller: int) -> AsyncIterator[Any]:
    """Yield functions that make one call and return its error, empty for none."""
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
    while True:
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            points = points_pb2_grpc.PointsServiceStub(channel)

            async def call(points: Any = points) -> str:
                request = points_pb2.ApplyPointsUpdateRequest(update=_update(merchant_id, store_id, caller))
                metadata = (("authorization", f"Bearer {secret}"),)
                try:
                    await points.ApplyPointsUpdate(request, metadata=metadata, timeout=CALL_SECONDS_MAX)
                except grpc.aio.AioRpcError as error:
                    return error.code().name
                return ""

            for _ in range(CALLS_PER_CONNECTION):
                yield call


async def _webhook_calls(address: str, secret: str, merchant_id: str, store_id: str, caller: int) -> AsyncIterator[Any]:
    """Yield functions that deliver one webhook and return its error, or empty."""
    host, _, port = address.rpartition(":")
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter | None = None

    async def deliver(*, reconnect: bool) -> str:
        nonlocal reader, writer
        body = {
            "buyer_id": f"honest-{caller}",
            "points_balance": 1,
            "store_id": store_id,
            "update_type": "INCREASE",
            "updated_at": int(time.time() * 1_000),
            "updated_scene": "SUCCESSFUL_ORDERS",
            "updated_value": secrets.randbelow(10**9),
        }
        raw = json.dumps(body).encode()
        digest = base64.b64encode(hmac.digest(secret.encode(), raw, "sha256")).decode()
        request_head = (
            f"POST /webhooks/shopline HTTP/1.1\r\nHost: {address}\r\nContent-Length: {len(raw)}\r\n"
            f"X-Shopline-Topic: {TOPIC}\r\nX-Shopline-Hmac-Sha256: {digest}\r\n"
            f"X-Shopline-Merchant-Id: {merchant_id}\r\nX-Shopline-Shop-Id: {store_id}\r\n"
            f"X-Shopline-Webhook-Id: {secrets.token_hex(8)}\r\n\r\n"
        )
        try:
            async with asyncio.timeout(CALL_SECONDS_MAX):
                if reconnect or writer is None:
                    if writer is not None:
                        writer.close()
                    reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(request_head.encode() + raw)
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                response = json.loads(await reader.readexactly(length))
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            writer = None
            return type(error).__name__
        # Check the outcome: a quarantined webhook gets 200, too.
        if response.get("outcome") == "APPLIED":
            return ""
        return f"{head[9:12].decode()} {response.get('outcome', '')}".strip()

    for number in itertools.count():
        reconnect = number % CALLS_PER_CONNECTION == 0
        yield lambda reconnect=reconnect: deliver(reconnect=reconnect)


async def _repeat(
    calls: AsyncIterator[Callable[[], Awaitable[str]]], end: float, durations: list[float]
) -> Counter[str]:
    """Make calls until the end time, and return the failures by name.

    Appends the calls' durations to a list.
    """
    failures: Counter[str] = Counter()
    async for call in calls:
        if time.perf_counter() >= end:
            break
        started = time.perf_counter()
        failure = await call()
        durations.append(time.perf_counter() - started)
        if failure:
            failures[failure] += 1
        await asyncio.sleep(PAUSE_SECONDS)
    return failures


async def _main(kind: str, address: str, merchant_id: str, store_id: str) -> None:
    make_calls = {"grpc": _grpc_calls, "webhooks": _webhook_calls}[kind]
    secret = os.environ["HONEST_SECRET"]
    while line := await asyncio.to_thread(sys.stdin.readline):
        end, durations = time.perf_counter() + float(line), list[float]()
        callers = [make_calls(address, secret, merchant_id, store_id, caller) for caller in range(CALLERS)]
        failures = sum(await asyncio.gather(*(_repeat(calls, end, durations) for calls in callers)), Counter[str]())
        for calls in callers:
            await calls.aclose()  # type: ignore[attr-defined] # calls are generators
        durations.sort()
        count = len(durations)
        p99_ms = durations[min(count - 1, count * 99 // 100)] * 1_000
        report = LatencyReport(count, durations[count // 2] * 1_000, p99_ms, dict(failures))
        print(json.dumps(asdict(report)), flush=True)  # noqa: T201 - the parent process reads this


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
