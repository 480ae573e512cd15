"""A customer's timeline: entries of all sources in one order, in pages."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from pointbook.v1 import identity_pb2, redemption_pb2
from pointbook_common.durations import DAY_MS
from support.clients import Client
from support.clocks import NOW_MS, at
from support.codes import CODE_SETTINGS, WRONG_CODE, guess_code, issue_and_read_code
from support.redemption import booking, customer_ref, earn, redeem, redeem_request, reverse, validate_request
from support.refusals import refused
from support.servers import Service
from support.shops import Shop
from support.statements import recorded_statements
from support.unique_names import unique

Entry = redemption_pb2.TimelineEntry


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """Create a shop that sends codes, with a customer of two buyers and 500 points."""
    client = service.client
    second = unique("store")
    await client.put_store(shop.merchant_id, second)
    await client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation=CODE_SETTINGS)
    await client.put_customer(
        shop.merchant_id,
        "c-1",
        mobile="+8613812345678",
        email="bea@example.com",
        buyers=[{"store_id": shop.store_id, "buyer_id": "buyer"}, {"store_id": second, "buyer_id": "b-2"}],
    )
    await earn(client, shop, 500)
    await earn(client, Shop(shop.merchant_id, second), 70, "b-2", updated_at=at(NOW_MS - 2 * DAY_MS))
    yield shop
    service.clock.now_ms = NOW_MS


async def read_page(client: Client, shop: Shop, **changes: Any) -> redemption_pb2.ListCustomerTimelineResponse:
    """Read a page of a timeline, by default of the shop's customer."""
    values: dict[str, Any] = {"merchant_id": shop.merchant_id} | changes
    if not {"customer", "customer_id"} & set(values):
        values["customer_id"] = "c-1"
    return await client.redemption.ListCustomerTimeline(redemption_pb2.ListCustomerTimelineRequest(**values))


async def read_all(client: Client, shop: Shop, size: int, **changes: Any) -> list[Entry]:
    """Read a whole timeline in pages."""
    entries: list[Entry] = []
    token = ""
    while token or not entries:
        response = await read_page(client, shop, page_size=size, page_token=token, **changes)
        assert len(response.entries) <= size
        entries += response.entries
        token = response.next_page_token
        if not token:
            break
    return entries


def summarise(entry: Entry) -> str:
    """Return an entry in a few words."""
    which = entry.WhichOneof("entry")
    if which == "points_entry":
        update = entry.points_entry.update
        return f"{'+' if update.update_type == 1 else '-'}{update.updated_value}"
    if which == "redemption":
        return f"redeem {entry.redemption.points}"
    if which == "reversal":
        return f"reverse {entry.reversal.points}"
    if which == "closing":
        return f"{redemption_pb2.ClosingAction.Name(entry.closing.action)[15:].lower()} {entry.closing.points}"
    if which == "refusal":
        return f"refuse {entry.refusal.status.code}"
    return entry.validation_event.outcome


async def record_everything(service: Service, shop: Shop) -> None:
    """Make every kind of entry, a minute apart."""
    client, clock = service.client, service.clock
    challenge_id, code = await issue_and_read_code(service, shop)
    clock.move(60)
    assert not await guess_code(client, shop, WRONG_CODE, challenge_id=challenge_id)
    clock.move(60)
    first = await redeem(client, redeem_request(shop, 100, validation_code=code))
    clock.move(60)
    await reverse(client, first, 30)
    clock.move(60)
    await client.apply(booking(shop, 70, 430, after_ms=clock.now_ms - NOW_MS))
    clock.move(60)
    await refused(redeem(client, redeem_request(shop, 999)))
    clock.move(60)
    second = await redeem(client, redeem_request(shop, 50))
    clock.move(60)
    request = redemption_pb2.SettleRedemptionRequest(
        merchant_id=shop.merchant_id, redemption_id=second.redemption_id, reason="its webhook was lost"
    )
    await client.redemption.SettleRedemption(request)


LIFE = [
    "settle 50",
    "redeem 50",
    "refuse 803",
    "-70",
    "reverse 30",
    "redeem 100",
    "USED",
    "RIGHT",
    "refuse 808",
    "WRONG",
    "SENT",
    "OPENED",
    "+500",
    "+70",
]


async def test_entries_of_all_sources_are_listed_newest_first(service: Service, client: Client, shop: Shop) -> None:
    await record_everything(service, shop)
    entries = (await read_page(client, shop)).entries

    assert [summarise(each) for each in entries] == LIFE
    times = [each.time.ToMilliseconds() for each in entries]
    assert times == sorted(times, reverse=True)


