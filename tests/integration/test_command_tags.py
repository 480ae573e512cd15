"""Two servers write at once, and the database counts the rows as Citus does.

For INSERT ... SELECT ... ON CONFLICT, Citus reports the rows selected instead of those written.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from pointbook_server.programs.model import Channel
from pointbook_server.redemption.redeem_batch import RedeemBatch
from pointbook_server.validation_codes import transactions as codes
from support.clients import Client
from support.codes import add_customers, issue_code
from support.command_tags import tags_count_selected_rows
from support.connections import superuser
from support.redemption import account_points, customer_ref, redeem, redeem_request
from support.refusals import refusal
from support.servers import Service, running_server
from support.shops import Shop

NAMES = ("ada", "bob")


@pytest.fixture(scope="module")
async def clients(service: Service, admin_token: str) -> AsyncIterator[tuple[Client, Client]]:
    """Clients of two servers on one database, with the command tags of Citus."""
    senders = {Channel.SMS: service.outbox}
    with tags_count_selected_rows():
        async with running_server(service.database_url, admin_token, senders=senders, clock=service.clock) as second:
            yield service.client, second[1]


@pytest.fixture
async def shop(service: Service, shop: Shop) -> Shop:
    """A shop with two customers, each with 500 points and a mobile number."""
    await add_customers(service.client, shop, NAMES)
    return shop


def meeting(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose first two calls wait for each other before they run."""
    both, arrived = asyncio.Barrier(2), list[int]()

    async def meet(*arguments: Any) -> Any:
        arrived.append(1)
        if len(arrived) <= 2:
            await both.wait()
        return await function(*arguments)

    return meet


async def run_at_once(*calls: Any) -> list[Any]:
    """Run calls at once, and return their results and errors."""
    async with asyncio.timeout(30):
        return await asyncio.gather(*calls, return_exceptions=True)


async def test_two_servers_send_one_code(
    service: Service, clients: tuple[Client, Client], shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codes, "_write", meeting(codes._write))
    count = len(service.outbox.messages)
    answers = await run_at_once(*(issue_code(client, shop, customer=customer_ref(shop, "ada")) for client in clients))

    assert len({answer.challenge_id for answer in answers}) == 1
    assert sorted(answer.sent for answer in answers) == [False, True]
    assert len(service.outbox.messages) == count + 1


async def test_two_servers_send_three_messages_to_one_destination(
    service: Service, clients: tuple[Client, Client], shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codes, "_write", meeting(codes._write))
    count, ada = len(service.outbox.messages), customer_ref(shop, "ada")
    answers = await run_at_once(
        *(issue_code(clients[points % 2], shop, points, customer=ada) for points in range(1, 7))
    )
    errors = [refusal(answer) for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]

    assert {(error.reason, error.metadata["limit"]) for error in errors} == {("SEND_LIMIT_REACHED", "destination")}
    assert len(errors) == 3
    assert len(service.outbox.messages) == count + 3


async def test_messages_of_two_servers_are_both_counted(
    service: Service, clients: tuple[Client, Client], shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They go to two customers, so that only the merchant's counter is shared."""
    monkeypatch.setattr(codes, "_write", meeting(codes._write))
    await run_at_once(
        *(
            issue_code(client, shop, customer=customer_ref(shop, name))
            for client, name in zip(clients, NAMES, strict=True)
        )
    )
    async with superuser(service) as connection:
        query = "SELECT sum((c->>1)::int) FROM validation_tallies, jsonb_array_elements(counts) AS c"
        sent = await connection.fetchval(f"{query} WHERE merchant_id = $1 AND subject = 'sends'", shop.merchant_id)

    assert sent == 2


async def test_two_servers_redeem_once_under_one_reference(
    clients: tuple[Client, Client], shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two customers, so that neither waits for the other's account."""
    monkeypatch.setattr(RedeemBatch, "write", meeting(RedeemBatch.write))
    await clients[0].put_program(shop.merchant_id, shop.store_id, criteria={})
    requests = [
        redeem_request(shop, external_reference_number="order", customer=customer_ref(shop, name)) for name in NAMES
    ]
    answers = await run_at_once(*(redeem(client, request) for client, request in zip(clients, requests, strict=True)))
    errors = [refusal(answer) for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]

    assert [error.reason for error in errors] == ["REFERENCE_REUSED"]
    held = [(await account_points(clients[0], shop, name))[2] for name in NAMES]
    assert sorted(held) == [0, 10]
