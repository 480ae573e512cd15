"""One-time codes by two server processes on one database.

The limits hold for both processes together, and counts survive a killed process.
"""

import asyncio
import contextlib
import json
import random
import re
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import pytest

from pointbook.v1 import identity_pb2, redemption_pb2
from pointbook_client.testing.ports import free_port
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from support.clients import Client
from support.clocks import at
from support.codes import CODE_SETTINGS, WRONG_CODE, issue_code
from support.http_clients import http_client
from support.probes import grpc_health
from support.processes import Running, running
from support.provider_servers import HttpServer, MailServer, http_server, mail_server
from support.redemption import customer_ref, redeem_request, validate_request
from support.refusals import refusal
from support.servers import CODE_KEY
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique
from support.waiting import until

SECONDS_MAX = 20.0
EMAIL = redemption_pb2.VALIDATION_TYPE_EMAIL
COMPARED = re.compile(r'pointbook_code_comparisons_total\{outcome="(\w+)"\} (\d+)')
OPEN_TRANSACTIONS = """
    SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
        AND xact_start < now() - interval '0.5 s'
"""


@dataclass
class Servers:
    """Two server processes, their clients, and the providers of messages."""

    database_url: str
    gateway: HttpServer
    mail: MailServer
    token: str
    folder: Path
    processes: list[Running] = field(default_factory=list)
    clients: list[Client] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)

    async def start(self, stack: contextlib.AsyncExitStack) -> tuple[Running, Client]:
        """Start one more process, and return it with a client."""
        address, metrics = (f"127.0.0.1:{free_port()}" for _ in range(2))
        settings = {
            "DATABASE_URL": self.database_url,
            "GRPC_ADDRESS": address,
            "METRICS_ADDRESS": metrics,
            "CODE_KEYS": f"k1:{CODE_KEY}",
            "SMS_URL": f"http://127.0.0.1:{self.gateway.port}/",
            "SMTP_URL": f"smtp://127.0.0.1:{self.mail.port}",
            "SMTP_FROM": "Points <points@shop.example.com>",
        }
        process = await stack.enter_async_context(running("serve", folder=self.folder, settings=settings))

        async def serves() -> bool:
            return await grpc_health(address) == "SERVING"

        await process.until(serves)
        client = Client(int(address.rpartition(":")[2]), self.token)
        stack.push_async_callback(client.close)
        self.metrics.append(metrics)
        return process, client

    async def count_comparisons(self) -> dict[str, int]:
        """Return how many codes two processes have compared, from their metrics."""
        sums = {"RIGHT": 0, "WRONG": 0}
        async with http_client() as http:
            for metrics in self.metrics[:2]:
                for outcome, count in COMPARED.findall((await http.get(f"http://{metrics}/metrics")).text):
                    sums[outcome] += int(count)
        return sums

    async def fetch(self, query: str, *values: object) -> list[Any]:
        """Return the rows of a query."""
        connection = await asyncpg.connect(self.database_url)
        try:
            return [tuple(row) for row in await connection.fetch(query, *values)]
        finally:
            await connection.close()

    async def read_attempts(self, challenge_id: str) -> tuple[str, int, int]:
        """Return the state of a challenge, and its attempts with and without its id."""
        query = "SELECT state, attempts, unnamed_attempts FROM validation_challenges WHERE challenge_id = $1"
        ((state, attempts, unnamed_attempts),) = await self.fetch(query, challenge_id)
        return state, attempts, unnamed_attempts

    async def issue(self, shop: Shop, points: int = 100, **changes: Any) -> tuple[str, str]:
        """Issue a code, and return its challenge_id and the code from the gateway."""
        count = len(self.gateway.requests)
        answer = await issue_code(self.clients[0], shop, points, **changes)
        (request,) = self.gateway.requests[count:]
        return answer.challenge_id, request.json["text"]

    def guesses(
        self, shop: Shop, count: int, code: str = WRONG_CODE, points: int = 100, **changes: Any
    ) -> Iterable[Any]:
        """Yield guesses of a code, to both servers in turn."""
        request = validate_request(shop, points, validation_code=code, **changes)
        return (self.clients[number % 2].redemption.ValidateRedemption(request) for number in range(count))


