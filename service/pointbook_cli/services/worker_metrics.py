"""The metrics of a service's workers at one address.

Each worker serves its metrics on a loopback socket that it inherits. The process that starts the workers reads them at
each scrape and adds the worker's number as a label, so a worker's series continue with its replacement.
"""

import asyncio
import contextlib
import re
import socket
from collections.abc import Iterable, Iterator

from prometheus_client import generate_latest

from pointbook_common.metric_registry import MetricRegistry
from pointbook_common.metrics_endpoint import PATH, MetricsEndpoint, listen

READ_SECONDS_MAX = 2.0
"""How long a worker may take to serve its metrics; Prometheus gives a scrape 10 s by default."""
REQUEST = b"GET " + PATH + b" HTTP/1.1\r\nHost: localhost\r\n\r\n"
WORKER = "worker"
FAMILY = re.compile(r"^(?=# HELP )", re.MULTILINE)
LABELLED_SAMPLE = re.compile(r"^(\w+)\{", re.MULTILINE)
PLAIN_SAMPLE = re.compile(r"^(\w+) ", re.MULTILINE)


class WorkerMetrics:
    """The sockets of the workers' metrics, and the metrics about the workers."""

    def __init__(self, count: int) -> None:
        self._registry = MetricRegistry()
        self._serving = self._registry.gauge("worker_serving", "1 while a worker serves, otherwise 0.", WORKER)
        self._ends = self._registry.counter(
            "worker_ends", "How often a worker has ended without being asked to, and was replaced.", WORKER
        )
        self.definitions = self._registry.definitions
        self.listeners: list[socket.socket] = []
        self._serving_numbers: set[int] = set()
        for number in range(count):
            self._serving.labels(number)
            self._ends.labels(number)

    def inherited_by(self, number: int) -> tuple[int, ...]:
        """Return the file descriptors that a worker inherits."""
        return (self.listeners[number].fileno(),) if self.listeners else ()

    def arguments_of(self, number: int) -> tuple[str, ...]:
        """Return the arguments that tell a worker its socket."""
        return tuple(f"--metrics-listener={descriptor}" for descriptor in self.inherited_by(number))

    def worker_serves(self, number: int) -> None:
        """Note that a worker serves."""
        self._serving.labels(number).set(1)
        self._serving_numbers.add(number)

    def worker_ended(self, number: int, *, was_stopped: bool) -> None:
        """Note that a worker has ended."""
        self._serving.labels(number).set(0)
        self._serving_numbers.discard(number)
        if not was_stopped:
            self._ends.labels(number).inc()

    async def expose(self) -> bytes:
        """Return the metrics of the serving workers as text."""
        numbers = sorted(self._serving_numbers)
        texts = await asyncio.gather(*(_read(self.listeners[number]) for number in numbers))
        text = merge(zip(numbers, texts, strict=True))
        return generate_latest(self._registry.registry) + text.encode()


@contextlib.contextmanager
def serve_worker_metrics(name: str, address: str, count: int) -> Iterator[WorkerMetrics]:
    """Serve the metrics of workers on a HOST:PORT during the block.

    With an empty address, they are not served. Raises OSError with the setting's name.
    """
    metrics = WorkerMetrics(count)
    if not address:
        yield metrics
        return
    with contextlib.ExitStack() as stack:
        endpoint = MetricsEndpoint(metrics.expose, stack.enter_context(listen(name, address)))
        stack.callback(endpoint.close)
        metrics.listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        yield metrics


def merge(texts: Iterable[tuple[int, str]]) -> str:
    """Return the texts of workers, which come with their numbers, as one.

    It has each family once, and each sample the number of its worker as a label. The texts are those of
    `generate_latest`: parsing their samples would take ten times as long.
    """
    families: dict[str, list[str]] = {}
    for number, text in texts:
        label = f'{WORKER}="{number}"'
        labelled = PLAIN_SAMPLE.sub(rf"\1{{{label}}} ", LABELLED_SAMPLE.sub(rf"\1{{{label},", text))
        for family in FAMILY.split(labelled)[1:]:
            documentation, kind, samples = family.split("\n", 2)
            families.setdefault(f"{documentation}\n{kind}\n", []).append(samples)
    return "".join(head + "".join(samples) for head, samples in families.items())


async def _read(listener: socket.socket) -> str:
    """Return the text that a worker serves.

    It is empty if the worker does not respond, or ends within its response.
    """
    try:
        async with asyncio.timeout(READ_SECONDS_MAX):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            try:
                writer.write(REQUEST)
                response = await reader.read(-1)
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return ""
    head, _, body = response.partition(b"\r\n\r\n")
    first, *fields = head.split(b"\r\n")
    is_complete = b"Content-Length: %d" % len(body) in fields
    return body.decode() if b" 200 " in first and is_complete else ""