async def test_entries_name_settled_redemption_with_its_current_state(
    service: Service, client: Client, shop: Shop
) -> None:
    await record_everything(service, shop)
    entries = (await read_page(client, shop)).entries
    redemptions = {summarise(each): each.redemption for each in entries if each.HasField("redemption")}
    (booked,) = [each.points_entry for each in entries if summarise(each) == "-70"]
    (reversal,) = [each.reversal for each in entries if each.HasField("reversal")]
    (closing,) = [each.closing for each in entries if each.HasField("closing")]

    first, second = redemptions["redeem 100"], redemptions["redeem 50"]
    assert booked.settled_redemption_id == reversal.redemption_id == first.redemption_id
    assert (first.reversed_points, first.state) == (30, redemption_pb2.REDEMPTION_STATE_SETTLED)
    assert (closing.redemption_id, closing.reason) == (second.redemption_id, "its webhook was lost")
    assert first.customer.customer_id == "c-1"


async def test_release_is_listed_with_points(service: Service, client: Client, shop: Shop) -> None:
    await redeem(client, redeem_request(shop, 120))
    service.clock.move(3 * 86_400 + 1)
    await service.server.services.redemptions.release_overdue(service.clock())
    entries = (await read_page(client, shop)).entries

    assert summarise(entries[0]) == "release 120"
    assert entries[0].time == at(service.clock.now_ms)
    assert entries[0].closing.reason == "not booked in time"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 13])
async def test_pages_of_any_size_make_the_same_timeline(
    service: Service, client: Client, shop: Shop, size: int
) -> None:
    await record_everything(service, shop)
    assert await read_all(client, shop, size) == list((await read_page(client, shop)).entries)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
async def test_entries_of_one_millisecond_are_paged(service: Service, client: Client, shop: Shop, size: int) -> None:
    for _ in range(3):
        await client.redemption.ValidateRedemption(validate_request(shop, 999))
    _, code = await issue_and_read_code(service, shop)
    made = [
        await redeem(client, redeem_request(shop, 100, validation_code=code)),
        await redeem(client, redeem_request(shop, 20)),
    ]
    for each in made:
        await reverse(client, each, 5)
        await reverse(client, each, 6)
    for points, balance in ((89, 411), (9, 402), (1, 401), (1, 400)):
        await client.apply(booking(shop, points, balance, after_ms=0))
    whole = list((await read_page(client, shop)).entries)

    kinds = [str(each.WhichOneof("entry")) for each in whole if each.time == at(NOW_MS)]
    assert list(dict.fromkeys(kinds)) == ["points_entry", "reversal", "redemption", "refusal", "validation_event"]
    assert [summarise(each) for each in whole[:4]] == ["-1", "-1", "-9", "-89"]
    assert [each.validation_event.outcome for each in whole if each.HasField("validation_event")] == [
        "USED",
        "RIGHT",
        "SENT",
        "OPENED",
    ]
    assert await read_all(client, shop, size) == whole


async def test_new_entries_between_pages_do_not_move_later_pages(service: Service, client: Client, shop: Shop) -> None:
    await record_everything(service, shop)
    whole = list((await read_page(client, shop)).entries)
    first = await read_page(client, shop, page_size=4)
    service.clock.move(60)
    await redeem(client, redeem_request(shop, 10))
    await client.apply(booking(shop, 10, 420, after_ms=service.clock.now_ms - NOW_MS))
    rest = await read_page(client, shop, page_token=first.next_page_token, page_size=4)

    assert [summarise(each) for each in (*first.entries, *rest.entries)] == [summarise(each) for each in whole[:8]]


@pytest.mark.parametrize("late", ["buyer", "b-2"])
@pytest.mark.parametrize("size", range(1, 6))
async def test_late_event_does_not_move_entries_of_another_account(
    client: Client, shop: Shop, size: int, late: str
) -> None:
    customer = (await read_page(client, shop)).customer
    shops = {buyer.buyer_id: Shop(shop.merchant_id, buyer.store_id) for buyer in customer.buyers}

    async def receive(buyer_id: str, number: int, balance: int) -> None:
        event_id = f"{shop.merchant_id}-{buyer_id}-{number}"
        changes: dict[str, Any] = {"updated_value": 1, "points_balance": balance, "updated_at": at(NOW_MS)}
        await client.apply(shops[buyer_id].update(buyer_id, event_id=event_id, **changes))

    for number in (1, 2, 3):
        await receive("buyer", number, 501 + number)
        await receive("b-2", number, 71 + number)
    whole = list((await read_page(client, shop)).entries)
    first = await read_page(client, shop, page_size=size)
    await receive(late, 0, 501 if late == "buyer" else 71)
    rest = await read_page(client, shop, page_token=first.next_page_token)

    event_ids = [each.points_entry.update.event_id for each in (*first.entries, *rest.entries)]
    assert [event_id for event_id in event_ids if event_id != f"{shop.merchant_id}-{late}-0"] == [
        each.points_entry.update.event_id for each in whole
    ]


