"""A provider's missed-call callbacks, from HTTP to the validated redemption.

Source: docs/reference/validation-codes.md#missed-calls
"""

import asyncio
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
from pointbook_server.rpc import method_handlers as handlers_module
from pointbook_server.server import Server
from shopline_shim import missed_calls_endpoint as endpoint_module
from support.clients import Client
from support.clocks import NOW_MS
from support.codes import issue_code
from support.database_proxy import proxied
from support.examples import examples
from support.fake_servers import assert_problem
from support.http_clients import basic_authorization
from support.json_logs import json_logs
from support.redemption import PENDING, earn, redeem, redeem_request, validate_request
from support.refusals import refused
from support.servers import Service, server_settings
from support.shims import shim_client
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique
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
    """A shop whose program requires a missed call, and a customer with 500 points."""
    await service.client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation=VALIDATION)
    await earn(service.client, shop, 500)
    buyers = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")]
    await service.client.put_customer(shop.merchant_id, "c-1", mobile=CALLER, buyers=buyers)
    return shop


@pytest.fixture(scope="module")
async def token(service: Service) -> str:
    """A token with the scope for missed calls of all merchants."""
    return await make_token(service.database_url, ["*"], [Scope.TELEPHONY])


@pytest.fixture(scope="module")
async def http(service: Service, token: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a shim in front of the module's server."""
    async with shim_client(service.server.port, token, missed_call_secrets=SECRETS) as client:
        yield client


def call_of(shop: Shop, **changes: Any) -> dict[str, Any]:
    """Return a callback for a call just after NOW_MS, without None fields."""
    values = {
        "merchant_id": shop.merchant_id,
        "caller_number": CALLER,
        "called_number": CALLED,
        "provider_call_id": unique("call"),
        "call_time": NOW_MS + 1,
        **changes,
    }
    return {name: value for name, value in values.items() if value is not None}


def status_and_json(response: httpx.Response) -> tuple[int, Any]:
    """Return the status and the JSON of a response."""
    return response.status_code, response.json()


async def post(http: httpx.AsyncClient, shop: Shop, **changes: Any) -> tuple[int, Any]:
    """Send a callback as JSON, and return the status and the JSON of the response."""
    return status_and_json(await http.post(PATH, json=call_of(shop, **changes), headers=BEARER))


async def read_violation_codes(client: Client, shop: Shop, challenge_id: str) -> list[int]:
    """Return the violations' codes of redeeming 100 points with a challenge."""
    response = await client.redemption.ValidateRedemption(validate_request(shop, 100, challenge_id=challenge_id))
    return [violation.code for violation in response.violations]


async def callback_count(http: httpx.AsyncClient, outcome: str) -> float:
    """Return the number of callbacks with an outcome."""
    start = f'pointbook_missed_call_callbacks_total{{outcome="{outcome}"}} '
    lines = (await http.get("/metrics")).text.splitlines()
    return sum(float(line.removeprefix(start)) for line in lines if line.startswith(start))


async def test_missed_call_validates_a_redemption_without_revealing_the_challenge(
    client: Client, http: httpx.AsyncClient, shop: Shop
) -> None:
    issued = await issue_code(client, shop)
    assert issued.missed_call_number == CALLED
    assert await read_violation_codes(client, shop, issued.challenge_id) == [822]
    refusal = await refused(redeem(client, redeem_request(shop, 100, challenge_id=issued.challenge_id)))
    assert refusal.metadata["status_code"] == "822"

    response = await http.post(PATH, json=call_of(shop), headers=BEARER)
    assert status_and_json(response) == SEEN
    assert issued.challenge_id not in f"{response.text}{response.headers}"
    assert await read_violation_codes(client, shop, issued.challenge_id) == []
    assert (await redeem(client, redeem_request(shop, 100, challenge_id=issued.challenge_id))).state == PENDING


@pytest.mark.parametrize(
    "changes", [{}, {"caller_number": CALLER[1:]}, {"called_number": "0086 21-1234 5678"}], ids=str
)
async def test_form_with_the_merchant_in_the_query_is_accepted(
    client: Client, http: httpx.AsyncClient, shop: Shop, changes: dict[str, Any]
) -> None:
    await issue_code(client, shop)
    form = call_of(shop, merchant_id=None, **changes)

    assert (
        status_and_json(await http.post(PATH, params={"merchant_id": shop.merchant_id}, data=form, headers=BEARER))
        == SEEN
    )


async def test_form_that_does_not_encode_the_plus_is_accepted(
    client: Client, http: httpx.AsyncClient, shop: Shop
) -> None:
    await issue_code(client, shop)
    form = "&".join(f"{name}={value}" for name, value in call_of(shop).items())
    assert "caller_number=+86" in form
    headers = {**BEARER, "Content-Type": "application/x-www-form-urlencoded"}

    assert status_and_json(await http.post(PATH, content=form, headers=headers)) == SEEN


async def test_form_with_the_field_names_of_the_provider_is_accepted(
    service: Service, client: Client, token: str, shop: Shop
) -> None:
    await issue_code(client, shop)
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
    async with shim_client(service.server.port, token, missed_call_secrets=SECRETS, missed_call_fields=TWILIO) as http:
        assert status_and_json(await http.post(PATH, params=params, data=form, headers=BEARER)) == SEEN
        problem = assert_problem(await http.post(PATH, params=params, data=call_of(shop), headers=BEARER), 400)
    assert [part.partition(" ")[0] for part in problem["detail"].split("; ")] == ["From", "To", "CallSid"]


async def test_callback_without_a_time_counts_as_a_call_of_now(
    service: Service, client: Client, http: httpx.AsyncClient, shop: Shop
) -> None:
    service.clock.now_ms = time.time_ns() // 1_000_000 - 1_000
    try:
        await issue_code(client, shop)
        assert await post(http, shop, call_time=None) == SEEN
        service.clock.move(60)
        await issue_code(client, shop, 110)
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
async def test_call_with_another_number_merchant_or_earlier_time_matches_no_challenge(
    client: Client, http: httpx.AsyncClient, shop: Shop, change: dict[str, Any]
) -> None:
    challenge_id = (await issue_code(client, shop)).challenge_id

    assert await post(http, shop, **change) == NO_CHALLENGE
    assert await read_violation_codes(client, shop, challenge_id) == [822]


async def test_repeated_callback_counts_once_and_not_for_a_later_challenge(
    client: Client, http: httpx.AsyncClient, shop: Shop
) -> None:
    first = (await issue_code(client, shop)).challenge_id
    call_id = unique("call")
    responses = await asyncio.gather(*(post(http, shop, provider_call_id=call_id) for _ in range(20)))
    assert responses == [SEEN] * 20
    await redeem(client, redeem_request(shop, 100, challenge_id=first))
    second = (await issue_code(client, shop)).challenge_id

    assert await post(http, shop, provider_call_id=call_id) == SEEN
    assert await read_violation_codes(client, shop, second) == [822]
    assert await post(http, shop) == SEEN
    assert await read_violation_codes(client, shop, second) == []


@pytest.mark.parametrize(
    "headers",
    [
        BEARER,
        {"Authorization": "bearer next-secret"},
        {"Authorization": basic_authorization("provider", "call-secret")},
        {"X-Pointbook-Secret": "next-secret"},
    ],
    ids=str,
)
async def test_secret_in_every_supported_header_is_accepted(
    http: httpx.AsyncClient, shop: Shop, headers: dict[str, str]
) -> None:
    assert status_and_json(await http.post(PATH, json=call_of(shop), headers=headers)) == NO_CHALLENGE


async def test_password_in_the_url_is_accepted(http: httpx.AsyncClient, shop: Shop) -> None:
    """Providers that support no headers may send it only after a challenge."""
    challenge = await http.post(PATH, json=call_of(shop))
    assert challenge.headers["www-authenticate"].startswith("Basic ")

    url = httpx.URL(str(http.base_url)).copy_with(path=PATH, username="any", password="call-secret")
    assert status_and_json(await http.post(url, json=call_of(shop))) == NO_CHALLENGE


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer call-secre"},
        {"Authorization": "Bearer call-secret,next-secret"},
        {"Authorization": "call-secret"},
        {"Authorization": basic_authorization("call-secret", "")},
        {"Authorization": "Basic ###"},
        {"Authorization": b"Bearer \xff"},
        {"X-Pointbook-Secret": "app-secret"},
    ],
    ids=str,
)
async def test_callback_without_a_valid_secret_is_401_and_has_no_effect(
    client: Client, http: httpx.AsyncClient, shop: Shop, headers: dict[str, Any]
) -> None:
    challenge_id = (await issue_code(client, shop)).challenge_id
    before = await callback_count(http, "forged")

    problem = assert_problem(await http.post(PATH, json=call_of(shop), headers=headers), 401)
    assert_problem(await http.post(PATH, content=b"a" * 300_000, headers=headers), 401)

    assert "secret" not in problem["detail"]
    assert await read_violation_codes(client, shop, challenge_id) == [822]
    assert await callback_count(http, "forged") == before + 2


