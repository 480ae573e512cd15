"""The last use of tokens, and their rotation, with several servers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from unittest.mock import patch

import grpc
import pytest

import pointbook_server.maintenance
from pointbook.v1 import points_pb2
from pointbook_common.durations import DAY_MS, MINUTE_MS
from pointbook_server.access.model import ALL_MERCHANTS, Scope, Token
from pointbook_server.access.queries import LOCK_TOKEN
from pointbook_server.access.rules import new_token, split_bearer
from pointbook_server.access.token_cache import TokenCache
from pointbook_server.access.transactions import NotRotatableError, TokenTransactions
from pointbook_server.db.database import Connection, Database
from pointbook_server.errors import PointbookError
from pointbook_server.programs.model import Channel
from pointbook_server.reasons import Reason
from pointbook_server.server import Server
from support.clients import Client
from support.clocks import NOW_MS, TestClock
from support.outbox import Outbox
from support.refusals import refused
from support.servers import server_settings
from support.tokens import make_token
from support.unique_names import unique
from support.waiting import until


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[TokenTransactions]:
    """The transactions of tokens."""
    database = Database(database_url, pool_size=4)
    yield TokenTransactions(database)
    await database.dispose()


@pytest.fixture
async def bearer(database_url: str) -> str:
    """A token for reading points."""
    return await make_token(database_url, [ALL_MERCHANTS], [Scope.POINTS_READ])


@contextlib.asynccontextmanager
async def tokens_of(store: TokenTransactions, clock: TestClock) -> AsyncIterator[TokenCache]:
    """Run a cache of the tokens, as each server has one."""
    cache = TokenCache(store, clock, staleness_seconds=30)
    await cache.start()
    try:
        yield cache
    finally:
        await cache.close()


async def stored(store: TokenTransactions, bearer: str) -> Token:
    """Return the stored token of a bearer string."""
    return next(token for token in await store.read_all() if token.token_id == split_bearer(bearer)[0])


async def used(store: TokenTransactions, bearer: str) -> int | None:
    """Return when a token was last used, in milliseconds since NOW_MS."""
    last_used_at_ms = (await stored(store, bearer)).last_used_at_ms
    return None if last_used_at_ms is None else last_used_at_ms - NOW_MS


async def is_used(store: TokenTransactions, bearer: str) -> bool:
    """Return whether a token was ever used."""
    return await used(store, bearer) is not None


async def test_the_last_use_is_written_when_it_is_flushed(store: TokenTransactions, bearer: str) -> None:
    clock = TestClock()
    async with tokens_of(store, clock) as cache:
        for _ in range(3):
            clock.move(10)
            await cache.authenticate(bearer)
        assert await used(store, bearer) is None
        await cache.write_last_used()
    assert await used(store, bearer) == 30_000


async def test_the_last_use_is_written_once_a_minute_over_all_servers(store: TokenTransactions, bearer: str) -> None:
    clock = TestClock()
    used_at = []
    async with tokens_of(store, clock) as one, tokens_of(store, clock) as two, tokens_of(store, clock) as three:
        for seconds, cache in ((0, one), (40, two), (10, one), (10, three), (70, two)):
            clock.move(seconds)
            await cache.authenticate(bearer)
            await cache.write_last_used()
            used_at.append(await used(store, bearer))
        assert used_at == [0, 0, 0, MINUTE_MS, 130_000]

        clock.now_ms -= 10 * MINUTE_MS
        await one.authenticate(bearer)
        await one.write_last_used()
    assert await used(store, bearer) == 130_000


async def test_a_refused_bearer_string_is_not_a_use(store: TokenTransactions, bearer: str) -> None:
    token_id, secret = split_bearer(bearer)
    async with tokens_of(store, TestClock()) as cache:
        for wrong in (f"pb_{token_id}_{secret[::-1]}x", f"pb_{token_id[::-1]}_{secret}", "nonsense"):
            with pytest.raises(PointbookError):
                await cache.authenticate(wrong)
        await cache.write_last_used()
    assert await used(store, bearer) is None


async def test_a_use_is_not_lost_while_the_database_is_unavailable(store: TokenTransactions, bearer: str) -> None:
    async with tokens_of(store, TestClock()) as cache:
        await cache.authenticate(bearer)
        away = PointbookError(Reason.DATABASE_UNAVAILABLE, "away")
        with patch.object(TokenTransactions, "write_last_used", side_effect=away), pytest.raises(PointbookError):
            await cache.write_last_used()
        await cache.write_last_used()
    assert await used(store, bearer) == 0


async def test_servers_that_write_the_same_tokens_do_not_wait_for_each_other(
    store: TokenTransactions, database_url: str
) -> None:
    bearers = [await make_token(database_url, [ALL_MERCHANTS], [Scope.POINTS_READ]) for _ in range(3)]
    database = Database(database_url, pool_size=1)
    async with tokens_of(store, TestClock()) as cache:
        for each in bearers:
            await cache.authenticate(each)

        async def hold(connection: Connection) -> None:
            token_id = split_bearer(bearers[0])[0]
            await connection.fetch(LOCK_TOKEN, {"token": token_id})
            async with asyncio.timeout(2):
                await cache.write_last_used()

        await database.transaction(hold)
    await database.dispose()
    assert [await used(store, each) for each in bearers] == [None, 0, 0]


@pytest.mark.parametrize("by", ["maintenance", "stop"])
async def test_a_server_writes_the_last_use_at_intervals_and_when_it_stops(
    store: TokenTransactions, database_url: str, bearer: str, by: str
) -> None:
    interval = 0.02 if by == "maintenance" else 1_000.0
    with patch.object(pointbook_server.maintenance, "INTERVAL_SECONDS", interval):
        clock = TestClock()
        server = Server(server_settings(), database_url, senders={Channel.SMS: Outbox()}, clock=clock)
        await server.start()
        client = Client(server.port, bearer)
        await client.account("m", "s", "b")
        await client.close()
        if by == "maintenance":
            await until(lambda: is_used(store, bearer))
        await server.stop()
    assert await used(store, bearer) == 0


@pytest.mark.parametrize(
    ("days", "overlap_ms", "old_expires", "new_expires"),
    [
        (None, DAY_MS, DAY_MS, None),
        (None, 0, 0, None),
        (30, DAY_MS, 11 * DAY_MS, 40 * DAY_MS),
        (30, 25 * DAY_MS, 30 * DAY_MS, 40 * DAY_MS),
    ],
)
async def test_a_rotated_token_has_a_successor_with_the_same_rights_and_lifetime(
    store: TokenTransactions, days: int | None, overlap_ms: int, old_expires: int, new_expires: int | None
) -> None:
    made, bearer = new_token(
        "till", ["m-1", "m-2"], [Scope.REDEEM, Scope.CODES], NOW_MS, None if days is None else NOW_MS + days * DAY_MS
    )
    await store.create(made)
    at_ms = NOW_MS + 10 * DAY_MS
    _, new, fresh = await store.rotate(made.token_id, at_ms, overlap_ms)
    old = await stored(store, bearer)

    assert await stored(store, fresh) == new
    assert (new.name, new.merchants, new.scopes) == (made.name, made.merchants, made.scopes)
    assert (new.token_id != old.token_id, new.secret_hash != old.secret_hash) == (True, True)
    expected = old_expires if days else at_ms - NOW_MS + old_expires
    assert old.expires_at_ms == NOW_MS + expected
    assert new.expires_at_ms == (None if new_expires is None else NOW_MS + new_expires)
    assert old.rotated_to == new.token_id


async def test_both_tokens_are_valid_during_the_overlap(
    store: TokenTransactions, database_url: str, bearer: str
) -> None:
    clock = TestClock()
    _, _, fresh = await store.rotate(split_bearer(bearer)[0], clock.now_ms, MINUTE_MS)
    server = Server(server_settings(), database_url, senders={Channel.SMS: Outbox()}, clock=clock)
    await server.start()
    request = points_pb2.GetPointsAccountRequest(merchant_id=unique("m"), store_id="s", buyer_id="b")
    clients = [Client(server.port, each) for each in (bearer, fresh)]
    for client in clients:
        await client.points.GetPointsAccount(request)
    clock.move(60)
    found = await refused(clients[0].points.GetPointsAccount(request))
    await clients[1].points.GetPointsAccount(request)
    for client in clients:
        await client.close()
    await server.stop()

    assert (found.code, found.reason) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_EXPIRED")


async def test_a_token_that_is_revoked_rotated_expired_or_unknown_is_not_rotated(
    store: TokenTransactions, database_url: str
) -> None:
    bearers = [await make_token(database_url, ["m"], [Scope.REDEEM], NOW_MS + 1) for _ in range(3)]
    revoked, first, expired = (split_bearer(each)[0] for each in bearers)
    await store.revoke(revoked, NOW_MS)
    _, second, _ = await store.rotate(first, NOW_MS, DAY_MS)
    count = len(await store.read_all())

    for token_id, at_ms, why in (
        (revoked, NOW_MS, "is revoked"),
        (first, NOW_MS, second.token_id),
        (expired, NOW_MS + 1, "has expired"),
        ("unknown", NOW_MS, "does not exist"),
    ):
        with pytest.raises(NotRotatableError, match=why):
            await store.rotate(token_id, at_ms, DAY_MS)
    assert len(await store.read_all()) == count


async def test_one_of_several_concurrent_rotations_succeeds(store: TokenTransactions, bearer: str) -> None:
    token_id = split_bearer(bearer)[0]
    answers = await asyncio.gather(*(store.rotate(token_id, NOW_MS, DAY_MS) for _ in range(4)), return_exceptions=True)
    assert sum(isinstance(answer, tuple) for answer in answers) == 1
    assert sum(isinstance(answer, NotRotatableError) for answer in answers) == 3
