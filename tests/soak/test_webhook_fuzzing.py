"""Random webhooks to a real shim: no 5xx, no exceptions, no leaked secrets."""

import asyncio
import re
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from pointbook_server.settings import ServerSettings
from support.deployments import SECRET, Deployment, error_lines
from support.honest_client import P99_RATIO_MAX, p99_ratio
from support.randomness import printed_random
from support.webhook_fuzzing import EXPECTED_STATUSES, FuzzedRequest, WebhookFuzzer

CONNECTIONS = 32
RESPONSE_SECONDS_MAX = 20.0
DIGEST = re.compile(r"[0-9a-f]{64}|[0-9A-Za-z+/]{43}=")
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
FULL_REQUESTS = 100_000
ROUNDS = 3
ROUND_SECONDS = 2.0


@pytest.mark.parametrize("requests", [500, pytest.param(FULL_REQUESTS, marks=pytest.mark.soak)])
async def test_fuzzed_webhooks_get_only_expected_statuses_and_harm_no_honest_sender(
    deployment: Deployment, figure: Callable[[str, float | str, str], None], requests: int
) -> None:
    is_full = requests == FULL_REQUESTS
    rounds = (ROUNDS, ROUND_SECONDS) if is_full else (1, 0.5)
    # Raise all limits of the quarantine, so that none is reached.
    names = [name.upper() for name in ServerSettings.model_fields if name.startswith("quarantine_")]
    limits = {name: str(10**6) for name in names if name.endswith("WEBHOOKS_MAX")}
    limits |= {name: str(10**12) for name in names if name.endswith("BYTES_MAX")}
    async with deployment.server(**limits) as server, deployment.shim() as shim, deployment.honest_webhooks() as honest:
        client = await deployment.client()
        before = await honest.rounds(*rounds)
        fuzzer = WebhookFuzzer(printed_random(), SECRET, deployment.shop.merchant_id, deployment.shop.store_id)
        senders = FuzzingSenders(deployment.http_address, fuzzer)
        await senders.run(requests)
        after = await honest.rounds(*rounds)
        assert await deployment.is_ready()
        await client.close()
    statuses = " ".join(f"{status} {count}" for status, count in senders.statuses.most_common())
    figure(f"{requests:,} fuzzed webhooks: statuses", statuses, "no 5xx")
    figure(
        f"{requests:,} fuzzed webhooks: ratio of the honest sender's p99 afterwards", p99_ratio(before, after), "<= 2"
    )
    assert senders.unexpected == []
    assert error_lines(shim.err) + error_lines(server.err) == []
    assert sum(each.failed for each in (*before, *after)) == 0
    # The p99 of half a second is meaningless.
    assert not is_full or p99_ratio(before, after) <= P99_RATIO_MAX
    logs = shim.err + shim.out + server.err + server.out
    assert not senders.digests & set(DIGEST.findall(logs))
    for secret in (SECRET, deployment.token.rpartition("_")[2]):
        assert secret not in logs
        assert secret.encode() not in senders.responses


class FuzzingSenders:
    """Connections that send generated requests and check the responses."""

    def __init__(self, address: str, fuzzer: WebhookFuzzer) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._fuzzer = fuzzer
        self.statuses: Counter[int] = Counter()
        self.unexpected: list[str] = []
        self.digests: set[str] = set()
        self.responses = bytearray()
        """All different responses, joined."""
        self._distinct_responses: set[bytes] = set()

    async def run(self, requests: int) -> None:
        """Send a number of requests."""
        remaining = iter(range(requests))
        await asyncio.gather(*(self._send_all(remaining) for _ in range(CONNECTIONS)))

    async def _send_all(self, remaining: Iterator[int]) -> None:
        connection: Connection | None = None
        for _ in remaining:
            request = self._fuzzer.request()
            self.digests.add(request.digest)
            try:
                connection, is_reusable = await self._send_over(connection, request)
            except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
                self.unexpected.append(f"{error!r} to {request.raw[:600]!r}")
                connection = None
                continue
            if not is_reusable:
                connection[1].transport.abort()
                connection = None
        if connection is not None:
            connection[1].transport.abort()

    async def _send_over(self, connection: Connection | None, request: FuzzedRequest) -> tuple[Connection, bool]:
        """Send a request over an open connection or, if it was closed, a new one."""
        async with asyncio.timeout(RESPONSE_SECONDS_MAX):
            if connection is not None:
                try:
                    return connection, await self._send(request, *connection)
                except (OSError, asyncio.IncompleteReadError) as error:
                    if getattr(error, "partial", b""):
                        raise
                    connection[1].transport.abort()
            connection = await asyncio.open_connection(self._host, self._port)
            return connection, await self._send(request, *connection)

    async def _send(self, request: FuzzedRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Send a request, check the response, and return whether to keep the connection."""
        writer.write(request.raw)
        head = await reader.readuntil(b"\r\n\r\n")
        length = LENGTH.search(head)
        body = await reader.readexactly(int(length[1])) if length else b""
        status = int(head[9:12])
        self.statuses[status] += 1
        self._store(re.sub(rb"x-request-id: \w+", b"", head) + body)
        is_unauthorized = status == 401
        if (
            status not in EXPECTED_STATUSES
            or (request.signed and is_unauthorized)
            or (not request.signed and status == 200)
        ):
            self.unexpected.append(f"{status} signed={request.signed} {body[:200]!r} to {request.raw[:600]!r}")
        if request.digest.encode() in head + body:
            self.unexpected.append(f"signature in {body[:200]!r}")
        return b"connection: close" not in head.lower() and status in {200, 401, 404}

    def _store(self, response: bytes) -> None:
        without_dates = re.sub(rb"date: [^\r]*", b"", response)
        if without_dates not in self._distinct_responses and len(self._distinct_responses) < 10_000:
            self._distinct_responses.add(without_dates)
            self.responses += without_dates
