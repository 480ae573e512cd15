"""The cache of tokens: known, new, forged, revoked and stale ones."""

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from pointbook.v1 import access_pb2
from pointbook_server.access import token_cache as token_cache_module
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.access.rules import split_bearer
from pointbook_server.access.token_cache import TokenCache
from pointbook_server.access.transactions import TokenTransactions
from pointbook_server.db.database import Database
from pointbook_server.errors import PointbookError
from pointbook_server.metrics import DatabaseMetrics
from pointbook_server.programs.model import Channel
from pointbook_server.reasons import Reason
from pointbook_server.server import Server
from support.clients import Client
from support.clocks import TestClock
from support.database_proxy import proxied
from support.outbox import Outbox
from support.servers import server_settings
from support.tokens import make_token, revoke_token
from support.waiting import until

NOW_MS = 1_780_000_000_000


class Loads:
    """The loads of tokens, which are counted and can be paused."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        original: Callable[[TokenTransactions], Any] = TokenTransactions.read_all

        async def counted(store: TokenTransactions) -> Any:
            self.count += 1
            await self.goes_on.wait()
            return await original(store)

        monkeypatch.setattr(TokenTransactions, "read_all", counted)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    """All loads of tokens in a test."""
    return Loads(monkeypatch)


@pytest.fixture
async def bearer(database_url: str) -> str:
    """A token for one test."""
    return await make_token(database_url, [ALL_MERCHANTS], [Scope.POINTS_READ])


@contextlib.asynccontextmanager
async def caching(
    database_url: str, staleness_seconds: float = 30.0, clock: TestClock | None = None
) -> AsyncIterator[TokenCache]:
    """Run a cache of the tokens of a database."""
    database = Database(database_url, pool_size=1)
    cache = TokenCache(TokenTransactions(database), clock or TestClock(), staleness_seconds=staleness_seconds)
    await cache.start()
    try:
        yield cache
    finally:
        await cache.close()
        await database.dispose()


async def reason_of(cache: TokenCache, bearer: str) -> Reason | None:
    """Return why a bearer string is refused; None if it is not."""
    try:
        await cache.authenticate(bearer)
    except PointbookError as error:
        return error.reason
    return None


def forged() -> str:
    """Return a bearer string with a valid form."""
    return f"pb_{secrets.token_hex(8)}_{secrets.token_urlsafe(32)}"


async def code_of(call: Any) -> str:
    """Return how a call ends."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def test_a_revoked_token_is_refused_while_calls_use_all_connections(database_url: str, bearer: str) -> None:
    server = Server(
        server_settings(database_pool_size=1), database_url, senders={Channel.SMS: Outbox()}, clock=TestClock()
    )
    await server.start()
    client = Client(server.port, bearer)
    request = access_pb2.GetCallerAccessRequest()
    await client.access.GetCallerAccess(request)

    async with server._database.autocommit():
        await revoke_token(database_url, bearer)
        codes: set[str] = set()

        async def is_refused() -> bool:
            codes.add(await code_of(client.access.GetCallerAccess(request)))
            return codes != {"OK"}

        seconds = await until(is_refused, seconds=25.0)

    await client.close()
    await server.stop()
    assert codes == {"OK", "UNAUTHENTICATED"}
    assert seconds < 2.0


async def test_a_known_token_waits_for_no_load(database_url: str, bearer: str, loads: Loads) -> None:
    async with caching(database_url) as cache:
        loads.goes_on.clear()
        before = loads.count
        await until(lambda: loads.count > before)
        async with asyncio.timeout(0.1):
            assert await reason_of(cache, bearer) is None
        loads.goes_on.set()


async def test_a_token_that_was_just_valid_expires_in_time(database_url: str, loads: Loads) -> None:
    clock = TestClock()
    bearer = await make_token(database_url, [ALL_MERCHANTS], [Scope.POINTS_READ], clock.now_ms + 1_000)
    async with caching(database_url, clock=clock) as cache:
        loads.goes_on.clear()
        assert [await reason_of(cache, bearer) for _ in range(2)] == [None, None]
        clock.move(0.999)
        assert await reason_of(cache, bearer) is None
        clock.move(0.001)
        assert [await reason_of(cache, bearer) for _ in range(2)] == [Reason.TOKEN_EXPIRED, Reason.TOKEN_EXPIRED]
        loads.goes_on.set()


async def test_a_wrong_secret_is_refused_after_the_right_one(database_url: str, bearer: str) -> None:
    async with caching(database_url) as cache:
        assert await reason_of(cache, bearer) is None
        for wrong in (bearer[:-1], f"{bearer}x", f"{bearer} ", bearer.swapcase()):
            assert await reason_of(cache, wrong) is Reason.TOKEN_INVALID
        assert await reason_of(cache, bearer) is None