async def test_callback_path_is_404_without_configured_secrets(service: Service, token: str, shop: Shop) -> None:
    async with shim_client(service.server.port, token) as http:
        for headers in (BEARER, {"Authorization": "Bearer"}, {}):
            assert_problem(await http.post(PATH, json=call_of(shop), headers=headers), 404)


@pytest.mark.parametrize(("method", "path"), [("GET", PATH), ("PUT", PATH), ("POST", f"{PATH}/")])
async def test_other_methods_and_paths_are_404(http: httpx.AsyncClient, shop: Shop, method: str, path: str) -> None:
    assert_problem(await http.request(method, path, json=call_of(shop), headers=BEARER), 404)


async def test_malformed_callback_is_400_with_every_wrong_field_and_no_value(
    http: httpx.AsyncClient, shop: Shop
) -> None:
    body = {"caller_number": "13912345678 private", "called_number": "private", "call_time": "private"}
    before = await callback_count(http, "malformed")
    with json_logs(endpoint_module) as written:
        problem = assert_problem(await http.post(PATH, json=body, headers=BEARER), 400)
        assert_problem(await http.post(PATH, content=b"private", headers=BEARER), 400)
        assert_problem(
            await http.post(PATH, content=b"private", headers={**BEARER, "Content-Type": "application/json"}), 400
        )
        assert_problem(await http.post(PATH, json=[call_of(shop)], headers=BEARER), 400)

    wrong_fields = [part.partition(" ")[0] for part in problem["detail"].split("; ")]
    assert wrong_fields == ["merchant_id", "caller_number", "called_number", "provider_call_id", "call_time"]
    assert "private" not in problem["detail"] + written.getvalue()
    assert problem["detail"] in written.getvalue()
    assert await callback_count(http, "malformed") == before + 4


