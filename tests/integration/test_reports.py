"""Reports on a merchant, compared with sums made through the API."""

from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import pytest

from pointbook.v1 import points_pb2, redemption_pb2
from pointbook_common.durations import DAY_MS
from pointbook_server.calendars import Calendar
from pointbook_server.db.database import Database
from pointbook_server.ledger.report import NEVER, LedgerReporter, OutstandingPoints, PointsReport, PointsScope
from pointbook_server.programs.transactions import ProgramTransactions
from pointbook_server.redemption.report import (
    RedemptionGroup,
    RedemptionReporter,
    RedemptionScope,
    RedemptionSums,
)
from pointbook_server.validation_codes.report import CodeReporter, CodesScope
from support.clients import Client
from support.clocks import NOW_MS, at
from support.codes import WRONG_CODE, add_customers, guess_code, issue_and_read_code, issue_code, read_audit
from support.points import decrease, increase, void_entries
from support.redemption import booking, customer_ref, earn, get_redemption, redeem, redeem_request, reverse
from support.servers import Service
from support.shops import Shop
from support.unique_names import unique

UTC_CALENDAR = Calendar("UTC")
SHANGHAI = "Asia/Shanghai"
BUYERS = ("buyer", "other", "poor", "old")
MAY_31_END_MS = int(datetime(2026, 5, 31, 16, tzinfo=UTC).timestamp()) * 1_000
"""The end of May in Shanghai."""
SETTLEMENT_MS = 72 * 3_600_000


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """A shop with redemptions in several states, expired points, drift and a debt."""
    client = service.client
    await client.put_program(shop.merchant_id, shop.store_id, criteria={}, time_zone=SHANGHAI)
    await earn(client, shop, 500, points_expiry_time=at(NOW_MS + 40 * DAY_MS))
    await earn(client, shop, 300, "other")
    await client.apply(increase(shop, 0, 10, 10, buyer_id="poor"))
    await client.apply(decrease(shop, 1, 40, -30, buyer_id="poor"))
    await client.apply(increase(shop, 0, 70, 75, buyer_id="old", points_expiry_time=at(NOW_MS - 1)))
    await client.apply(increase(shop, 1, 5, 90, buyer_id="old"))
    unwanted = increase(shop, 2, 1_000, 1_310, buyer_id="other")
    await client.apply(unwanted)
    await void_entries(client, shop, unwanted.event_id)
    for points in (30, 20, 10):
        redeemed = await redeem(client, redeem_request(shop, points))
    await reverse(client, redeemed, 4)
    await client.apply(booking(shop, 20, 480))
    yield shop
    service.clock.now_ms = NOW_MS


async def read_accounts(client: Client, shop: Shop) -> list[points_pb2.PointsAccount]:
    """Read all accounts of a shop, with their lots."""
    return [await client.account(shop.merchant_id, shop.store_id, buyer) for buyer in BUYERS]


async def points_report(database: Database, shop: Shop, **scope: Any) -> PointsReport:
    """Return the report on a shop's points."""
    return await LedgerReporter(database).run(PointsScope(shop.merchant_id, **scope), UTC_CALENDAR, NOW_MS)


async def test_points_are_the_sums_of_all_accounts(client: Client, database: Database, shop: Shop) -> None:
    accounts = await read_accounts(client, shop)
    report = await points_report(database, shop)

    assert report.accounts == len(BUYERS)
    assert report.balance == sum(account.points_balance for account in accounts) == 480 + 300 - 30 + 90
    assert report.active == sum(account.active_points for account in accounts)
    assert report.held == sum(account.held_points for account in accounts) == 30 + 6
    assert report.holding_accounts == 1
    assert report.expired == sum(account.expired_points for account in accounts) == 70
    assert report.expired_accounts == 1
    assert (report.negative_accounts, report.negative_balance) == (1, -30)
    assert (report.drifting_accounts, report.drift) == (1, sum(account.drift for account in accounts)) == (1, 10)
    assert report.flow.opened + report.flow.earned == sum(account.lifetime_points for account in accounts)
    assert report.end_balance == report.balance


