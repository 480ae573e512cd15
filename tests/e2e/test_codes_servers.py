"""One-time codes by two server processes on one database, which send by a real SMTP server and a real gateway.

Whoever guesses or asks at both at once gets no further than at one, and what a process has counted outlives it.
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
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from support.codes import CODES, WRONG, issue
from support.harness import CODE_KEY, Client, Shop, at, make_token, refusal, unique
from support.http_clients import http_client
from support.processes import Running, free_port, grpc_health, running
from support.provider_servers import HttpServer, MailServer, http_server, mail_server
from support.redemption import customer_ref, redeem_request, validate_request
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
    """Two server processes, a client and the metrics' address of each, and where their messages arrive."""

    database_url: str
    gateway: HttpServer
    mail: MailServer
    token: str
    folder: Path
    processes: list[Running] = field(default_factory=list)
    clients: list[Client] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)

    async def start(self, stack: contextlib.AsyncExitStack) -> tuple[Running, Client]:
        """Start one more process, and a client of it."""
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

    async def compared(self) -> dict[str, int]:
        """How many codes the two have compared, as their metrics tell, by the result."""
        sums = {"RIGHT": 0, "WRONG": 0}
        async with http_client() as http:
            for metrics in self.metrics[:2]:
                for outcome, count in COMPARED.findall((await http.get(f"http://{metrics}/metrics")).text):
                    sums[outcome] += int(count)
        return sums

    async def fetch(self, query: str, *values: object) -> list[Any]:
        """Ask the database."""
        connection = await asyncpg.connect(self.database_url)
        try:
            return [tuple(row) for row in await connection.fetch(query, *values)]
        finally:
            await connection.close()

    async def attempts(self, challenge_id: str) -> tuple[str, int, int]:
        """The state of a challenge, and how many attempts that name it, and do not, are used up."""
        query = "SELECT state, attempts, unnamed_attempts FROM validation_challenges WHERE challenge_id = $1"
        ((state, named, unnamed),) = await self.fetch(query, challenge_id)
        return state, named, unnamed

    async def issued(self, shop: Shop, points: int = 100, **changes: Any) -> tuple[str, str]:
        """Have a code issued; answers its challenge, and the code as the gateway got it."""
        count = len(self.gateway.requests)
        answer = await issue(self.clients[0], shop, points, **changes)
        (request,) = self.gateway.requests[count:]
        return answer.challenge_id, request.json["text"]

    def guesses(self, shop: Shop, count: int, code: str = WRONG, points: int = 100, **changes: Any) -> Iterable[Any]:
        """Guess a code so often, at both servers in turn."""
        request = validate_request(shop, points, validation_code=code, **changes)
        return (self.clients[number % 2].redemption.ValidateRedemption(request) for number in range(count))


@pytest.fixture(scope="module")
async def servers(database_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Servers]:
    """Two servers that serve."""
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
    """A shop whose program sends codes, with a customer who has 50,000 points, a number and an address."""
    client, shop = servers.clients[0], Shop(unique("merchant"), unique("store"))
    await client.put_store(shop.merchant_id, shop.store_id)
    await client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation=CODES)
    yesterday = at(int(time.time() * 1_000) - 86_400_000)
    await client.apply(shop.update(updated_value=50_000, points_balance=50_000, updated_at=yesterday))
    buyers = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")]
    mobile = f"+86138{random.randrange(10**8):08}"  # noqa: S311 - any number will do
    await client.put_customer(shop.merchant_id, "c-1", mobile=mobile, email="buyer@example.com", buyers=buyers)
    return shop


async def at_once(calls: Iterable[Any]) -> list[Any]:
    """Make calls at once, and wait for all their answers and errors."""
    async with asyncio.timeout(SECONDS_MAX):
        return await asyncio.gather(*calls, return_exceptions=True)


def reasons(answers: list[Any]) -> set[str]:
    """Why questions were answered with no; nothing else than answers is expected."""
    return {found.reason for answer in answers for found in answer.violations}


