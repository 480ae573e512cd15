"""Methods over HTTP and JSON, by a real Envoy with the shipped configuration."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from pointbook_client.testing.ports import free_port
from pointbook_server.access.model import Scope
from pointbook_server.rpc.listening import MESSAGE_BYTES_MAX
from support.clocks import NOW_MS, at
from support.codes import CODE_SETTINGS
from support.docs_pages import DOCS, blocks_of
from support.envoy import SERVERS, needs_envoy
from support.fleets import Fleet, running_fleet
from support.http_json import JsonCaller, details_of, json_client, path
from support.processes import clean_environment, finish
from support.provider_servers import HttpServer, http_server
from support.servers import CODE_KEY
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique
from support.waiting import until

pytestmark = needs_envoy

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
MOBILE = "+8613812345678"


@dataclass
class Web:
    """A fleet behind Envoy, and the gateway that its messages are sent to."""

    fleet: Fleet
    gateway: HttpServer
    url: str


@pytest.fixture(scope="module")
async def web(database_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Web]:
    """A fleet that sends one-time codes, for the tests of this file."""
    port = free_port()
    async with http_server() as gateway:
        settings = {"CODE_KEYS": f"k1:{CODE_KEY}", "SMS_URL": f"http://127.0.0.1:{gateway.port}/"}
        async with running_fleet(database_url, tmp_path_factory.mktemp("fleet"), port, settings) as fleet:
            yield Web(fleet, gateway, f"https://localhost:{port}")


@pytest.fixture
async def call(web: Web) -> AsyncIterator[JsonCaller]:
    """A caller with a token for everything."""
    async with json_client(web.url, str(web.fleet.ca)) as http:
        yield JsonCaller(http, web.fleet.token)


def in_merchant(shop: Shop, *segments: str, verb: str = "") -> str:
    """Return a path in a merchant."""
    return path("merchants", shop.merchant_id, *segments, verb=verb)


def account_path(shop: Shop, buyer_id: str = "buyer", collection: str = "account") -> str:
    """Return the path of an account, or of its entries."""
    return in_merchant(shop, "stores", shop.store_id, "buyers", buyer_id, collection)


def points_update(shop: Shop, **changes: Any) -> dict[str, Any]:
    """Return the body that adds 500 points to a new account."""
    update = {
        "event_id": unique("event"),
        "store_id": shop.store_id,
        "buyer_id": "buyer",
        "update_type": "POINTS_UPDATE_TYPE_INCREASE",
        "updated_scene": "POINTS_UPDATE_SCENE_SUCCESSFUL_REGISTRATION",
        "updated_value": "500",
        "updated_at": at(NOW_MS - 60_000).ToJsonString(),
    }
    return {"update": update | changes}


def redemption(shop: Shop, **changes: Any) -> dict[str, Any]:
    """Return the body that redeems 100 points of a buyer."""
    buyer = {"store_id": shop.store_id, "buyer_id": "buyer"}
    return {"customer": {"buyer": buyer}, "program_id": "1", "points": "100", **changes}


async def open_shop(call: JsonCaller, shop: Shop, **validation: Any) -> None:
    """Put a program and a customer, and add 500 points."""
    program = {
        "store_ids": [shop.store_id],
        "redemption_enabled": True,
        "criteria": {"multiples_of": "10"},
        "point_value": "0.01",
        "currency_code": "USD",
        "validation": {"code_length": CODE_SETTINGS["code_length"], "message_templates": {"": "$code"}, **validation},
    }
    await call("PUT", in_merchant(shop, "programs", "1"), program)
    customer = {"mobile": MOBILE, "buyers": [{"store_id": shop.store_id, "buyer_id": "buyer"}]}
    await call("PUT", in_merchant(shop, "customers", "customer"), customer)
    await call("POST", in_merchant(shop, "pointsUpdates", verb="apply"), points_update(shop))


async def test_points_are_redeemed_with_a_code_and_returned(web: Web, call: JsonCaller, shop: Shop) -> None:
    await open_shop(call, shop, required=True)

    validated = await call("POST", in_merchant(shop, "redemptions", verb="validate"), redemption(shop))
    assert [each["reason"] for each in validated["violations"]] == ["VALIDATION_REQUIRED"]
    count = len(web.gateway.requests)
    issued = await call("POST", in_merchant(shop, "validationCodes", verb="issue"), redemption(shop))
    (sent,) = web.gateway.requests[count:]
    body = redemption(
        shop,
        validation_code=sent.json["text"],
        challenge_id=issued["issued_code"]["challenge_id"],
        external_reference_number=unique("order"),
    )
    redeemed = (await call("POST", in_merchant(shop, "redemptions"), body))["redemption"]
    repeated = (await call("POST", in_merchant(shop, "redemptions"), body))["redemption"]
    assert (redeemed["points"], repeated["redemption_id"]) == ("100", redeemed["redemption_id"])
    assert await held_points(call, shop) == ("500", "400", "100")

    by_id = in_merchant(shop, "redemptions", redeemed["redemption_id"])
    reversal = {"external_reference_number": unique("return")}
    reversed_ = (await call("POST", f"{by_id}:reverse", reversal))["redemption"]
    by_reference = in_merchant(shop, "references", body["external_reference_number"], "redemption")
    stored = await call("GET", by_id)
    assert stored == await call("GET", by_reference)
    assert (reversed_["state"], stored["redemption"]["state"]) == ("REDEMPTION_STATE_REVERSED",) * 2
    again = await call("POST", f"{by_reference}:reverse", reversal)
    assert again["redemption"]["reversed_points"] == reversed_["reversed_points"] == "100"
    assert await held_points(call, shop) == ("500", "500", "0")
    customer = {"customer": {"merchant_id": shop.merchant_id, "mobile": MOBILE}}
    listed = await call("POST", in_merchant(shop, "redemptions", verb="list"), customer)
    assert listed == {"redemptions": [stored["redemption"]], "next_page_token": ""}
    assert await call("GET", in_merchant(shop, "redemptions") + "?page_size=1") == listed


async def held_points(call: JsonCaller, shop: Shop) -> tuple[str, str, str]:
    """Return the balance, the active and the held points of the buyer."""
    account = (await call("GET", account_path(shop)))["account"]
    return account["points_balance"], account["active_points"], account["held_points"]


@needs_curl
async def test_the_lines_of_the_page_work_with_curl(web: Web, shop: Shop) -> None:
    (script,) = blocks_of((DOCS / "http-json.md").read_text(), "bash")
    token = await make_token(web.fleet.database_url, [shop.merchant_id], list(Scope))
    shell = clean_environment({}) | {"URL": web.url, "CA": str(web.fleet.ca), "TOKEN": token}

    lines = script.replace("2000001234", shop.merchant_id).replace("1718263946864", shop.store_id)
    finished = await finish("bash", "-e", "-c", lines, environment=shell)

    assert (finished.exit_code, finished.err) == (0, ""), finished
    *_, account, entries, validated, redeemed, stored, reversed_, listed = map(json.loads, finished.out.splitlines())
    assert account["account"]["points_balance"] == "500"
    assert len(entries["entries"]) == 1
    assert validated["redeemable"]
    assert redeemed["redemption"]["redemption_id"] == stored["redemption"]["redemption_id"]
    assert reversed_["redemption"]["reversed_points"] == "100"
    assert [each["state"] for each in listed["redemptions"]] == ["REDEMPTION_STATE_REVERSED"]


async def test_a_wrong_request_shows_every_wrong_field(call: JsonCaller, shop: Shop) -> None:
    error = await call(
        "POST", in_merchant(shop, "pointsUpdates", verb="apply"), {"update": {"updated_value": -4}}, status=400
    )

    details = details_of(error)
    assert (error["code"], details["ErrorInfo"]["reason"]) == (3, "INVALID_FIELDS")
    assert {violation["field"] for violation in details["BadRequest"]["field_violations"]} == {
        f"update.{name}"
        for name in ("event_id", "store_id", "buyer_id", "update_type", "updated_scene", "updated_value", "updated_at")
    }


async def test_integers_are_numbers_or_strings(call: JsonCaller, shop: Shop) -> None:
    update = points_update(shop)
    update["update"]["updated_value"] = 500

    applied = await call.http.post(
        in_merchant(shop, "pointsUpdates", verb="apply"), json=update, headers={"authorization": f"Bearer {call.token}"}
    )
    update["update"]["updated_value"] = "500"
    repeated = await call("POST", in_merchant(shop, "pointsUpdates", verb="apply"), update)

    assert applied.json()["outcome"] == "APPLY_OUTCOME_APPLIED"
    assert repeated["outcome"] == "APPLY_OUTCOME_DUPLICATE"
    assert repeated["account"]["points_balance"] == "500"


async def test_names_may_be_in_camel_case(call: JsonCaller, shop: Shop) -> None:
    account = await call("GET", account_path(shop) + "?withLots=true&atTime=2026-01-01T00:00:00Z")

    assert account["account"]["as_of"] == "2026-01-01T00:00:00Z"


async def test_an_id_may_contain_characters_of_paths(call: JsonCaller, shop: Shop) -> None:
    buyer_id = "../a/b?c=d&e%2F:get"

    account = await call("GET", account_path(shop, buyer_id))

    assert account["account"]["buyer_id"] == buyer_id


async def test_errors_have_the_status_of_their_code(web: Web, call: JsonCaller, shop: Shop) -> None:
    async def reason_of(token: str, status: int, verb: str = "GET", where: str = account_path(shop)) -> Any:
        error = await JsonCaller(call.http, token)(verb, where, status=status)
        return details_of(error)["ErrorInfo"]["reason"]

    reader = await make_token(web.fleet.database_url, [shop.merchant_id], [Scope.POINTS_READ])

    assert await reason_of("", 401) == "TOKEN_MISSING"
    assert await reason_of("wrong", 401) == "TOKEN_INVALID"
    assert await reason_of(reader, 403, where=in_merchant(shop, "stores")) == "SCOPE_MISSING"
    assert await reason_of(reader, 403, where=path("merchants", "other", "benefits")) == "MERCHANT_FORBIDDEN"
    assert await reason_of(reader, 404, where=in_merchant(shop, "benefits", "unknown")) == "BENEFIT_NOT_FOUND"
    stale = in_merchant(shop, "stores", shop.store_id) + "?etag=stale"
    error = await call("PUT", stale, {"display_name": "Shop"}, status=409)
    assert details_of(error)["ErrorInfo"]["reason"] == "STALE_ETAG"
    await call("POST", in_merchant(shop, "pointsUpdates", verb="apply"), update := points_update(shop))
    update["update"]["updated_value"] = "501"
    error = await call("POST", in_merchant(shop, "pointsUpdates", verb="apply"), update, status=409)
    assert details_of(error)["ErrorInfo"]["reason"] == "EVENT_ID_REUSED"


async def test_errors_that_pass_say_when_to_repeat(web: Web, call: JsonCaller, shop: Shop) -> None:
    await open_shop(call, shop)

    web.gateway.status = 500
    failed = await call("POST", in_merchant(shop, "validationCodes", verb="issue"), redemption(shop), status=503)
    web.gateway.status = 200
    limited = None
    while limited is None:
        answer = await call.http.post(
            in_merchant(shop, "validationCodes", verb="issue"),
            json=redemption(shop, points=str(10 * len(web.gateway.requests))),
            headers={"authorization": f"Bearer {call.token}"},
        )
        assert answer.status_code in {200, 429, 503}, answer.text
        limited = answer.json() if answer.status_code == 429 else None

    assert details_of(failed)["ErrorInfo"]["reason"] == "DELIVERY_FAILED"
    assert details_of(limited)["ErrorInfo"]["reason"] == "SEND_LIMIT_REACHED"
    for error in (failed, limited):
        assert float(details_of(error)["RetryInfo"]["retry_delay"].removesuffix("s")) > 0


@pytest.mark.parametrize(
    ("query", "body", "status"),
    [
        ("", {"merchant_id": "other"}, 400),
        ("", {"merchantId": "other"}, 200),
        ("", {"merchant_id": "own", "merchantId": "other"}, 403),
        ("?program.merchant_id=other", {}, 403),
        ("?program.merchantId=other", {}, 403),
    ],
)
async def test_no_request_reaches_a_merchant_that_the_token_is_not_for(
    web: Web, call: JsonCaller, shop: Shop, *, query: str, body: dict[str, str], status: int
) -> None:
    token = await make_token(web.fleet.database_url, [shop.merchant_id], list(Scope))
    other = unique("other")
    program = {"store_ids": [shop.store_id], "point_value": "0.01", "currency_code": "USD"}
    named = {name: {"own": shop.merchant_id, "other": other}[value] for name, value in body.items()}

    answer = await call.http.put(
        in_merchant(shop, "programs", "1") + query.replace("other", other),
        json=program | named,
        headers={"authorization": f"Bearer {token}"},
    )

    assert answer.status_code == status, answer.text
    if status == 200:
        assert answer.json()["program"]["merchant_id"] == shop.merchant_id
    if status == 403:
        assert details_of(answer.json())["ErrorInfo"]["reason"] == "MERCHANT_FORBIDDEN"


@pytest.mark.parametrize(
    ("verb", "where", "code"),
    [
        ("GET", "/v1/unknown", 12),
        ("GET", "/", 12),
        ("POST", "/v1/callerAccess", 12),
        ("OPTIONS", "/v1/callerAccess", 12),
        ("TRACE", "/v1/callerAccess", 12),
        ("POST", "/pointbook.v1.AccessService/GetCallerAccess", 12),
        ("POST", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", 12),
        ("GET", "/v1/callerAccess?unknown=1", 3),
        ("GET", "/v1/merchants/m/programs/one", 3),
        ("GET", "/v1/merchants/m/redemptions?state=UNKNOWN", 3),
        ("GET", "/v1/merchants/m/redemptions?start_time=yesterday", 3),
    ],
)
async def test_what_is_no_method_does_not_reach_a_server(
    web: Web, call: JsonCaller, verb: str, where: str, code: int
) -> None:
    before = await web.fleet.envoy.requests(SERVERS)

    error = await call(verb, where, status={3: 400, 12: 404}[code], headers={"origin": "https://shop.example"})

    assert (error["code"], error["details"]) == (code, [])
    assert await web.fleet.envoy.requests(SERVERS) == before


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b'{"update": ', 400),
        (b"[]", 400),
        (b'{"update": {"event_id": "\xff"}}', 400),
        (b'{"update": ' * 200 + b"}" * 200, 400),
        (b'{"update": {"update_type": "UP"}}', 400),
        (b'{"update": {"updated_value": 5.5}}', 400),
        (b'{"update": {"updated_value": 9223372036854775808}}', 400),
        (b'{"update": {"merchant_id": "another"}}', 400),
        (b'{"update": {"event_id": "' + b"x" * MESSAGE_BYTES_MAX + b'"}}', 413),
    ],
    ids=["cut", "array", "not UTF-8", "deep", "enum", "fraction", "overflow", "contradicts the path", "large"],
)
async def test_malformed_bodies_are_refused(call: JsonCaller, shop: Shop, content: bytes, status: int) -> None:
    error = await call("POST", in_merchant(shop, "pointsUpdates", verb="apply"), status=status, content=content)

    assert (error["code"], error["details"]) == ({400: 3, 413: 8}[status], [])


async def test_grpc_has_no_route(call: JsonCaller) -> None:
    answer = await call.http.post(
        path("callerAccess"),
        content=b"\0\0\0\0\0",
        headers={"content-type": "application/grpc", "authorization": f"Bearer {call.token}"},
    )

    assert answer.headers["grpc-status"] != "0"
    assert answer.content == b""


async def test_answers_are_not_stored_and_have_the_id_of_the_request(web: Web, call: JsonCaller, shop: Shop) -> None:
    request_id = unique("request")

    answer = await call.http.get(
        account_path(shop), headers={"authorization": f"Bearer {call.token}", "x-request-id": request_id}
    )

    assert (answer.headers["x-request-id"], answer.headers["cache-control"]) == (request_id, "no-store")
    assert not any(name.startswith("access-control-") for name in answer.headers)

    async def is_logged() -> bool:
        return any(request_id in process.err for process in web.fleet.processes.values())

    await until(is_logged)


async def test_envoy_logs_failed_calls_by_method_without_the_path_of_the_caller(
    web: Web, call: JsonCaller, shop: Shop
) -> None:
    secret = unique("secret")
    customer = in_merchant(shop, "customers", secret)
    failing: list[tuple[str, str, int, dict[str, Any]]] = [
        ("GET", customer, 404, {}),
        ("PUT", customer, 400, {"content": b'{"mobile": 5}'}),
        ("PUT", customer, 413, {"content": b" " * (MESSAGE_BYTES_MAX + 1)}),
        ("GET", f"{customer}?unknown=1", 400, {}),
        ("GET", f"{customer}/unknown", 404, {}),
    ]
    request_ids = [unique("request") for _ in failing]
    for request_id, (verb, where, status, options) in zip(request_ids, failing, strict=True):
        await call(verb, where, status=status, headers={"x-request-id": request_id}, **options)

    async def is_logged() -> bool:
        return all(request_id in web.fleet.envoy.process.out for request_id in request_ids)

    await until(is_logged)
    lines = [json.loads(line) for line in web.fleet.envoy.process.out.splitlines() if "request_id" in line]
    paths = {line["request_id"]: line["path"] for line in lines}
    service = "/pointbook.v1.CustomersService/"
    expected = [f"{service}GetCustomer", f"{service}PutCustomer", "", "", ""]
    assert [paths[request_id] for request_id in request_ids] == expected
    assert secret not in web.fleet.envoy.process.out


async def test_a_large_page_is_whole(call: JsonCaller, shop: Shop) -> None:
    started = NOW_MS - 600_000
    updates = [
        points_update(
            shop, merchant_id=shop.merchant_id, updated_value="1", updated_at=at(started + number).ToJsonString()
        )
        for number in range(1000)
    ]
    body = {"updates": [each["update"] for each in updates], "outcomes_only": True}

    applied = await call("POST", path("pointsUpdates", verb="batchApply"), body)
    page = await call("GET", account_path(shop, collection="entries") + "?page_size=1000")

    assert {each["response"]["outcome"] for each in applied["results"]} == {"APPLY_OUTCOME_APPLIED"}
    assert len(page["entries"]) == 1000


async def test_a_killed_server_fails_no_call_and_all_of_them_503(web: Web, call: JsonCaller, shop: Shop) -> None:
    first, second = web.fleet.servers
    await call("POST", in_merchant(shop, "pointsUpdates", verb="apply"), update := points_update(shop))

    await web.fleet.processes[first].kill()
    outcomes = [await call("POST", in_merchant(shop, "pointsUpdates", verb="apply"), update) for _ in range(20)]
    await web.fleet.processes[second].kill()
    error = await call("GET", account_path(shop), status=503)
    await asyncio.gather(*map(web.fleet.start, web.fleet.servers))
    await web.fleet.until_balanced()

    assert {each["outcome"] for each in outcomes} == {"APPLY_OUTCOME_DUPLICATE"}
    assert (error["code"], error["details"]) == (14, [])
