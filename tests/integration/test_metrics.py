"""The metrics endpoint: counters of codes, and robustness against clients."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from prometheus_client import generate_latest

from pointbook_common import metrics_endpoint
from pointbook_common.metric_registry import MetricRegistry
from pointbook_common.metrics_endpoint import MetricsEndpoint, exposition_of, listen
from pointbook_server.metrics import Metrics
from pointbook_server.programs.model import Channel
from pointbook_server.server import Server
from support.clients import Client
from support.codes import CODE_SETTINGS, WRONG_CODE, guess_code, issue_code
from support.http_clients import http_client
from support.redemption import earn
from support.servers import Service, server_settings
from support.shops import Shop
from support.waiting import until


@pytest.fixture
async def counting(service: Service, admin_token: str) -> AsyncIterator[tuple[Client, str]]:
    """A client of a server with metrics, and their URL."""
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
    async with http_client() as http:
        response = await http.get(url)
    assert response.status_code == 200
    return response.text


async def test_codes_are_counted_by_outcome(service: Service, counting: tuple[Client, str], shop: Shop) -> None:
    """A guess on a locked challenge is counted but not compared."""
    client, url = counting
    await client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation=CODE_SETTINGS)
    await earn(client, shop, 500)
    issued = await issue_code(client, shop)
    await issue_code(client, shop)
    challenge = {"challenge_id": issued.challenge_id}
    assert await guess_code(client, shop, service.outbox.messages[-1].text, **challenge)
    for _ in range(7):
        assert not await guess_code(client, shop, WRONG_CODE, **challenge)
    metrics_text = await read(url)

    for line in (
        'pointbook_code_issues_total{channel="SMS",outcome="SENT"} 1.0',
        'pointbook_code_issues_total{channel="SMS",outcome="HELD"} 1.0',
        'pointbook_code_guesses_total{outcome="RIGHT"} 1.0',
        'pointbook_code_guesses_total{outcome="WRONG"} 5.0',
        'pointbook_code_guesses_total{outcome="LOCKED"} 2.0',
        'pointbook_code_comparisons_total{outcome="RIGHT"} 1.0',
        'pointbook_code_comparisons_total{outcome="WRONG"} 5.0',
    ):
        assert line in metrics_text
    for name in ('"buyer"', issued.challenge_id):
        assert name not in metrics_text


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[MetricsEndpoint]:
    """An endpoint that closes slow clients after half a second."""
    monkeypatch.setattr(metrics_endpoint, "CONNECTION_SECONDS_MAX", 0.5)
    with listen("ADDRESS", "127.0.0.1:0") as listener:
        endpoint = MetricsEndpoint(exposition_of(Metrics().registry), listener)
        yield endpoint
        endpoint.close()


def connect(endpoint: MetricsEndpoint, sent: bytes = b"") -> socket.socket:
    """Open a connection of a client that sends some bytes and does not read."""
    client = socket.create_connection(("127.0.0.1", endpoint.port), timeout=5.0)
    client.sendall(sent)
    return client


def raw(endpoint: MetricsEndpoint, request: bytes) -> bytes:
    """Send a request, and return all bytes until the connection is closed."""
    with connect(endpoint, request) as client:
        return rest_of(client)


def rest_of(client: socket.socket) -> bytes:
    """Return all bytes until the connection is closed."""
    return b"".join(iter(lambda: client.recv(65_536), b""))


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET /metrics HTTP/1.1", 200),
        ("GET /metrics?name[]=x HTTP/1.0", 200),
        ("HEAD /metrics HTTP/1.1", 200),
        ("POST /metrics HTTP/1.1", 405),
        ("GET / HTTP/1.1", 404),
        ("GET /metrics/ HTTP/1.1", 404),
        ("GET /../metrics HTTP/1.1", 404),
        ("GET /metrics", 400),
        ("GET /metrics HTTP/2.0", 400),
        ("PRI * HTTP/2.0", 400),
        ("\x16\x03\x01", 400),
    ],
)
def test_only_the_metrics_path_is_served(endpoint: MetricsEndpoint, request_line: str, status: int) -> None:
    head, _, body = raw(endpoint, request_line.encode() + b"\r\nHost: x\r\n\r\n").partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert (b"pointbook_refusals" in body) is (status == 200 and request_line.startswith("GET"))


def test_head_over_8_kib_is_cut_off(endpoint: MetricsEndpoint) -> None:
    with connect(endpoint) as client, pytest.raises((ConnectionResetError, BrokenPipeError)):
        client.sendall(b"x" * 13_000_000)


def test_idle_clients_use_no_threads_and_lock_out_no_client(
    endpoint: MetricsEndpoint, capfd: pytest.CaptureFixture[str]
) -> None:
    """Beyond the limit the oldest connections are closed, and others time out."""
    threads = threading.active_count()
    clients = [connect(endpoint, b"GET /met" if number % 2 else b"") for number in range(200)]
    assert raw(endpoint, b"GET /metrics HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    assert threading.active_count() == threads
    for client in clients:
        with client, contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
    assert capfd.readouterr().err == ""


def test_close_ends_open_connections_without_a_log_line(capfd: pytest.CaptureFixture[str]) -> None:
    """Idle clients do not delay the shutdown."""
    endpoint = MetricsEndpoint(exposition_of(Metrics().registry), listen("ADDRESS", "127.0.0.1:0"))
    clients = [connect(endpoint) for _ in range(100)]
    assert raw(endpoint, b"GET /metrics HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    began = time.monotonic()
    endpoint.close()
    assert time.monotonic() - began < 1.0
    for client in clients:
        with client, contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
    assert capfd.readouterr().err == ""


def test_unread_response_times_out(endpoint: MetricsEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_endpoint, "generate_latest", lambda _registry: b"#" * 50_000_000)
    with connect(endpoint, b"GET /metrics HTTP/1.1\r\n\r\n") as client:
        time.sleep(1.0)
        received = sum(map(len, iter(lambda: client.recv(1_000_000), b"")))
    assert received < 50_000_000


def test_a_scrape_never_finds_a_part_of_a_replaced_gauge() -> None:
    """A merchant that vanishes for a moment would resolve its alert."""
    registry = MetricRegistry()
    gauge = registry.gauge_table("drift", "Drift.", "merchant_id")
    counts: set[int] = set()

    def replace() -> None:
        for number in range(300):
            gauge.replace({(f"merchant-{merchant}",): number for merchant in range(200)})

    replace()
    thread = threading.Thread(target=replace)
    thread.start()
    while thread.is_alive() or not counts:
        counts.add(generate_latest(registry.registry).count(b"\npointbook_drift{"))

    assert counts == {200}


async def test_concurrent_scrapes_share_their_text() -> None:
    """Each gets one that was begun after its request, so two texts are enough."""
    begun, may_end = 0, threading.Event()

    async def expose() -> bytes:
        nonlocal begun
        begun += 1
        number = begun
        await asyncio.to_thread(may_end.wait)
        return b"%d" % number

    def scrape(endpoint: MetricsEndpoint) -> bytes:
        return raw(endpoint, b"GET /metrics HTTP/1.1\r\n\r\n").rpartition(b"\r\n")[2]

    with listen("ADDRESS", "127.0.0.1:0") as listener:
        endpoint = MetricsEndpoint(expose, listener)
        first = asyncio.create_task(asyncio.to_thread(scrape, endpoint))
        await until(lambda: begun == 1)
        clients = [connect(endpoint, b"GET /metrics HTTP/1.1\r\n\r\n") for _ in range(50)]
        await until(lambda: len(endpoint._connections) == 51)
        may_end.set()
        assert await first == b"1"
        for client in clients:
            with client:
                assert (await asyncio.to_thread(rest_of, client)).endswith(b"\r\n2")
        endpoint.close()
    assert begun == 2


async def test_blocked_event_loop_does_not_block_the_endpoint(endpoint: MetricsEndpoint) -> None:
    """The synchronous request blocks this test's loop."""
    response = httpx.get(f"http://127.0.0.1:{endpoint.port}/metrics", trust_env=False)  # noqa: ASYNC210 - on purpose

    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_address_in_use_prevents_the_start() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        with pytest.raises(OSError, match="POINTBOOK_METRICS_ADDRESS: cannot listen"):
            listen("POINTBOOK_METRICS_ADDRESS", f"127.0.0.1:{holder.getsockname()[1]}")
