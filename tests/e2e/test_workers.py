"""Servers and shims with two workers that are killed, suspended and stopped."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from pointbook.v1 import points_pb2
from pointbook_client.testing.ports import free_port
from shopline_shim.signature import sign
from support.clients import Client
from support.http_clients import http_client
from support.ledger import check_ledger
from support.probes import http_get, http_text, is_alive, zombies
from support.processes import HAS_PROC, POINTBOOK, Running, clean_environment, running
from support.servers import Service
from support.shops import Shop
from support.waiting import until

pytestmark = pytest.mark.skipif(not HAS_PROC, reason="worker processes are looked up in /proc")

Send = Callable[[str], Awaitable[bool]]
"""Sends the one event of a buyer, once; returns whether it was acknowledged."""

CALLERS = 8
HEARTBEAT_SECONDS = 3
REPLACED_SECONDS_MAX = 40.0
STOP_SECONDS_MAX = 10.0
SECRET = "app-secret-of-workers"


class Load:
    """Callers that send events one by one, with retries until each is acknowledged."""

    def __init__(self, send: Send) -> None:
        self.acknowledged: list[str] = []
        self.failures = 0
        self._send = send
        self._stopping = False
        self._callers = [asyncio.create_task(self._call(number)) for number in range(CALLERS)]

    async def stop(self) -> None:
        """Stop all callers after their current event."""
        self._stopping = True
        await asyncio.gather(*self._callers)

    async def more(self, count: int = 50) -> None:
        """Wait until a number of further events is acknowledged."""
        goal = len(self.acknowledged) + count
        await until(lambda: len(self.acknowledged) >= goal, REPLACED_SECONDS_MAX)

    async def _call(self, caller: int) -> None:
        number = 0
        while not self._stopping:
            buyer_id = f"buyer-{caller}-{number}"
            if await self._send(buyer_id):
                self.acknowledged.append(buyer_id)
                number += 1
            else:
                self.failures += 1
                await asyncio.sleep(0.02)


@asynccontextmanager
async def two_workers(folder: Path, command: str, settings: Mapping[str, str]) -> AsyncIterator[Running]:
    """Run a command with two workers; both serve while the context is open."""
    settings = {**settings, "HEARTBEAT_TIMEOUT_SECONDS": str(HEARTBEAT_SECONDS)}
    async with running(command, "--workers", "2", folder=folder, settings=settings) as process:
        await until_served(process, 2)
        workers = process.workers()
        try:
            yield process
        finally:
            await process.kill()
            await until(lambda: not any(map(is_alive, workers)))


async def until_served(process: Running, count: int) -> None:
    """Wait until a number of workers has started to serve."""

    async def have_served() -> bool:
        return process.err.count('"worker serves"') >= count

    await process.until(have_served, REPLACED_SECONDS_MAX)


def logged(process: Running, event: str) -> list[dict[str, Any]]:
    """Return the log lines of an event."""
    lines = [json.loads(line) for line in process.err.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == event]


async def kill_suspend_and_stop(process: Running, load: Load) -> None:
    """Kill a worker, suspend another one, and stop all, under load."""
    await load.more()
    killed, other = process.workers()
    os.kill(killed, signal.SIGKILL)
    await load.more()
    await until_served(process, 3)
    assert [(line["pid"], line["cause"]) for line in logged(process, "worker ended")] == [(killed, "SIGKILL")]

    os.kill(other, signal.SIGSTOP)
    await until_served(process, 4)
    assert not is_alive(other)
    assert logged(process, "worker ended")[-1]["cause"] == f"no heartbeat for {HEARTBEAT_SECONDS} s"
    workers = process.workers()
    assert len(workers) == 2
    assert not zombies([killed, other, *workers])
    await load.more()

    exit_code, seconds = await process.terminate()
    assert exit_code == 0, process.err
    assert seconds < STOP_SECONDS_MAX
    assert not any(map(is_alive, workers))
    assert "Traceback" not in process.err


async def check_once(database_url: str, shop: Shop, load: Load) -> None:
    """Check that every acknowledged event is in the ledger once."""
    accounts = await check_ledger(database_url, shop.merchant_id)
    entries = {key.buyer_id: len(account.entries) for key, account in accounts.items()}
    assert set(entries.values()) == {1}
    assert set(load.acknowledged) <= entries.keys()


async def test_no_event_is_lost_or_doubled_while_server_workers_are_replaced(
    database_url: str, admin_token: str, shop: Shop, tmp_path: Path
) -> None:
    port, metrics_port = free_port(), free_port()
    addresses = {"GRPC_ADDRESS": f"127.0.0.1:{port}", "METRICS_ADDRESS": f"127.0.0.1:{metrics_port}"}
    async with two_workers(tmp_path, "serve", {"DATABASE_URL": database_url, **addresses}) as process:

        async def send(buyer_id: str) -> bool:
            # Each call has its own connection, so that the kernel selects a worker each time.
            client = Client(port, admin_token, [("grpc.use_local_subchannel_pool", 1)])
            try:
                update = shop.update(buyer_id, event_id=f"event-{buyer_id}")
                await client.points.ApplyPointsUpdate(points_pb2.ApplyPointsUpdateRequest(update=update), timeout=1.0)
            except grpc.aio.AioRpcError as error:
                if error.code() not in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}:
                    raise
                return False
            finally:
                await client.close()
            return True

        load = Load(send)
        await kill_suspend_and_stop(process, load)
        await load.stop()
    await check_once(database_url, shop, load)


async def test_no_other_program_gets_the_ports_of_a_dead_worker(database_url: str, tmp_path: Path) -> None:
    port, metrics_port = free_port(), free_port()
    addresses = {"GRPC_ADDRESS": f"127.0.0.1:{port}", "METRICS_ADDRESS": f"127.0.0.1:{metrics_port}"}
    async with two_workers(tmp_path, "serve", {"DATABASE_URL": database_url, **addresses}) as process:
        for pid in process.workers():
            os.kill(pid, signal.SIGKILL)
        await until(lambda: len(logged(process, "worker ended")) == 2)
        for reserved_port in (port, metrics_port):
            with pytest.raises(OSError, match="in use"):
                socket.create_server(("127.0.0.1", reserved_port))
        await until_served(process, 4)
        assert sorted(line["number"] for line in logged(process, "worker started")) == [0, 0, 1, 1]
        text = await http_text(f"http://127.0.0.1:{metrics_port}/metrics")
        for number in (0, 1):
            assert f'pointbook_worker_serving{{worker="{number}"}} 1.0' in text
            assert f'pointbook_worker_ends_total{{worker="{number}"}} 1.0' in text
            assert f'pointbook_serving{{worker="{number}"}} 1.0' in text
        assert (await process.stop(signal.SIGINT))[0] == 0, process.err


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_shim_runs_with_closed_standard_streams(tmp_path: Path, workers: str) -> None:
    address = f"127.0.0.1:{free_port()}"
    closed = ("/bin/sh", "-c", 'exec "$0" "$@" <&- >&-', POINTBOOK, "shim", "--workers", workers)
    environment = clean_environment({"HTTP_ADDRESS": address, "SHOPLINE_SECRETS": SECRET})
    process = await Running.start(*closed, environment=environment, folder=tmp_path)
    try:

        async def responds() -> bool:
            return await http_get(f"http://{address}/healthz") == 200

        await process.until(responds)
        assert (await process.terminate())[0] == 0, process.err
    finally:
        await process.kill()


async def test_no_webhook_is_lost_or_doubled_while_shim_workers_are_replaced(
    service: Service, admin_token: str, shop: Shop, tmp_path: Path
) -> None:
    port = free_port()
    settings = {
        "HTTP_ADDRESS": f"127.0.0.1:{port}",
        "GRPC_ADDRESS": f"127.0.0.1:{service.server.port}",
        "TOKEN": admin_token,
        "SHOPLINE_SECRETS": SECRET,
    }
    async with two_workers(tmp_path, "shim", settings) as process:

        async def send(buyer_id: str) -> bool:
            body = {
                "buyer_id": buyer_id,
                "points_balance": 20,
                "store_id": shop.store_id,
                "update_type": "INCREASE",
                "updated_at": 1_721_829_526_566,
                "updated_scene": "SUCCESSFUL_REGISTRATION",
                "updated_value": 20,
            }
            raw_body = json.dumps(body).encode()
            headers = {
                "X-Shopline-Topic": "app_memberSystem_points/challenged",
                "X-Shopline-Hmac-Sha256": sign(SECRET, raw_body),
                "X-Shopline-Shop-Id": shop.store_id,
                "X-Shopline-Merchant-Id": shop.merchant_id,
                "X-Shopline-Webhook-Id": buyer_id,
            }
            async with http_client(timeout=1.0) as http:
                try:
                    url = f"http://127.0.0.1:{port}/webhooks/shopline"
                    response = await http.post(url, content=raw_body, headers=headers)
                except httpx.TransportError:
                    return False
            assert response.status_code in {200, 503}, response.text
            return response.status_code == 200

        load = Load(send)
        await kill_suspend_and_stop(process, load)
        await load.stop()
    await check_once(service.database_url, shop, load)


async def test_shim_workers_end_with_their_killed_parent(tmp_path: Path) -> None:
    settings = {"HTTP_ADDRESS": f"127.0.0.1:{free_port()}", "SHOPLINE_SECRETS": SECRET, "GRPC_ADDRESS": "127.0.0.1:1"}
    async with two_workers(tmp_path, "shim", settings) as process:
        workers = process.workers()
        await process.kill()
        await until(lambda: not any(map(is_alive, workers)))
    async with two_workers(tmp_path, "shim", settings) as process:
        assert (await process.terminate())[0] == 0
