"""Every redemption has one known outcome, although the server is killed."""

import asyncio
import itertools
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pointbook_client import Buyer, CustomerRef, PendingCall, PointbookClient, PointbookError, Redemption, connect
from pointbook_client.testing.ports import free_port
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from support.clients import Client
from support.clocks import at
from support.connections import connected
from support.probes import grpc_health
from support.processes import Running, clean_environment
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique
from support.verification import run_verify
from support.waiting import until

CALLERS = 16
CALLS_BETWEEN_KILLS = 40
EARNED = 1_000_000
SECONDS_MAX = 120.0


class KilledServer:
    """A server process at one address, which is killed and started again."""

    def __init__(self, database_url: str, folder: Path) -> None:
        self.port = free_port()
        self._settings = {"DATABASE_URL": database_url, "GRPC_ADDRESS": f"127.0.0.1:{self.port}"}
        self._folder = folder
        self._process: Running | None = None

    async def start(self) -> None:
        """Start the process, and return at once."""
        self._process = await Running.fork("serve", environment=clean_environment(self._settings), folder=self._folder)

    async def serves(self) -> bool:
        """Return whether the server accepts calls."""
        return await grpc_health(f"127.0.0.1:{self.port}") == "SERVING"

    async def kill(self) -> None:
        """Kill the process without a warning."""
        if self._process is not None:
            await self._process.stop(signal.SIGKILL)


@asynccontextmanager
async def killed_server(database_url: str, folder: Path) -> AsyncIterator[KilledServer]:
    """Run a server during the block."""
    server = KilledServer(database_url, folder)
    await server.start()
    try:
        await until(server.serves, seconds=30)
        yield server
    finally:
        await server.kill()


class Callers:
    """Concurrent callers that redeem points, and return every third redemption."""

    def __init__(self, clients: Sequence[PointbookClient], shop: Shop) -> None:
        self._clients, self._shop = clients, shop
        self._stopping = False
        self.redeemed: dict[str, Redemption] = {}
        self.reversed: dict[str, Redemption] = {}
        self.unknown = 0
        """How often the outcome of a call was unknown at first."""

    async def run(self, number: int) -> None:
        """Redeem until the callers stop."""
        client = self._clients[number % len(self._clients)]
        customer = CustomerRef(self._shop.merchant_id, buyer=Buyer(self._shop.store_id, f"buyer-{number}"))
        for count in itertools.count():
            if self._stopping:
                return
            call = client.redeem(customer, 1, 10)
            self.redeemed[call.reference] = await self._resolve(call)
            if count % 3 == 0:
                reversal = client.reverse(self._shop.merchant_id, redeemed_reference=call.reference)
                self.reversed[reversal.reference] = await self._resolve(reversal)

    def stop(self) -> None:
        """Stop after the running calls."""
        self._stopping = True

    async def _resolve(self, call: PendingCall[Redemption]) -> Redemption:
        """Send a call until it returns. No rule refuses it."""
        while True:
            try:
                return await call
            except PointbookError as error:
                if not error.outcome_unknown:
                    raise
                self.unknown += 1
                # The pause of a caller while the server is away, which half of the clients do not wait for.
                await asyncio.sleep(0.05)


async def create_shop(port: int, token: str) -> Shop:
    """Create a shop whose buyers have points."""
    shop, client = Shop(unique("merchant"), unique("store")), Client(port, token)
    await client.put_store(shop.merchant_id, shop.store_id)
    await client.put_program(shop.merchant_id, shop.store_id, criteria={})
    yesterday = at(int(time.time() * 1_000) - 86_400_000)
    for number in range(CALLERS):
        await client.apply(
            shop.update(f"buyer-{number}", updated_value=EARNED, points_balance=EARNED, updated_at=yesterday)
        )
    await client.close()
    return shop


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.soak)])
async def test_every_redemption_has_one_outcome_although_the_server_is_killed(
    database_url: str, tmp_path: Path, record_property: Callable[[str, object], None], kills: int
) -> None:
    token = await make_token(database_url, [ALL_MERCHANTS], list(Scope))
    async with (
        asyncio.timeout(SECONDS_MAX),
        killed_server(database_url, tmp_path) as server,
        connect(f"127.0.0.1:{server.port}", token=token) as client,
        connect(f"127.0.0.1:{server.port}", token=token, retries=False) as without_retries,
    ):
        shop = await create_shop(server.port, token)
        callers = Callers((client, without_retries), shop)
        running = [asyncio.create_task(callers.run(number)) for number in range(CALLERS)]
        for _ in range(kills):
            goal = len(callers.redeemed) + CALLS_BETWEEN_KILLS

            def are_redeeming(goal: int = goal) -> bool:
                return len(callers.redeemed) >= goal or any(task.done() for task in running)

            await until(are_redeeming, seconds=60)
            await server.kill()
            await server.start()
        await until(server.serves, seconds=30)
        callers.stop()
        await asyncio.gather(*running)
        record_property("redemptions, unknown at first", f"{len(callers.redeemed)}, {callers.unknown}")

        async with connected(database_url) as connection:
            query = "SELECT reference, redemption_id FROM {} WHERE merchant_id = $1"
            for table, known in (("redemptions", callers.redeemed), ("redemption_reversals", callers.reversed)):
                rows = await connection.fetch(query.format(table), shop.merchant_id)
                assert {row["reference"]: row["redemption_id"] for row in rows} == {
                    reference: redemption.redemption_id for reference, redemption in known.items()
                }
                assert len(rows) == len(known)
        await run_verify(database_url, shop.merchant_id)
    assert callers.unknown > 0
    assert len(callers.redeemed) >= kills * CALLS_BETWEEN_KILLS
