"""Traces from webhooks through the shim, calls and batches to statements."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextvars import Context
from dataclasses import dataclass
from typing import Any

import pytest
from opentelemetry.trace import StatusCode

from pointbook.v1 import points_pb2
from pointbook_common import tracing as tracing_module
from pointbook_common.errors import SettingError
from pointbook_server.programs.model import Channel
from pointbook_server.rpc import call_log as call_log_module
from pointbook_server.server import Server
from shopline_shim import app as app_module
from shopline_shim import webhooks_endpoint
from support.clients import Client
from support.clocks import TestClock
from support.json_logs import json_logs
from support.outbox import Outbox
from support.refusals import refused
from support.servers import server_settings, stop_idle, until_calls_end
from support.shims import APPLIED, points_body, webhook_sender
from support.shops import Shop
from support.traces import RecordedTracing, id_of, trace_of

APPLY = "pointbook.v1.PointsService/ApplyPointsUpdate"
TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = (("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01"),)
TOPIC = "app_memberSystem_points/challenged"


@dataclass
class Traced:
    """A server whose spans are recorded, with its client."""

    server: Server
    client: Client
    tracing: RecordedTracing

    async def apply(self, shop: Shop, buyer_id: str, metadata: Any = ()) -> None:
        """Apply an update of a buyer."""
        request = points_pb2.ApplyPointsUpdateRequest(update=shop.update(buyer_id))
        await self.client.points.ApplyPointsUpdate(request, metadata=metadata)


@pytest.fixture
async def traced(database_url: str, admin_token: str) -> AsyncIterator[Traced]:
    """A server with tracing."""
    tracing = RecordedTracing()
    server = Server(
        server_settings(), database_url, senders={Channel.SMS: Outbox()}, clock=TestClock(), tracing=tracing
    )
    await server.start()
    client = Client(server.port, admin_token)
    yield Traced(server, client, tracing)
    await client.close()
    await stop_idle(server)


async def test_a_call_continues_its_callers_trace_down_to_the_statements(traced: Traced, shop: Shop) -> None:
    await traced.apply(shop, "buyer-of-the-trace", TRACEPARENT)

    (call,), (batch,) = traced.tracing.named(APPLY), traced.tracing.named("batch updates")
    assert f"{trace_of(call):032x}" == TRACE_ID
    assert call.parent is not None
    assert f"{call.parent.span_id:016x}" == PARENT_ID
    assert batch.parent is not None
    assert batch.parent.span_id == id_of(call)
    statements = traced.tracing.children_of(batch)
    assert statements
    assert all(name.startswith(("ledger.", "transaction.")) for name in statements)
    assert {trace_of(span) for span in traced.tracing.spans} == {trace_of(call)}
    assert dict(call.attributes or {}) | {"pointbook.request_id": ""} == {
        "rpc.system": "grpc",
        "rpc.service": "pointbook.v1.PointsService",
        "rpc.method": "ApplyPointsUpdate",
        "rpc.grpc.status_code": 0,
        "pointbook.request_id": "",
    }
    exported = "".join(span.to_json() for span in traced.tracing.spans)
    for value in ("buyer-of-the-trace", shop.merchant_id, shop.store_id):
        assert value not in exported


async def test_calls_that_share_a_batch_are_linked_with_it(traced: Traced, shop: Shop) -> None:
    await asyncio.gather(*(traced.apply(shop, f"buyer-{number}") for number in range(20)))

    calls = {id_of(call): call for call in traced.tracing.named(APPLY)}
    batches = traced.tracing.named("batch updates")
    assert len(calls) == 20
    assert len(batches) < 20
    sharing = set()
    for batch in batches:
        assert batch.parent is not None
        linked = {link.context.span_id for link in batch.links}
        assert batch.attributes == {"pointbook.batch.size": 1 + len(linked)}
        for span_id in linked:
            assert id_of(batch) in {link.context.span_id for link in calls[span_id].links}
        sharing |= {batch.parent.span_id, *linked}
    assert sharing == set(calls)


async def test_errors_of_callers_are_no_errors_of_the_span(traced: Traced, shop: Shop) -> None:
    await refused(traced.apply(shop, ""))
    await until_calls_end(traced.server)

    (call,) = traced.tracing.named(APPLY)
    assert call.status.status_code is StatusCode.UNSET
    assert call.attributes is not None
    assert call.attributes["pointbook.reason"] == "INVALID_FIELDS"
    assert call.attributes["rpc.grpc.status_code"] == 3


async def test_a_failure_of_the_server_is_an_error_of_the_span(traced: Traced, shop: Shop) -> None:
    traced.server._database.cut()
    await refused(traced.apply(shop, "buyer"))
    await until_calls_end(traced.server)

    (call,) = traced.tracing.named(APPLY)
    assert call.status.status_code is StatusCode.ERROR


async def test_strangers_cause_no_spans(traced: Traced, shop: Shop) -> None:
    stranger = Client(traced.server.port, "pb_unknown_token")
    request = points_pb2.ApplyPointsUpdateRequest(update=shop.update())
    await refused(stranger.points.ApplyPointsUpdate(request, metadata=TRACEPARENT))
    await stranger.close()
    await until_calls_end(traced.server)

    assert traced.tracing.named(APPLY) == []


@pytest.mark.parametrize("header", ["", "00-zz-zz-01", "x" * 4_000, f"00-{'0' * 32}-{PARENT_ID}-01"])
async def test_a_malformed_context_starts_a_new_trace(traced: Traced, shop: Shop, header: str) -> None:
    await traced.apply(shop, "buyer", (("traceparent", header), ("tracestate", "=;,")))

    (call,) = traced.tracing.named(APPLY)
    assert call.parent is None


async def test_lines_of_the_log_have_the_ids_of_the_span(traced: Traced, shop: Shop) -> None:
    with json_logs(call_log_module) as written:
        await traced.apply(shop, "buyer", TRACEPARENT)
    (call,) = traced.tracing.named(APPLY)
    (line,) = [line for line in map(json.loads, written.getvalue().splitlines()) if line["event"] == "call"]

    assert (line["trace_id"], line["span_id"]) == (TRACE_ID, f"{id_of(call):016x}")


async def test_a_webhook_is_one_trace_through_shim_and_server(
    traced: Traced, shop: Shop, admin_token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shim trusts no context that comes with a webhook."""
    monkeypatch.setattr(app_module, "build_tracing", lambda _service: traced.tracing)
    with json_logs(webhooks_endpoint) as written:
        async with webhook_sender(traced.server.port, admin_token, traced.client, tracing=True) as sender:
            headers = dict(TRACEPARENT)
            assert await sender.send(shop, TOPIC, points_body(shop), **headers) == APPLIED
    (webhook,), (request,), (call,) = map(traced.tracing.named, ("webhook", "ApplyPointsUpdate", APPLY))
    (line,) = [line for line in map(json.loads, written.getvalue().splitlines()) if line["event"] == "webhook"]

    assert webhook.parent is None
    assert f"{trace_of(webhook):032x}" not in {TRACE_ID, "0" * 32}
    assert (request.parent and request.parent.span_id) == id_of(webhook)
    assert (call.parent and call.parent.span_id) == id_of(request)
    assert traced.tracing.children_of(call) == ["batch updates"]
    assert webhook.attributes == {"pointbook.topic": TOPIC, "pointbook.outcome": "applied"}
    assert line["trace_id"] == f"{trace_of(webhook):032x}"


