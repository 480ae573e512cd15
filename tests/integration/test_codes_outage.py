"""The database goes away during guesses: every answered guess was counted."""

import asyncio
import random

import grpc

from pointbook_server.programs.model import Channel
from pointbook_server.server import Server
from support.clients import Client
from support.codes import CODE_SETTINGS, WRONG_CODE, issue_and_read_code
from support.connections import superuser
from support.database_proxy import proxied
from support.redemption import customer_ref, earn, validate_request
from support.refusals import refusal
from support.servers import Service, server_settings
from support.shops import Shop

ROUNDS = 20
GUESSES = 8


async def test_every_answered_guess_was_counted(service: Service, shop: Shop, admin_token: str) -> None:
    """Callers see wrong codes or UNAVAILABLE at any time of the cut."""
    random_moments = random.Random(11)  # noqa: S311 - moments, no secrets
    await service.client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation=CODE_SETTINGS)
    answered = counted = 0
    async with proxied(service.database_url) as proxy:
        server = Server(server_settings(), proxy.url, senders={Channel.SMS: service.outbox}, clock=service.clock)
        await server.start()
        client = Client(server.port, admin_token)
        for number in range(ROUNDS):
            buyer_id = f"buyer-{number}"
            await earn(service.client, shop, 500, buyer_id)
            challenge_id, _ = await issue_and_read_code(service, shop, customer=customer_ref(shop, buyer_id))
            # Wait until the server has connected again.
            await client.redemption.ValidateRedemption(
                validate_request(shop, 100, customer=customer_ref(shop, buyer_id))
            )
            evidence = {"validation_code": WRONG_CODE, "challenge_id": challenge_id}
            request = validate_request(shop, 100, customer=customer_ref(shop, buyer_id), **evidence)
            guesses = [
                asyncio.ensure_future(client.redemption.ValidateRedemption(request, timeout=10)) for _ in range(GUESSES)
            ]
            if number == 0:
                await asyncio.wait(guesses)
            await asyncio.sleep(random_moments.uniform(0, 0.04))
            await proxy.cut()
            answers = await asyncio.gather(*guesses, return_exceptions=True)
            await proxy.restore()
            errors = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
            assert {refusal(error).reason for error in errors} <= {"DATABASE_UNAVAILABLE"}
            async with superuser(service) as connection:
                query = "SELECT attempts FROM validation_challenges WHERE challenge_id = $1"
                attempts = await connection.fetchval(query, challenge_id)
            wrong_count = len(answers) - len(errors)
            assert attempts >= min(wrong_count, 5)
            answered, counted = answered + wrong_count, counted + attempts
        await client.close()
        await server.stop()

    assert 0 < answered < ROUNDS * GUESSES
    assert counted > 0
