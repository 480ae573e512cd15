"""SHOPLINE's customer webhooks, from HTTP to the customer and to the quarantine and back: no fakes."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import permutations
from typing import Any

import asyncpg
import grpc
import httpx
import pytest

from pointbook.v1 import customers_pb2, identity_pb2, webhooks_pb2
from pointbook_cli.quarantine import translate_again
from pointbook_server.customers import servicer as customers_module
from pointbook_server.programs.model import Channel
from pointbook_server.rpc import status_interceptor as status_module
from pointbook_server.server import Server
from pointbook_server.webhooks import servicer as webhooks_module
from shopline_shim import signature
from shopline_shim import webhooks_endpoint as app_module
from support.harness import NOW_MS, Client, Outbox, Service, Shop, TestClock, server_settings, unique
from support.json_logs import json_logs
from support.shims import PATH, SECRET, shim_before

NUMBER = "+8613800000000"
APPLIED = (200, {"outcome": "APPLIED"})
QUARANTINED = (200, {"outcome": "QUARANTINED"})


class Site:
    """A shim before a real server."""

    def __init__(self, http: httpx.AsyncClient, client: Client) -> None:
        self.http = http
        self.client = client

    async def send(self, shop: Shop, topic: str, body: object, **headers: str) -> tuple[int, Any]:
        """Deliver a signed webhook in the name of a shop, and answer the status and the JSON."""
        raw_body = body if isinstance(body, bytes) else json.dumps(body).encode()
        signed = {
            "x-shopline-topic": f"customers/{topic}",
            "x-shopline-hmac-sha256": signature.sign(SECRET, raw_body),
            "x-shopline-shop-id": shop.store_id,
            "x-shopline-merchant-id": shop.merchant_id,
        }
        changed = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = await self.http.post(PATH, content=raw_body, headers=signed | changed)
        return answer.status_code, answer.json()

    async def customer(self, shop: Shop, buyer_id: str = "17") -> customers_pb2.Customer:
        """Read the customer of a buyer."""
        buyer = identity_pb2.Buyer(store_id=shop.store_id, buyer_id=buyer_id)
        request = customers_pb2.GetCustomerRequest(
            merchant_id=shop.merchant_id, customer=identity_pb2.CustomerRef(buyer=buyer)
        )
        return (await self.client.customers.GetCustomer(request)).customer

    async def quarantined(self, shop: Shop) -> list[webhooks_pb2.QuarantinedWebhook]:
        """Read what waits in a merchant's quarantine, whole."""
        listed = await self.client.webhooks.ListQuarantinedWebhooks(
            webhooks_pb2.ListQuarantinedWebhooksRequest(merchant_id=shop.merchant_id)
        )
        requests = [
            webhooks_pb2.GetQuarantinedWebhookRequest(merchant_id=shop.merchant_id, quarantine_id=kept.quarantine_id)
            for kept in listed.webhooks
        ]
        return [(await self.client.webhooks.GetQuarantinedWebhook(request)).webhook for request in requests]

    async def reason(self, shop: Shop) -> str:
        """Tell why the one webhook of a merchant is in quarantine."""
        [kept] = await self.quarantined(shop)
        return webhooks_pb2.QuarantineReason.Name(kept.reason).removeprefix("QUARANTINE_REASON_")


@asynccontextmanager
async def before(port: int, token: str, client: Client) -> AsyncIterator[Site]:
    """Run a shim before a server."""
    async with shim_before(port, token) as http:
        yield Site(http, client)


@pytest.fixture(scope="module")
async def site(service: Service, admin_token: str) -> AsyncIterator[Site]:
    """A shim for all merchants before the file's server."""
    async with before(service.server.port, admin_token, service.client) as running:
        yield running


def body(**changes: Any) -> dict[str, Any]:
    """Write the body of a webhook that creates, updates or deletes."""
    values = {"id": "17", "email": "Ada@Example.com", "phone": NUMBER, "updated_at": "2026-05-01T08:00:00+08:00"}
    return values | changes


