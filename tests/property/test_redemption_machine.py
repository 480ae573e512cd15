"""Redemption under random steps: no point is drawn twice or lost."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from pointbook.v1 import customers_pb2, identity_pb2, points_pb2, redemption_pb2
from pointbook_server.db.database import Database, Statement
from pointbook_server.ledger.model import AccountKey
from pointbook_server.redemption import queries
from pointbook_server.redemption.allocation import points_by_account
from pointbook_server.redemption.model import HoldState, Redemption
from support.clocks import NOW_MS, at
from support.examples import examples
from support.ledger import StoredAccount, assert_is_fold, read_ledger
from support.refusals import refusal
from support.servers import Service
from support.shops import Shop
from support.unique_names import unique

EXAMPLES = settings(
    max_examples=examples(60),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NAMES = ("ada", "bob", "eve")
"""Ada and Bob are registered, and a group; Eve is an unregistered buyer."""
CAP = 120
WINDOW_MS = 60_000
"""The settlement window of the program."""
LEAD_MS = 20_000
"""How much earlier than a redemption SHOPLINE may have booked it."""
REFUSALS = {
    "INSUFFICIENT_POINTS",
    "ABOVE_MAX_PER_DAY",
    "REDEMPTION_SETTLED",
    "ALREADY_REVERSED",
    "NOT_A_GROUP_MEMBER",
    "ENTRY_NOT_FOUND",
}
"""The reasons for which a call may be refused."""
READ_REDEMPTIONS = Statement(
    text(f"SELECT {queries.ALL_COLUMNS}, {queries.STATE} AS state FROM redemptions WHERE merchant_id = :merchant_id")  # noqa: S608 - constant names
)


@dataclass
class Story:
    """The history of a shop's customers, with the calls that steps can repeat."""

    service: Service
    shop: Shop
    events: list[points_pb2.PointsUpdate] = field(default_factory=list)
    orders: list[redemption_pb2.RedeemPointsRequest] = field(default_factory=list)
    redemptions: list[redemption_pb2.Redemption] = field(default_factory=list)
    balances: dict[str, int] = field(default_factory=lambda: dict.fromkeys(NAMES, 0))

    @property
    def now_ms(self) -> int:
        """The time of the story."""
        return self.service.clock.now_ms

    async def attempt(self, call: Any) -> Any:
        """Await a call, and return None if the rules refuse it."""
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            if refusal(error).reason not in REFUSALS:
                raise
            return None

    async def event(
        self, buyer_id: str, points: int, late_ms: int, life_ms: int | None, *, balanced: bool, scene: int
    ) -> None:
        """Send an event: perhaps late, with or without a balance."""
        self.balances[buyer_id] += points
        direction = points_pb2.POINTS_UPDATE_TYPE_INCREASE if points >= 0 else points_pb2.POINTS_UPDATE_TYPE_DECREASE
        update = self.shop.update(
            buyer_id,
            event_id=f"{self.shop.store_id}-{len(self.events):03}",
            update_type=direction,
            updated_scene=scene,
            updated_value=abs(points),
            points_balance=self.balances[buyer_id] if balanced else None,
            points_expiry_time=at(self.now_ms - late_ms + life_ms) if points > 0 and life_ms is not None else None,
            updated_at=at(self.now_ms - late_ms),
        )
        self.events.append(update)
        if await self.attempt(self.service.client.apply(update)) is None:
            self.balances[buyer_id] -= points

    async def repeat(self, index: int) -> None:
        """Repeat an event and a redemption."""
        if self.events:
            await self.attempt(self.service.client.apply(self.events[index % len(self.events)]))
        if self.redemptions:
            stored = self.redemptions[index % len(self.redemptions)]
            (request,) = (
                each for each in self.orders if each.external_reference_number == stored.external_reference_number
            )
            response = await self.service.client.redemption.RedeemPoints(request)
            assert response.redemption.redemption_id == stored.redemption_id

    async def redeem(self, name: str, points: int, *, pools: bool) -> None:
        """Redeem a customer's own points, or a group's."""
        customer = identity_pb2.CustomerRef(merchant_id=self.shop.merchant_id)
        if name == "eve":
            customer.buyer.store_id, customer.buyer.buyer_id = self.shop.store_id, "eve"
        else:
            customer.external_id = name
        request = redemption_pb2.RedeemPointsRequest(
            customer=customer,
            program_id=1,
            points=points,
            external_reference_number=f"{self.shop.store_id}-{len(self.orders):03}",
            user_group2=identity_pb2.UserGroupRef(id="all") if pools else None,
        )
        self.orders.append(request)
        response = await self.attempt(self.service.client.redemption.RedeemPoints(request))
        if response is not None:
            self.redemptions.append(response.redemption)

    async def send_booking(self, index: int, late_ms: int, *, balanced: bool) -> None:
        """Send SHOPLINE's decrease for the points that a redemption drew from an account.

        The redemption may be in any state.
        """
        if self.redemptions:
            redemption = self.redemptions[index % len(self.redemptions)]
            draw = redemption.draws[index % len(redemption.draws)]
            points = sum(each.points for each in redemption.draws if each.buyer == draw.buyer)
            cashback = points_pb2.POINTS_UPDATE_SCENE_CASHBACK
            await self.event(draw.buyer.buyer_id, -points, late_ms, None, balanced=balanced, scene=cashback)

    async def send_booking_first(self, name: str, points: int, late_ms: int) -> None:
        """Send SHOPLINE's decrease for a redemption that may follow."""
        cashback = points_pb2.POINTS_UPDATE_SCENE_CASHBACK
        await self.event(name, -points, late_ms, None, balanced=True, scene=cashback)

    async def reverse(self, index: int, points: int) -> None:
        """Reverse points of a redemption, twice under one reference."""
        if self.redemptions:
            redemption = self.redemptions[index % len(self.redemptions)]
            request = redemption_pb2.ReverseRedemptionRequest(
                merchant_id=self.shop.merchant_id,
                redemption_id=redemption.redemption_id,
                points=points,
                external_reference_number=unique("reversal"),
            )
            first = await self.attempt(self.service.client.redemption.ReverseRedemption(request))
            assert first == await self.attempt(self.service.client.redemption.ReverseRedemption(request))

    async def settle(self, index: int) -> None:
        """Settle a redemption by hand."""
        if self.redemptions:
            redemption = self.redemptions[index % len(self.redemptions)]
            request = redemption_pb2.SettleRedemptionRequest(
                merchant_id=self.shop.merchant_id, redemption_id=redemption.redemption_id, reason="a test"
            )
            await self.attempt(self.service.client.redemption.SettleRedemption(request))

    async def void(self, index: int, *, is_void: bool) -> None:
        """Void an entry, or unvoid it."""
        if self.events:
            ids, points = [self.events[index % len(self.events)].event_id], self.service.client.points
            fields: dict[str, Any] = {"merchant_id": self.shop.merchant_id, "event_ids": ids, "reason": "a test"}
            await self.attempt(
                points.VoidPointsEntries(points_pb2.VoidPointsEntriesRequest(**fields))
                if is_void
                else points.UnvoidPointsEntries(points_pb2.UnvoidPointsEntriesRequest(**fields))
            )

    async def wait(self, after_ms: int) -> None:
        """Advance the clock."""
        self.service.clock.now_ms += after_ms

    async def release_overdue(self) -> None:
        """Release the redemptions that were not booked in time."""
        await self.service.server.services.redemptions.release_overdue(self.service.clock())

    async def redeem_concurrently(self, names: list[str], points: int) -> None:
        """Redeem for several customers at once, while overdue redemptions are released."""
        redeeming = (self.redeem(name, points, pools=name != "eve") for name in names)
        await asyncio.gather(*redeeming, self.release_overdue())


