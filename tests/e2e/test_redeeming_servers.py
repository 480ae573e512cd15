"""Many concurrent redemptions by two server processes on one database."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from pointbook.v1 import identity_pb2, redemption_pb2
from pointbook_client.testing.ports import free_port
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from support.clients import Client
from support.clocks import at
from support.ledger import check_ledger
from support.probes import grpc_health
from support.processes import Running, running
from support.refusals import refusal
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique

CALLS = 200
COVERED = 10
"""So many of the calls the balance covers."""
POINTS = 50
SECONDS_MAX = 25.0
TRANSIENT = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.DEADLINE_EXCEEDED}
"""What a caller repeats: what became of the call is not known, or nothing did."""
Redemption = redemption_pb2.Redemption


@dataclass
class Servers:
    """Two server processes with clients, and a shop with points for ten redemptions."""

    processes: list[Running]
    clients: list[Client]
    shop: Shop
    database_url: str

    def redeem_request(self) -> redemption_pb2.RedeemPointsRequest:
        """Build a request to redeem some of the points."""
        buyer = identity_pb2.Buyer(store_id=self.shop.store_id, buyer_id="buyer")
        return redemption_pb2.RedeemPointsRequest(
            customer=identity_pb2.CustomerRef(merchant_id=self.shop.merchant_id, buyer=buyer),
            program_id=1,
            points=POINTS,
            external_reference_number=unique("order"),
        )

    async def redeem(self, request: redemption_pb2.RedeemPointsRequest, number: int) -> Redemption | None:
        """Redeem with retries, each on the next server; return None for a refusal."""
        while True:
            number += 1
            try:
                response = await self.clients[number % len(self.clients)].redemption.RedeemPoints(request, timeout=10)
            except grpc.aio.AioRpcError as error:
                if error.code() in TRANSIENT:
                    await asyncio.sleep(0.05)
                    continue
                assert refusal(error).reason == "INSUFFICIENT_POINTS"  # noqa: PT017 - the only refusal expected
                return None
            return response.redemption

    async def stored(self) -> list[Redemption]:
        """Return all stored redemptions."""
        request = redemption_pb2.ListRedemptionsRequest(merchant_id=self.shop.merchant_id, page_size=1_000)
        return list((await self.clients[0].redemption.ListRedemptions(request)).redemptions)

    async def check(self, redeemed: list[Redemption]) -> None:
        """Check that ten redemptions are stored once, and were acknowledged."""
        stored = await self.stored()
        assert sorted(each.redemption_id for each in redeemed) == sorted(each.redemption_id for each in stored)
        assert len(stored) == len({each.external_reference_number for each in stored}) == COVERED
        account = await self.clients[0].account(self.shop.merchant_id, self.shop.store_id, "buyer")
        assert (account.points_balance, account.active_points) == (COVERED * POINTS, 0)
        assert account.held_points == COVERED * POINTS
        await check_ledger(self.database_url, self.shop.merchant_id)


@pytest.fixture
async def servers(database_url: str, tmp_path: Path) -> AsyncIterator[Servers]:
    """Start two servers and create the shop."""
    token = await make_token(database_url, [ALL_MERCHANTS], list(Scope))
    started = Servers([], [], Shop(unique("merchant"), unique("store")), database_url)
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(2):
            address = f"127.0.0.1:{free_port()}"
            settings = {"DATABASE_URL": database_url, "GRPC_ADDRESS": address}
            process = await stack.enter_async_context(running("serve", folder=tmp_path, settings=settings))

            async def serves(address: str = address) -> bool:
                return await grpc_health(address) == "SERVING"

            await process.until(serves)
            client = Client(int(address.rpartition(":")[2]), token)
            stack.push_async_callback(client.close)
            started.processes.append(process)
            started.clients.append(client)
        first, shop = started.clients[0], started.shop
        await first.put_store(shop.merchant_id, shop.store_id)
        await first.put_program(shop.merchant_id, shop.store_id, criteria={})
        yesterday = at(int(time.time() * 1_000) - 86_400_000)
        points = COVERED * POINTS
        await first.apply(shop.update(updated_value=points, points_balance=points, updated_at=yesterday))
        yield started


async def test_ten_of_200_redemptions_succeed(servers: Servers, record_property: Callable[[str, object], None]) -> None:
    began = time.perf_counter()
    async with asyncio.timeout(SECONDS_MAX):
        responses = await asyncio.gather(*(servers.redeem(servers.redeem_request(), number) for number in range(CALLS)))
    record_property("redemptions_per_second", round(CALLS / (time.perf_counter() - began)))

    await servers.check([response for response in responses if response is not None])


async def test_killed_server_redeems_nothing_twice(servers: Servers) -> None:
    """Calls without a response are repeated on the other server."""
    delay = random.uniform(0.02, 0.5)  # noqa: S311 - any time will do

    async def kill() -> None:
        await asyncio.sleep(delay)
        await servers.processes[1].kill()

    async with asyncio.timeout(SECONDS_MAX):
        *responses, _ = await asyncio.gather(
            *(servers.redeem(servers.redeem_request(), number) for number in range(CALLS)), kill()
        )

    await servers.check([response for response in responses if response is not None])


async def test_same_redemption_sent_to_both_servers_is_stored_once(servers: Servers) -> None:
    orders = [servers.redeem_request() for _ in range(COVERED)]

    async with asyncio.timeout(SECONDS_MAX):
        responses = await asyncio.gather(*(servers.redeem(each, number) for each in orders for number in range(4)))
    assert len({response.redemption_id for response in responses if response is not None}) == COVERED
    distinct = {response.redemption_id: response for response in responses if response is not None}
    await servers.check(list(distinct.values()))