async def test_field_that_the_server_rejects_is_400_with_the_name_of_the_provider(
    service: Service, token: str, http: httpx.AsyncClient, shop: Shop
) -> None:
    invalid_number = "+8611111111111"
    problem = assert_problem(
        await http.post(PATH, json=call_of(shop, caller_number=invalid_number), headers=BEARER), 400
    )
    assert problem["detail"].startswith("caller_number must be ")
    assert invalid_number[1:] not in problem["detail"]

    names = {"caller_number": "From"}
    async with shim_client(service.server.port, token, missed_call_secrets=SECRETS, missed_call_fields=names) as mapped:
        body = call_of(shop, caller_number=None, From=invalid_number)
        problem = assert_problem(await mapped.post(PATH, json=body, headers=BEARER), 400)
    assert problem["detail"].startswith("From must be ")


async def test_body_above_the_limit_is_413(http: httpx.AsyncClient, shop: Shop) -> None:
    raw_body = json.dumps(call_of(shop)).encode()
    headers = {**BEARER, "Content-Type": "application/json"}

    async def chunks(body: bytes) -> AsyncIterator[bytes]:
        for start in range(0, len(body), 50_000):
            yield body[start : start + 50_000]

    for body, status in ((raw_body.ljust(262_144), 200), (raw_body.ljust(262_145), 413)):
        assert (await http.post(PATH, content=body, headers=headers)).status_code == status
        assert (await http.post(PATH, content=chunks(body), headers=headers)).status_code == status


async def test_slow_and_disconnecting_clients_are_408_or_incomplete(service: Service, token: str) -> None:
    settings = {"missed_call_secrets": SECRETS, "header_timeout_seconds": 0.3, "request_timeout_seconds": 0.6}
    head = f"POST {PATH} HTTP/1.1\r\nhost: shim\r\nauthorization: Bearer call-secret\r\n"
    async with shim_client(service.server.port, token, **settings) as http:
        for request in (head, f"{head}content-length: 100\r\n\r\nmerchant_id="):
            reader, writer = await asyncio.open_connection(http.base_url.host, http.base_url.port)
            writer.write(request.encode())
            assert (await asyncio.wait_for(reader.read(), 3)).startswith(b"HTTP/1.1 408 ")
            writer.close()
        _, writer = await asyncio.open_connection(http.base_url.host, http.base_url.port)
        writer.write(f"{head}content-length: 100\r\n\r\nmerchant_id=".encode())
        await writer.drain()
        writer.close()

        async def both_are_counted() -> bool:
            return await callback_count(http, "incomplete") == 2

        await until(both_are_counted)


@contextlib.asynccontextmanager
async def server_on(service: Service, database_url: str, port: int = 0) -> AsyncIterator[Server]:
    """Run another server with the clock of the module's server during the block."""
    settings = server_settings(grpc_address=f"127.0.0.1:{port}")
    server = Server(settings, database_url, senders={}, clock=service.clock)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def retry_until_seen(send: Callable[[], Awaitable[tuple[int, Any]]]) -> None:
    """Send a callback until it is not 503, and check that its outcome is SEEN."""
    deadline = time.monotonic() + 10
    while (response := await send())[0] == 503:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    assert response == SEEN


