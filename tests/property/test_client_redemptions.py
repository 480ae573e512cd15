"""The client redeems and reverses at most once, and finds out what happened.

Requests and answers are lost, connections are cut and stall, servers are replaced, callers give up and repeat.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointbook_client import (
    Buyer,
    CustomerRef,
    PendingCall,
    PointbookClient,
    PointbookError,
    Redemption,
    attempts,
    connect,
    reasons,
)
from pointbook_server.server import Server
from support.clients import Client
from support.connections import connected
from support.examples import examples
from support.redemption import account_points, earn
from support.server_proxy import ServerProxy, server_proxy
from support.servers import Service, running_server
from support.shops import Shop
from support.unique_names import unique

EXAMPLES = settings(
    max_examples=examples(40),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
EARNED = 100
TIMEOUT_SECONDS = 0.4
"""The deadline of the client's calls."""
LOCK_SECONDS = 0.3
"""The longest time that a step holds an account's lock, so that calls wait for it and outlive their connections."""
SETTLE_SECONDS = 0.6
"""In place of the client's 20 seconds: longer than the lock and a transaction after it."""
RESOLVE_SECONDS = 10.0


@dataclass
class Sent:
    """A redemption or reversal, and what its sender was told."""

    call: PendingCall[Redemption]
    again: Callable[[PointbookClient], PendingCall[Redemption]]
    """Builds the same call in another process, which has stored the reference."""
    redeemed: str | None = None
    """The reference of the redemption that is reversed, if it is a reversal."""
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    results: list[Redemption] = field(default_factory=list)
    is_refused: bool = False
    """Whether the call was refused for good."""
    has_other_sender: bool = False
    """Whether another process has sent the call: then a refusal is final only after its deadlines."""

    def send(self, call: PendingCall[Redemption]) -> None:
        """Send the call, beside all that run."""
        self.tasks.append(asyncio.create_task(self._send(call)))

    async def _send(self, call: PendingCall[Redemption]) -> None:
        try:
            self.results.append(await call)
        except PointbookError as error:
            self.is_refused |= call is self.call and not error.outcome_unknown


