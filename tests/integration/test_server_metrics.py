"""The metrics and the log of a server's calls, and what is read from the database."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from prometheus_client import generate_latest

from pointbook.v1 import points_pb2, programs_pb2, webhooks_pb2
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.db import database as database_module
from pointbook_server.db.database import Connection, Database
from pointbook_server.db.errors import RetryTransactionError
from pointbook_server.metrics import Metrics
from pointbook_server.rpc import call_log as call_log_module
from pointbook_server.rpc import method_handlers as handlers_module
from pointbook_server.server import Server
from support.clients import Client
from support.clocks import NOW_MS
from support.json_logs import json_logs
from support.redemption import earn, redeem, redeem_request
from support.refusals import refused
from support.servers import running_server, until_calls_end
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique
from support.waiting import until

APPLY = "PointsService/ApplyPointsUpdate"
WEBHOOK = points_pb2.WebhookMetadata(webhook_id="w-1")


@dataclass
class Measured:
    """A server of one test with its client."""

    server: Server
    client: Client

    def value(self, name: str, **labels: str) -> float | None:
        """Return the value of a sample."""
        return self.server.metrics.registry.get_sample_value(f"pointbook_{name}", labels)

    async def refresh(self) -> None:
        """Read the state of the database into the metrics, as maintenance does."""
        await self.server.maintenance.refresh_metrics()


@pytest.fixture
async def measured(database_url: str, admin_token: str) -> AsyncIterator[Measured]:
    """A server whose metrics start at zero."""
    async with running_server(database_url, admin_token) as (server, client):
        yield Measured(server, client)


class HeldBatches:
    """Updates that are written only once they may leave."""

    def __init__(self, write: Callable[[str, Any], Awaitable[Any]]) -> None:
        self._write = write
        self.has_begun = asyncio.Event()
        self.may_leave = asyncio.Event()

    async def write(self, merchant_id: str, batch: Any) -> Any:
        """Write a batch when it may leave."""
        self.has_begun.set()
        await self.may_leave.wait()
        return await self._write(merchant_id, batch)


@pytest.fixture
def held_batches(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> HeldBatches:
    """The held batches of the server."""
    batcher = measured.server.services.points_batcher
    held = HeldBatches(batcher._send)
    monkeypatch.setattr(batcher, "_send", held.write)
    return held


async def test_calls_are_counted_by_method_code_and_reason(measured: Measured, shop: Shop) -> None:
    await measured.client.apply(shop.update())
    await refused(measured.client.apply(shop.update("")))
    await refused(measured.client.apply(Shop(shop.merchant_id, "unregistered").update()))
    anonymous = Client(measured.server.port, "")
    await refused(anonymous.apply(shop.update()))
    await anonymous.close()
    await until_calls_end(measured.server)

    assert measured.value("grpc_call_duration_seconds_count", method=APPLY) == 4
    for code, reason in (
        ("INVALID_ARGUMENT", "INVALID_FIELDS"),
        ("NOT_FOUND", "STORE_NOT_FOUND"),
        ("UNAUTHENTICATED", "TOKEN_MISSING"),
    ):
        assert measured.value("grpc_call_errors_total", method=APPLY, code=code, reason=reason) == 1, reason


async def test_cancelled_and_unknown_calls_are_counted(
    measured: Measured, shop: Shop, admin_token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(measured.server.services.points_batcher, "run", hang)
    call = measured.client.points.ApplyPointsUpdate(points_pb2.ApplyPointsUpdateRequest(update=shop.update()))
    await until(lambda: measured.value("grpc_calls_running") == 1)
    call.cancel()
    cancelled = {"method": APPLY, "code": "CANCELLED", "reason": "CANCELLED"}
    await until(lambda: measured.value("grpc_call_errors_total", **cancelled) == 1)

    unknown: Any = measured.client.channel.unary_unary("/pointbook.v1.PointsService/Unknown")
    with pytest.raises(grpc.aio.AioRpcError):
        await unknown(b"", metadata=(("authorization", f"Bearer {admin_token}"),))
    await until_calls_end(measured.server)
    labels = {"method": "unknown", "code": "UNIMPLEMENTED", "reason": "UNKNOWN_METHOD"}
    assert measured.value("grpc_call_errors_total", **labels) == 1
    assert measured.value("grpc_calls_running") == 0


async def test_a_call_that_ends_at_its_callers_deadline_is_no_cancelled_one(
    measured: Measured, held_batches: HeldBatches, shop: Shop
) -> None:
    """Objectives leave cancelled calls out.

    So a server too slow for all its callers would meet them.
    """
    request = points_pb2.ApplyPointsUpdateRequest(update=shop.update())
    calls = [measured.client.points.ApplyPointsUpdate(request, timeout=1 + number / 100) for number in range(10)]
    ends = await asyncio.gather(*calls, return_exceptions=True)
    assert {end.code() for end in ends if isinstance(end, grpc.aio.AioRpcError)} == {grpc.StatusCode.DEADLINE_EXCEEDED}
    await until(lambda: measured.value("grpc_calls_running") == 0)
    held_batches.may_leave.set()

    late = {"method": APPLY, "code": "DEADLINE_EXCEEDED", "reason": "DEADLINE_EXCEEDED"}
    assert measured.value("grpc_call_errors_total", **late) == 10


async def test_batches_are_measured_by_kind(measured: Measured, shop: Shop) -> None:
    await asyncio.gather(*(measured.client.apply(shop.update(f"buyer-{number}")) for number in range(30)))
    await measured.client.account(shop.merchant_id, shop.store_id, "buyer-1")

    batches = measured.value("batch_size_count", kind="updates")
    assert batches is not None
    assert 1 <= batches < 30
    assert measured.value("batch_size_sum", kind="updates") == 30
    assert measured.value("batch_wait_seconds_count", kind="updates") == batches
    assert measured.value("batch_duration_seconds_count", kind="updates") == batches
    assert measured.value("batch_items_waiting", kind="updates") == 0
    assert measured.value("batch_size_sum", kind="accounts") == 1


async def test_statements_are_timed_by_name(measured: Measured, shop: Shop) -> None:
    await measured.client.put_store(shop.merchant_id, shop.store_id)
    await measured.client.account(shop.merchant_id, shop.store_id, "buyer")

    for name in ("programs.update_store", "ledger.read_accounts", "transaction.commit"):
        assert measured.value("database_statement_duration_seconds_count", statement=name), name
    assert measured.value("database_connections_max") == measured.server._settings.database_pool_size
    await until(lambda: measured.value("database_connections_in_use") == 0)
    assert measured.value("database_connection_wait_seconds_count")


async def test_conflicts_and_failures_of_the_database_are_counted_by_cause(database_url: str) -> None:
    metrics = Metrics()
    database = Database(database_url, pool_size=1, metrics=metrics)
    causes = iter(("40001", "40P01", "", "40001"))

    async def conflict(_connection: Connection) -> None:
        if (cause := next(causes, None)) is not None:
            raise RetryTransactionError(cause)

    await database.transaction(conflict)
    database.cut()
    with pytest.raises(Exception, match="not available"):
        await database.transaction(conflict)
    await database.dispose()

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"pointbook_{name}", labels)

    assert value("database_retries_total", sqlstate="40001") == 2
    assert value("database_retries_total", sqlstate="40P01") == 1
    assert value("database_retries_total", sqlstate="noticed") == 1
    assert value("database_errors_total", cause="PoolRefusalError") == 1


async def test_the_last_conflict_is_no_retry(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "RETRY_DELAY_SECONDS", 0)
    metrics, attempts = Metrics(), 0
    database = Database(database_url, pool_size=1, metrics=metrics)

    async def conflict(_connection: Connection) -> None:
        nonlocal attempts
        attempts += 1
        raise RetryTransactionError("40001")

    with pytest.raises(RetryTransactionError):
        await database.transaction(conflict)
    await database.dispose()

    retries = metrics.registry.get_sample_value("pointbook_database_retries_total", {"sqlstate": "40001"})
    assert retries == attempts - 1


async def test_updates_are_counted_by_scene_and_outcome(measured: Measured, shop: Shop) -> None:
    """A name that SHOPLINE does not list is no label, because a sender chooses it."""
    update = shop.update()
    unlisted = {"updated_scene": None, "unrecognized_scene": unique("SCENE")}
    updates = [update, update, shop.update("other", points_balance=None, **unlisted), shop.update("")]
    await measured.client.points.BatchApplyPointsUpdates(points_pb2.BatchApplyPointsUpdatesRequest(updates=updates))
    await measured.client.apply(update)
    await refused(measured.client.apply(Shop(shop.merchant_id, "unregistered").update()))

    for scene, outcome, count in (
        ("SUCCESSFUL_REGISTRATION", "APPLIED", 1),
        ("SUCCESSFUL_REGISTRATION", "DUPLICATE", 2),
        ("SUCCESSFUL_REGISTRATION", "REFUSED", 2),
        ("OTHER", "APPLIED", 1),
    ):
        assert measured.value("points_events_total", scene=scene, outcome=outcome) == count, (scene, outcome)


async def test_updates_of_cancelled_calls_are_counted_once_they_are_applied(
    measured: Measured, held_batches: HeldBatches, shop: Shop
) -> None:
    call = measured.client.points.ApplyPointsUpdate(points_pb2.ApplyPointsUpdateRequest(update=shop.update()))
    await held_batches.has_begun.wait()
    call.cancel()
    await until(lambda: measured.value("grpc_calls_running") == 0)
    held_batches.may_leave.set()

    await until(lambda: measured.value("points_events_total", scene="SUCCESSFUL_REGISTRATION", outcome="APPLIED") == 1)


async def test_drift_is_shown_by_merchant(measured: Measured, shop: Shop) -> None:
    for buyer_id, balance in (("buyer-1", 50), ("buyer-2", 10)):
        await measured.client.apply(shop.update(buyer_id, event_id=unique("event")))
        await measured.client.apply(shop.update(buyer_id, points_balance=40 + balance))

    await measured.refresh()

    accounts = await measured.client.points.ListDriftingAccounts(
        points_pb2.ListDriftingAccountsRequest(merchant_id=shop.merchant_id)
    )
    drifts = [account.drift for account in accounts.accounts]
    assert drifts
    assert measured.value("drifting_accounts", merchant_id=shop.merchant_id) == len(drifts)
    assert measured.value("drift_points", merchant_id=shop.merchant_id) == sum(map(abs, drifts))


async def test_holds_are_counted(measured: Measured, shop: Shop) -> None:
    await measured.client.put_program(shop.merchant_id, shop.store_id, criteria={})
    await measured.refresh()
    before = measured.value("redemption_holds_open")
    assert before is not None
    await earn(measured.client, shop, 500)
    await redeem(measured.client, redeem_request(shop))

    await measured.refresh()

    now = measured.value("redemption_holds_open")
    assert now is not None
    assert now > before
    assert measured.value("redemption_holds_overdue") is not None


async def test_quarantine_is_counted_by_reason_with_its_oldest_webhook(measured: Measured) -> None:
    request = webhooks_pb2.QuarantineWebhookRequest(
        merchant_id=unique("merchant"),
        topic="app_memberSystem_points/challenged",
        body=unique("body").encode(),
        reason=webhooks_pb2.QUARANTINE_REASON_MALFORMED,
    )
    await measured.client.webhooks.QuarantineWebhook(request)

    await measured.refresh()

    count = measured.value("quarantine_webhooks_by_reason", reason="MALFORMED")
    oldest = measured.value("quarantine_oldest_timestamp_seconds")
    assert count is not None
    assert count >= 1
    assert oldest is not None
    assert 0 < oldest <= NOW_MS / 1_000


async def test_share_of_the_nearest_limit_of_quarantines_is_shown(
    database_url: str, admin_token: str, shop: Shop
) -> None:
    """Here that of a merchant; those of the shared and of all quarantines are far."""
    async with running_server(database_url, admin_token, quarantine_webhooks_max=2_000) as (server, client):
        for number in range(2):
            body = json.dumps({"store_id": shop.store_id, "number": number}).encode()
            await client.webhooks.QuarantineWebhook(
                webhooks_pb2.QuarantineWebhookRequest(
                    merchant_id=shop.merchant_id,
                    topic="app_memberSystem_points/challenged",
                    body=body,
                    reason=webhooks_pb2.QUARANTINE_REASON_MALFORMED,
                )
            )
        measured = Measured(server, client)
        await measured.refresh()
        ratio = measured.value("quarantine_fullest_ratio")

    assert ratio is not None
    assert ratio >= 2 / 2_000
    assert ratio < 1


async def test_last_webhook_of_a_store_is_kept(measured: Measured, shop: Shop, database_url: str) -> None:
    """PutStore does not reset it, and updates that are no webhooks do not count."""
    labels = {"merchant_id": shop.merchant_id, "store_id": shop.store_id}
    await measured.client.apply(shop.update())
    await measured.refresh()
    assert measured.value("store_last_webhook_timestamp_seconds", **labels) is None

    await measured.client.apply(shop.update(webhook=WEBHOOK))
    await measured.refresh()
    store = programs_pb2.Store(merchant_id=shop.merchant_id, store_id=shop.store_id, display_name="Renamed")
    await measured.client.programs.PutStore(programs_pb2.PutStoreRequest(store=store))

    assert measured.value("store_last_webhook_timestamp_seconds", **labels) == NOW_MS / 1_000
    async with running_server(database_url) as (server, client):
        other = Measured(server, client)
        await other.refresh()
        assert other.value("store_last_webhook_timestamp_seconds", **labels) == NOW_MS / 1_000


async def test_a_stopping_server_writes_the_last_webhooks(database_url: str, admin_token: str, shop: Shop) -> None:
    async with running_server(database_url, admin_token) as (_, client):
        await client.apply(shop.update(webhook=WEBHOOK))
    async with running_server(database_url) as (server, client):
        measured = Measured(server, client)
        await measured.refresh()
        labels = {"merchant_id": shop.merchant_id, "store_id": shop.store_id}
        assert measured.value("store_last_webhook_timestamp_seconds", **labels) == NOW_MS / 1_000


async def test_next_expiry_is_that_of_tokens_in_use(database_url: str, measured: Measured, shop: Shop) -> None:
    tokens = [
        await make_token(database_url, [ALL_MERCHANTS], [Scope.POINTS_WRITE], expires_at_ms=NOW_MS + 3_600_000 * hours)
        for hours in (1, 2, 3)
    ]
    for token in tokens[1:]:
        client = Client(measured.server.port, token)
        await client.apply(shop.update(unique("buyer")))
        await client.close()

    assert measured.value("token_expiry_timestamp_seconds") == NOW_MS / 1_000 + 7_200


async def test_each_call_is_one_line_of_the_log(database_url: str, admin_token: str, shop: Shop) -> None:
    with json_logs(call_log_module) as written:
        async with running_server(database_url, admin_token) as (_, client):
            await client.apply(shop.update("buyer-of-the-log"))
            await refused(client.apply(shop.update("")))
    applied, failed = [line for line in map(json.loads, written.getvalue().splitlines()) if line["event"] == "call"]

    assert (applied["method"], applied["code"], applied["reason"]) == (APPLY, "OK", None)
    assert (failed["method"], failed["code"], failed["reason"]) == (APPLY, "INVALID_ARGUMENT", "INVALID_FIELDS")
    assert applied["duration_ms"] >= applied["queue_ms"] > 0
    assert applied["token_id"]
    assert applied["request_id"] != failed["request_id"]
    assert "buyer-of-the-log" not in written.getvalue()


async def test_calls_beyond_the_limit_of_lines_are_counted(database_url: str, admin_token: str, shop: Shop) -> None:
    with json_logs(call_log_module) as written:
        async with running_server(database_url, admin_token, call_log_lines_per_second_max=3) as (_, client):
            await asyncio.gather(*(client.apply(shop.update(f"buyer-{number}")) for number in range(40)))

            def lines(event: str) -> list[dict[str, Any]]:
                return [line for line in map(json.loads, written.getvalue().splitlines()) if line["event"] == event]

            await until(lambda: len(lines("call")) + sum(line["count"] for line in lines("more calls")) == 40)
    assert len(lines("call")) <= 3 * (len(lines("more calls")) + 1)
    assert all("request_id" not in line for line in lines("more calls"))


async def test_lag_of_the_event_loop_is_measured(measured: Measured) -> None:
    await until(lambda: (measured.value("event_loop_lag_seconds_count") or 0) >= 2)


async def test_a_defect_that_many_calls_hit_is_logged_in_a_few_lines(
    database_url: str, admin_token: str, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("the defect")

    with json_logs(handlers_module) as written:
        async with running_server(database_url, admin_token) as (server, client):
            monkeypatch.setattr(server.services.points_batcher, "run", fail)
            calls = [refused(client.apply(shop.update())) for _ in range(40)]
            assert {refusal.reason for refusal in await asyncio.gather(*calls)} == {"INTERNAL"}
            text = '"more internal errors"'
            await until(lambda: text in written.getvalue())
    assert written.getvalue().count('"internal error"') < 40


async def test_a_scrape_is_short(measured: Measured, shop: Shop) -> None:
    """Its length is its cost; a histogram of each of 60 methods would triple it."""
    await measured.client.put_program(shop.merchant_id, shop.store_id, criteria={})
    await earn(measured.client, shop, 500)
    await redeem(measured.client, redeem_request(shop))
    await measured.client.account(shop.merchant_id, shop.store_id, "buyer")
    await measured.refresh()

    text = generate_latest(measured.server.metrics.registry).decode()
    # Merchants and stores are bounded by limits of their own, and other tests have many.
    lines = [line for line in text.splitlines() if "merchant_id=" not in line]
    assert len(lines) < 700
    assert "ListRedemptions" not in text
