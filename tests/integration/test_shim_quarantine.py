"""Webhooks that cannot be applied, from SHOPLINE's request to the quarantine and back into the book: no fakes."""

import asyncio
import json
import random
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from pointbook.v1 import points_pb2, webhooks_pb2
from pointbook_server.access.model import Scope
from pointbook_server.programs.model import Channel
from pointbook_server.rpc import status_interceptor as status_module
from pointbook_server.server import Server
from pointbook_server.webhooks import servicer as servicer_module
from shopline_shim import signature, translate
from shopline_shim import webhooks_endpoint as app_module
from support.harness import NOW_MS, Client, Outbox, Service, Shop, TestClock, make_token, server_settings, unique
from support.json_logs import json_logs
from support.shims import PATH, SECRET, shim_before

TOPIC = "app_memberSystem_points/challenged"
APPLIED = (200, {"outcome": "APPLIED"})
QUARANTINED = (200, {"outcome": "QUARANTINED"})


@dataclass
class Site:
    """A shim before a real server."""

    http: httpx.AsyncClient
    client: Client

    async def send(self, shop: Shop, raw_body: bytes, **headers: str) -> tuple[int, Any]:
        """Deliver a signed body in the name of a shop, and answer the status and the JSON."""
        changed = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = await self.http.post(PATH, content=raw_body, headers=signed(shop, raw_body) | changed)
        return answer.status_code, answer.json()

    async def quarantined(self, merchant_id: str) -> list[webhooks_pb2.QuarantinedWebhook]:
        """List what waits in a merchant's quarantine."""
        request = webhooks_pb2.ListQuarantinedWebhooksRequest(merchant_id=merchant_id, page_size=1_000)
        return list((await self.client.webhooks.ListQuarantinedWebhooks(request)).webhooks)

    async def reason(self, merchant_id: str) -> str:
        """Tell why the one webhook of a merchant is in quarantine."""
        [kept] = await self.quarantined(merchant_id)
        return webhooks_pb2.QuarantineReason.Name(kept.reason).removeprefix("QUARANTINE_REASON_")


def signed(shop: Shop, raw_body: bytes) -> dict[str, str]:
    """Write SHOPLINE's headers for a shop's body."""
    return {
        "x-shopline-topic": TOPIC,
        "x-shopline-hmac-sha256": signature.sign(SECRET, raw_body),
        "x-shopline-shop-domain": "example.myshopline.com",
        "x-shopline-shop-id": shop.store_id,
        "x-shopline-merchant-id": shop.merchant_id,
        "x-shopline-api-version": "v20250601",
        "x-shopline-webhook-id": "b54557e48a5fbf7d70bcd043",
    }


def body(shop: Shop, **changes: Any) -> bytes:
    """Write the body of a points webhook."""
    values = {
        "buyer_id": "2404721679",
        "points_balance": 20,
        "store_id": shop.store_id,
        "update_type": "INCREASE",
        "updated_at": NOW_MS - 60_000,
        "updated_scene": "SUCCESSFUL_REGISTRATION",
        "updated_value": 20,
    }
    return json.dumps(values | changes).encode()


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


@asynccontextmanager
async def small_site(service: Service, admin_token: str, webhooks_max: int) -> AsyncIterator[Site]:
    """A shim before a server whose quarantine has little room."""
    outbox = Outbox()
    settings = server_settings(quarantine_webhooks_max=webhooks_max)
    server = Server(settings, service.database_url, senders={Channel.SMS: outbox}, clock=TestClock())
    await server.start()
    client = Client(server.port, admin_token)
    async with before(server.port, admin_token, client) as running:
        yield running
    await client.close()
    await server.stop()


async def test_an_unknown_store_is_replayed_after_it_is_registered(site: Site) -> None:
    """What SHOPLINE sent too early is not lost: registered and replayed, it is in the book once."""
    shop = Shop(unique("merchant"), unique("store"))

    assert await site.send(shop, body(shop)) == QUARANTINED
    assert await site.send(shop, body(shop)) == QUARANTINED
    [waiting] = await site.quarantined(shop.merchant_id)
    assert (waiting.receive_count, await site.reason(shop.merchant_id)) == (1, "STORE_UNKNOWN")

    await site.client.put_store(shop.merchant_id, shop.store_id)
    named = {"merchant_id": shop.merchant_id, "quarantine_id": waiting.quarantine_id}
    kept = (
        await site.client.webhooks.GetQuarantinedWebhook(webhooks_pb2.GetQuarantinedWebhookRequest(**named))
    ).webhook
    update = translate.points_update({header.name: header.value for header in kept.headers}, kept.body)
    request = webhooks_pb2.ReplayQuarantinedWebhookRequest(points_update=update)
    request.merchant_id, request.quarantine_id = shop.merchant_id, waiting.quarantine_id
    answer = await site.client.webhooks.ReplayQuarantinedWebhook(request)

    assert answer.points_update.outcome == points_pb2.APPLY_OUTCOME_APPLIED
    assert await site.send(shop, body(shop)) == (200, {"outcome": "DUPLICATE"})
    assert (await site.client.account(shop.merchant_id, shop.store_id, "2404721679")).points_balance == 20
    assert await site.quarantined(shop.merchant_id) == []


