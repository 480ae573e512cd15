"""Ten failures of real services, and the alert of the shipped rules for each.

Prometheus is real too. The rules are those of deploy/, with all durations divided by FACTOR; thresholds are unchanged.
"""

import asyncio
import contextlib
import itertools
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import httpx
import pytest
from pydantic import SecretStr

from pointbook_client.testing.ports import free_port
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.db.clock_skew import SystemClock
from pointbook_server.delivery.sender import Message
from pointbook_server.programs.model import Channel
from pointbook_server.server import Server
from support.certificates import Authority
from support.clients import Client
from support.clocks import NOW_MS, at
from support.codes import add_customers, issue_code
from support.database_proxy import DatabaseProxy, proxied
from support.embedded_database import Cluster
from support.processes import HAS_PROC, Running, running
from support.prometheus import PROMETHEUS, FiringAlert, Prometheus, running_prometheus
from support.redemption import customer_ref
from support.servers import running_server
from support.shims import PATH, points_body, shim_client, webhook_headers
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique
from support.waiting import until

pytestmark = [
    pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed"),
    pytest.mark.skipif(not HAS_PROC, reason="worker processes are looked up in /proc"),
]

FACTOR = 100
TEMPLATE = "pointbook_template"
"""The migrated database that the fixture `database_url` makes."""
SAMPLES_BEFORE = 6
"""How often each service is scraped before anything is broken; until here no alert may fire."""
FIRING_SECONDS_MAX = 60.0
CUSTOMERS = 150
PAUSE_SECONDS = 0.1
"""The pace of the load: one call, then this pause."""
ISSUE_PAUSE_SECONDS = 0.3
"""The pace of codes, so that they are requested for as long as the drill lasts."""
SECOND_BREAK_SECONDS = 15.0
"""When a failure recurs, for a busy machine on which scrapes fail meanwhile."""
SLOW_SECONDS = 2.6
TOPIC = "app_memberSystem_points/challenged"

EXPECTED = {
    FiringAlert("PointbookDatabaseUnavailable", "pointbook-away", "critical"),
    FiringAlert("PointbookDatabaseHangs", "pointbook-hung", "critical"),
    FiringAlert("PointbookDatabaseReadOnly", "pointbook-read-only", "critical"),
    FiringAlert("PointbookWebhookSecretWrong", "pointbook-shim-secret", "critical"),
    FiringAlert("PointbookQuarantineFull", "pointbook-quarantine", "critical"),
    FiringAlert("PointbookClockSkewed", "pointbook-clock", "critical"),
    FiringAlert("PointbookCertificateExpires", "pointbook-certificate", "critical"),
    FiringAlert("PointbookWorkerEnded", "pointbook-workers", "warning"),
    FiringAlert("PointbookDriftGrows", "pointbook-lost", "warning"),
    FiringAlert("PointbookCodeSendsSlow", "pointbook-sender", "warning"),
}
"""The alert for each failure, with the job of the broken service."""

Break = Callable[[], Awaitable[None]]
"""Breaks a service. It may go on until it is cancelled."""


class ShiftedClock(SystemClock):
    """A machine's clock that a test moves ahead of the database's."""

    ahead_ms = 0

    def __call__(self) -> int:
        """Return the machine's time."""
        return super().__call__() + self.ahead_ms


class SlowSender:
    """A provider that takes its time."""

    needs_destination = True

    async def send(self, _message: Message) -> None:
        """Accept a message after a while."""
        await asyncio.sleep(SLOW_SECONDS)