@pytest.fixture(scope="module")
async def servers(database_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Servers]:
    """Two running servers."""
    token = await make_token(database_url, [ALL_MERCHANTS], list(Scope))
    async with contextlib.AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(http_server())
        mail = await stack.enter_async_context(mail_server())
        found = Servers(database_url, gateway, mail, token, tmp_path_factory.mktemp("codes"))
        for process, client in [await found.start(stack) for _ in range(2)]:
            found.processes.append(process)
            found.clients.append(client)
        yield found
        logged = "".join(process.err for process in found.processes)
    for request in gateway.requests:
        assert request.json["text"] not in logged
        assert request.json["to"].lstrip("+") not in logged


@pytest.fixture
async def shop(servers: Servers) -> Shop:
    """A shop whose program sends codes, with a customer who has two contacts."""
    client, shop = servers.clients[0], Shop(unique("merchant"), unique("store"))
    await client.put_store(shop.merchant_id, shop.store_id)
    await client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation=CODE_SETTINGS)
    yesterday = at(int(time.time() * 1_000) - 86_400_000)
    await client.apply(shop.update(updated_value=50_000, points_balance=50_000, updated_at=yesterday))
    buyers = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")]
    mobile = f"+86138{random.randrange(10**8):08}"  # noqa: S311 - a phone number, no secret
    await client.put_customer(shop.merchant_id, "c-1", mobile=mobile, email="buyer@example.com", buyers=buyers)
    return shop


async def run_at_once(calls: Iterable[Any]) -> list[Any]:
    """Run calls at once, and return all results and errors."""
    async with asyncio.timeout(SECONDS_MAX):
        return await asyncio.gather(*calls, return_exceptions=True)


def reasons_of(answers: list[Any]) -> set[str]:
    """Return the reasons of all violations."""
    return {found.reason for answer in answers for found in answer.violations}


@pytest.mark.parametrize("with_id", [True, False], ids=["with challenge_id", "without challenge_id"])
async def test_five_of_500_concurrent_guesses_are_compared(servers: Servers, shop: Shop, *, with_id: bool) -> None:
    """After them the right code is not compared either."""
    challenge_id, code = await servers.issue(shop)
    evidence: dict[str, Any] = {"challenge_id": challenge_id} if with_id else {}
    before = await servers.count_comparisons()
    answers = await run_at_once(servers.guesses(shop, 500, **evidence))
    after = await servers.count_comparisons()

    assert reasons_of(answers) == {"CODE_INVALID"}
    assert {**before, "WRONG": before["WRONG"] + 5} == after
    assert await servers.read_attempts(challenge_id) == (("LIVE", 5, 0) if with_id else ("LIVE", 0, 5))
    assert reasons_of(await run_at_once(servers.guesses(shop, 2, code, **evidence))) == {"CODE_INVALID"}
    assert await servers.count_comparisons() == after