async def test_start_time_is_inclusive_and_end_time_exclusive(service: Service, client: Client, shop: Shop) -> None:
    await record_everything(service, shop)
    whole = list((await read_page(client, shop)).entries)
    for minute in range(-1, 9):
        moment = at(NOW_MS + minute * 60_000)
        time_ms = moment.ToMilliseconds()
        older = [each for each in whole if each.time.ToMilliseconds() < time_ms]
        newer = [each for each in whole if each.time.ToMilliseconds() >= time_ms]
        assert await read_all(client, shop, 2, end_time=moment) == older
        assert list((await read_page(client, shop, start_time=moment)).entries) == newer


async def test_void_and_late_entries_are_listed_in_order(client: Client, shop: Shop) -> None:
    update = shop.update(updated_value=900, points_balance=None, update_type=2, updated_at=at(NOW_MS - 5_000))
    assert (await refused(client.apply(update))).reason == "INSUFFICIENT_POINTS"
    await client.apply(booking(shop, 30, 470, after_ms=-1_000))
    await client.apply(shop.update(updated_value=5, points_balance=505, updated_at=at(NOW_MS - 10_000)))

    assert [summarise(each) for each in (await read_page(client, shop)).entries] == ["-30", "+5", "+500", "+70"]


async def test_customer_has_masked_contacts(client: Client, shop: Shop) -> None:
    customer = (await read_page(client, shop, customer=identity_pb2.CustomerRef(mobile="+86 138 1234 5678"))).customer
    assert customer.customer.customer_id == "c-1"
    assert (customer.masked_mobile, customer.masked_email) == ("+86******5678", "b***@example.com")
    assert {each.buyer_id for each in customer.buyers} == {"buyer", "b-2"}

    await earn(client, shop, 20, "unknowns")
    response = await read_page(client, shop, customer=customer_ref(shop, "unknowns"))
    assert response.customer.customer.buyer.buyer_id == "unknowns"
    assert (response.customer.masked_mobile, response.customer.masked_email) == ("", "")
    assert [summarise(each) for each in response.entries] == ["+20"]


async def test_timeline_includes_history_of_buyer_before_registration(client: Client, shop: Shop) -> None:
    await earn(client, shop, 300, "late")
    customer = customer_ref(shop, "late")
    await redeem(client, redeem_request(shop, 100, customer=customer))
    await client.redemption.ValidateRedemption(validate_request(shop, 999, customer=customer))
    await client.put_customer(
        shop.merchant_id, "c-2", external_id="x-2", buyers=[{"store_id": shop.store_id, "buyer_id": "late"}]
    )
    await redeem(client, redeem_request(shop, 50, customer=customer))

    entries = await read_all(client, shop, 1, customer_id="c-2")
    assert sorted(summarise(each) for each in entries) == ["+300", "redeem 100", "redeem 50", "refuse 803"]


async def test_page_takes_fixed_number_of_statements(service: Service, client: Client, shop: Shop) -> None:
    """Three find the customer, and each source takes one."""
    with recorded_statements(shop) as of_few:
        await read_page(client, shop)
    await record_everything(service, shop)
    with recorded_statements(shop) as of_more:
        await read_page(client, shop)
    assert len(of_more) == len(of_few) <= 9


async def test_wrong_requests_and_unknown_customers_are_refused(service: Service, client: Client, shop: Shop) -> None:
    events = redemption_pb2.ListValidationEventsRequest(merchant_id=shop.merchant_id, customer_id="c-1", page_size=1)
    await issue_and_read_code(service, shop)
    strange = (await client.redemption.ListValidationEvents(events)).next_page_token
    assert strange
    wrong: list[tuple[dict[str, Any], set[str]]] = [
        ({"merchant_id": ""}, {"merchant_id"}),
        ({"page_size": 1_001, "page_token": "x"}, {"page_size", "page_token"}),
        ({"page_token": strange}, {"page_token"}),
        ({"customer_id": "two words"}, {"customer_id"}),
    ]
    for changes, fields in wrong:
        assert set((await refused(read_page(client, shop, **changes))).fields) == fields
    for who in ({"customer_id": "unknown"}, {"customer": identity_pb2.CustomerRef(email="unknown@example.com")}):
        refusal = await refused(read_page(client, shop, **who))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "CUSTOMER_NOT_FOUND")