class Drill:
    """Services with their own databases and metrics, and how to break them."""

    def __init__(self, cluster: Cluster, folder: Path, stack: contextlib.AsyncExitStack) -> None:
        self._cluster, self._folder, self._stack = cluster, folder, stack
        self.targets: dict[str, str] = {}
        self.breaks: list[Break] = []

    async def start(self) -> None:
        """Start all services."""
        await asyncio.gather(
            self.database_away(),
            self.database_hung(),
            self.database_read_only(),
            self.wrong_secret(),
            self.full_quarantine(),
            self.skewed_clock(),
            self.expired_certificate(),
            self.killed_worker(),
            self.lost_webhooks(),
            self.slow_sender(),
        )

    async def database_away(self) -> None:
        """Prepare a server whose database closes all connections and accepts none."""
        url, token = await self._database()
        proxy = await self._stack.enter_async_context(proxied(url))
        _, client, shop = await self._server("pointbook-away", proxy.url, token)
        self.breaks += [proxy.cut, lambda: _write_forever(client, shop)]

    async def database_hung(self) -> None:
        """Prepare a server whose database stops responding."""
        url, token = await self._database()
        proxy = await self._stack.enter_async_context(proxied(url))
        _, client, shop = await self._server("pointbook-hung", proxy.url, token)
        self.breaks += [lambda: _freeze(proxy), lambda: _write_forever(client, shop)]

    async def database_read_only(self) -> None:
        """Prepare a server whose connections are replaced by read-only ones."""
        url, token = await self._database()
        _, client, shop = await self._server("pointbook-read-only", url, token)
        self.breaks += [lambda: _make_read_only(url), lambda: _write_forever(client, shop)]

    async def wrong_secret(self) -> None:
        """Prepare a shim whose secret is not SHOPLINE's."""
        url, token = await self._database()
        server, _, shop = await self._server("pointbook-server-secret", url, token)
        http = await self._shim("pointbook-shim-secret", server, token, shopline_secrets=(SecretStr("other-secret"),))

        async def deliver() -> None:
            while True:
                assert await _deliver(http, shop, points_body(shop)) == httpx.codes.UNAUTHORIZED
                await asyncio.sleep(PAUSE_SECONDS)

        self.breaks.append(deliver)

    async def full_quarantine(self) -> None:
        """Prepare a server with space for one webhook in its quarantine."""
        url, token = await self._database()
        server, _, shop = await self._server("pointbook-quarantine", url, token, quarantine_total_webhooks_max=1)
        http = await self._shim("pointbook-shim-quarantine", server, token)

        async def deliver() -> None:
            assert await _deliver(http, shop, points_body(shop, updated_value="no number")) == httpx.codes.OK
            for number in itertools.count():
                body = points_body(shop, updated_value=f"no number either: {number}")
                assert await _deliver(http, shop, body) == httpx.codes.SERVICE_UNAVAILABLE
                await asyncio.sleep(PAUSE_SECONDS)

        self.breaks.append(deliver)

    async def skewed_clock(self) -> None:
        """Prepare a server whose clock is moved by a minute."""
        url, token = await self._database()
        clock = ShiftedClock()
        await self._server("pointbook-clock", url, token, clock=clock)

        async def move() -> None:
            clock.ahead_ms = 60_000

        self.breaks.append(move)

    async def expired_certificate(self) -> None:
        """Prepare a server whose certificate is replaced by one that has expired."""
        url, token = await self._database()
        authority, folder = Authority(), self._folder
        cert, key = authority.issue().write(folder, "server")
        await self._server("pointbook-certificate", url, token, tls_cert_file=cert, tls_key_file=key)

        async def replace() -> None:
            authority.issue(life=-timedelta(hours=1)).write(folder, "server")

        self.breaks.append(replace)

    async def killed_worker(self) -> None:
        """Prepare a service with two workers that are killed, one after the other."""
        url, _ = await self._database()
        address = self._target("pointbook-workers")
        settings = {"DATABASE_URL": url, "GRPC_ADDRESS": f"127.0.0.1:{free_port()}", "METRICS_ADDRESS": address}
        service = await self._stack.enter_async_context(
            running("serve", "--workers", "2", folder=self._folder, settings=settings)
        )

        async def have_started() -> bool:
            return service.err.count('"worker serves"') == 2

        await service.until(have_started)
        self.breaks.append(lambda: _kill_workers(service))

    async def lost_webhooks(self) -> None:
        """Prepare a server that misses events between others."""
        url, token = await self._database()
        server, client, shop = await self._server("pointbook-lost", url, token)

        async def lose() -> None:
            for number in itertools.count():
                buyer_id = f"buyer-{number}"
                await client.apply(shop.update(buyer_id, points_balance=20))
                await client.apply(shop.update(buyer_id, points_balance=90, updated_at=at(NOW_MS - 30_000)))
                await server.maintenance.refresh_metrics()
                await asyncio.sleep(SECOND_BREAK_SECONDS)

        self.breaks.append(lose)

    async def slow_sender(self) -> None:
        """Prepare a server whose provider is slow."""
        url, token = await self._database()
        senders = {Channel.SMS: SlowSender()}
        _, client, shop = await self._server("pointbook-sender", url, token, senders=senders, contact_pause_seconds=0)
        names = [f"customer-{number}" for number in range(CUSTOMERS)]
        await add_customers(client, shop, names)

        async def send() -> None:
            async with asyncio.TaskGroup() as calls:
                for name in names:
                    calls.create_task(issue_code(client, shop, customer=customer_ref(shop, name)))
                    await asyncio.sleep(ISSUE_PAUSE_SECONDS)

        self.breaks.append(send)

    async def _database(self) -> tuple[str, str]:
        """Return the URL of a new database, and a token with all scopes."""
        url = await self._cluster.clone(TEMPLATE)
        return url, await make_token(url, [ALL_MERCHANTS], list(Scope))

    async def _server(self, job: str, url: str, token: str, **settings: Any) -> tuple[Server, Client, Shop]:
        """Start a server with metrics, and return it with a client and a shop."""
        values = {"clock": SystemClock(), "metrics_address": self._target(job), **settings}
        server, client = await self._stack.enter_async_context(running_server(url, token, **values))
        shop = Shop(unique("merchant"), unique("store"))
        if "tls_cert_file" not in settings:  # The client speaks no TLS.
            await client.put_store(shop.merchant_id, shop.store_id)
        return server, client, shop

    async def _shim(self, job: str, server: Server, token: str, **settings: Any) -> httpx.AsyncClient:
        """Start a shim with metrics, and return its client."""
        values = {"shim_metrics_address": self._target(job), **settings}
        return await self._stack.enter_async_context(shim_client(server.port, token, **values))

    def _target(self, job: str) -> str:
        """Return a new address for the metrics of a job."""
        self.targets[job] = f"127.0.0.1:{free_port()}"
        return self.targets[job]