ORDERS = points_pb2.POINTS_UPDATE_SCENE_SUCCESSFUL_ORDERS
MANUAL_DECREASE = points_pb2.POINTS_UPDATE_SCENE_MANUALLY_DECREASE
EXPIRED = points_pb2.POINTS_UPDATE_SCENE_POINTS_EXPIRED
Step = Callable[[Story], Any]


def step(method: Callable[..., Any], *arguments: st.SearchStrategy[Any], **keywords: st.SearchStrategy[Any]) -> Any:
    """Build a strategy of steps from a method of a story, whose arguments are drawn."""
    return st.builds(
        lambda *drawn, **drawn_keywords: lambda story: method(story, *drawn, **drawn_keywords), *arguments, **keywords
    )


FEW_SIZES = st.sampled_from([5, 10])
"""So few that bookings and redemptions often have the same points."""
CUSTOMERS, POINTS, INDEXES = st.sampled_from(NAMES), st.integers(1, 30), st.integers(0, 20)
LATE_MS, ANY = st.sampled_from([0, 0, 1, 3_000, 7_000]), st.booleans()
LIVES_MS = st.sampled_from([None, 1, 5_000, 30_000, 90_000])
SPENT, SPENT_SCENES = st.integers(-30, -1), st.sampled_from([MANUAL_DECREASE, EXPIRED])
steps = st.one_of(
    step(Story.event, CUSTOMERS, st.integers(1, 60), LATE_MS, LIVES_MS, balanced=ANY, scene=st.just(ORDERS)),
    step(Story.event, CUSTOMERS, SPENT, LATE_MS, st.none(), balanced=ANY, scene=SPENT_SCENES),
    step(Story.redeem, CUSTOMERS, POINTS, pools=ANY),
    step(Story.redeem, CUSTOMERS, POINTS, pools=ANY),
    step(Story.redeem_concurrently, st.lists(CUSTOMERS, min_size=2, max_size=5), POINTS),
    step(Story.send_booking, INDEXES, LATE_MS, balanced=ANY),
    step(Story.send_booking_first, CUSTOMERS, FEW_SIZES, LATE_MS),
    step(Story.redeem, CUSTOMERS, FEW_SIZES, pools=ANY),
    step(Story.reverse, INDEXES, st.sampled_from([0, 1, 5, 20])),
    step(Story.settle, INDEXES),
    step(Story.void, INDEXES, is_void=ANY),
    step(Story.repeat, INDEXES),
    step(Story.wait, st.sampled_from([1, 4_000, 30_000, WINDOW_MS])),
    step(Story.release_overdue),
)


