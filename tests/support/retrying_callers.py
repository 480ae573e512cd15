"""Callers that retry until they succeed, and a check of the ledger afterwards."""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import asyncpg
import grpc

from pointbook.v1 import points_pb2, points_pb2_grpc
from support.clocks import at
from support.shops import Shop
from support.waiting import until

CONNECTIONS = 4
NOW_MS = int(time.time() * 1_000)


class RetryingCallers:
    """Concurrent callers that send one event at a time and retry failed calls."""

    def __init__(
        self,
        address: str,
        token: str,
        shop: Shop,
        options: Sequence[tuple[str, Any]] = (),
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 200), *options)
        self._shop = shop
        self._channels = [
            grpc.aio.insecure_channel(address, options=options)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options=options)
            for _ in range(CONNECTIONS)
        ]
        self._metadata = (("authorization", f"Bearer {token}"),)
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self.acknowledged: dict[str, str] = {}
        self.codes: Counter[str] = Counter()
        """The number of calls by status code."""

    def start(self, number: int) -> None:
        """Start a number of callers."""
        self._tasks = [asyncio.create_task(self._call(f"buyer-{index}", index)) for index in range(number)]

    async def stop(self) -> None:
        """Stop after every running call has ended."""
        self._stopping = True
        await asyncio.gather(*self._tasks)
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def wait_for_acknowledged(self, more: int, seconds: float = 60.0) -> None:
        """Wait until `more` further calls were acknowledged."""
        goal = len(self.acknowledged) + more

        async def reached() -> bool:
            return len(self.acknowledged) >= goal

        await until(reached, seconds=seconds)

    async def _call(self, buyer_id: str, index: int) -> None:
        points = points_pb2_grpc.PointsServiceStub(self._channels[index % CONNECTIONS])
        for balance in itertools.count(1):
            update = self._shop.update(
                buyer_id, updated_at=at(NOW_MS - 10**9 + balance), updated_value=1, points_balance=balance
            )
            request = points_pb2.ApplyPointsUpdateRequest(update=update)
            while not self._stopping and update.event_id not in self.acknowledged:
                await self._try(points, request)
            if self._stopping:
                return

    async def _try(self, points: Any, request: points_pb2.ApplyPointsUpdateRequest) -> None:
        try:
            await points.ApplyPointsUpdate(request, metadata=self._metadata, timeout=20.0)
        except grpc.aio.AioRpcError as error:
            self.codes[error.code().name] += 1
            await asyncio.sleep(0.1)
        else:
            self.codes["OK"] += 1
            self.acknowledged[request.update.event_id] = request.update.buyer_id


async def check_acknowledged_events(database_url: str, shop: Shop, callers: RetryingCallers) -> None:
    """Check that acknowledged events are stored once, and that balances add up."""
    connection = await asyncpg.connect(database_url)
    entries = await connection.fetch(
        "SELECT event_id, buyer_id, updated_value FROM points_entries WHERE merchant_id = $1", shop.merchant_id
    )
    accounts = await connection.fetch(
        "SELECT buyer_id, balance, opening, drift FROM points_accounts WHERE merchant_id = $1", shop.merchant_id
    )
    await connection.close()
    stored = Counter(row["event_id"] for row in entries)
    assert set(callers.acknowledged) <= set(stored)
    assert set(stored.values()) == {1}
    sums: Counter[str] = Counter()
    for row in entries:
        sums[row["buyer_id"]] += row["updated_value"]
    # Each caller sent +1 after +1 from zero, so a wrong balance means a lost or doubled event.
    assert {row["buyer_id"]: row["balance"] for row in accounts} == dict(sums)
    assert {(row["opening"], row["drift"]) for row in accounts} == {(0, 0)}