@pytest.mark.parametrize("names", [True, False], ids=["naming the challenge", "naming none"])
async def test_of_500_wrong_guesses_five_are_compared(servers: Servers, shop: Shop, *, names: bool) -> None:
    """And no other one after them, though it were the right one."""
    challenge_id, code = await servers.issued(shop)
    named: dict[str, Any] = {"challenge_id": challenge_id} if names else {}
    before = await servers.compared()
    answers = await at_once(servers.guesses(shop, 500, **named))
    after = await servers.compared()

    assert reasons(answers) == {"CODE_INVALID"}
    assert {**before, "WRONG": before["WRONG"] + 5} == after
    assert await servers.attempts(challenge_id) == (("LIVE", 5, 0) if names else ("LIVE", 0, 5))
    assert reasons(await at_once(servers.guesses(shop, 2, code, **named))) == {"CODE_INVALID"}
    assert await servers.compared() == after


async def test_of_200_right_ones_one_redeems(servers: Servers, shop: Shop) -> None:
    """The points would be enough for all of them."""
    challenge_id, code = await servers.issued(shop)
    proof = {"validation_code": code, "challenge_id": challenge_id}
    answers = await at_once(
        servers.clients[number % 2].redemption.RedeemPoints(redeem_request(shop, 100, **proof)) for number in range(200)
    )

    errors = [refusal(answer) for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert len(errors) == 199
    assert {error.reason for error in errors} == {"CODE_INVALID"}
    assert await servers.attempts(challenge_id) == ("USED", 0, 0)
    account = await servers.clients[0].account(shop.merchant_id, shop.store_id, "buyer")
    assert (account.active_points, account.held_points) == (49_900, 100)


async def test_of_100_requests_one_sends(servers: Servers, shop: Shop) -> None:
    """At both servers, whichever it is."""
    count = len(servers.gateway.requests)
    answers = await at_once(issue(servers.clients[number % 2], shop) for number in range(100))

    assert sum(answer.sent for answer in answers) == 1
    assert len({answer.challenge_id for answer in answers}) == 1
    assert len(servers.gateway.requests) == count + 1


async def test_three_messages_to_a_destination(servers: Servers, shop: Shop) -> None:
    """However many are asked for at once, each for another amount."""
    count = len(servers.gateway.requests)
    answers = await at_once(issue(servers.clients[points % 2], shop, points) for points in range(1, 41))
    errors = [refusal(answer) for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]

    assert len(servers.gateway.requests) == count + 3
    assert len(errors) == 37
    assert {(error.reason, error.metadata["limit"]) for error in errors} == {("SEND_LIMIT_REACHED", "destination")}


async def test_a_thousand_messages_of_a_merchant(servers: Servers, shop: Shop) -> None:
    """Five of which are left here."""
    names = [f"buyer-{number}" for number in range(20)]
    updates = [shop.update(name, updated_value=100, points_balance=100) for name in names]
    await at_once(map(servers.clients[0].apply, updates))
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
    answers = await at_once(
        issue(servers.clients[number % 2], shop, customer=customer_ref(shop, name)) for number, name in enumerate(names)
    )
    errors = [refusal(answer) for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]

    assert len(errors) == 15
    assert {(error.reason, error.metadata["limit"]) for error in errors} == {("SEND_LIMIT_REACHED", "merchant")}


async def test_ten_wrong_guesses_an_hour(servers: Servers, shop: Shop) -> None:
    """Over all challenges; those that name none are counted apart, and lock nobody else out."""
    began = await servers.compared()
    for points, more in ((100, 5), (200, 5), (300, 0)):
        challenge_id, code = await servers.issued(shop, points)
        before = await servers.compared()
        answers = await at_once(servers.guesses(shop, 40, points=points, challenge_id=challenge_id))
        assert reasons(answers) == {"CODE_INVALID"}
        assert (await servers.compared())["WRONG"] == before["WRONG"] + more
    # Not by its name any more, but without it.
    assert reasons(await at_once(servers.guesses(shop, 2, code, 300, challenge_id=challenge_id))) == {"CODE_INVALID"}
    assert not reasons(await at_once(servers.guesses(shop, 2, code, 300)))
    await at_once(servers.guesses(shop, 40, points=300))
    assert (await servers.compared())["WRONG"] == began["WRONG"] + 15


async def test_whoever_leaves_has_guessed(servers: Servers, shop: Shop) -> None:
    """By a deadline or by themselves, at any moment: what was compared is counted, and five times is the end."""
    challenge_id, code = await servers.issued(shop)
    request = validate_request(shop, 100, validation_code=WRONG, challenge_id=challenge_id)
    before = await servers.compared()
    rng = random.Random(7)  # noqa: S311 - any moment will do

    async def leave(number: int) -> None:
        redemption = servers.clients[number % 2].redemption
        if number % 3:
            await redemption.ValidateRedemption(request, timeout=rng.uniform(0.001, 0.05))
        else:
            call = redemption.ValidateRedemption(request)
            await asyncio.sleep(rng.uniform(0, 0.05))
            call.cancel()

    for _ in range(5):
        await at_once(map(leave, range(40)))

        async def are_all_counted() -> bool:
            _, attempts, _ = await servers.attempts(challenge_id)
            return attempts <= 5 and (await servers.compared())["WRONG"] == before["WRONG"] + attempts

        await until(are_all_counted)
    await at_once(servers.guesses(shop, 5, challenge_id=challenge_id))
    assert await servers.attempts(challenge_id) == ("LIVE", 5, 0)
    assert reasons(await at_once(servers.guesses(shop, 2, code, challenge_id=challenge_id))) == {"CODE_INVALID"}


async def test_a_count_outlives_its_server(servers: Servers, shop: Shop) -> None:
    """It is killed as soon as anybody else can see the count; the challenge is asked for anew meanwhile."""
    challenge_id, code = await servers.issued(shop)
    request = validate_request(shop, 100, validation_code=WRONG, challenge_id=challenge_id)
    async with contextlib.AsyncExitStack() as stack:
        process, client = await servers.start(stack)
        guessing = asyncio.ensure_future(client.redemption.ValidateRedemption(request))
        async with asyncio.timeout(SECONDS_MAX):
            while await servers.attempts(challenge_id) == ("LIVE", 0, 0):
                pass
        await process.kill()
        await asyncio.wait([guessing])
    assert (await issue(servers.clients[0], shop)).challenge_id == challenge_id

    assert await servers.attempts(challenge_id) == ("LIVE", 1, 0)
    before = await servers.compared()
    await at_once(servers.guesses(shop, 50, challenge_id=challenge_id))
    assert (await servers.compared())["WRONG"] == before["WRONG"] + 4
    assert reasons(await at_once(servers.guesses(shop, 2, code, challenge_id=challenge_id))) == {"CODE_INVALID"}


async def test_codes_go_by_real_servers(servers: Servers, shop: Shop) -> None:
    """By SMS through the gateway and by e-mail; where they went is told masked."""
    count = len(servers.mail.emails)
    _, code = await servers.issued(shop)
    assert not reasons(await at_once(servers.guesses(shop, 2, code)))
    answer = await issue(servers.clients[1], shop, 100, validation_type=EMAIL)
    ((envelope, email),) = servers.mail.emails[count:]
    code = email.get_content().strip()

    assert (answer.sent, answer.destination) == (True, "b***@example.com")
    assert envelope.rcpt_tos == ["buyer@example.com"]
    assert not reasons(await at_once(servers.guesses(shop, 2, code)))
    assert not reasons(await at_once(servers.guesses(shop, 2, code, challenge_id=answer.challenge_id)))


@pytest.mark.parametrize("channel", [redemption_pb2.VALIDATION_TYPE_SMS, EMAIL], ids=["gateway", "SMTP"])
async def test_a_provider_that_hangs(
    servers: Servers, shop: Shop, monkeypatch: pytest.MonkeyPatch, channel: redemption_pb2.ValidationType
) -> None:
    """Whoever waits for it waits 5 s and gets 860; it holds no transaction, and keeps nobody else waiting."""
    monkeypatch.setattr(servers.gateway, "manner", "hang")
    monkeypatch.setattr(servers.mail, "at_data", "hang")
    client, sent = servers.clients[0], len(servers.gateway.requests) + len(servers.mail.emails)
    began = time.monotonic()
    hanging = asyncio.ensure_future(issue(client, shop, 100, validation_type=channel))
    await until(lambda: len(servers.gateway.requests) + len(servers.mail.emails) > sent)
    seconds = []
    while time.monotonic() < began + 4.0:
        asked = time.monotonic()
        assert (await client.redemption.ValidateRedemption(validate_request(shop, 100))).redeemable
        seconds.append(time.monotonic() - asked)
    ((open_transactions,),) = await servers.fetch(OPEN_TRANSACTIONS)

    assert not hanging.done()
    assert open_transactions == 0
    assert sorted(seconds)[len(seconds) * 99 // 100] < 0.25
    (answer,) = await at_once([hanging])
    assert refusal(answer).reason == "DELIVERY_FAILED"
    assert 4.5 < time.monotonic() - began < 7.0
