"""Points webhooks that arrive at the same time share calls to the server."""

import asyncio
import json
import time
from typing import Any

import grpc
import pytest

from pointbook.v1 import points_pb2
from pointbook_client import UnavailableError
from pointbook_common.shopline_webhooks import POINTS_TOPIC
from pointbook_server.access.model import Scope
from shopline_shim import points_batcher as batcher_module
from shopline_shim import request_id_middleware
from shopline_shim.points_batcher import CALLS_MAX, PointsBatcher
from shopline_shim.server_client import ServerClient
from support.clocks import NOW_MS
from support.fake_servers import BODY, SHOP, RunningShim, assert_problem, shim_with_fakes, signed_headers
from support.json_logs import json_logs
from support.servers import Service
from support.shims import APPLIED, DUPLICATE, PATH, QUARANTINED, points_body, webhook_sender
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique
from support.waiting import until

WEBHOOKS = 40


class Arrivals:
    """Counts the updates that were given to a batcher."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        apply = PointsBatcher.apply

        async def counted(batcher: PointsBatcher, *arguments: Any) -> points_pb2.ApplyPointsUpdateResponse:
            self.count += 1
            return await apply(batcher, *arguments)

        monkeypatch.setattr(PointsBatcher, "apply", counted)

    async def wait(self, count: int) -> None:
        """Wait until so many updates have arrived."""
        await until(lambda: self.count == count)


@pytest.fixture
def arrivals(monkeypatch: pytest.MonkeyPatch) -> Arrivals:
    """The updates of a test."""
    return Arrivals(monkeypatch)


async def post(shim: RunningShim, number: int, merchant_id: str = SHOP.merchant_id) -> int:
    """Deliver the webhook of a buyer, and return the status."""
    raw_body = json.dumps(BODY | {"buyer_id": f"buyer-{number}"}).encode()
    headers = signed_headers(raw_body) | {"x-shopline-merchant-id": merchant_id}
    return (await shim.client.post(PATH, content=raw_body, headers=headers)).status_code


async def hold_calls(shim: RunningShim, arrivals: Arrivals) -> list[asyncio.Task[int]]:
    """Deliver webhooks until as many calls as there can be wait at the server."""
    shim.points.proceeds.clear()
    held = []
    for number in range(1, CALLS_MAX + 1):
        held.append(asyncio.create_task(post(shim, -number)))
        await arrivals.wait(number)
        await until(lambda number=number: len(shim.points.updates) == number)  # type: ignore[misc] # mypy infers no defaults
    return held


async def queue_webhooks(
    shim: RunningShim, arrivals: Arrivals, count: int
) -> tuple[list[asyncio.Task[int]], list[asyncio.Task[int]]]:
    """Deliver webhooks that wait behind held calls, and return both."""
    held = await hold_calls(shim, arrivals)
    waiting = [asyncio.create_task(post(shim, number)) for number in range(count)]
    await arrivals.wait(CALLS_MAX + count)
    return held, waiting


async def test_webhooks_that_arrive_during_a_call_share_the_next_one(arrivals: Arrivals) -> None:
    async with shim_with_fakes() as shim:
        held, waiting = await queue_webhooks(shim, arrivals, WEBHOOKS)
        shim.points.proceeds.set()

        assert set(await asyncio.gather(*held, *waiting)) == {200}
        assert [len(batch) for batch in shim.points.batches] == [WEBHOOKS]
        assert {update.buyer_id for update in shim.points.batches[0]} == {f"buyer-{n}" for n in range(WEBHOOKS)}
        assert len(shim.points.updates) == CALLS_MAX


async def test_calls_have_a_bounded_number_of_updates(arrivals: Arrivals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batcher_module, "UPDATES_MAX", 15)
    async with shim_with_fakes() as shim:
        held, waiting = await queue_webhooks(shim, arrivals, WEBHOOKS)
        shim.points.proceeds.set()

        assert set(await asyncio.gather(*held, *waiting)) == {200}
        assert sorted(len(batch) for batch in shim.points.batches) == [10, 15, 15]


async def test_a_slow_merchant_delays_no_other(arrivals: Arrivals) -> None:
    async with shim_with_fakes() as shim:
        held = await hold_calls(shim, arrivals)
        waiting = asyncio.create_task(post(shim, 1))
        await arrivals.wait(CALLS_MAX + 1)

        other = asyncio.create_task(post(shim, 2, merchant_id="another-merchant"))
        await until(lambda: len(shim.points.updates) == CALLS_MAX + 1)
        assert shim.points.updates[-1].merchant_id == "another-merchant"
        shim.points.proceeds.set()
        assert set(await asyncio.gather(*held, waiting, other)) == {200}


async def test_a_webhook_waits_for_a_call_until_its_deadline(arrivals: Arrivals) -> None:
    async with shim_with_fakes(grpc_timeout_seconds=0.5) as shim:
        held = await hold_calls(shim, arrivals)
        started = time.monotonic()

        response = await shim.post()

        assert_problem(response, 503)
        assert time.monotonic() - started < 1.5
        assert set(await asyncio.gather(*held)) == {503}
        assert not shim.points.batches
        shim.points.proceeds.set()
        assert await post(shim, 3) == 200


def fail_shared_calls(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Make each call with several updates fail in the shim."""
    call = ServerClient.call

    async def failing(client: ServerClient, method: Any, request: Any, context: Any) -> Any:
        if method is client.points.BatchApplyPointsUpdates:
            raise error
        return await call(client, method, request, context)

    monkeypatch.setattr(ServerClient, "call", failing)


