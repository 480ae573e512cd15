"""What Prometheus reads from the server: how codes, guesses and calls ended, and nobody's name."""

import socket
from collections.abc import AsyncIterator

import httpx
import pytest

from harness import Client, Service, Shop, server_settings
from integration.codes import CODES, WRONG, is_right, issue
from integration.redeeming import earn
from pointbook_server.metrics import Metrics, MetricsEndpoint
from pointbook_server.programs.model import Channel
from pointbook_server.server import Server


@pytest.fixture
async def counting(service: Service, admin_token: str) -> AsyncIterator[tuple[Client, str]]:
    """A server that tells what it counts, and where."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    settings = server_settings(metrics_address=address)
    server = Server(settings, service.database_url, senders={Channel.SMS: service.outbox}, clock=service.clock)
    await server.start()
    client = Client(server.port, admin_token)
    yield client, f"http://{address}/metrics"
    await client.close()
    await server.stop()
    with pytest.raises(httpx.ConnectError):
        await read(f"http://{address}/metrics")


async def read(url: str) -> str:
    """Read the metrics."""
    async with httpx.AsyncClient(trust_env=False) as http:
        answer = await http.get(url)
    assert answer.status_code == 200
    return answer.text


async def test_codes_are_counted_by_outcome(service: Service, counting: tuple[Client, str], shop: Shop) -> None:
    """Of what was issued, guessed and compared; a guess that is locked out is compared no more."""
    client, url = counting
    await client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation=CODES)
    await earn(client, shop, 500)
    issued = await issue(client, shop)
    await issue(client, shop)
    named = {"challenge_id": issued.challenge_id}
    assert await is_right(client, shop, service.outbox.messages[-1].text, **named)
    for _ in range(7):
        assert not await is_right(client, shop, WRONG, **named)
    told = await read(url)

    for line in (
        'pointbook_code_issues_total{channel="SMS",outcome="SENT"} 1.0',
        'pointbook_code_issues_total{channel="SMS",outcome="HELD"} 1.0',
        'pointbook_code_guesses_total{outcome="RIGHT"} 1.0',
        'pointbook_code_guesses_total{outcome="WRONG"} 5.0',
        'pointbook_code_guesses_total{outcome="LOCKED"} 2.0',
        'pointbook_code_comparisons_total{outcome="RIGHT"} 1.0',
        'pointbook_code_comparisons_total{outcome="WRONG"} 5.0',
    ):
        assert line in told
    for name in (shop.merchant_id, shop.store_id, "buyer", issued.challenge_id):
        assert name not in told


def test_an_address_that_is_taken() -> None:
    """Stops the start, and names the setting."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        with pytest.raises(OSError, match="POINTBOOK_METRICS_ADDRESS: cannot listen"):
            MetricsEndpoint(Metrics(), f"127.0.0.1:{holder.getsockname()[1]}")
