"""A telephony provider's callbacks, from HTTP to the redemption that they validate: no fakes."""

import asyncio
import base64
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from pydantic import SecretStr

from pointbook.v1 import identity_pb2, redemption_pb2
from pointbook_server.access.model import Scope
from pointbook_server.rpc import status_interceptor as status_module
from pointbook_server.server import Server
from shopline_shim import missed_calls_endpoint as app_module
from support.codes import issue
from support.database_proxy import proxied
from support.harness import NOW_MS, Client, Service, Shop, make_token, refused, server_settings, unique
from support.json_logs import json_logs
from support.redemption import PENDING, earn, order, question, redeem
from support.shims import shim_before
from support.waiting import until

PATH = "/callbacks/missed-call"
CALLER, CALLED = "+8613912345678", "+862112345678"
SECRETS = (SecretStr("next-secret"), SecretStr("call-secret"))
BEARER = {"Authorization": "Bearer call-secret"}
TWILIO = {
    "caller_number": "From",
    "called_number": "To",
    "provider_call_id": "CallSid",
    "call_time": "Timestamp",
}
SEEN = (200, {"outcome": "SEEN"})
NO_CHALLENGE = (200, {"outcome": "NO_CHALLENGE"})
VALIDATION = {
    "required": True,
    "channels": [redemption_pb2.VALIDATION_TYPE_MISSED_CALL],
    "missed_call_number": CALLED,
}


@pytest.fixture
async def shop(service: Service, shop: Shop) -> Shop:
    """A shop whose program wants a missed call, with a customer who has 500 points and a number."""
    await service.client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation=VALIDATION)
    await earn(service.client, shop, 500)
    buyers = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")]
    await service.client.put_customer(shop.merchant_id, "c-1", mobile=CALLER, buyers=buyers)
    return shop


@pytest.fixture(scope="module")
async def token(service: Service) -> str:
    """A token that is good for missed calls alone, of all merchants."""
    return await make_token(service.database_url, ["*"], [Scope.TELEPHONY])


@pytest.fixture(scope="module")
async def http(service: Service, token: str) -> AsyncIterator[httpx.AsyncClient]:
    """A shim before the file's server, as most tests want it."""
    async with shim_before(service.server.port, token, missed_call_secrets=SECRETS) as client:
        yield client


def call_of(shop: Shop, **changes: Any) -> dict[str, Any]:
    """Write a callback, a millisecond after the tests' beginning; what is None is left out."""
    values = {
        "merchant_id": shop.merchant_id,
        "caller_number": CALLER,
        "called_number": CALLED,
        "provider_call_id": unique("call"),
        "call_time": NOW_MS + 1,
        **changes,
    }
    return {name: value for name, value in values.items() if value is not None}


def answer_of(response: httpx.Response) -> tuple[int, Any]:
    """Read an answer: the status and the JSON."""
    return response.status_code, response.json()


async def post(http: httpx.AsyncClient, shop: Shop, **changes: Any) -> tuple[int, Any]:
    """Tell of a call as JSON."""
    return answer_of(await http.post(PATH, json=call_of(shop, **changes), headers=BEARER))


async def codes(client: Client, shop: Shop, challenge_id: str) -> list[int]:
    """Tell what speaks against redeeming 100 points with a challenge."""
    answer = await client.redemption.ValidateRedemption(question(shop, 100, challenge_id=challenge_id))
    return [found.code for found in answer.violations]


async def counted(http: httpx.AsyncClient, outcome: str) -> float:
    """Read how many callbacks ended in some way."""
    start = f'pointbook_missed_call_callbacks_total{{outcome="{outcome}"}} '
    lines = (await http.get("/metrics")).text.splitlines()
    return sum(float(line.removeprefix(start)) for line in lines if line.startswith(start))


def problem_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """Check that an answer is a problem body, and read it."""
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    return problem


async def test_a_call_validates_a_redemption(client: Client, http: httpx.AsyncClient, shop: Shop) -> None:
    """Issue, call, callback, redeem: 822 until the call was seen, and the provider never learns the challenge."""
    issued = await issue(client, shop)
    assert issued.missed_call_number == CALLED
    assert await codes(client, shop, issued.challenge_id) == [822]
    found = await refused(redeem(client, order(shop, 100, challenge_id=issued.challenge_id)))
    assert found.metadata["status_code"] == "822"

    response = await http.post(PATH, json=call_of(shop), headers=BEARER)
    assert answer_of(response) == SEEN
    assert issued.challenge_id not in f"{response.text}{response.headers}"
    assert await codes(client, shop, issued.challenge_id) == []
    assert (await redeem(client, order(shop, 100, challenge_id=issued.challenge_id))).state == PENDING


