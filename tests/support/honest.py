"""An honest client in a process of its own, so that what a test does to a server does not slow the clock of it.

Run as a program it reads a number of seconds a line, calls for as long, and prints what it saw as one line of JSON.
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
CALLS_A_CONNECTION = 25
"""Some calls come over new connections, as those of a client that has just started."""
P99_RATIO_MAX = 2.0
"""How many times as long honest calls may take while, or after, strangers do what they can."""
P99_NOISE_MS = 10.0
"""What a p99 of a few milliseconds may become on a machine whose processes share two cores."""
TOPIC = "app_memberSystem_points/challenged"


@dataclass(frozen=True, slots=True)
class Seen:
    """What honest callers saw: how long their calls took, and which failed."""

    calls: int
    p50_ms: float
    p99_ms: float
    failures: Mapping[str, int]

    @property
    def failed(self) -> int:
        """How many calls failed."""
        return sum(self.failures.values())


class Honest:
    """The process, driven by a test."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def call(self, seconds: float) -> Seen:
        """Have it call for some seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{seconds}\n".encode())
        async with asyncio.timeout(seconds + 3 * CALL_SECONDS_MAX):
            line = await self._process.stdout.readline()
        assert line, "the honest client ended; its message stands above"
        return Seen(**json.loads(line))

    async def rounds(self, count: int, seconds: float) -> list[Seen]:
        """Have it call several times."""
        return [await self.call(seconds) for _ in range(count)]


@asynccontextmanager
async def honest_client(kind: str, address: str, secret: str, merchant_id: str, store_id: str) -> AsyncIterator[Honest]:
    """Run an honest client: `grpc` with a token, or `webhooks` with an app secret."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    arguments = (kind, address, merchant_id, store_id)
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, *arguments, stdin=PIPE, stdout=PIPE, env={**kept, "HONEST_SECRET": secret}
    )
    try:
        yield Honest(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def typical_p99_ms(rounds: list[Seen]) -> float:
    """Return the median of the rounds' p99: one that the machine spoiled does not count."""
    return statistics.median(each.p99_ms for each in rounds)


def p99_ratio(before: list[Seen], after: list[Seen]) -> float:
    """Return how many times as long the slowest of a hundred calls take, where that is more than noise."""
    return typical_p99_ms(after) / max(typical_p99_ms(before), P99_NOISE_MS / P99_RATIO_MAX)


# The program


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
    """Yield calls to await, each with a name for what it failed of or an empty one."""
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

            for _ in range(CALLS_A_CONNECTION):
                yield call


async def _webhook_calls(address: str, secret: str, merchant_id: str, store_id: str, caller: int) -> AsyncIterator[Any]:
    """Yield webhooks to deliver, each with a name for what it failed of or an empty one."""
    host, _, port = address.rpartition(":")
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter | None = None

    async def deliver(*, fresh: bool) -> str:
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
        head = (
            f"POST /webhooks/shopline HTTP/1.1\r\nHost: {address}\r\nContent-Length: {len(raw)}\r\n"
            f"X-Shopline-Topic: {TOPIC}\r\nX-Shopline-Hmac-Sha256: {digest}\r\n"
            f"X-Shopline-Merchant-Id: {merchant_id}\r\nX-Shopline-Shop-Id: {store_id}\r\n"
            f"X-Shopline-Webhook-Id: {secrets.token_hex(8)}\r\n\r\n"
        )
        try:
            async with asyncio.timeout(CALL_SECONDS_MAX):
                if fresh or writer is None:
                    if writer is not None:
                        writer.close()
                    reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(head.encode() + raw)
                answer = await reader.readuntil(b"\r\n\r\n")
                length = int(answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                told = json.loads(await reader.readexactly(length))
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            writer = None
            return type(error).__name__
        # What is only quarantined is answered 200 too.
        return "" if told.get("outcome") == "APPLIED" else f"{answer[9:12].decode()} {told.get('outcome', '')}".strip()

    for number in itertools.count():
        fresh = number % CALLS_A_CONNECTION == 0
        yield lambda fresh=fresh: deliver(fresh=fresh)


async def _repeat(calls: AsyncIterator[Callable[[], Awaitable[str]]], end: float, into: list[float]) -> Counter[str]:
    failures: Counter[str] = Counter()
    async for call in calls:
        if time.perf_counter() >= end:
            break
        began = time.perf_counter()
        failure = await call()
        into.append(time.perf_counter() - began)
        if failure:
            failures[failure] += 1
        await asyncio.sleep(PAUSE_SECONDS)
    return failures


async def _main(kind: str, address: str, merchant_id: str, store_id: str) -> None:
    make = {"grpc": _grpc_calls, "webhooks": _webhook_calls}[kind]
    secret = os.environ["HONEST_SECRET"]
    while line := await asyncio.to_thread(sys.stdin.readline):
        end, took = time.perf_counter() + float(line), list[float]()
        every = [make(address, secret, merchant_id, store_id, caller) for caller in range(CALLERS)]
        failures = sum(await asyncio.gather(*(_repeat(calls, end, took) for calls in every)), Counter[str]())
        for calls in every:
            await calls.aclose()  # type: ignore[attr-defined] # they are generators
        took.sort()
        p99_ms = took[min(len(took) - 1, len(took) * 99 // 100)] * 1_000
        seen = Seen(len(took), took[len(took) // 2] * 1_000, p99_ms, dict(failures))
        print(json.dumps(asdict(seen)), flush=True)  # noqa: T201 - its parent reads this


if __name__ == "__main__":
    asyncio.run(_main(*sys.argv[1:]))