async def test_one_of_200_concurrent_redemptions_uses_the_code(servers: Servers, shop: Shop) -> None:
    challenge_id, code = await servers.issue(shop)
    evidence = {"validation_code": code, "challenge_id": challenge_id}
    answers = await run_at_once(
        servers.clients[number % 2].redemption.RedeemPoints(redeem_request(shop, 100, **evidence))
        for number in range(200)
    )

    errors = [refusal(answer) for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert len(errors) == 199
    assert {error.reason for error in errors} == {"CODE_INVALID"}
    assert await servers.read_attempts(challenge_id) == ("USED", 0, 0)
    account = await servers.clients[0].account(shop.merchant_id, shop.store_id, "buyer")
    assert (account.active_points, account.held_points) == (49_900, 100)


async def test_one_of_100_concurrent_requests_sends_a_message(servers: Servers, shop: Shop) -> None:
    count = len(servers.gateway.requests)
    answers = await run_at_once(issue_code(servers.clients[number % 2], shop) for number in range(100))

    assert sum(answer.sent for answer in answers) == 1
    assert len({answer.challenge_id for answer in answers}) == 1
    assert len(servers.gateway.requests) == count + 1


async def test_three_concurrent_messages_go_to_one_destination(servers: Servers, shop: Shop) -> None:
    count = len(servers.gateway.requests)
    answers = await run_at_once(issue_code(servers.clients[points % 2], shop, points) for points in range(1, 41))
    errors = [refusal(answer) for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]

    assert len(servers.gateway.requests) == count + 3
    assert len(errors) == 37
    assert {(error.reason, error.metadata["limit"]) for error in errors} == {("SEND_LIMIT_REACHED", "destination")}


async def test_messages_of_a_merchant_are_limited_to_a_thousand(servers: Servers, shop: Shop) -> None:
    """This test starts with 995."""
    names = [f"buyer-{number}" for number in range(20)]
    updates = [shop.update(name, updated_value=100, points_balance=100) for name in names]
    await run_at_once(map(servers.clients[0].apply, updates))
    for number, name in enumerate(names):
        buyers = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id=name)]
        await servers.clients[0].put_customer(shop.merchant_id, name, mobile=f"+861391234{number:04}", buyers=buyers)
    now_ms = int(time.time() * 1_000)
    await servers.fetch(
        "INSERT INTO validation_tallies (subject, merchant_id, counts, revision, updated_at_ms)"
        " VALUES ('sends', $1, $2, 1, $3)",
        shop.merchant_id,
        json.dumps([(now_ms, 995)]),
        now_ms,
    )
    answers = await run_at_once(
        issue_code(servers.clients[number % 2], shop, customer=customer_ref(shop, name))
        for number, name in enumerate(names)
    )
    errors = [refusal(answer) for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]

    assert len(errors) == 15
    assert {(error.reason, error.metadata["limit"]) for error in errors} == {("SEND_LIMIT_REACHED", "merchant")}


async def test_ten_wrong_guesses_an_hour_are_compared(servers: Servers, shop: Shop) -> None:
    """Guesses without a challenge_id are counted apart."""
    at_start = await servers.count_comparisons()
    for points, more in ((100, 5), (200, 5), (300, 0)):
        challenge_id, code = await servers.issue(shop, points)
        before = await servers.count_comparisons()
        answers = await run_at_once(servers.guesses(shop, 40, points=points, challenge_id=challenge_id))
        assert reasons_of(answers) == {"CODE_INVALID"}
        assert (await servers.count_comparisons())["WRONG"] == before["WRONG"] + more
    # Guesses with the challenge_id are used up, guesses without it are not.
    assert reasons_of(await run_at_once(servers.guesses(shop, 2, code, 300, challenge_id=challenge_id))) == {
        "CODE_INVALID"
    }
    assert not reasons_of(await run_at_once(servers.guesses(shop, 2, code, 300)))
    await run_at_once(servers.guesses(shop, 40, points=300))
    assert (await servers.count_comparisons())["WRONG"] == at_start["WRONG"] + 15


async def test_guesses_of_cancelled_calls_are_counted(servers: Servers, shop: Shop) -> None:
    challenge_id, code = await servers.issue(shop)
    request = validate_request(shop, 100, validation_code=WRONG_CODE, challenge_id=challenge_id)
    before = await servers.count_comparisons()
    random_moments = random.Random(7)  # noqa: S311 - moments, no secrets

    async def leave(number: int) -> None:
        redemption = servers.clients[number % 2].redemption
        if number % 3:
            await redemption.ValidateRedemption(request, timeout=random_moments.uniform(0.001, 0.05))
        else:
            call = redemption.ValidateRedemption(request)
            await asyncio.sleep(random_moments.uniform(0, 0.05))
            call.cancel()

    for _ in range(5):
        await run_at_once(map(leave, range(40)))

        async def are_all_counted() -> bool:
            _, read_attempts, _ = await servers.read_attempts(challenge_id)
            return (
                read_attempts <= 5 and (await servers.count_comparisons())["WRONG"] == before["WRONG"] + read_attempts
            )

        await until(are_all_counted)
    await run_at_once(servers.guesses(shop, 5, challenge_id=challenge_id))
    assert await servers.read_attempts(challenge_id) == ("LIVE", 5, 0)
    assert reasons_of(await run_at_once(servers.guesses(shop, 2, code, challenge_id=challenge_id))) == {"CODE_INVALID"}