async def test_a_failed_call_fails_each_of_its_webhooks(arrivals: Arrivals, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_shared_calls(monkeypatch, UnavailableError(grpc.StatusCode.UNAVAILABLE, "The server is gone."))
    async with shim_with_fakes() as shim:
        held, waiting = await queue_webhooks(shim, arrivals, 3)
        shim.points.proceeds.set()

        assert await asyncio.gather(*held, *waiting) == [200] * CALLS_MAX + [503] * 3
        assert await post(shim, 4) == 200


async def test_a_defect_fails_the_webhooks_of_its_call_and_is_logged(
    arrivals: Arrivals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They get the response of any defect, not that of a stopping shim."""
    fail_shared_calls(monkeypatch, RuntimeError("a defect"))
    async with shim_with_fakes() as shim:
        held, waiting = await queue_webhooks(shim, arrivals, 3)
        with json_logs(request_id_middleware) as log:
            shim.points.proceeds.set()
            assert await asyncio.gather(*held, *waiting) == [200] * CALLS_MAX + [500] * 3
        assert log.getvalue().count("unexpected error") == 3
        assert await post(shim, 4) == 200


async def test_a_response_without_some_result_fails_all_webhooks_of_its_call(arrivals: Arrivals) -> None:
    async with shim_with_fakes() as shim:
        held, waiting = await queue_webhooks(shim, arrivals, 3)
        shim.points.is_short_of_results = True
        shim.points.proceeds.set()

        assert await asyncio.gather(*held, *waiting) == [200] * CALLS_MAX + [503] * 3
        assert await post(shim, 4) == 200


async def test_each_webhook_of_a_call_gets_its_own_result(
    service: Service, admin_token: str, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those of single calls: applied, duplicate, and quarantined."""
    sizes = count_updates_of_calls(monkeypatch)
    unknown = Shop(shop.merchant_id, unique("store"))
    bodies = {f"buyer-{number}": points_body(shop, buyer_id=f"buyer-{number}") for number in range(WEBHOOKS)}
    async with webhook_sender(service.server.port, admin_token, service.client) as sender:
        assert await sender.send(shop, POINTS_TOPIC, bodies["buyer-0"]) == APPLIED
        results = await asyncio.gather(
            *(sender.send(shop, POINTS_TOPIC, body) for body in bodies.values()),
            sender.send(unknown, POINTS_TOPIC, points_body(unknown)),
            sender.send(shop, POINTS_TOPIC, points_body(shop, updated_at=NOW_MS + 10 * 86_400_000)),
        )

        assert results == [DUPLICATE, *[APPLIED] * (WEBHOOKS - 1), QUARANTINED, QUARANTINED]
        quarantined = {webhook.detail for webhook in await sender.quarantined(shop.merchant_id)}
    assert max(sizes) > 1
    assert len(quarantined) == 2
    assert any("store_id" in detail for detail in quarantined)
    assert any("updated_at" in detail for detail in quarantined)


def count_updates_of_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which each call adds the number of its updates."""
    sizes: list[int] = []
    call = PointsBatcher._call

    async def counted(batcher: PointsBatcher, batch: Any) -> Any:
        sizes.append(len(batch))
        return await call(batcher, batch)

    monkeypatch.setattr(PointsBatcher, "_call", counted)
    return sizes


async def test_a_merchant_that_the_token_does_not_cover_fails_no_other(
    service: Service, shop: Shop, database_url: str
) -> None:
    token = await make_token(database_url, [shop.merchant_id], [Scope.POINTS_WRITE, Scope.WEBHOOKS])
    forbidden = Shop(unique("merchant"), unique("store"))
    await service.client.put_store(forbidden.merchant_id, forbidden.store_id)
    async with webhook_sender(service.server.port, token, service.client) as sender:
        results = await asyncio.gather(
            *(
                sender.send(each, POINTS_TOPIC, points_body(each, buyer_id=f"buyer-{number}"))
                for number in range(10)
                for each in (shop, forbidden)
            )
        )
    assert [status for status, _ in results] == [200, 503] * 10


async def test_an_internal_error_of_one_update_fails_its_webhook_alone(
    service: Service, admin_token: str, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = count_updates_of_calls(monkeypatch)
    ledger = service.server.services.points_batcher
    send = ledger._send

    async def failing(merchant_id: str, batch: Any) -> Any:
        if any(received.event.account_key.buyer_id == "broken" for received in batch):
            raise RuntimeError("a defect")
        return await send(merchant_id, batch)

    monkeypatch.setattr(ledger, "_send", failing)
    async with webhook_sender(service.server.port, admin_token, service.client) as sender:
        names = ["broken", *(f"buyer-{number}" for number in range(WEBHOOKS))]
        results = await asyncio.gather(
            *(sender.send(shop, POINTS_TOPIC, points_body(shop, buyer_id=name)) for name in names)
        )
    assert [status for status, _ in results] == [503] + [200] * WEBHOOKS
    assert max(sizes) > 1
