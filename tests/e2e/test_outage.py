"""Outages of the database, the server or the token lose no acknowledged event."""

import asyncio
import base64
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pointbook_cli.embedded_postgres import EmbeddedPostgres
from pointbook_client.testing.ports import free_port
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.db.migrations import migrate
from support.clients import Client
from support.clocks import at
from support.http_clients import http_client
from support.probes import grpc_health, http_get
from support.processes import Finished, Running, one_line, pointbook, running
from support.retrying_callers import RetryingCallers, check_acknowledged_events
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique
from support.waiting import until, until_locks_are_awaited

SECRET = "app-secret"
SHOPLINE_SECONDS = 5.0
STOP_SECONDS_MAX = 20.0
CALLERS = 300
NOW_MS = int(time.time() * 1_000)


@pytest.fixture(scope="module")
async def postgres(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedPostgres]:
    """A migrated database that these tests stop and start."""
    database = EmbeddedPostgres(tmp_path_factory.mktemp("outage") / "postgres", fsync=False)
    await database.start()
    await migrate(database.url())
    yield database
    await database.stop()


@pytest.fixture(autouse=True)
async def _database_runs(postgres: EmbeddedPostgres) -> None:
    """Start the database before each test."""
    await postgres.start()


@dataclass
class Site:
    """The settings of a server and a shim on one database, and a merchant."""

    folder: Path
    database_url: str
    shop: Shop
    admin_token: str
    token_id: str = ""
    grpc_address: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")
    http_address: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")
    token: str = ""

    @contextlib.asynccontextmanager
    async def server(self, **settings: str) -> AsyncIterator[Running]:
        """Run the server; it serves while the context is open."""
        own = {"DATABASE_URL": self.database_url, "GRPC_ADDRESS": self.grpc_address}
        async with running("serve", folder=self.folder, settings=own | settings) as process:
            await process.until(self.serves)
            yield process

    @contextlib.asynccontextmanager
    async def shim(self) -> AsyncIterator[Running]:
        """Run the shim; it listens while the context is open."""
        settings = {
            "GRPC_ADDRESS": self.grpc_address,
            "HTTP_ADDRESS": self.http_address,
            "SHOPLINE_SECRETS": SECRET,
            "TOKEN": self.token,
        }
        async with running("shim", folder=self.folder, settings=settings) as process:
            await process.until(self.listens)
            yield process

    async def serves(self) -> bool:
        """Return whether the server's health is SERVING."""
        return await grpc_health(self.grpc_address) == "SERVING"

    async def listens(self) -> bool:
        """Return whether the shim listens."""
        return await http_get(f"http://{self.http_address}/healthz") == 200

    async def readyz(self) -> int:
        """Return the status of /readyz."""
        return await http_get(f"http://{self.http_address}/readyz")

    async def client(self) -> Client:
        """Open a client with all scopes, and register the store."""
        client = Client(int(self.grpc_address.rpartition(":")[2]), self.admin_token)
        await client.put_store(self.shop.merchant_id, self.shop.store_id)
        return client

    async def send(self, body: dict[str, Any], merchant_id: str | None = None) -> httpx.Response:
        """Deliver a signed points webhook, with the timeout of SHOPLINE."""
        raw = json.dumps(body).encode()
        headers = {
            "X-Shopline-Topic": "app_memberSystem_points/challenged",
            "X-Shopline-Hmac-Sha256": base64.b64encode(hmac.digest(SECRET.encode(), raw, "sha256")).decode(),
            "X-Shopline-Merchant-Id": merchant_id or self.shop.merchant_id,
            "X-Shopline-Shop-Id": body["store_id"],
            "X-Shopline-Webhook-Id": unique("webhook"),
        }
        async with http_client(timeout=SHOPLINE_SECONDS) as client:
            return await client.post(f"http://{self.http_address}/webhooks/shopline", content=raw, headers=headers)

    def body(self, **changes: Any) -> dict[str, Any]:
        """Return SHOPLINE's sample of the Points update webhook, made consistent."""
        return {
            "buyer_id": "2404721679",
            "points_balance": 20,
            "points_expiry_time": "",
            "store_id": self.shop.store_id,
            "update_type": "INCREASE",
            "updated_at": NOW_MS,
            "updated_scene": "SUCCESSFUL_REGISTRATION",
            "updated_value": 20,
            **changes,
        }