async def test_count_of_a_killed_server_holds(servers: Servers, shop: Shop) -> None:
    """The server is killed as soon as the count is visible."""
    challenge_id, code = await servers.issue(shop)
    request = validate_request(shop, 100, validation_code=WRONG_CODE, challenge_id=challenge_id)
    async with contextlib.AsyncExitStack() as stack:
        process, client = await servers.start(stack)
        guessing = asyncio.ensure_future(client.redemption.ValidateRedemption(request))
        async with asyncio.timeout(SECONDS_MAX):
            while await servers.read_attempts(challenge_id) == ("LIVE", 0, 0):
                pass
        await process.kill()
        await asyncio.wait([guessing])
    assert (await issue_code(servers.clients[0], shop)).challenge_id == challenge_id

    assert await servers.read_attempts(challenge_id) == ("LIVE", 1, 0)
    before = await servers.count_comparisons()
    await run_at_once(servers.guesses(shop, 50, challenge_id=challenge_id))
    assert (await servers.count_comparisons())["WRONG"] == before["WRONG"] + 4
    assert reasons_of(await run_at_once(servers.guesses(shop, 2, code, challenge_id=challenge_id))) == {"CODE_INVALID"}


async def test_codes_are_sent_by_gateway_and_smtp_server(servers: Servers, shop: Shop) -> None:
    count = len(servers.mail.emails)
    _, code = await servers.issue(shop)
    assert not reasons_of(await run_at_once(servers.guesses(shop, 2, code)))
    answer = await issue_code(servers.clients[1], shop, 100, validation_type=EMAIL)
    ((envelope, email),) = servers.mail.emails[count:]
    code = email.get_content().strip()

    assert (answer.sent, answer.destination) == (True, "b***@example.com")
    assert envelope.rcpt_tos == ["buyer@example.com"]
    assert not reasons_of(await run_at_once(servers.guesses(shop, 2, code)))
    assert not reasons_of(await run_at_once(servers.guesses(shop, 2, code, challenge_id=answer.challenge_id)))


@pytest.mark.parametrize("channel", [redemption_pb2.VALIDATION_TYPE_SMS, EMAIL], ids=["gateway", "SMTP"])
async def test_hanging_provider_delays_only_its_own_caller(
    servers: Servers, shop: Shop, monkeypatch: pytest.MonkeyPatch, channel: redemption_pb2.ValidationType
) -> None:
    """The caller gets DELIVERY_FAILED after 5 s; no transaction is open meanwhile."""
    monkeypatch.setattr(servers.gateway, "behavior", "hang")
    monkeypatch.setattr(servers.mail, "at_data", "hang")
    client, sent = servers.clients[0], len(servers.gateway.requests) + len(servers.mail.emails)
    started = time.monotonic()
    hanging = asyncio.ensure_future(issue_code(client, shop, 100, validation_type=channel))
    await until(lambda: len(servers.gateway.requests) + len(servers.mail.emails) > sent)
    seconds = []
    while time.monotonic() < started + 4.0:
        asked_at = time.monotonic()
        assert (await client.redemption.ValidateRedemption(validate_request(shop, 100))).redeemable
        seconds.append(time.monotonic() - asked_at)
    ((open_transactions,),) = await servers.fetch(OPEN_TRANSACTIONS)

    assert not hanging.done()
    assert open_transactions == 0
    assert sorted(seconds)[len(seconds) * 99 // 100] < 0.25
    (answer,) = await run_at_once([hanging])
    assert refusal(answer).reason == "DELIVERY_FAILED"
    assert 4.5 < time.monotonic() - started < 7.0