def redaction(shop: Shop, **changes: Any) -> dict[str, Any]:
    """Write the body of a redaction."""
    customer = {"id": "17", "email": "Ada@Example.com", "phone": NUMBER}
    return {"customer": customer, "shop_id": shop.store_id, "update_time": "2026-05-02T08:00:00+08:00"} | changes


async def test_the_life_of_a_customer(site: Site, shop: Shop) -> None:
    """Created, updated, deleted, restored and redacted by webhooks, and a late retry changes nothing."""
    assert await site.send(shop, "create", body()) == APPLIED
    assert await site.send(shop, "create", body()) == (200, {"outcome": "DUPLICATE"})
    created = await site.customer(shop)
    assert (created.mobile, created.email) == (NUMBER, "Ada@Example.com")

    assert (
        await site.send(shop, "update", body(phone="008613900000000", updated_at="2026-05-01T09:00:00+08:00"))
        == APPLIED
    )
    assert (await site.customer(shop)).mobile == "+8613900000000"
    assert await site.send(shop, "update", body(updated_at="2026-05-01T08:30:00+08:00")) == (
        200,
        {"outcome": "OUTDATED"},
    )
    assert await site.send(shop, "delete", body(updated_at="2026-05-01T10:00:00+08:00")) == APPLIED
    assert (await site.customer(shop)).mobile == ""
    assert await site.send(shop, "update", body(updated_at="2026-05-01T11:00:00+08:00")) == APPLIED
    assert (await site.customer(shop)).mobile == NUMBER
    assert await site.send(shop, "redact", redaction(shop)) == APPLIED
    assert await site.send(shop, "update", body(updated_at="2026-05-01T12:00:00+08:00")) == (
        200,
        {"outcome": "REDACTED"},
    )

    last = await site.customer(shop)
    assert (last.customer_id, last.mobile, last.email) == (created.customer_id, "", "")
    assert await site.quarantined(shop) == []


@pytest.mark.parametrize(
    ("phone", "expected"),
    [
        ("\u202a0085291236001\u202c", "+85291236001"),
        ("\uff10\uff10\uff18\uff15\uff12\u3000\uff19\uff11\uff12\uff13\uff0d6001", "+85291236001"),
        ("\u200e+852\u00a09123\u20116001", "+85291236001"),
        ("005215512345678", "+525512345678"),
        ("005491123456789", "+5491123456789"),
    ],
)
async def test_phone_numbers_are_read_as_they_were_pasted(site: Site, shop: Shop, phone: str, expected: str) -> None:
    """Invisible characters and full-width digits hide no 00."""
    assert await site.send(shop, "create", body(phone=phone)) == APPLIED
    assert (await site.customer(shop)).mobile == expected


async def test_what_is_left_out_is_counted(site: Site, shop: Shop) -> None:
    """By type and cause, and the webhook is applied otherwise."""
    await site.client.put_customer(shop.merchant_id, "other", email="ada@example.com")
    assert await site.send(shop, "update", body(phone="13800000000")) == APPLIED

    metrics = (await site.http.get("/metrics")).text
    assert 'pointbook_customer_identifiers_skipped_total{cause="taken",type="email"} 1.0' in metrics
    assert 'pointbook_customer_identifiers_skipped_total{cause="invalid",type="mobile"} 1.0' in metrics
    assert 'pointbook_webhooks_total{outcome="applied",topic="customers/update"}' in metrics


@pytest.mark.parametrize(
    ("topic", "changes", "reason"),
    [
        ("update", {"id": None}, "MALFORMED"),
        ("update", {"customer": {"id": "17"}, "id": None}, "MALFORMED"),
        ("redact", {}, "MALFORMED"),
        ("create", {"updated_at": "2026-05-01"}, "MALFORMED"),
        ("update", {"updated_at": "2031-05-01T08:00:00Z"}, "OUT_OF_BOUNDS"),
    ],
)
async def test_a_webhook_that_cannot_be_applied_is_kept(
    site: Site, shop: Shop, topic: str, changes: dict[str, Any], reason: str
) -> None:
    """Encrypted, under its own topic, with a reason that quotes nothing."""
    assert await site.send(shop, topic, body(**changes)) == QUARANTINED
    [kept] = await site.quarantined(shop)

    assert (await site.reason(shop), kept.topic) == (reason, f"customers/{topic}")
    assert json.loads(kept.body) == body(**changes)
    assert "Ada" not in kept.detail