async def _write_forever(client: Client, shop: Shop) -> None:
    """Apply updates of new buyers; calls may fail as UNAVAILABLE."""
    for number in itertools.count():
        with contextlib.suppress(grpc.aio.AioRpcError):
            await client.apply(shop.update(f"buyer-{number}"))
        await asyncio.sleep(PAUSE_SECONDS)


async def _deliver(http: httpx.AsyncClient, shop: Shop, body: bytes) -> int:
    """Deliver a points webhook, and return the status."""
    return (await http.post(PATH, content=body, headers=webhook_headers(shop, TOPIC, body))).status_code


async def _make_read_only(url: str) -> None:
    """Make all sessions of a database read-only, as a failover to a standby does."""
    operator = await asyncpg.connect(url)
    name = await operator.fetchval("SELECT current_database()")
    await operator.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    await operator.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1 AND pid <> pg_backend_pid()", name
    )
    await operator.close()


async def _freeze(proxy: DatabaseProxy) -> None:
    proxy.freeze()


async def _kill_workers(service: Running) -> None:
    while True:
        os.kill(service.workers()[0], signal.SIGKILL)
        await asyncio.sleep(SECOND_BREAK_SECONDS)


@contextlib.asynccontextmanager
async def _broken(breaks: list[Break]) -> AsyncIterator[None]:
    """Break services during the block. Raises what a break raises."""
    tasks = [asyncio.ensure_future(each()) for each in breaks]
    try:
        yield
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _causes(firing: set[FiringAlert]) -> set[FiringAlert]:
    """Return those of some alerts that name one of the ten causes."""
    names = {(alert.name, alert.severity) for alert in EXPECTED}
    return {alert for alert in firing if (alert.name, alert.severity) in names}


async def _are_scraped(prometheus: Prometheus, jobs: int) -> bool:
    """Return whether all services have been scraped for a while, without a failure."""
    samples = await prometheus.query(f"count_over_time((up == 1)[1m:500ms]) >= {SAMPLES_BEFORE}")
    return len(samples) == jobs


@pytest.mark.usefixtures("database_url")
async def test_each_of_ten_failures_fires_its_alert_and_no_other(cluster: Cluster, tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as stack:
        drill = Drill(cluster, tmp_path, stack)
        await drill.start()
        prometheus = await stack.enter_async_context(running_prometheus(tmp_path, drill.targets, FACTOR))
        await until(lambda: _are_scraped(prometheus, len(drill.targets)), FIRING_SECONDS_MAX)
        assert _causes(await prometheus.firing()) == set()

        fired: set[FiringAlert] = set()

        async def have_fired() -> bool:
            fired.update(_causes(await prometheus.firing()))
            return fired >= EXPECTED

        async with _broken(drill.breaks):
            with contextlib.suppress(TimeoutError):
                await until(have_fired, FIRING_SECONDS_MAX)
            texts = [text for alert in await prometheus.alerts() for text in alert["annotations"].values()]

    assert fired == EXPECTED
    assert [text for text in texts if "<" in text] == []
