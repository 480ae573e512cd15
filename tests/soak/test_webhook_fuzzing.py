"""Random webhooks at a real shim and server: no 5xx, no exception in a log, and nothing secret in answers or logs."""

import asyncio
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from pointbook_server.settings import ServerSettings
from support.honest import P99_RATIO_MAX, p99_ratio
from support.sites import SECRET, Site, faults
from support.webhook_fuzzing import STATUSES, FuzzedRequest, WebhookFuzzer

CONNECTIONS = 32
ANSWER_SECONDS_MAX = 20.0
DIGEST = re.compile(r"[0-9a-f]{64}|[0-9A-Za-z+/]{43}=")
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)
IN_FULL = 100_000
ROUNDS = 3
ROUND_SECONDS = 2.0


@pytest.mark.parametrize("requests", [500, pytest.param(IN_FULL, marks=pytest.mark.soak)])
async def test_fuzzed_webhooks(site: Site, figure: Callable[[str, float | str, str], None], requests: int) -> None:
    """Any request is answered as the README says, and an honest sender notices nothing."""
    in_full = requests == IN_FULL
    rounds = (ROUNDS, ROUND_SECONDS) if in_full else (1, 0.5)
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 - pytest shows it where the test fails
    # No bound of the quarantine shall be met.
    names = [name.upper() for name in ServerSettings.model_fields if name.startswith("quarantine_")]
    bounds = {name: str(10**6) for name in names if name.endswith("WEBHOOKS_MAX")}
    bounds |= {name: str(10**12) for name in names if name.endswith("BYTES_MAX")}
    async with site.server(**bounds) as server, site.shim() as shim, site.honest_webhooks() as honest:
        client = await site.client()
        before = await honest.rounds(*rounds)
        source = random.Random(seed)  # noqa: S311 - it is to be repeatable
        senders = Senders(site.http_address, WebhookFuzzer(source, SECRET, site.shop.merchant_id, site.shop.store_id))
        await senders.run(requests)
        after = await honest.rounds(*rounds)
        assert await site.is_ready()
        await client.close()
    statuses = " ".join(f"{status} {count}" for status, count in senders.statuses.most_common())
    figure(f"{requests:,} fuzzed webhooks: statuses", statuses, "no 5xx")
    figure(f"{requests:,} fuzzed webhooks: honest callers' p99 afterwards, ratio", p99_ratio(before, after), "<= 2")
    assert senders.unexpected == []
    assert faults(shim.err) + faults(server.err) == []
    assert sum(each.failed for each in (*before, *after)) == 0
    # The p99 of half a second says nothing.
    assert not in_full or p99_ratio(before, after) <= P99_RATIO_MAX
    logs = shim.err + shim.out + server.err + server.out
    assert not senders.digests & set(DIGEST.findall(logs))
    for secret in (SECRET, site.token.rpartition("_")[2]):
        assert secret not in logs
        assert secret.encode() not in senders.answers


class Senders:
    """Connections over which a fuzzer's requests go."""

    def __init__(self, address: str, fuzzer: WebhookFuzzer) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._fuzzer = fuzzer
        self.statuses: Counter[int] = Counter()
        self.unexpected: list[str] = []
        self.digests: set[str] = set()
        self.answers = bytearray()
        """All different answers."""
        self._different: set[bytes] = set()

    async def run(self, requests: int) -> None:
        """Send so many."""
        left = iter(range(requests))
        await asyncio.gather(*(self._send_all(left) for _ in range(CONNECTIONS)))

    async def _send_all(self, left: Iterator[int]) -> None:
        connection: Connection | None = None
        for _ in left:
            request = self._fuzzer.request()
            self.digests.add(request.digest)
            try:
                connection, stays = await self._send_over(connection, request)
            except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
                self.unexpected.append(f"{error!r} to {request.raw[:600]!r}")
                connection = None
                continue
            if not stays:
                connection[1].transport.abort()
                connection = None
        if connection is not None:
            connection[1].transport.abort()

    async def _send_over(self, connection: Connection | None, request: FuzzedRequest) -> tuple[Connection, bool]:
        """Send a request over a connection, or over a new one where the old one was closed before any answer."""
        async with asyncio.timeout(ANSWER_SECONDS_MAX):
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
        """Send a request and judge the answer; returns whether the connection stays."""
        writer.write(request.raw)
        head = await reader.readuntil(b"\r\n\r\n")
        length = LENGTH.search(head)
        body = await reader.readexactly(int(length[1])) if length else b""
        status = int(head[9:12])
        self.statuses[status] += 1
        self._keep(re.sub(rb"x-request-id: \w+", b"", head) + body)
        answers_forged = status == 401
        if status not in STATUSES or (request.signed and answers_forged) or (not request.signed and status == 200):
            self.unexpected.append(f"{status} signed={request.signed} {body[:200]!r} to {request.raw[:600]!r}")
        if request.digest.encode() in head + body:
            self.unexpected.append(f"the digest in {body[:200]!r}")
        return b"connection: close" not in head.lower() and status in {200, 401, 404}

    def _keep(self, answer: bytes) -> None:
        without_dates = re.sub(rb"date: [^\r]*", b"", answer)
        if without_dates not in self._different and len(self._different) < 10_000:
            self._different.add(without_dates)
            self.answers += without_dates