@pytest.mark.parametrize(
    "changes", [{}, {"caller_number": CALLER[1:]}, {"called_number": "0086 21-1234 5678"}], ids=str
)
async def test_a_form(client: Client, http: httpx.AsyncClient, shop: Shop, changes: dict[str, Any]) -> None:
    """As most providers post it, with the merchant in the URL, and numbers as they write them."""
    await issue(client, shop)
    form = call_of(shop, merchant_id=None, **changes)

    assert answer_of(await http.post(PATH, params={"merchant_id": shop.merchant_id}, data=form, headers=BEARER)) == SEEN


async def test_a_plus_that_a_form_lost(client: Client, http: httpx.AsyncClient, shop: Shop) -> None:
    """A form that does not encode it means a blank."""
    await issue(client, shop)
    form = "&".join(f"{name}={value}" for name, value in call_of(shop).items())
    assert "caller_number=+86" in form
    headers = {**BEARER, "Content-Type": "application/x-www-form-urlencoded"}

    assert answer_of(await http.post(PATH, content=form, headers=headers)) == SEEN


async def test_mapped_names(service: Service, client: Client, token: str, shop: Shop) -> None:
    """Twilio's form, with all that it tells beside the call."""
    await issue(client, shop)
    form = {
        "CallSid": unique("CA"),
        "From": CALLER,
        "To": CALLED,
        "Timestamp": "Wed, 03 Jun 2026 08:00:00 +0000",
        "Caller": CALLER,
        "CallStatus": "no-answer",
        "FromCity": "",
    }
    params = {"merchant_id": shop.merchant_id}
    async with shim_before(service.server.port, token, missed_call_secrets=SECRETS, missed_call_fields=TWILIO) as http:
        assert answer_of(await http.post(PATH, params=params, data=form, headers=BEARER)) == SEEN
        problem = problem_of(await http.post(PATH, params=params, data=call_of(shop), headers=BEARER), 400)
    assert [part.partition(" ")[0] for part in problem["detail"].split("; ")] == ["From", "To", "CallSid"]


async def test_a_callback_without_a_time(service: Service, client: Client, http: httpx.AsyncClient, shop: Shop) -> None:
    """Tells of a call of just now: it is good for a challenge from before, by the server's clock, and no other."""
    service.clock.now_ms = time.time_ns() // 1_000_000 - 1_000
    try:
        await issue(client, shop)
        assert await post(http, shop, call_time=None) == SEEN
        service.clock.move(60)
        await issue(client, shop, 110)
        assert await post(http, shop, call_time=None) == NO_CHALLENGE
    finally:
        service.clock.now_ms = NOW_MS