async def test_outstanding_points_are_those_of_the_lots_by_month(
    client: Client, database: Database, shop: Shop
) -> None:
    lots = Counter[str]()
    for account in await read_accounts(client, shop):
        for lot in account.lots:
            expiry = lot.points_expiry_time.ToDatetime()
            if not lot.HasField("points_expiry_time") or lot.points_expiry_time.ToMilliseconds() > NOW_MS:
                lots[f"{expiry:%Y-%m}" if lot.HasField("points_expiry_time") else NEVER] += lot.remaining_points
    report = await points_report(database, shop)

    assert {month: outstanding.points for month, outstanding in report.outstanding.items()} == lots
    assert report.outstanding == {
        "2026-07": OutstandingPoints(points=480, unheld=480 - 36, accounts=1),
        NEVER: OutstandingPoints(points=300 + 20, unheld=320, accounts=2),
    }
    assert sum(each.unheld for each in report.outstanding.values()) == report.active


async def test_flow_of_a_period_has_only_its_events(database: Database, shop: Shop) -> None:
    everything = (await points_report(database, shop)).flow
    today = await points_report(database, shop, start_ms=NOW_MS)
    before = await points_report(database, shop, end_ms=NOW_MS)

    assert (everything.earned, everything.spent, everything.redeemed) == (500 + 300 + 10 + 70 + 5, 40 + 20, 20)
    assert (everything.opened, everything.drift, everything.expired) == (5, 10, 0)
    assert (today.flow.spent, today.flow.redeemed, today.flow.earned) == (20, 20, 0)
    assert (before.flow.spent, before.flow.redeemed) == (40, 0)
    assert before.end_balance == today.start_balance == before.start_balance + before.flow.change
    assert today.end_balance == today.balance


async def test_stores_add_up_to_their_merchant(client: Client, database: Database, shop: Shop) -> None:
    second = Shop(shop.merchant_id, unique("store"))
    await client.put_store(second.merchant_id, second.store_id)
    await client.apply(second.update())
    reporter = LedgerReporter(database)
    one, other, both = [
        await reporter.run(PointsScope(shop.merchant_id, store_id), UTC_CALENDAR, NOW_MS)
        for store_id in (shop.store_id, second.store_id, "")
    ]

    assert other.balance == other.active == other.flow.earned == 20
    assert one.balance + other.balance == both.balance
    assert one.flow.earned + other.flow.earned == both.flow.earned
    assert one.flow.opened + other.flow.opened == both.flow.opened
    assert one.accounts + other.accounts == both.accounts


async def redemption_sums(
    database: Database, shop: Shop, now_ms: int = NOW_MS, **scope: Any
) -> dict[RedemptionGroup, RedemptionSums]:
    """Return the sums of a shop's redemptions."""
    reporter = RedemptionReporter(database, ProgramTransactions(database))
    return (await reporter.run(RedemptionScope(shop.merchant_id, **scope), now_ms)).sums


async def test_redemptions_are_those_that_the_api_lists(client: Client, database: Database, shop: Shop) -> None:
    request = redemption_pb2.ListRedemptionsRequest(merchant_id=shop.merchant_id)
    listed = (await client.redemption.ListRedemptions(request)).redemptions
    sums = await redemption_sums(database, shop)

    expected: dict[str, list[redemption_pb2.Redemption]] = {}
    for redemption in listed:
        name = redemption_pb2.RedemptionState.Name(redemption.state).removeprefix("REDEMPTION_STATE_")
        expected.setdefault(name, []).append(redemption)
    assert {group.state for group in sums} == set(expected) == {"PENDING", "SETTLED"}
    for group, total in sums.items():
        redemptions = expected[group.state]
        assert (group.program_id, group.month) == (1, "2026-05")
        assert total.redemptions == len(redemptions)
        assert total.points == sum(each.points for each in redemptions)
        assert total.redeem_value == sum(Decimal(each.redeem_value) for each in redemptions)
        assert total.redeem_local_value == sum(Decimal(each.redeem_local_value) for each in redemptions)
        assert total.reversed_points == sum(each.reversed_points for each in redemptions)
        assert total.reversed_value == total.reversed_points * Decimal("0.01")
        assert (total.overdue, total.overdue_points) == (0, 0)