@pytest.fixture
async def site(postgres: EmbeddedPostgres, tmp_path: Path) -> Site:
    """A site with a token for the shim, created by `pointbook token create`."""
    url = postgres.url()
    shop = Shop(unique("merchant"), unique("store"))
    scope = ("--merchant", shop.merchant_id, "--scope", "points.write", "--scope", "webhooks")
    made = await pointbook("token", "create", "--name", "shim", *scope, DATABASE_URL=url)
    assert made.exit_code == 0, made.err
    token = made.out.strip()
    admin_token = await make_token(url, [ALL_MERCHANTS], list(Scope))
    return Site(tmp_path, url, shop, admin_token, token_id=token.split("_")[1], token=token)


async def test_webhooks_get_503_while_the_database_is_away_and_then_200(postgres: EmbeddedPostgres, site: Site) -> None:
    async with site.server(), site.shim():
        client = await site.client()
        assert (await site.send(site.body())).status_code == 200
        more = site.body(updated_at=NOW_MS + 1, points_balance=50, updated_value=30)

        await postgres.stop()
        began = time.monotonic()
        away = await site.send(more)
        answered_seconds = time.monotonic() - began

        assert away.status_code == 503
        assert away.headers["content-type"] == "application/problem+json"
        assert answered_seconds < SHOPLINE_SECONDS

        async def is_reported() -> bool:
            return await grpc_health(site.grpc_address) == "NOT_SERVING" and await site.readyz() == 503

        await until(is_reported)
        assert await http_get(f"http://{site.http_address}/healthz") == 200

        await postgres.start()
        await until(site.serves)
        retried = await site.send(more)

        assert retried.status_code == 200
        assert retried.json() == {"outcome": "APPLIED"}
        assert await site.readyz() == 200
        account = await client.account(site.shop.merchant_id, site.shop.store_id, "2404721679")
        assert (account.points_balance, account.drift) == (50, 0)
        await client.close()


async def test_webhooks_get_503_in_time_while_the_database_hangs(postgres: EmbeddedPostgres, site: Site) -> None:
    async with site.server(), site.shim():
        client = await site.client()
        blocker = await asyncpg.connect(postgres.url())
        async with blocker.transaction():
            await blocker.execute("LOCK TABLE points_accounts IN ACCESS EXCLUSIVE MODE")
            frozen = await site.send(site.body())

        assert frozen.status_code == 503
        await blocker.close()
        assert (await site.send(site.body())).status_code == 200
        await client.close()


async def test_the_shim_recovers_after_its_server_was_away(site: Site) -> None:
    async with site.server() as first, site.shim():
        client = await site.client()
        assert await site.readyz() == 200
        exit_code, _ = await first.terminate()
        assert exit_code == 0

        assert (await site.send(site.body())).status_code == 503
        assert await site.readyz() == 503

        async with site.server():

            async def ready() -> bool:
                return await site.readyz() == 200

            found_seconds = await until(ready)
            assert (await site.send(site.body())).status_code == 200
        assert found_seconds < SHOPLINE_SECONDS
        await client.close()


async def test_webhooks_of_other_merchants_stores_are_quarantined(site: Site) -> None:
    async with site.server(), site.shim():
        client = await site.client()
        other = Shop(unique("merchant"), unique("store"))
        await client.put_store(other.merchant_id, other.store_id)

        unknown = await site.send(site.body(store_id=unique("store")))
        foreign = await site.send(site.body(store_id=other.store_id))
        forbidden = await site.send(site.body(store_id=other.store_id), merchant_id=other.merchant_id)

        for response in (unknown, foreign):
            assert (response.status_code, response.json()) == (200, {"outcome": "QUARANTINED"})
        # The merchant is an unsigned header, and the token may get more merchants: SHOPLINE must retry.
        assert forbidden.status_code == 503
        account = await client.account(other.merchant_id, other.store_id, "2404721679")
        assert account.points_balance == 0
        await client.close()


async def test_webhooks_get_503_after_the_token_was_revoked(site: Site) -> None:
    async with site.server(), site.shim() as shim:
        client = await site.client()
        assert (await site.send(site.body())).status_code == 200

        revoked = await pointbook("token", "revoke", site.token_id, DATABASE_URL=site.database_url)
        assert revoked == Finished(0, f"Token {site.token_id} is revoked.\n", "")

        async def refused() -> bool:
            return (await site.send(site.body())).status_code == 503

        assert await until(refused) < SHOPLINE_SECONDS
        assert "POINTBOOK_TOKEN" in shim.err
        assert site.token not in shim.err
        again = await pointbook("token", "revoke", site.token_id, DATABASE_URL=site.database_url)
        assert site.token_id in one_line(again)
        await client.close()


