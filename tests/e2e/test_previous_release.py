"""The previous release and the next one on one database, under load."""

import asyncio
import contextlib
import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc

from pointbook.v1 import points_pb2
from pointbook_client.testing.ports import free_port
from pointbook_common.durations import DAY_MS
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.db.migrations.revisions import all_revisions
from support.clients import Client
from support.clocks import at
from support.connections import connected
from support.embedded_database import Cluster
from support.ledger import check_ledger
from support.previous_release import REVISION, next_program, previous_program
from support.probes import grpc_health
from support.processes import Running, finish_fork, one_line, running
from support.redemption import earn, redeem_request, validate_request
from support.shops import Shop
from support.unique_names import unique
from support.waiting import until

CALLERS = 8
CALLS_OF_STEP = 300
"""How many calls must succeed in each step of the upgrade."""
NOW_MS = int(time.time() * 1_000)
RETRY_SECONDS = 0.02
"""The pause of a caller before it repeats a call, as a client with retries makes."""
SCOPES = (Scope.ADMIN, Scope.STORES, Scope.POINTS_WRITE, Scope.REDEEM)
CREATE_TOKEN = (
    *("token", "create", "--name", "load", "--merchant", ALL_MERCHANTS),
    *(word for scope in SCOPES for word in ("--scope", scope)),
)
ADD_COLUMN = f'''
"""A note of each account."""

from alembic import op

revision = "9001"
down_revision = "{all_revisions()[-1].number}"


def upgrade() -> None:
    """Add the column."""
    op.execute("ALTER TABLE points_accounts ADD COLUMN note text")
    op.execute("CREATE TYPE later_row AS (note text)")
'''
BUILD_INDEX = '''
"""An index of notes."""

from pointbook_server.db.migrations.operations import backfill, create_index

revision = "9002"
down_revision = "9001"
in_transaction = False


def upgrade() -> None:
    """Fill the column, and build the index."""
    backfill("points_accounts", ["store_id", "buyer_id", "merchant_id"], {"note": "''"}, "note IS NULL", batch_rows=3)
    create_index("ix_points_accounts_note", "points_accounts (note)")
'''
MIGRATIONS = {"9001_note.py": ADD_COLUMN, "9002_note_index.py": BUILD_INDEX}


class Load:
    """Concurrent callers of several servers.

    Each repeats a call that got UNAVAILABLE, on the next server, until it succeeds.
    """

    def __init__(self, shop: Shop) -> None:
        self._shop = shop
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self.clients: list[Client] = []
        self.events: set[str] = set()
        self.references: set[str] = set()
        self.codes: Counter[str] = Counter()

    def start(self) -> None:
        """Start the callers."""
        self._tasks = [asyncio.create_task(self._run(f"buyer-{number}")) for number in range(CALLERS)]

    async def stop(self) -> None:
        """Stop after the running calls have succeeded."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def wait(self) -> None:
        """Wait until more calls have succeeded."""
        goal = self.codes["OK"] + CALLS_OF_STEP
        await until(lambda: self.codes["OK"] >= goal or any(task.done() for task in self._tasks), seconds=30.0)

    async def _run(self, buyer_id: str) -> None:
        for number in itertools.count(1):
            if self._stopping:
                return
            update = self._shop.update(
                buyer_id, updated_value=1, points_balance=number, updated_at=at(NOW_MS - DAY_MS + number)
            )
            apply, redeem = points_pb2.ApplyPointsUpdateRequest(update=update), redeem_request(self._shop, 1)
            await self._repeat(lambda client: client.points.ApplyPointsUpdate, apply)
            self.events.add(update.event_id)
            await self._repeat(lambda client: client.redemption.ValidateRedemption, validate_request(self._shop, 1))
            await self._repeat(lambda client: client.redemption.RedeemPoints, redeem)
            self.references.add(redeem.external_reference_number)

    async def _repeat(self, method_of: Callable[[Client], Any], request: object) -> None:
        for attempt in itertools.count():
            try:
                await method_of(self.clients[attempt % len(self.clients)])(request, timeout=10.0)
            except grpc.aio.AioRpcError as error:
                self.codes[error.code().name] += 1
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                await asyncio.sleep(RETRY_SECONDS)
            else:
                self.codes["OK"] += 1
                return


@contextlib.asynccontextmanager
async def serving(program: Path, url: str, folder: Path) -> AsyncIterator[tuple[Running, int]]:
    """Run a release's server, and yield it with its port once it serves."""
    address = f"127.0.0.1:{free_port()}"
    settings = {"DATABASE_URL": url, "GRPC_ADDRESS": address}
    async with running("serve", folder=folder, settings=settings, program=program) as process:

        async def serves() -> bool:
            return await grpc_health(address) == "SERVING"

        await process.until(serves)
        yield process, int(address.rpartition(":")[2])