@pytest.mark.parametrize(
    "change",
    [
        {"caller_number": "+8613912345679"},
        {"called_number": "+862112345679"},
        {"call_time": NOW_MS - 1},
        {"call_time": (NOW_MS - 1_000) // 1_000},
        {"merchant_id": "another"},
    ],
    ids=str,
)
async def test_a_call_that_meets_nothing(
    client: Client, http: httpx.AsyncClient, shop: Shop, change: dict[str, Any]
) -> None:
    """Another caller, another number, a call from before, or another merchant's: taken, and good for nothing."""
    challenge_id = (await issue(client, shop)).challenge_id

    assert await post(http, shop, **change) == NO_CHALLENGE
    assert await codes(client, shop, challenge_id) == [822]


async def test_a_repeated_callback(client: Client, http: httpx.AsyncClient, shop: Shop) -> None:
    """A provider may tell many times of one call, also at once; a later challenge wants another call."""
    first = (await issue(client, shop)).challenge_id
    call_id = unique("call")
    answers = await asyncio.gather(*(post(http, shop, provider_call_id=call_id) for _ in range(20)))
    assert answers == [SEEN] * 20
    await redeem(client, order(shop, 100, challenge_id=first))
    second = (await issue(client, shop)).challenge_id

    assert await post(http, shop, provider_call_id=call_id) == SEEN
    assert await codes(client, shop, second) == [822]
    assert await post(http, shop) == SEEN
    assert await codes(client, shop, second) == []


def basic(user: str, password: str) -> str:
    """Write user and password as clients do that find them in a URL."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.mark.parametrize(
    "headers",
    [
        BEARER,
        {"Authorization": "bearer next-secret"},
        {"Authorization": basic("provider", "call-secret")},
        {"X-Pointbook-Secret": "next-secret"},
    ],
    ids=str,
)
async def test_ways_to_send_a_secret(http: httpx.AsyncClient, shop: Shop, headers: dict[str, str]) -> None:
    """As a provider can, by either secret while one is rotated."""
    assert answer_of(await http.post(PATH, json=call_of(shop), headers=headers)) == NO_CHALLENGE


async def test_a_password_in_the_url(http: httpx.AsyncClient, shop: Shop) -> None:
    """Providers that know no headers take it there, and may send it only when they are asked."""
    unasked = await http.post(PATH, json=call_of(shop))
    assert unasked.headers["www-authenticate"].startswith("Basic ")

    url = httpx.URL(str(http.base_url)).copy_with(path=PATH, username="any", password="call-secret")
    assert answer_of(await http.post(url, json=call_of(shop))) == NO_CHALLENGE


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer call-secre"},
        {"Authorization": "Bearer call-secret,next-secret"},
        {"Authorization": "call-secret"},
        {"Authorization": basic("call-secret", "")},
        {"Authorization": "Basic ###"},
        {"Authorization": b"Bearer \xff"},
        {"X-Pointbook-Secret": "app-secret"},
    ],
    ids=str,
)
async def test_strangers(client: Client, http: httpx.AsyncClient, shop: Shop, headers: dict[str, Any]) -> None:
    """Are 401, whatever they tell, and learn nothing."""
    challenge_id = (await issue(client, shop)).challenge_id
    before = await counted(http, "forged")

    problem = problem_of(await http.post(PATH, json=call_of(shop), headers=headers), 401)
    problem_of(await http.post(PATH, content=b"a" * 300_000, headers=headers), 401)

    assert "secret" not in problem["detail"].replace("the secret of", "")
    assert await codes(client, shop, challenge_id) == [822]
    assert await counted(http, "forged") == before + 2


async def test_without_secrets_there_is_no_such_path(service: Service, token: str, shop: Shop) -> None:
    """404 as everything else, whatever is sent along."""
    async with shim_before(service.server.port, token) as http:
        for headers in (BEARER, {"Authorization": "Bearer"}, {}):
            problem_of(await http.post(PATH, json=call_of(shop), headers=headers), 404)


@pytest.mark.parametrize(("method", "path"), [("GET", PATH), ("PUT", PATH), ("POST", f"{PATH}/")])
async def test_other_methods_and_paths(http: httpx.AsyncClient, shop: Shop, method: str, path: str) -> None:
    """Are 404, also for who knows the secret."""
    problem_of(await http.request(method, path, json=call_of(shop), headers=BEARER), 404)


async def test_malformed_callbacks(http: httpx.AsyncClient, shop: Shop) -> None:
    """Every wrong field is named and none quoted, in the answer and for the operator; nobody has to send it again."""
    body = {"caller_number": "13912345678 private", "called_number": "private", "call_time": "private"}
    before = await counted(http, "malformed")
    with json_logs(app_module) as written:
        problem = problem_of(await http.post(PATH, json=body, headers=BEARER), 400)
        problem_of(await http.post(PATH, content=b"private", headers=BEARER), 400)
        problem_of(
            await http.post(PATH, content=b"private", headers={**BEARER, "Content-Type": "application/json"}), 400
        )
        problem_of(await http.post(PATH, json=[call_of(shop)], headers=BEARER), 400)

    named = [part.partition(" ")[0] for part in problem["detail"].split("; ")]
    assert named == ["merchant_id", "caller_number", "called_number", "provider_call_id", "call_time"]
    assert "private" not in problem["detail"] + written.getvalue()
    assert problem["detail"] in written.getvalue()
    assert await counted(http, "malformed") == before + 4


async def test_what_the_server_finds_wrong(service: Service, token: str, http: httpx.AsyncClient, shop: Shop) -> None:
    """A number that no country has is named as well, by the provider's name."""
    nowhere = "+8611111111111"
    problem = problem_of(await http.post(PATH, json=call_of(shop, caller_number=nowhere), headers=BEARER), 400)
    assert problem["detail"].startswith("caller_number must be ")
    assert nowhere[1:] not in problem["detail"]

    names = {"caller_number": "From"}
    async with shim_before(service.server.port, token, missed_call_secrets=SECRETS, missed_call_fields=names) as mapped:
        body = call_of(shop, caller_number=None, From=nowhere)
        problem = problem_of(await mapped.post(PATH, json=body, headers=BEARER), 400)
    assert problem["detail"].startswith("From must be ")


async def test_large_bodies(http: httpx.AsyncClient, shop: Shop) -> None:
    """The webhooks' limit, with a length or in chunks."""
    raw_body = json.dumps(call_of(shop)).encode()
    headers = {**BEARER, "Content-Type": "application/json"}

    async def chunks(body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), 50_000):
            yield body[start : start + 50_000]

    for body, status in ((raw_body.ljust(262_144), 200), (raw_body.ljust(262_145), 413)):
        assert (await http.post(PATH, content=body, headers=headers)).status_code == status
        assert (await http.post(PATH, content=chunks(body), headers=headers)).status_code == status