async def test_stale_tokens_are_refused_until_they_are_loaded_again(database_url: str) -> None:
    bearer = await make_token(database_url, [ALL_MERCHANTS], [Scope.POINTS_READ])
    async with proxied(database_url) as proxy, caching(proxy.url, staleness_seconds=3.0) as cache:
        proxy.freeze()
        frozen_at = time.monotonic()

        async def is_admitted() -> bool:
            return await reason_of(cache, bearer) is None

        async def is_refused() -> bool:
            return not await is_admitted()

        await until(is_refused)
        stale_seconds = time.monotonic() - frozen_at
        with pytest.raises(PointbookError) as refusal:
            await cache.authenticate(bearer)
        proxy.thaw()
        good_seconds = await until(is_admitted)

    assert 1.5 < stale_seconds < 3.5
    assert refusal.value.reason is Reason.DATABASE_UNAVAILABLE
    assert refusal.value.retry_after_seconds == 1.0
    assert good_seconds < 3.0


async def test_a_database_that_hangs_is_counted_after_the_tokens_are_stale(
    database_url: str, bearer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No call reaches the database then."""
    causes: list[str] = []
    monkeypatch.setattr(DatabaseMetrics, "count_error", lambda _self, cause: causes.append(cause))
    async with proxied(database_url) as proxy, caching(proxy.url, staleness_seconds=0.5) as cache:
        proxy.freeze()

        async def is_refused() -> bool:
            return await reason_of(cache, bearer) is Reason.DATABASE_UNAVAILABLE

        async def is_counted_again() -> bool:
            return len(causes) >= 2

        await until(is_refused)
        causes.clear()
        await until(is_counted_again)

    assert set(causes) == {"TimeoutError"}


async def test_the_next_expiry_is_not_that_of_a_revoked_token(database_url: str) -> None:
    clock = TestClock()
    expires_at_ms = clock() + 60_000
    bearer = await make_token(database_url, [ALL_MERCHANTS], [Scope.POINTS_READ], expires_at_ms)
    async with caching(database_url, clock=clock) as cache:
        await cache.authenticate(bearer)
        assert cache.next_expiry_ms() == expires_at_ms
        await revoke_token(database_url, bearer)

        async def is_left_out() -> bool:
            return cache.next_expiry_ms() != expires_at_ms

        await until(is_left_out)


async def test_an_unknown_token_is_not_invalid_while_tokens_cannot_be_loaded(database_url: str, loads: Loads) -> None:
    async with caching(database_url) as cache:
        loads.goes_on.clear()
        unknown = asyncio.create_task(reason_of(cache, forged()))
        await until(unknown.done)
        loads.goes_on.set()
    assert unknown.result() is Reason.DATABASE_UNAVAILABLE


async def test_a_bounded_number_of_forged_tokens_waits(
    database_url: str, bearer: str, loads: Loads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache_module, "WAITING_MAX", 20)
    async with caching(database_url) as cache:
        before, began = loads.count, time.monotonic()
        strangers = [asyncio.create_task(reason_of(cache, forged())) for _ in range(1_200)]
        await asyncio.sleep(0)
        async with asyncio.timeout(0.1):
            assert await reason_of(cache, bearer) is None
        reasons = await asyncio.gather(*strangers)
        seconds = time.monotonic() - began

    assert reasons.count(Reason.TOKEN_INVALID) == 20
    assert reasons.count(Reason.QUEUE_FULL) == 1_180
    assert loads.count - before <= 2 + seconds / 0.2
    assert seconds < 1.0


async def test_forged_tokens_cause_at_most_five_loads_a_second(database_url: str, loads: Loads) -> None:
    async with caching(database_url) as cache:
        before, began = loads.count, time.monotonic()
        while time.monotonic() - began < 1.0:
            assert await reason_of(cache, forged()) is Reason.TOKEN_INVALID
        assert 3 <= loads.count - before <= 6


@pytest.mark.parametrize("kind", ["missed before", "wrong secret", "malformed"])
async def test_a_token_that_cannot_be_new_is_refused_at_once(
    database_url: str, bearer: str, loads: Loads, kind: str
) -> None:
    async with caching(database_url) as cache:
        token = {
            "missed before": forged(),
            "wrong secret": f"pb_{split_bearer(bearer)[0]}_{secrets.token_urlsafe(32)}",
            "malformed": "pb_unknown_token",
        }[kind]
        assert await reason_of(cache, token) is Reason.TOKEN_INVALID
        loads.goes_on.clear()
        async with asyncio.timeout(0.1):
            for _ in range(100):
                assert await reason_of(cache, token) is Reason.TOKEN_INVALID
        loads.goes_on.set()


async def test_remembered_misses_are_bounded_and_never_hide_a_token(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache_module, "MISSES_MAX", 3)
    bearer = await make_token(database_url, [ALL_MERCHANTS], [Scope.POINTS_READ])
    async with caching(database_url) as cache:
        cache._remember_miss(split_bearer(bearer)[0])
        assert await reason_of(cache, bearer) is None
        others = [split_bearer(forged())[0] for _ in range(5)]
        for token_id in others:
            cache._remember_miss(token_id)
        assert list(cache._misses) == others[-3:]


async def test_calls_that_wait_for_tokens_end_when_the_server_stops(database_url: str, loads: Loads) -> None:
    async with caching(database_url) as cache:
        loads.goes_on.clear()
        before = loads.count
        first = asyncio.create_task(reason_of(cache, forged()))
        await until(lambda: loads.count > before)
        second = asyncio.create_task(reason_of(cache, forged()))
        await asyncio.sleep(0)
    assert await first is Reason.DATABASE_UNAVAILABLE
    assert await second is Reason.DATABASE_UNAVAILABLE