async def empty_database(cluster: Cluster) -> str:
    """Return the URL of a database without tables."""

    async def leave_empty(_url: str) -> None:
        pass

    await cluster.template("pointbook_previous", leave_empty)
    return await cluster.clone("pointbook_previous")


async def check_stored(url: str, shop: Shop, load: Load) -> None:
    """Check that the acknowledged events and redemptions are stored, each once."""
    async with connected(url) as connection:
        events = await connection.fetch(
            "SELECT event_id FROM points_entries WHERE merchant_id = $1 AND buyer_id <> 'buyer'", shop.merchant_id
        )
        redemptions = await connection.fetch(
            "SELECT reference FROM redemptions WHERE merchant_id = $1", shop.merchant_id
        )
    assert Counter(row["event_id"] for row in events) == Counter(load.events)
    assert Counter(row["reference"] for row in redemptions) == Counter(load.references)
    accounts = await check_ledger(url, shop.merchant_id)
    assert {account.account.drift for account in accounts.values()} == {0}


async def test_upgrade_and_rollback_fail_no_call_and_lose_no_event(cluster: Cluster, tmp_path: Path) -> None:
    """The previous release serves during the migration, and after the next one."""
    previous, upcoming = previous_program(tmp_path), next_program(tmp_path, MIGRATIONS)
    url = await empty_database(cluster)
    settings = {"DATABASE_URL": url}
    migrated = await finish_fork(previous, "migrate", settings=settings)
    assert migrated.out == f"The database was migrated from revision nothing to {REVISION}.\n", migrated
    token = (await finish_fork(previous, *CREATE_TOKEN, settings=settings)).out.strip()
    shop = Shop(unique("merchant"), unique("store"))
    load = Load(shop)

    async with serving(previous, url, tmp_path) as (old, old_port), contextlib.AsyncExitStack() as stack:

        async def connect(port: int) -> Client:
            client = Client(port, token)
            stack.push_async_callback(client.close)
            return client

        load.clients = [await connect(old_port)]
        await load.clients[0].put_store(shop.merchant_id, shop.store_id)
        await load.clients[0].put_program(shop.merchant_id, shop.store_id, criteria={})
        await earn(load.clients[0], shop, 1_000_000)
        load.start()
        await load.wait()

        # The next release refuses the older schema.
        check, refused = await asyncio.gather(
            finish_fork(upcoming, "migrate", "--check", settings=settings),
            finish_fork(upcoming, "serve", settings=settings | {"GRPC_ADDRESS": f"127.0.0.1:{free_port()}"}),
        )
        assert (check.exit_code, check.out.splitlines()[-1]) == (1, "9002 expand: An index of notes")
        assert one_line(refused).endswith("this release needs revision 9002: run `pointbook migrate`")

        # The previous one serves while the schema changes, and afterwards.
        succeeded = load.codes["OK"]
        migrated = await finish_fork(upcoming, "migrate", settings=settings)
        assert (migrated.exit_code, migrated.err) == (0, ""), migrated
        assert load.codes["OK"] > succeeded
        await load.wait()

        async with serving(upcoming, url, tmp_path) as (new, new_port):
            load.clients.insert(0, await connect(new_port))
            await load.wait()
            assert (await old.terminate())[0] == 0
            await load.wait()

            # The rollback: the previous release starts on the newer schema.
            async with serving(previous, url, tmp_path) as (_, again_port):
                load.clients[-1] = await connect(again_port)
                assert (await new.terminate())[0] == 0
                await load.wait()
                await load.stop()

    assert set(load.codes) <= {"OK", "UNAVAILABLE"}
    await check_stored(url, shop, load)