@pytest.mark.parametrize(
    ("reason", "changes", "headers"),
    [
        ("MALFORMED", {"updated_value": "x"}, {}),
        ("OUT_OF_BOUNDS", {"updated_at": NOW_MS * 2}, {}),
        ("OUT_OF_BOUNDS", {"updated_value": 2**63 - 1}, {}),
        ("SHOP_ID_MISMATCH", {}, {"x_shopline_shop_id": "1"}),
    ],
)
async def test_a_webhook_is_kept_for_its_reason(
    site: Site, shop: Shop, reason: str, changes: dict[str, Any], headers: dict[str, str]
) -> None:
    """By what the shim itself sees, and by what the server says."""
    assert await site.send(shop, body(shop, **changes), **headers) == QUARANTINED
    assert await site.reason(shop.merchant_id) == reason


@pytest.mark.parametrize("field", ["points_expiry_time", "updated_at"])
@pytest.mark.parametrize("value", [-(2**63), -1, "-1", 1, 1_798_761_600, 946_684_799_999, 2**63 - 1])
async def test_a_time_that_is_not_in_milliseconds_is_out_of_bounds(
    site: Site, shop: Shop, field: str, value: object
) -> None:
    """The detail names the field, and the unit that is expected."""
    assert await site.send(shop, body(shop, **{field: value})) == QUARANTINED

    [waiting] = await site.quarantined(shop.merchant_id)
    assert await site.reason(shop.merchant_id) == "OUT_OF_BOUNDS"
    assert waiting.detail.startswith(f"{field} must be")
    assert "milliseconds" in waiting.detail


async def test_a_body_with_more_wrong_than_a_time_is_malformed(site: Site, shop: Shop) -> None:
    """What cannot be read at all is the graver of the two."""
    assert await site.send(shop, body(shop, points_expiry_time=-1, updated_value="x")) == QUARANTINED
    assert await site.reason(shop.merchant_id) == "MALFORMED"


async def test_an_event_with_other_content_is_kept(site: Site, shop: Shop) -> None:
    """The book has another event under this id, so that this one waits for an operator."""
    raw_body = body(shop)
    update = translate.points_update(signed(shop, raw_body), raw_body)
    update.updated_value = 5
    await site.client.apply(update)

    assert await site.send(shop, raw_body) == QUARANTINED
    assert await site.reason(shop.merchant_id) == "EVENT_ID_REUSED"


async def test_garbage_of_the_largest_size_is_kept_whole(site: Site, shop: Shop) -> None:
    """256 KiB of noise under a right signature are authentic, so they are kept to the last byte."""
    garbage = secrets.token_bytes(256 * 1024)

    assert await site.send(shop, garbage) == QUARANTINED
    [waiting] = await site.quarantined(shop.merchant_id)
    request = webhooks_pb2.GetQuarantinedWebhookRequest(
        merchant_id=shop.merchant_id, quarantine_id=waiting.quarantine_id
    )
    assert (await site.client.webhooks.GetQuarantinedWebhook(request)).webhook.body == garbage


async def test_a_flood_of_headers_costs_no_webhook(site: Site, shop: Shop) -> None:
    """Headers are not signed: whoever adds many cannot keep the webhook, or SHOPLINE's own headers, out."""
    raw_body = b"no JSON of " + shop.store_id.encode()
    flood = {f"a_{number}": "x" * 400 for number in range(90)}

    assert await site.send(shop, raw_body, **flood) == QUARANTINED
    [waiting] = await site.quarantined(shop.merchant_id)
    request = webhooks_pb2.GetQuarantinedWebhookRequest(
        merchant_id=shop.merchant_id, quarantine_id=waiting.quarantine_id
    )
    kept = (await site.client.webhooks.GetQuarantinedWebhook(request)).webhook
    headers = {header.name: header.value for header in kept.headers}
    assert headers == {name: value for name, value in signed(shop, raw_body).items() if "hmac" not in name}