async def test_a_merchant_or_shop_that_does_not_fit(site: Site, shop: Shop) -> None:
    """A store of another merchant, and a redaction under another shop's header."""
    other = Shop(unique("merchant"), shop.store_id)
    assert await site.send(other, "update", body(id=unique("id"))) == QUARANTINED
    assert await site.reason(other) == "MERCHANT_MISMATCH"
    assert await site.send(shop, "redact", redaction(shop), x_shopline_shop_id="elsewhere") == QUARANTINED
    assert await site.reason(shop) == "SHOP_ID_MISMATCH"


async def test_a_store_that_the_header_alone_names(site: Site, shop: Shop) -> None:
    """Where nobody has registered it, the webhook waits."""
    assert await site.send(shop, "update", body(id=unique("id")), x_shopline_shop_id=unique("store")) == QUARANTINED
    assert await site.reason(shop) == "STORE_UNKNOWN"


async def test_a_quarantined_webhook_is_replayed(site: Site) -> None:
    """Translated by the shim's own code again, and applied once."""
    early = Shop(unique("merchant"), unique("store"))
    assert await site.send(early, "update", body(note=early.store_id)) == QUARANTINED
    assert await site.send(early, "redact", redaction(early)) == QUARANTINED
    await site.client.put_store(early.merchant_id, early.store_id)
    replayed = []
    for kept in sorted(await site.quarantined(early), key=lambda kept: kept.topic, reverse=True):
        request = translate_again(kept)
        request.merchant_id, request.quarantine_id = early.merchant_id, kept.quarantine_id
        for _ in range(2):
            answer = await site.client.webhooks.ReplayQuarantinedWebhook(request)
            replayed.append(customers_pb2.CustomerUpdateOutcome.Name(answer.customer_update.outcome))

    assert [name.removeprefix("CUSTOMER_UPDATE_OUTCOME_") for name in replayed] == ["APPLIED", "DUPLICATE"] * 2
    assert await site.quarantined(early) == []
    assert (await site.customer(early)).mobile == ""


GONE = {"phone": "0085291236001", "email": "ada@example.com"}
UNREADABLE = {"phone": "0085 0000", "email": "ada at example.com"}
CHANGING_HANDS = [
    ("create", {"id": "a", **GONE, "updated_at": "2026-05-01T08:00:00+08:00"}),
    ("update", {"id": "a", **UNREADABLE, "updated_at": "2026-05-01T09:00:00+08:00"}),
    ("create", {"id": "b", **GONE, "updated_at": "2026-05-01T10:00:00+08:00"}),
]
"""A customer whose number and address another one has next."""


@pytest.mark.parametrize("arrival", list(permutations(CHANGING_HANDS)))
async def test_a_contact_that_a_customer_lost_finds_the_next_one(site: Site, shop: Shop, arrival: Any) -> None:
    """In every order of the webhooks."""
    for topic, changes in arrival:
        status, _ = await site.send(shop, topic, body(**changes))
        assert status == 200

    first, second = await site.customer(shop, "a"), await site.customer(shop, "b")
    assert (first.mobile, first.email) == ("", "")
    assert (second.mobile, second.email) == ("+85291236001", "ada@example.com")


@pytest.mark.parametrize("arrival", list(permutations(CHANGING_HANDS)))
async def test_a_contact_passes_on_in_replays_too(site: Site, arrival: Any) -> None:
    """In every order in which webhooks are replayed from the quarantine."""
    early = Shop(unique("merchant"), unique("store"))
    kept = {}
    for topic, changes in arrival:
        assert await site.send(early, topic, body(**changes, note=early.store_id)) == QUARANTINED
        [new] = [webhook for webhook in await site.quarantined(early) if webhook.quarantine_id not in kept]
        kept[new.quarantine_id] = new
    await site.client.put_store(early.merchant_id, early.store_id)
    for webhook in kept.values():
        request = translate_again(webhook, "")
        request.merchant_id, request.quarantine_id = early.merchant_id, webhook.quarantine_id
        await site.client.webhooks.ReplayQuarantinedWebhook(request)

    first, second = await site.customer(early, "a"), await site.customer(early, "b")
    assert (first.mobile, first.email) == ("", "")
    assert (second.mobile, second.email) == ("+85291236001", "ada@example.com")