@dataclass
class Story:
    """A shop whose calls go through a proxy to one of two servers."""

    shop: Shop
    admin: Client
    clients: tuple[PointbookClient, PointbookClient]
    """The process that sends, and another one that has its stored references."""
    proxy: ServerProxy
    servers: tuple[Server, Server]
    database_url: str
    sent: list[Sent] = field(default_factory=list)
    locks: list[asyncio.Task[None]] = field(default_factory=list)

    def redeem(self, points: int) -> None:
        """Redeem points of the buyer."""
        customer = CustomerRef(self.shop.merchant_id, buyer=Buyer(self.shop.store_id, "buyer"))
        call = self.clients[0].redeem(customer, 1, points)
        reference = call.reference
        self._start(Sent(call, lambda client: client.redeem(customer, 1, points, reference=reference)))

    def reverse(self, index: int, points: int | None) -> None:
        """Reverse points of a redemption, whose outcome may be unknown."""
        redemptions = [sent for sent in self.sent if sent.redeemed is None]
        if redemptions:
            redeemed = redemptions[index % len(redemptions)].call.reference
            call = self.clients[0].reverse(self.shop.merchant_id, redeemed_reference=redeemed, points=points)
            reference, merchant_id = call.reference, self.shop.merchant_id
            self._start(
                Sent(
                    call,
                    lambda client: client.reverse(
                        merchant_id, redeemed_reference=redeemed, points=points, reference=reference
                    ),
                    redeemed,
                )
            )

    def _start(self, sent: Sent) -> None:
        self.sent.append(sent)
        sent.send(sent.call)

    def send_again(self, index: int) -> None:
        """Send a call again that was not refused for good."""
        if self.sent and not (sent := self.sent[index % len(self.sent)]).is_refused:
            sent.send(sent.call)

    def send_elsewhere(self, index: int) -> None:
        """Send the same call from another process."""
        if self.sent and not (sent := self.sent[index % len(self.sent)]).is_refused:
            sent.has_other_sender = True
            sent.send(sent.again(self.clients[1]))

    def give_up(self, index: int) -> None:
        """Cancel the running attempts of a call."""
        if self.sent:
            for task in self.sent[index % len(self.sent)].tasks:
                task.cancel()

    def cut(self) -> None:
        """End all connections at once."""
        self.proxy.abort()

    def replace_server(self) -> None:
        """End all connections, as by a kill; calls go to the other server."""
        first, second = self.servers
        self.proxy.target = second.port if self.proxy.target == first.port else first.port
        self.proxy.abort()

    def lose_answers(self) -> None:
        """Lose what servers send from now on."""
        self.proxy.answers.is_lost = True

    def lose_requests(self) -> None:
        """Lose what clients send from now on."""
        self.proxy.requests.is_lost = True

    def delay_requests(self) -> None:
        """Deliver what clients send at the end of the fault, when they may have given up."""
        self.proxy.requests.flow.clear()

    def delay_answers(self) -> None:
        """Deliver what servers send only at the end of the fault."""
        self.proxy.answers.flow.clear()

    def heal(self) -> None:
        """End the faults of the network."""
        self.proxy.heal()

    async def lock(self) -> None:
        """Lock the account for a while, so that calls run longer than their callers wait."""
        is_held = asyncio.Event()
        self.locks.append(asyncio.create_task(self._hold_lock(is_held)))
        await is_held.wait()

    async def _hold_lock(self, is_held: asyncio.Event) -> None:
        async with connected(self.database_url) as connection, connection.transaction():
            query = "SELECT FROM points_accounts WHERE merchant_id = $1 FOR UPDATE"
            await connection.execute(query, self.shop.merchant_id)
            is_held.set()
            await asyncio.sleep(LOCK_SECONDS)

    async def enable(self, *, is_enabled: bool) -> None:
        """Allow or forbid redemptions, so that attempts of one call may differ."""
        await self.admin.put_program(
            self.shop.merchant_id, self.shop.store_id, criteria={}, redemption_enabled=is_enabled
        )

    async def refuse_second(self, points: int, *, is_cut: bool) -> None:
        """Have an attempt refused while an abandoned one waits in the server."""
        self.heal()
        await self.lock()
        self.redeem(points)
        await self.pause(0.05)
        await self.enable(is_enabled=False)
        if is_cut:
            self.cut()
        else:
            self.give_up(-1)
        self.send_again(-1)
        await self.pause(0.05)
        await self.enable(is_enabled=True)

    async def pause(self, seconds: float) -> None:
        """Wait while calls run."""
        await asyncio.sleep(seconds)


Step = Callable[[Story], Any]
INDEXES = st.integers(0, 5)


def step(method: Callable[..., Any], *drawn: st.SearchStrategy[Any], **more: st.SearchStrategy[Any]) -> Any:
    """Build a strategy of steps from a method of a story."""
    return st.builds(lambda *values, **named: lambda story: method(story, *values, **named), *drawn, **more)


FAULTS = (
    Story.cut,
    Story.replace_server,
    Story.lose_answers,
    Story.lose_requests,
    Story.delay_requests,
    Story.delay_answers,
    Story.lock,
)
steps = st.one_of(
    step(Story.redeem, st.sampled_from([10, 30, 70])),
    step(Story.redeem, st.sampled_from([10, 30, 70])),
    step(Story.reverse, INDEXES, st.sampled_from([None, 5, 10])),
    step(Story.send_again, INDEXES),
    step(Story.send_elsewhere, INDEXES),
    step(Story.give_up, INDEXES),
    *(step(fault) for fault in FAULTS),
    step(Story.heal),
    step(Story.enable, is_enabled=st.booleans()),
    step(Story.refuse_second, st.sampled_from([10, 30]), is_cut=st.booleans()),
    step(Story.pause, st.sampled_from([0.0, 0.005, 0.03, 0.15, TIMEOUT_SECONDS])),
)


@pytest.fixture(scope="module")
async def servers(database_url: str) -> AsyncIterator[tuple[Server, Server]]:
    """Two servers of one database."""
    async with running_server(database_url) as (first, _), running_server(database_url) as (second, _):
        yield first, second