async def start_story(service: Service) -> Story:
    """Create a shop whose customers may pool their few points."""
    story = Story(service, Shop(unique("merchant"), unique("store")))
    client, shop = service.client, story.shop
    service.clock.now_ms = NOW_MS
    await client.put_store(shop.merchant_id, shop.store_id)
    await client.put_program(
        shop.merchant_id,
        shop.store_id,
        criteria={"max_points_per_day": CAP},
        allow_group_redemption=True,
        settlement_window={"seconds": WINDOW_MS // 1_000},
        settlement_lead={"seconds": LEAD_MS // 1_000},
    )
    for name in NAMES[:2]:
        buyers = [{"store_id": shop.store_id, "buyer_id": name}]
        await client.put_customer(shop.merchant_id, name, external_id=name, buyers=buyers)
    members = [customers_pb2.UserGroup.Member(customer_id=name, can_redeem=True) for name in NAMES[:2]]
    group = customers_pb2.UserGroup(
        merchant_id=shop.merchant_id, group_id="all", primary_customer_id="ada", members=members
    )
    await client.customers.PutUserGroup(customers_pb2.PutUserGroupRequest(user_group=group))
    for name in NAMES:
        await story.event(name, 40, 10_000, None, balanced=True, scene=ORDERS)
    return story


async def read_redemptions(database: Database, story: Story) -> list[Redemption]:
    """Read a merchant's redemptions, and check their derived columns."""
    params = {"merchant_id": story.shop.merchant_id, "now_ms": story.now_ms}
    async with database.autocommit() as connection:
        rows = await connection.fetch(READ_REDEMPTIONS, params)
    redemptions = list(map(queries.read_redemption, rows))
    for row, redemption in zip(rows, redemptions, strict=True):
        written = queries.to_mutable_columns(redemption)
        stored = {name: row[name] for name in ("open_points", "released_points", "reversed_points")}
        assert stored == {name: written[name] for name in stored}
        assert row.state == redemption.state(story.now_ms)
    return redemptions


def check_redemption(redemption: Redemption) -> None:
    """Check that a redemption's draws and holds add up."""
    assert sum(draw.points for draw in redemption.draws) == redemption.content.points
    assert all(0 <= draw.reversed_points <= draw.points for draw in redemption.draws)
    assert points_by_account(redemption.draws) == {hold.key: hold.points for hold in redemption.holds}


def check_settlements(ledger: Mapping[AccountKey, StoredAccount], redemptions: Sequence[Redemption]) -> None:
    """Check that each settled hold was settled by one entry."""
    holds = [(redemption.redemption_id, hold) for redemption in redemptions for hold in redemption.holds]
    settled = {(redemption_id, hold.key) for redemption_id, hold in holds if hold.state is HoldState.SETTLED}
    claims = [(entry.settled_redemption_id, key) for key, stored in ledger.items() for entry in stored.entries]
    counts = Counter(claim for claim in claims if claim[0] is not None)
    assert set(counts.values()) <= {1}
    assert set(counts) <= settled


async def check(database: Database, story: Story) -> None:
    """Check that accounts and redemptions agree, and no point is held twice."""
    redemptions = await read_redemptions(database, story)
    usage: Counter[str] = Counter()
    expected: defaultdict[AccountKey, dict[str, tuple[int, bool]]] = defaultdict(dict)
    for redemption in redemptions:
        check_redemption(redemption)
        usage[redemption.content.redeemer] += redemption.content.points - redemption.reversed_points
        for hold in redemption.holds:
            is_open = hold.state is HoldState.OPEN and story.now_ms < redemption.settle_by_ms
            if hold.points and hold.state is not HoldState.SETTLED:
                expected[hold.key][redemption.redemption_id] = (hold.points, is_open)
    assert all(points <= CAP for points in usage.values())

    ledger = await read_ledger(database, story.shop.merchant_id)
    assert_is_fold(ledger)
    check_settlements(ledger, redemptions)
    for key, stored in ledger.items():
        account = stored.account
        points = account.points_at(story.now_ms)
        assert 0 <= points.active <= max(max(account.balance, 0) - points.expired - points.held, 0)
        held = {hold.redemption_id: (hold.points, hold.is_open(story.now_ms)) for hold in account.holds}
        assert held == expected[key]
        assert points.held == sum(points for points, is_open in expected[key].values() if is_open)


async def check_listing(story: Story) -> None:
    """Check that lists by state have redemptions in that state, and together have all."""
    service, merchant_id = story.service.client.redemption, story.shop.merchant_id
    redemption_ids = []
    for state in redemption_pb2.RedemptionState.values()[1:]:
        request = redemption_pb2.ListRedemptionsRequest(merchant_id=merchant_id, state=state, page_size=1_000)
        page = list((await service.ListRedemptions(request)).redemptions)
        assert all(redemption.state == state for redemption in page)
        redemption_ids += [redemption.redemption_id for redemption in page]
    assert sorted(redemption_ids) == sorted(redemption.redemption_id for redemption in story.redemptions)


@given(st.lists(steps, min_size=4, max_size=20))
@EXAMPLES
async def test_no_point_is_held_twice_after_any_steps(
    service: Service, database: Database, story_steps: list[Step]
) -> None:
    story = await start_story(service)
    try:
        for step in story_steps:
            await step(story)
            await check(database, story)
        await check_listing(story)
    finally:
        service.clock.now_ms = NOW_MS