async def test_slow_bodies_and_clients_that_leave(service: Service, token: str) -> None:
    """End as those of webhooks do."""
    settings = {"missed_call_secrets": SECRETS, "header_timeout_seconds": 0.3, "request_timeout_seconds": 0.6}
    head = f"POST {PATH} HTTP/1.1\r\nhost: shim\r\nauthorization: Bearer call-secret\r\n"
    async with shim_before(service.server.port, token, **settings) as http:
        for request in (head, f"{head}content-length: 100\r\n\r\nmerchant_id="):
            reader, writer = await asyncio.open_connection(http.base_url.host, http.base_url.port)
            writer.write(request.encode())
            assert (await asyncio.wait_for(reader.read(), 3)).startswith(b"HTTP/1.1 408 ")
            writer.close()
        _, writer = await asyncio.open_connection(http.base_url.host, http.base_url.port)
        writer.write(f"{head}content-length: 100\r\n\r\nmerchant_id=".encode())
        await writer.drain()
        writer.close()

        async def are_counted() -> bool:
            return await counted(http, "incomplete") == 2

        await until(are_counted)


@contextlib.asynccontextmanager
async def server_on(service: Service, database_url: str, port: int = 0) -> AsyncIterator[Server]:
    """Run another server with the clock of the file's own."""
    settings = server_settings(grpc_address=f"127.0.0.1:{port}")
    server = Server(settings, database_url, senders={}, clock=service.clock)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def until_seen(send: Callable[[], Awaitable[tuple[int, Any]]]) -> None:
    """Send a callback again, as a provider does, until it is taken."""
    deadline = time.monotonic() + 10
    while (answer := await send())[0] == 503:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    assert answer == SEEN


async def test_a_server_that_is_away(service: Service, client: Client, token: str, shop: Shop) -> None:
    """503 and when to come again; the same callback then is a success."""
    challenge_id = (await issue(client, shop)).challenge_id
    body = call_of(shop)
    async with server_on(service, service.database_url) as server:
        port = server.port
    async with shim_before(port, token, missed_call_secrets=SECRETS) as http:
        response = await http.post(PATH, json=body, headers=BEARER)
        problem_of(response, 503)
        assert response.headers["retry-after"] == "5"
        assert await counted(http, "unavailable") == 1
        assert await codes(client, shop, challenge_id) == [822]
        async with server_on(service, service.database_url, port):
            await until_seen(lambda: post(http, shop, **body))
    assert await codes(client, shop, challenge_id) == []


async def test_a_database_that_is_away(service: Service, client: Client, token: str, shop: Shop) -> None:
    """Is told like a server that is away."""
    challenge_id = (await issue(client, shop)).challenge_id
    body = call_of(shop)
    async with (
        proxied(service.database_url) as proxy,
        server_on(service, proxy.url) as server,
        shim_before(server.port, token, missed_call_secrets=SECRETS) as http,
    ):
        assert await post(http, shop, provider_call_id=unique("call"), caller_number="+8613912345679") == NO_CHALLENGE
        await proxy.cut()
        problem_of(await http.post(PATH, json=body, headers=BEARER), 503)
        assert await codes(client, shop, challenge_id) == [822]
        await proxy.mend()
        await until_seen(lambda: post(http, shop, **body))
    assert await codes(client, shop, challenge_id) == []