@asynccontextmanager
async def start_story(service: Service, servers: tuple[Server, Server], token: str) -> AsyncIterator[Story]:
    """Create a shop with one buyer, and clients behind a proxy."""
    shop = Shop(unique("merchant"), unique("store"))
    await service.client.put_store(shop.merchant_id, shop.store_id)
    await service.client.put_program(shop.merchant_id, shop.store_id, criteria={})
    await earn(service.client, shop, EARNED)
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(server_proxy(servers[0].port))
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.min_reconnect_backoff_ms", 100))
        first, second = [
            await stack.enter_async_context(
                connect(proxy.address, token=token, timeout=TIMEOUT_SECONDS, channel_options=options)
            )
            for _ in range(2)
        ]
        yield Story(shop, service.client, (first, second), proxy, servers, service.database_url)


async def resolve(sent: Sent) -> Redemption | None:
    """Send a call until its outcome is known; return its redemption, None if refused."""
    async with asyncio.timeout(RESOLVE_SECONDS):
        while not sent.is_refused:
            try:
                return await sent.call
            except PointbookError as error:
                if not error.outcome_unknown:
                    return None
            # The pause of a caller: nothing says when an earlier attempt has ended.
            await asyncio.sleep(0.05)
    return None


async def read_rows(connection: asyncpg.Connection, story: Story, sent: Sent) -> list[Any]:
    """Return what the database has under the reference of a call."""
    table = "redemptions" if sent.redeemed is None else "redemption_reversals"
    query = f"SELECT * FROM {table} WHERE merchant_id = $1 AND reference = $2"  # noqa: S608 - constant names
    return list(await connection.fetch(query, story.shop.merchant_id, sent.call.reference))


async def check_sent(connection: asyncpg.Connection, story: Story, sent: Sent, redemption: Redemption | None) -> None:
    """Check that a call and the database agree."""
    rows = await read_rows(connection, story, sent)
    if redemption is None:
        assert rows == [], f"{sent.call} was refused, and carried out"
        assert sent.results == []
        if sent.redeemed is None:
            with pytest.raises(reasons.RedemptionNotFoundError):
                await story.clients[0].get_redemption(story.shop.merchant_id, reference=sent.call.reference)
        return
    (row,) = rows
    assert {result.redemption_id for result in (redemption, *sent.results)} == {row["redemption_id"]}
    if sent.redeemed is None:
        found = await story.clients[0].get_redemption(story.shop.merchant_id, reference=sent.call.reference)
        assert found.redemption_id == row["redemption_id"]


async def check(story: Story) -> None:
    """End all faults, and check every call."""
    story.heal()
    await asyncio.gather(*story.locks)
    await asyncio.gather(*(task for sent in story.sent for task in sent.tasks), return_exceptions=True)
    await story.enable(is_enabled=True)
    if any(sent.has_other_sender for sent in story.sent):
        await asyncio.sleep(TIMEOUT_SECONDS + SETTLE_SECONDS)
    outcomes = [await resolve(sent) for sent in story.sent]
    async with connected(story.database_url) as connection:
        for sent, redemption in zip(story.sent, outcomes, strict=True):
            if redemption is None and sent.has_other_sender:
                # The refusal was not final, and the other process may have been faster.
                rows = await read_rows(connection, story, sent)
                assert len(rows) <= 1
            else:
                await check_sent(connection, story, sent, redemption)
        query = "SELECT sum(points - reversed_points)::bigint FROM redemptions WHERE merchant_id = $1"
        held = await connection.fetchval(query, story.shop.merchant_id) or 0
    assert await account_points(story.admin, story.shop) == (EARNED, EARNED - held, held)


@given(story_steps=st.lists(steps, min_size=4, max_size=16))
@EXAMPLES
async def test_lost_answers_redeem_and_reverse_once_and_the_caller_finds_out(
    service: Service, servers: tuple[Server, Server], admin_token: str, story_steps: list[Step]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attempts, "SETTLE_SECONDS", SETTLE_SECONDS)
        async with start_story(service, servers, admin_token) as story:
            for each in story_steps:
                pending = each(story)
                if pending is not None:
                    await pending
            await check(story)