async def test_a_forged_or_unsigned_redaction_is_401(site: Site, shop: Shop) -> None:
    """Nothing is erased, and nothing kept."""
    await site.send(shop, "update", body())
    raw_body = json.dumps(redaction(shop)).encode()

    status, _ = await site.send(shop, "redact", raw_body, x_shopline_hmac_sha256=signature.sign("other", raw_body))

    assert status == 401
    assert (await site.customer(shop)).mobile == NUMBER
    assert await site.quarantined(shop) == []


async def test_parallel_deliveries_are_applied_once(site: Site, shop: Shop) -> None:
    """SHOPLINE may deliver the same webhook several times at once."""
    answers = await asyncio.gather(*(site.send(shop, "create", body()) for _ in range(30)))

    outcomes = sorted(answer["outcome"] for _, answer in answers)
    assert outcomes == ["APPLIED"] + ["DUPLICATE"] * 29


async def test_without_a_code_key_a_redaction_is_503(service: Service, admin_token: str, shop: Shop) -> None:
    """SHOPLINE sends it again until the server has a key; all else is applied, and nothing is quarantined."""
    settings = server_settings(code_keys={})
    server = Server(settings, service.database_url, senders={Channel.SMS: Outbox()}, clock=TestClock())
    await server.start()
    client = Client(server.port, admin_token)
    async with before(server.port, admin_token, client) as site:
        assert await site.send(shop, "update", body()) == APPLIED
        assert (await site.send(shop, "redact", redaction(shop)))[0] == 503
        assert (await site.customer(shop)).mobile == NUMBER
        assert await site.quarantined(shop) == []
    await client.close()
    await server.stop()


async def test_nothing_of_a_person_is_logged(site: Site, shop: Shop) -> None:
    """Neither by the shim nor by the server, nor kept in clear, whatever becomes of the webhook."""
    private = {"email": "private@example.com", "phone": "+8613812345678"}
    await site.client.put_customer(shop.merchant_id, "other", email="private@example.com")
    with json_logs(app_module, status_module, customers_module, webhooks_module) as written:
        for topic, told in (
            ("create", body(**private)),
            ("update", body(id="private id", **private)),
            ("redact", body(**private)),
            ("update", body(updated_at="private", **private)),
            ("delete", body(updated_at="2031-05-01T08:00:00Z", **private)),
            ("update", body(id="19", **(private | {"phone": "private"}))),
            ("redact", redaction(shop, customer={"id": "17", **private})),
        ):
            status, _ = await site.send(shop, topic, told)
            assert status == 200

    assert "private" not in written.getvalue()
    assert "13812345678" not in written.getvalue()


async def test_the_clock_of_the_tests(service: Service) -> None:
    """The bodies above are of the past of the servers' clock."""
    connection = await asyncpg.connect(service.database_url)
    newest = await connection.fetchval("SELECT max(updated_at_ms) FROM customer_updates")
    await connection.close()

    assert 0 < newest < NOW_MS


async def test_a_byte_order_mark_makes_no_other_customer_webhook(site: Site, shop: Shop) -> None:
    """The same content is the same event, with or without a mark."""
    raw_bodies = [json.dumps(told).encode() for told in (body(), redaction(shop))]

    assert await site.send(shop, "create", b"\xef\xbb\xbf" + raw_bodies[0]) == APPLIED
    assert await site.send(shop, "create", raw_bodies[0]) == (200, {"outcome": "DUPLICATE"})
    assert await site.send(shop, "redact", b"\xef\xbb\xbf" + raw_bodies[1]) == APPLIED
    assert (await site.customer(shop)).mobile == ""