async def test_holds_that_are_not_released_in_time_are_overdue(
    service: Service, database: Database, shop: Shop
) -> None:
    later_ms = NOW_MS + SETTLEMENT_MS
    due = await redemption_sums(database, shop, later_ms)
    service.clock.now_ms = later_ms
    await service.server.services.redemptions.release_overdue(later_ms)
    released = await redemption_sums(database, shop, later_ms)

    unsettled = RedemptionGroup(1, "2026-05", "UNSETTLED")
    assert (due[unsettled].overdue, due[unsettled].overdue_points) == (2, 36)
    assert (released[unsettled].overdue, released[unsettled].overdue_points) == (0, 0)
    assert released[unsettled].points == due[unsettled].points == 40


async def test_months_and_days_are_those_of_the_program(service: Service, database: Database, shop: Shop) -> None:
    for time_ms, points in ((MAY_31_END_MS - 1, 50), (MAY_31_END_MS, 60)):
        service.clock.now_ms = time_ms
        await redeem(service.client, redeem_request(shop, points, customer=customer_ref(shop, "other")))
    now_ms = MAY_31_END_MS + 1

    def points_by_month(sums: dict[RedemptionGroup, RedemptionSums]) -> dict[str, int]:
        months = Counter[str]()
        for group, total in sums.items():
            months[group.month] += total.points
        return dict(months)

    june = date(2026, 6, 1)
    assert points_by_month(await redemption_sums(database, shop, now_ms)) == {"2026-05": 60 + 50, "2026-06": 60}
    assert points_by_month(await redemption_sums(database, shop, now_ms, first_day=june)) == {"2026-06": 60}
    assert points_by_month(await redemption_sums(database, shop, now_ms, last_day=date(2026, 5, 30))) == {"2026-05": 60}
    in_utc = await redemption_sums(database, shop, now_ms, time_zone="UTC")
    assert points_by_month(in_utc) == {"2026-05": 60 + 50 + 60}


async def test_a_store_has_the_redemptions_that_drew_from_it(client: Client, database: Database, shop: Shop) -> None:
    second = Shop(shop.merchant_id, unique("store"))
    await client.put_store(second.merchant_id, second.store_id)
    await client.put_program(shop.merchant_id, second.store_id, program_id=2, criteria={}, point_value="0.02")
    await earn(client, second, 100, "third")
    reference = customer_ref(second, "third")
    made = await redeem(client, redeem_request(second, 40, program_id=2, customer=reference))
    sums = await redemption_sums(database, shop, store_id=second.store_id)

    assert {group: total.points for group, total in sums.items()} == {RedemptionGroup(2, "2026-05", "PENDING"): 40}
    assert Decimal((await get_redemption(client, made)).redeem_value) == Decimal("0.80")
    assert [total.redeem_value for total in sums.values()] == [Decimal("0.80")]


async def test_codes_are_counted_as_the_audit_has_them(service: Service, client: Client, database: Database) -> None:
    shop = Shop(unique("merchant"), unique("store"))
    await client.put_store(shop.merchant_id, shop.store_id)
    await add_customers(client, shop, ["ada", "bea"])
    ada, bea = (customer_ref(shop, name) for name in ("ada", "bea"))
    challenge_id, code = await issue_and_read_code(service, shop, customer=ada)
    for _ in range(3):
        await issue_code(client, shop, customer=ada)  # within the cooldown
    assert await guess_code(client, shop, code, customer=ada, challenge_id=challenge_id)
    challenge_id, _ = await issue_and_read_code(service, shop, customer=bea)
    for _ in range(8):
        assert not await guess_code(client, shop, WRONG_CODE, customer=bea, challenge_id=challenge_id)
    audit = Counter((action, outcome) for action, outcome, _ in await read_audit(service, shop))
    events = await CodeReporter(database).run(CodesScope(shop.merchant_id))

    today = datetime.fromtimestamp(NOW_MS / 1_000, UTC).date()
    assert {(each.action, each.outcome): each.events for each in events} == audit
    assert {(each.day, each.channel) for each in events} == {(today, "SMS")}
    assert audit == {
        ("ISSUE", "OPENED"): 2, ("ISSUE", "HELD"): 3, ("DELIVER", "SENT"): 2,
        ("GUESS", "RIGHT"): 1, ("GUESS", "WRONG"): 5, ("GUESS", "LOCKED"): 3,
    }  # fmt: skip
    assert await CodeReporter(database).run(CodesScope(shop.merchant_id, today, today)) == events
    for period in (CodesScope(shop.merchant_id, last_day=date(2026, 5, 1)), CodesScope("another-merchant")):
        assert await CodeReporter(database).run(period) == []
