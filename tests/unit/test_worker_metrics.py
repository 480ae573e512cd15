"""The metrics of several workers at one address."""

import asyncio
import socket
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pointbook_cli.services import worker_metrics
from pointbook_cli.services.worker_metrics import WorkerMetrics, merge, serve_worker_metrics
from pointbook_client.testing.ports import free_port
from pointbook_common.metrics_endpoint import MetricsEndpoint, exposition_of
from support.http_clients import http_client

METHOD = 'with "quotes" {and} braces\n# HELP \x85me\na{b} \\n'
"""A label that contains what the text consists of."""


def registry_of(calls: int) -> CollectorRegistry:
    """Return the metrics of a worker with this number of calls."""
    registry = CollectorRegistry()
    Counter("calls", "Calls.", ["method"], registry=registry).labels(METHOD).inc(calls)
    Gauge("plain", "Plain.", registry=registry).set(calls)
    Histogram("seconds", "Seconds.", registry=registry, buckets=(1, 2)).observe(calls)
    return registry


def samples(text: str, name: str) -> dict[str, float]:
    """Return the values of a sample by worker."""
    return {
        sample.labels["worker"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


@pytest.fixture
def served() -> Iterator[tuple[WorkerMetrics, str]]:
    """The metrics of two workers, and their URL."""
    address = f"127.0.0.1:{free_port()}"
    with serve_worker_metrics("ADDRESS", address, 2) as metrics:
        yield metrics, f"http://{address}/metrics"


async def read(url: str) -> str:
    """Read the metrics."""
    async with http_client() as http:
        return (await http.get(url)).raise_for_status().text


def test_each_sample_gets_its_worker_as_a_label() -> None:
    text = merge((number, generate_latest(registry_of(number + 1)).decode()) for number in (0, 1))
    names = [family.name for family in text_string_to_metric_families(text)]
    families = {family.name: family for family in text_string_to_metric_families(text)}

    assert names == ["calls", "plain", "seconds"]
    (first, second) = families["calls"].samples
    assert first.labels == {"method": METHOD, "worker": "0"}
    assert (first.value, second.labels["worker"], second.value) == (1, "1", 2)
    assert [(sample.labels, sample.value) for sample in families["plain"].samples] == [
        ({"worker": "0"}, 1),
        ({"worker": "1"}, 2),
    ]
    assert len(families["seconds"].samples) == 2 * 5


async def test_one_address_serves_all_workers(served: tuple[WorkerMetrics, str]) -> None:
    metrics, url = served
    endpoints = [
        MetricsEndpoint(exposition_of(registry_of(number + 1)), socket.socket(fileno=socket.dup(descriptor)))
        for number in range(2)
        for descriptor in metrics.inherited_by(number)
    ]
    metrics.worker_serves(0)
    metrics.worker_serves(1)
    text = await read(url)
    for endpoint in endpoints:
        endpoint.close()

    assert samples(text, "calls_total") == {"0": 1, "1": 2}
    assert samples(text, "pointbook_worker_serving") == {"0": 1, "1": 1}
    assert text.count("# TYPE calls_total counter") == 1


async def test_a_worker_that_does_not_respond_hides_no_other(
    served: tuple[WorkerMetrics, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_metrics, "READ_SECONDS_MAX", 0.3)
    metrics, url = served
    (descriptor,) = metrics.inherited_by(1)
    endpoint = MetricsEndpoint(exposition_of(registry_of(7)), socket.socket(fileno=socket.dup(descriptor)))
    metrics.worker_serves(0)
    metrics.worker_serves(1)
    texts = await asyncio.gather(*(read(url) for _ in range(5)))
    endpoint.close()

    for text in texts:
        assert samples(text, "calls_total") == {"1": 7}
        assert samples(text, "pointbook_worker_serving") == {"0": 1, "1": 1}


async def test_a_scrape_does_not_wait_for_a_worker_that_is_being_replaced(served: tuple[WorkerMetrics, str]) -> None:
    metrics, url = served
    metrics.worker_serves(0)
    metrics.worker_ended(0, was_stopped=False)

    async with asyncio.timeout(worker_metrics.READ_SECONDS_MAX / 2):
        text = await read(url)

    assert samples(text, "pointbook_worker_serving") == {"0": 0, "1": 0}
    assert samples(text, "pointbook_worker_ends_total") == {"0": 1, "1": 0}


async def test_a_worker_that_ends_within_its_response_is_left_out(served: tuple[WorkerMetrics, str]) -> None:
    """Its last line may be half of a number, or half of a label."""
    metrics, url = served
    (descriptor,) = metrics.inherited_by(0)
    (other,) = metrics.inherited_by(1)
    metrics.worker_serves(0)
    metrics.worker_serves(1)
    endpoint = MetricsEndpoint(exposition_of(registry_of(7)), socket.socket(fileno=socket.dup(other)))

    async def end_early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 400\r\n\r\n")
        writer.write(b"# HELP calls_total C\n# TYPE calls_total counter\ncalls_total 12")
        writer.close()

    async with await asyncio.start_server(end_early, sock=socket.socket(fileno=socket.dup(descriptor))):
        text = await read(url)
    endpoint.close()

    assert samples(text, "calls_total") == {"1": 7}


def test_a_worker_that_was_stopped_has_not_ended_by_itself() -> None:
    metrics = WorkerMetrics(1)
    metrics.worker_ended(0, was_stopped=True)

    value = metrics._registry.registry.get_sample_value("pointbook_worker_ends_total", {"worker": "0"})
    assert value == 0


def test_without_an_address_workers_get_no_socket() -> None:
    with serve_worker_metrics("ADDRESS", "", 2) as metrics:
        assert metrics.inherited_by(1) == ()
        assert metrics.arguments_of(1) == ()


async def test_the_address_is_free_again_afterwards(served: tuple[WorkerMetrics, str]) -> None:
    _, url = served
    address = url.removeprefix("http://").removesuffix("/metrics")
    with pytest.raises(OSError, match="ADDRESS: cannot listen"), serve_worker_metrics("ADDRESS", address, 1):
        pass
    assert "pointbook_worker_serving" in await read(url)


async def test_metrics_are_not_served_after_the_block() -> None:
    address = f"127.0.0.1:{free_port()}"
    with serve_worker_metrics("ADDRESS", address, 1):
        pass
    with pytest.raises(httpx.ConnectError):
        await read(f"http://{address}/metrics")