async def test_a_redaction_erases_bodies_with_a_mark_or_without_a_topic(site: Site, shop: Shop) -> None:
    """Personal data is found in quarantine, however its body came."""
    marked = b"\xef\xbb\xbf" + json.dumps(body(updated_at="unreadable", note=shop.store_id)).encode()
    assert await site.send(shop, "update", marked) == QUARANTINED
    assert await site.send(shop, "update", body(note=shop.store_id), x_shopline_topic="") == QUARANTINED
    assert await site.send(shop, "redact", redaction(shop)) == APPLIED

    assert [kept.body_erased for kept in await site.quarantined(shop)] == [True, True]


async def replay_one(site: Site, shop: Shop, **options: bool) -> str:
    """Replay the one webhook that waits for a merchant, and return the outcome."""
    [waiting] = await site.quarantined(shop)
    request = translate_again(waiting)
    request.merchant_id, request.quarantine_id = shop.merchant_id, waiting.quarantine_id
    request.overrides_contradiction = options.get("override", False)
    answer = await site.client.webhooks.ReplayQuarantinedWebhook(request)
    outcome = customers_pb2.CustomerUpdateOutcome.Name(answer.customer_update.outcome)
    return outcome.removeprefix("CUSTOMER_UPDATE_OUTCOME_")


@pytest.mark.parametrize("genuine", ["update", "create"])
async def test_a_captured_update_is_no_deletion(site: Site, shop: Shop, genuine: str) -> None:
    """The topic is not signed: a copy under another one waits for an operator, however often it comes."""
    raw_body = body(note=shop.store_id)
    assert await site.send(shop, genuine, raw_body) == APPLIED
    for _ in range(3):
        assert await site.send(shop, "delete", raw_body) == QUARANTINED

    assert await site.reason(shop) == "EVENT_ID_REUSED"
    assert (await site.customer(shop)).mobile
    with pytest.raises(grpc.aio.AioRpcError, match="first one stays"):
        await replay_one(site, shop)


async def test_a_forged_deletion_that_comes_first_is_overridden_by_an_operator(site: Site, shop: Shop) -> None:
    """The genuine update waits, in sight of the operator, whose decision stays whatever is sent again."""
    older = body(note=shop.store_id, updated_at="2026-05-01T07:00:00+08:00")
    raw_body = body(note=shop.store_id)
    assert await site.send(shop, "update", older) == APPLIED
    assert await site.send(shop, "delete", raw_body) == APPLIED
    assert (await site.customer(shop)).mobile == ""
    assert await site.send(shop, "update", raw_body) == QUARANTINED
    assert await site.reason(shop) == "EVENT_ID_REUSED"

    assert await replay_one(site, shop, override=True) == "APPLIED"
    restored = await site.customer(shop)
    assert restored.mobile
    assert (await site.send(shop, "delete", raw_body))[1] == {"outcome": "DUPLICATE"}
    assert await site.customer(shop) == restored


@pytest.mark.parametrize("topic", ["create", "update", "delete", "redact"])
@pytest.mark.parametrize("knows_merchant", [True, False])
async def test_a_captured_body_creates_nothing_in_another_tenant(
    site: Site, service: Service, shop: Shop, topic: str, *, knows_merchant: bool
) -> None:
    """Under the headers of a merchant that does not own the store it is quarantined, whatever else they name."""
    thief = unique("merchant")
    if knows_merchant:
        await site.client.put_store(thief, unique("store"))
    raw_body = redaction(shop) if topic == "redact" else body(note=shop.store_id)
    assert await site.send(Shop(thief, shop.store_id), topic, raw_body) == QUARANTINED
    assert await site.reason(Shop(thief, "")) == "MERCHANT_MISMATCH"
    elsewhere = body(note=thief)
    assert await site.send(Shop(thief, unique("store")), "update", elsewhere) == QUARANTINED

    connection = await asyncpg.connect(service.database_url)
    for table in ("customers", "customer_buyers", "customer_updates", "customer_identifiers", "customer_tombstones"):
        query = f"SELECT count(*) FROM {table} WHERE merchant_id = $1"  # noqa: S608 - names of our own
        assert await connection.fetchval(query, thief) == 0
    await connection.close()