async def test_a_token_without_the_scope(service: Service, shop: Shop) -> None:
    """The provider shall send again; the operator reads which setting to look at."""
    token = await make_token(service.database_url, [shop.merchant_id], [Scope.POINTS_WRITE, Scope.WEBHOOKS])
    async with shim_before(service.server.port, token, missed_call_secrets=SECRETS) as http:
        with json_logs(app_module) as written:
            problem_of(await http.post(PATH, json=call_of(shop), headers=BEARER), 503)
    assert "check POINTBOOK_TOKEN" in written.getvalue()


async def test_no_number_is_told(client: Client, http: httpx.AsyncClient, shop: Shop) -> None:
    """Neither in logs nor in metrics nor in answers, whatever becomes of a callback."""
    await issue(client, shop)
    call_id = f"{CALLER}-{CALLED}"
    told = ""
    with json_logs(app_module, status_module) as written:
        for changes in (
            {"provider_call_id": call_id},
            {"caller_number": "+86139123456780"},
            {"caller_number": f"{CALLER}x", "call_time": CALLER},
            {"merchant_id": f"{CALLER} {CALLED}"},
            {"provider_call_id": f"{CALLER} {CALLED}"},
        ):
            response = await http.post(PATH, json=call_of(shop, **changes), headers=BEARER)
            told += f"{response.text}{response.headers}"
        headers = {**BEARER, "X-Shopline-Webhook-Id": CALLER, "X-Shopline-Topic": CALLER}
        told += (await http.post(PATH, json=call_of(shop), headers=headers)).text
        told += (await http.post(PATH, json=call_of(shop))).text
        told += (await http.get("/metrics")).text

    assert written.getvalue()
    for private in ("3912345678", "2112345678", "call-secret", "next-secret"):
        assert private not in told + written.getvalue()


def random_value(generator: random.Random, shop: Shop) -> Any:
    """Make up what a field may hold."""
    return generator.choice(
        [
            None,
            True,
            [],
            {"a": [1]},
            "",
            -1,
            0,
            generator.randint(-(2**70), 2**70),
            generator.choice([0.5, 1e300, float("nan"), float("inf")]),
            "".join(chr(generator.randrange(0x11000)) for _ in range(generator.randrange(20))),
            "".join(generator.choice("+0123456789 -().:TZ") for _ in range(generator.randrange(30))),
            "9" * 5_000,
            "\ud800",
            CALLER,
            shop.merchant_id,
            "2026-06-01T08:00:00Z",
        ]
    )


def random_request(generator: random.Random, shop: Shop) -> tuple[str, bytes]:
    """Make up a media type and a body: a callback with fields changed, bytes cut or swapped, or plain noise."""
    call = call_of(shop)
    call |= {name: random_value(generator, shop) for name in generator.sample(sorted(call), generator.randrange(3))}
    is_form = generator.random() < 0.5
    form = {name: str(value).encode(errors="replace") for name, value in call.items()}
    raw_body = bytearray((urlencode(form) if is_form else json.dumps(call)).encode())
    kind = generator.randrange(5)
    if kind == 0:
        raw_body[generator.randrange(len(raw_body))] = generator.randrange(256)
    elif kind == 1:
        del raw_body[generator.randrange(len(raw_body)) :]
    elif kind == 2:
        raw_body = bytearray(generator.randbytes(generator.randrange(200)))
    media_types = ["application/x-www-form-urlencoded" if is_form else "application/json"] * 9 + ["text/plain"]
    return generator.choice(media_types), bytes(raw_body)


async def test_random_bodies(http: httpx.AsyncClient, shop: Shop) -> None:
    """A thousand authentic but random callbacks are 200 or 400, and the log knows neither an error nor a number."""
    generator = random.Random(20260601)  # noqa: S311 - the same in every run
    requests = iter([random_request(generator, shop) for _ in range(1_000)])
    statuses: dict[int, int] = {}

    async def send_all() -> None:
        for media_type, raw_body in requests:
            headers = {**BEARER, "Content-Type": media_type}
            response = await http.post(PATH, content=raw_body, headers=headers)
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1

    with json_logs(app_module, status_module) as written:
        await asyncio.gather(*(send_all() for _ in range(8)))

    assert set(statuses) == {200, 400}
    assert min(statuses.values()) > 150
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    assert {line["level"] for line in lines} <= {"debug", "info", "warning"}
    assert CALLER[1:] not in written.getvalue()
    assert "Traceback" not in written.getvalue()