async def test_webhooks_that_share_a_call_are_linked_with_it(
    traced: Traced, shop: Shop, admin_token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app_module, "build_tracing", lambda _service: traced.tracing)
    async with webhook_sender(traced.server.port, admin_token, traced.client, tracing=True) as sender:
        bodies = [points_body(shop, buyer_id=f"buyer-{number}") for number in range(20)]
        assert set(map(str, await asyncio.gather(*(sender.send(shop, TOPIC, body) for body in bodies)))) == {
            str(APPLIED)
        }
    webhooks = {id_of(span) for span in traced.tracing.named("webhook")}
    requests = traced.tracing.named("BatchApplyPointsUpdates")

    assert len(webhooks) == 20
    assert requests
    for request in requests:
        (shared,) = [span for span in traced.tracing.spans if request.parent and id_of(span) == request.parent.span_id]
        assert shared.parent is not None
        assert {shared.parent.span_id, *(link.context.span_id for link in shared.links)} <= webhooks


def test_work_shared_by_calls_that_are_not_recorded_begins_no_trace() -> None:
    tracing = RecordedTracing()
    call = tracing.start_call("call", {}, {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}, 0.0)

    def share() -> None:
        with tracing.share("batch", {}, [call]):
            tracing.start_request("request", {}, None).end({}, is_error=False)

    Context().run(share)  # as those who send batches do
    assert not tracing.spans


def test_the_span_of_shared_work_that_fails_has_no_message() -> None:
    tracing = RecordedTracing()
    call = tracing.start_call("call", {}, {}, 0.0)
    with pytest.raises(ValueError, match="a caller's text"), tracing.share("batch", {}, [call]):
        raise ValueError("a caller's text")
    (span,) = tracing.spans

    assert span.status.status_code is StatusCode.ERROR
    assert "a caller's text" not in span.to_json()


async def test_without_its_package_tracing_is_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.delitem(sys.modules, "pointbook_common.otel")

    with pytest.raises(SettingError, match=r"POINTBOOK_TRACING: .*pointbook\[otel\]"):
        tracing_module.build_tracing("server")


def test_opentelemetry_is_not_loaded_unless_it_is_used() -> None:
    code = "import sys, pointbook_server.server, shopline_shim.server; sys.exit('opentelemetry' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 0