async def test_a_full_quarantine_is_503_until_something_is_dropped(
    service: Service, admin_token: str, shop: Shop
) -> None:
    """SHOPLINE keeps what we have no room for, and sends it again; what is kept already still is 200."""
    broken = [body(shop, updated_value=f"x{number}") for number in range(3)]
    async with small_site(service, admin_token, webhooks_max=2) as site:
        assert await site.send(shop, broken[0]) == QUARANTINED
        assert await site.send(shop, broken[1]) == QUARANTINED
        assert (await site.send(shop, broken[2]))[0] == 503
        assert await site.send(shop, broken[0]) == QUARANTINED
        assert await site.send(shop, body(shop)) == APPLIED
        [oldest, _] = await site.quarantined(shop.merchant_id)
        await site.client.webhooks.DropQuarantinedWebhook(
            webhooks_pb2.DropQuarantinedWebhookRequest(
                merchant_id=shop.merchant_id, quarantine_id=oldest.quarantine_id, reason="noise"
            )
        )
        assert await site.send(shop, broken[2]) == QUARANTINED


async def test_a_token_without_the_scope_is_503(service: Service, shop: Shop) -> None:
    """A shim that may only write points loses nothing: SHOPLINE sends again until the token is mended."""
    scopes = [Scope.POINTS_WRITE]
    token = await make_token(service.database_url, [shop.merchant_id], scopes)
    both = await make_token(service.database_url, [shop.merchant_id], [*scopes, Scope.WEBHOOKS])
    async with before(service.server.port, token, service.client) as site:
        assert await site.send(shop, body(shop)) == APPLIED
        assert (await site.send(shop, b"no JSON"))[0] == 503
    async with before(service.server.port, both, service.client) as site:
        assert await site.send(shop, b"no JSON") == QUARANTINED
        assert (await site.send(shop, b"no JSON", x_shopline_merchant_id=""))[0] == 503


async def test_parallel_deliveries_are_kept_once(site: Site, shop: Shop) -> None:
    """SHOPLINE may deliver the same webhook several times at once."""
    answers = await asyncio.gather(*(site.send(shop, b"no JSON of " + shop.store_id.encode()) for _ in range(40)))
    [kept] = await site.quarantined(shop.merchant_id)

    assert answers == [QUARANTINED] * 40
    assert kept.receive_count == 1


async def test_nothing_of_a_body_is_logged(site: Site, shop: Shop) -> None:
    """Neither by the shim nor by the server, whatever becomes of the webhook."""
    bodies = [
        b"private no JSON",
        body(shop, buyer_id="private buyer"),
        body(shop, buyer_id="private-buyer", updated_at=NOW_MS * 2),
        body(Shop(shop.merchant_id, "private-store"), buyer_id="private-buyer"),
        body(shop, buyer_id="private-buyer", updated_scene="PRIVATE private"),
    ]
    with json_logs(app_module, status_module, servicer_module) as written:
        answers = [await site.send(shop, raw_body, x_other="private header") for raw_body in bodies]

    assert [answer for answer in answers if answer != QUARANTINED] == []
    assert "webhook quarantined" in written.getvalue()
    assert "private" not in written.getvalue().lower()
    assert SECRET not in written.getvalue()


async def test_the_log_says_where_a_webhook_is_kept(site: Site) -> None:
    """A quarantine is listed by its merchant, whom nobody could guess where the header is wrong."""
    shop = Shop(unique("merchant"), unique("store"))
    with json_logs(app_module) as written:
        assert await site.send(shop, b"no JSON of " + shop.store_id.encode()) == QUARANTINED
    [told] = [line for line in map(json.loads, written.getvalue().splitlines()) if line["level"] == "warning"]
    [kept] = await site.quarantined(shop.merchant_id)

    assert (told["merchant_id"], told["quarantine_id"]) == (shop.merchant_id, kept.quarantine_id)


def random_body(chance: random.Random, shop: Shop) -> bytes:
    """Make up a body: fields changed, removed or of another kind, bytes cut or swapped, or plain noise."""
    values: list[Callable[[], Any]] = [
        lambda: None,
        lambda: chance.randint(-(2**70), 2**70),
        lambda: chance.randint(0, 1_000),
        lambda: chance.choice([True, [], {}, [{"a": [1]}], 0.5, float("nan"), 1e300]),
        lambda: "".join(chr(chance.randrange(0x11000)) for _ in range(chance.randrange(9))),
        lambda: chance.choice(["INCREASE", "decrease", "1e999999999", "", "\0", "9" * 5_000, str(NOW_MS)]),
    ]
    names = ["buyer_id", "points_balance", "store_id", "update_type", "updated_at", "updated_scene", "updated_value"]
    changes = {name: chance.choice(values)() for name in chance.sample(names, chance.randrange(4))}
    raw_body = bytearray(body(shop, **({"buyer_id": str(chance.randrange(10**9))} | changes)))
    kind = chance.randrange(5)
    if kind == 0:
        return chance.randbytes(chance.randrange(300))
    if kind == 1:
        raw_body[chance.randrange(len(raw_body))] = chance.randrange(256)
    if kind == 2:
        del raw_body[chance.randrange(len(raw_body)) :]
    return bytes(raw_body)


