"""Decreases and redemptions count once, in any order and with repetitions."""

from collections.abc import Sequence
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointbook.v1 import points_pb2, redemption_pb2
from pointbook_server.db.database import Database
from pointbook_server.redemption.verifier import RedemptionMismatch, RedemptionVerifier
from support.clocks import NOW_MS
from support.examples import examples
from support.redemption import SETTLED, UNSETTLED, account_points, booking, earn, get_redemption, redeem, redeem_request
from support.servers import Service
from support.shops import Shop
from support.unique_names import unique

EXAMPLES = settings(
    max_examples=examples(40),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
LEAD_MS = 600_000
STEP_MS = 10_000
"""How much time passes between two things at most: all of them happen inside the lead."""
SIZES = st.lists(st.sampled_from([10, 10, 20, 30]), min_size=1, max_size=5)


async def create_shop(service: Service, points: int, leftovers: Sequence[int]) -> Shop:
    """Create a shop with a buyer's points, and old redemptions never booked."""
    client, shop = service.client, Shop(unique("merchant"), unique("store"))
    service.clock.now_ms = NOW_MS - LEAD_MS
    await client.put_store(shop.merchant_id, shop.store_id)
    await client.put_program(
        shop.merchant_id,
        shop.store_id,
        criteria={},
        settlement_lead={"seconds": LEAD_MS // 1_000},
        settlement_window={"seconds": 60},
    )
    await earn(client, shop, points)
    for size in leftovers:
        if size <= points:
            await redeem(client, redeem_request(shop, size))
            service.clock.now_ms += 60_000
    service.clock.now_ms = NOW_MS
    await client.put_program(
        shop.merchant_id, shop.store_id, criteria={}, settlement_lead={"seconds": LEAD_MS // 1_000}
    )
    return shop


class Till:
    """A till that books its sales in SHOPLINE and redeems them, in any order."""

    def __init__(self, service: Service, shop: Shop, sizes: Sequence[int]) -> None:
        self._service, self._shop = service, shop
        self._orders = [redeem_request(shop, size) for size in sizes]
        self._to_book, self._balance = list(sizes), sum(sizes)
        self._booked: list[points_pb2.PointsUpdate] = []
        self.redemptions: dict[str, redemption_pb2.Redemption] = {}

    async def book(self) -> None:
        """Book the next sale in SHOPLINE, and send its webhook."""
        if self._to_book:
            size = self._to_book.pop(0)
            self._balance -= size
            after_ms = self._service.clock.now_ms - NOW_MS
            self._booked.append(booking(self._shop, size, self._balance, after_ms))
            await self._service.client.apply(self._booked[-1])

    async def redeem(self, place: int) -> None:
        """Redeem a sale, perhaps again."""
        request = self._orders[place % len(self._orders)]
        response = await redeem(self._service.client, request)
        known = self.redemptions.setdefault(request.external_reference_number, response)
        assert response.redemption_id == known.redemption_id

    async def repeat(self, place: int) -> None:
        """Repeat a webhook."""
        if self._booked:
            await self._service.client.apply(self._booked[place % len(self._booked)])

    async def finish(self) -> None:
        """Book and redeem the sales that are left."""
        for place in range(len(self._orders)):
            await self.redeem(place)
            self._service.clock.now_ms += 1
            await self.book()
            self._service.clock.now_ms += 1


PLACES = st.integers(0, 9)
STEPS = st.lists(
    st.tuples(
        st.one_of(st.just(("book",)), st.tuples(st.just("redeem"), PLACES), st.tuples(st.just("repeat"), PLACES)),
        st.integers(1, STEP_MS),
    ),
    max_size=14,
)


@given(sizes=SIZES, leftovers=st.lists(st.sampled_from([10, 20]), max_size=2), steps=STEPS)
@EXAMPLES
async def test_decreases_and_redemptions_in_any_order_count_once(
    service: Service, database: Database, sizes: list[int], leftovers: list[int], steps: list[tuple[Any, int]]
) -> None:
    """In the end no points are active or held, and every sale is settled.

    None of the old redemptions is.
    """
    shop = await create_shop(service, sum(sizes), leftovers)
    till = Till(service, shop, sizes)
    try:
        for (name, *places), after_ms in steps:
            await getattr(till, name)(*places)
            service.clock.now_ms += after_ms
        await till.finish()

        states = [(await get_redemption(service.client, each)).state for each in till.redemptions.values()]
        assert states == [SETTLED] * len(sizes)
        assert await account_points(service.client, shop) == (0, 0, 0)
        listing = redemption_pb2.ListRedemptionsRequest(merchant_id=shop.merchant_id, state=UNSETTLED)
        old = (await service.client.redemption.ListRedemptions(listing)).redemptions
        assert len(old) == sum(size <= sum(sizes) for size in leftovers)
        mismatches: list[RedemptionMismatch] = []
        await RedemptionVerifier(database).run(shop.merchant_id, "", "", service.clock.now_ms, mismatches.append)
        assert mismatches == []
    finally:
        service.clock.now_ms = NOW_MS