async def test_unavailable_server_is_503_and_a_retry_succeeds(
    service: Service, client: Client, token: str, shop: Shop
) -> None:
    challenge_id = (await issue_code(client, shop)).challenge_id
    body = call_of(shop)
    async with server_on(service, service.database_url) as server:
        port = server.port
    async with shim_client(port, token, missed_call_secrets=SECRETS) as http:
        response = await http.post(PATH, json=body, headers=BEARER)
        assert_problem(response, 503)
        assert response.headers["retry-after"] == "5"
        assert await callback_count(http, "unavailable") == 1
        assert await read_violation_codes(client, shop, challenge_id) == [822]
        async with server_on(service, service.database_url, port):
            await retry_until_seen(lambda: post(http, shop, **body))
    assert await read_violation_codes(client, shop, challenge_id) == []


async def test_unavailable_database_is_503_and_a_retry_succeeds(
    service: Service, client: Client, token: str, shop: Shop
) -> None:
    challenge_id = (await issue_code(client, shop)).challenge_id
    body = call_of(shop)
    async with (
        proxied(service.database_url) as proxy,
        server_on(service, proxy.url) as server,
        shim_client(server.port, token, missed_call_secrets=SECRETS) as http,
    ):
        assert await post(http, shop, provider_call_id=unique("call"), caller_number="+8613912345679") == NO_CHALLENGE
        await proxy.cut()
        assert_problem(await http.post(PATH, json=body, headers=BEARER), 503)
        assert await read_violation_codes(client, shop, challenge_id) == [822]
        await proxy.restore()
        await retry_until_seen(lambda: post(http, shop, **body))
    assert await read_violation_codes(client, shop, challenge_id) == []


async def test_token_without_the_scope_is_503_and_logged(service: Service, shop: Shop) -> None:
    token = await make_token(service.database_url, [shop.merchant_id], [Scope.POINTS_WRITE, Scope.WEBHOOKS])
    async with shim_client(service.server.port, token, missed_call_secrets=SECRETS) as http:
        with json_logs(endpoint_module) as written:
            assert_problem(await http.post(PATH, json=call_of(shop), headers=BEARER), 503)
    assert "check POINTBOOK_TOKEN" in written.getvalue()


async def test_phone_numbers_are_in_no_log_metric_or_response(
    client: Client, http: httpx.AsyncClient, shop: Shop
) -> None:
    await issue_code(client, shop)
    call_id = f"{CALLER}-{CALLED}"
    received = ""
    with json_logs(endpoint_module, handlers_module) as written:
        for changes in (
            {"provider_call_id": call_id},
            {"caller_number": "+86139123456780"},
            {"caller_number": f"{CALLER}x", "call_time": CALLER},
            {"merchant_id": f"{CALLER} {CALLED}"},
            {"provider_call_id": f"{CALLER} {CALLED}"},
        ):
            response = await http.post(PATH, json=call_of(shop, **changes), headers=BEARER)
            received += f"{response.text}{response.headers}"
        headers = {**BEARER, "X-Shopline-Webhook-Id": CALLER, "X-Shopline-Topic": CALLER}
        received += (await http.post(PATH, json=call_of(shop), headers=headers)).text
        received += (await http.post(PATH, json=call_of(shop))).text
        received += (await http.get("/metrics")).text

    assert written.getvalue()
    for private in ("3912345678", "2112345678", "call-secret", "next-secret"):
        assert private not in received + written.getvalue()


def random_value(generator: random.Random, shop: Shop) -> Any:
    """Return a random value of a field."""
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
    """Return a media type and a callback with random changes, or random bytes."""
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


async def test_random_callbacks_are_200_or_400_and_log_no_errors(http: httpx.AsyncClient, shop: Shop) -> None:
    generator = random.Random(20260601)  # noqa: S311 - repeatable
    count = examples(1_000)
    requests = iter([random_request(generator, shop) for _ in range(count)])
    statuses: dict[int, int] = {}

    async def send_all() -> None:
        for media_type, raw_body in requests:
            headers = {**BEARER, "Content-Type": media_type}
            response = await http.post(PATH, content=raw_body, headers=headers)
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1

    with json_logs(endpoint_module, handlers_module) as written:
        await asyncio.gather(*(send_all() for _ in range(8)))

    assert set(statuses) == {200, 400}
    assert min(statuses.values()) > 0.15 * count
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    assert {line["level"] for line in lines} <= {"debug", "info", "warning"}
    assert CALLER[1:] not in written.getvalue()
    assert "Traceback" not in written.getvalue()