async def test_random_authentic_bodies_are_all_taken(site: Site, shop: Shop) -> None:
    """A thousand signed bodies of any kind are 200, in the book or in quarantine, and nothing breaks."""
    chance = random.Random(20250601)  # noqa: S311 - the same bodies in every run
    bodies = iter([random_body(chance, shop) for _ in range(1_000)])
    outcomes: dict[str, int] = {}

    async def deliver() -> None:
        for raw_body in bodies:
            status, answer = await site.send(shop, raw_body)
            assert status == 200, (answer, raw_body)
            outcomes[answer["outcome"]] = outcomes.get(answer["outcome"], 0) + 1

    with json_logs(app_module, status_module, servicer_module) as written:
        await asyncio.gather(*(deliver() for _ in range(16)))
    entries = [json.loads(line) for line in written.getvalue().splitlines()]

    assert outcomes["APPLIED"] > 50
    assert outcomes["QUARANTINED"] > 500
    assert entries
    assert [entry for entry in entries if entry["level"] in {"error", "critical"} or "exception" in entry] == []


MARK = b"\xef\xbb\xbf"


async def test_a_byte_order_mark_makes_no_other_event(site: Site, shop: Shop) -> None:
    """The signature covers the mark, which is why no proxy can take it away; the content is the same."""
    assert await site.send(shop, MARK + body(shop)) == APPLIED
    assert await site.send(shop, body(shop)) == (200, {"outcome": "DUPLICATE"})
    assert await site.send(shop, MARK + b"\r\n" + body(shop)) == (200, {"outcome": "DUPLICATE"})
    unsigned = await site.send(shop, MARK + body(shop), x_shopline_hmac_sha256=signature.sign(SECRET, body(shop)))

    assert unsigned[0] == 401
    assert await site.quarantined(shop.merchant_id) == []


@pytest.mark.parametrize("topics", [[], [""], [","], [TOPIC, "customers/update"], [f"{TOPIC},customers/redact"]])
async def test_a_webhook_without_one_topic_is_kept(site: Site, shop: Shop, topics: list[str]) -> None:
    """An absent topic is no other topic, and two different ones are none."""
    raw_body = body(shop)
    headers = [(name, value) for name, value in signed(shop, raw_body).items() if name != "x-shopline-topic"]
    headers += [("x-shopline-topic", value) for value in topics]
    answer = await site.http.post(PATH, content=raw_body, headers=headers)

    assert (answer.status_code, answer.json()) == QUARANTINED
    [kept] = await site.quarantined(shop.merchant_id)
    assert (kept.topic, await site.reason(shop.merchant_id)) == ("", "TOPIC_MISSING")
    assert not (await site.client.account(shop.merchant_id, shop.store_id, "2404721679")).points_balance


@pytest.mark.parametrize("topics", [[TOPIC, TOPIC], [f"{TOPIC}, {TOPIC}"], [f"{TOPIC} ,"], ["", TOPIC]])
async def test_a_topic_that_is_repeated_is_one(site: Site, shop: Shop, topics: list[str]) -> None:
    """A proxy may repeat a header, or join repeated ones."""
    raw_body = body(shop)
    headers = [(name, value) for name, value in signed(shop, raw_body).items() if name != "x-shopline-topic"]
    headers += [("x-shopline-topic", value) for value in topics]
    answer = await site.http.post(PATH, content=raw_body, headers=headers)

    assert (answer.status_code, answer.json()) == APPLIED


async def test_an_unsigned_body_without_a_topic_is_401(site: Site, shop: Shop) -> None:
    """What is not authentic is not kept."""
    assert (await site.send(shop, b"x", x_shopline_topic="", x_shopline_hmac_sha256="0" * 64))[0] == 401
    assert await site.quarantined(shop.merchant_id) == []


async def test_a_body_without_a_topic_waits_at_shopline_where_there_is_no_key(
    service: Service, admin_token: str, shop: Shop
) -> None:
    """It may be a customer's, so that it never lies in clear; SHOPLINE sends it again."""
    settings = server_settings(quarantine_keys={})
    server = Server(settings, service.database_url, senders={}, clock=TestClock())
    await server.start()
    client = Client(server.port, admin_token)
    async with before(server.port, admin_token, client) as site:
        with json_logs(app_module) as written:
            assert (await site.send(shop, body(shop), x_shopline_topic=""))[0] == 503
        assert '"cause": "KEY_NOT_CONFIGURED"' in written.getvalue()
        assert await site.quarantined(shop.merchant_id) == []
        assert await site.send(shop, b"no JSON") == QUARANTINED
    await client.close()
    await server.stop()