async def test_calls_beyond_100_streams_of_a_connection_wait(site: Site) -> None:
    async with site.server():
        client = await site.client()
        for round_number in range(2):
            updates = [
                site.shop.update(
                    f"buyer-{n}", updated_at=at(NOW_MS + round_number), points_balance=20 * (round_number + 1)
                )
                for n in range(CALLERS)
            ]
            answers = await asyncio.gather(*map(client.apply, updates))
            assert {response.drift for response in answers} == {0}
        await client.close()


async def test_sigterm_under_load_stops_cleanly(postgres: EmbeddedPostgres, site: Site) -> None:
    async with site.server() as server:
        client = await site.client()
        callers = RetryingCallers(site.grpc_address, site.admin_token, site.shop)
        callers.start(CALLERS)
        await callers.wait_for_acknowledged(CALLERS)

        exit_code, stop_seconds = await server.terminate()

        assert exit_code == 0, server.err
        assert stop_seconds < STOP_SECONDS_MAX
        assert set(callers.codes) <= {"OK", "UNAVAILABLE"}
        async with site.server():
            await callers.wait_for_acknowledged(CALLERS)
            await callers.stop()
        assert set(callers.codes) <= {"OK", "UNAVAILABLE"}
        await check_acknowledged_events(postgres.url(), site.shop, callers)
        await client.close()


async def test_sigterm_ends_hanging_calls(postgres: EmbeddedPostgres, site: Site) -> None:
    async with site.server(DRAIN_SECONDS="3") as server:
        client = await site.client()
        blocker = await asyncpg.connect(postgres.url())
        lock = blocker.transaction()
        await lock.start()
        await blocker.execute("LOCK TABLE points_accounts IN ACCESS EXCLUSIVE MODE")
        callers = RetryingCallers(site.grpc_address, site.admin_token, site.shop)
        callers.start(CALLERS)
        await until_locks_are_awaited(site.database_url)
        stopping = asyncio.create_task(server.terminate())
        async with grpc.aio.insecure_channel(site.grpc_address) as channel:
            health = health_pb2_grpc.HealthStub(channel)

            async def is_reported() -> bool:
                response = await health.Check(health_pb2.HealthCheckRequest(), timeout=2.0)
                return bool(response.status == health_pb2.HealthCheckResponse.NOT_SERVING)

            await until(is_reported)

        exit_code, stop_seconds = await stopping

        assert exit_code == 0, server.err
        assert stop_seconds < STOP_SECONDS_MAX
        await callers.stop()
        assert set(callers.codes) == {"UNAVAILABLE"}
        assert "internal error" not in server.err
        await lock.rollback()
        await blocker.close()
        await client.close()


async def test_after_sigkill_under_load_acknowledged_events_count_once(postgres: EmbeddedPostgres, site: Site) -> None:
    callers, some = RetryingCallers(site.grpc_address, site.admin_token, site.shop), CALLERS // 3
    for number in range(3):
        async with site.server() as server:
            if number == 0:
                client = await site.client()
                await client.close()
                callers.start(some)
            await callers.wait_for_acknowledged(some)
            await server.kill()
    async with site.server():
        await callers.wait_for_acknowledged(some)
        await callers.stop()
    assert set(callers.codes) <= {"OK", "UNAVAILABLE"}
    await check_acknowledged_events(postgres.url(), site.shop, callers)


async def test_after_a_database_restart_under_load_events_count_once(postgres: EmbeddedPostgres, site: Site) -> None:
    async with site.server():
        client = await site.client()
        callers = RetryingCallers(site.grpc_address, site.admin_token, site.shop)
        callers.start(CALLERS)
        await callers.wait_for_acknowledged(CALLERS)
        await postgres.stop()
        await until(lambda: callers.codes["UNAVAILABLE"] > 0)
        await postgres.start()
        await callers.wait_for_acknowledged(CALLERS)
        await callers.stop()
        assert set(callers.codes) <= {"OK", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED"}
        await check_acknowledged_events(postgres.url(), site.shop, callers)
        await client.close()
