"""Claims to contacts: the newest webhook decides, in every order of arrival."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from itertools import permutations
from typing import Any

import grpc
import pytest

from pointbook.v1 import customers_pb2, identity_pb2, redemption_pb2
from pointbook_server.customers import queries
from pointbook_server.db.database import Connection, Statement
from support.clients import Client
from support.clocks import NOW_MS, at
from support.codes import CODE_SETTINGS, guess_code, issue_and_read_code, issue_code
from support.connections import count_deadlocks, fetch_rows
from support.customers import (
    CREATED,
    DELETED,
    INVALID,
    REDACTED,
    TAKEN,
    TYPE_EMAIL,
    TYPE_MOBILE,
    contacts_of_buyer,
    customer_update,
    email,
    find_customer_id,
    find_needless_claims,
    mobile,
    move_identifier,
    read_all_tables,
    redact_customer,
    skipped_causes,
    update_outcome,
)
from support.redemption import customer_ref, earn, redeem_request, validate_request, violation_codes
from support.refusals import refusal, refused
from support.servers import Service, running_server
from support.shops import Shop
from support.unique_names import unique
from support.waiting import until_locks_are_awaited

TYPES = {"mobile": TYPE_MOBILE, "email": TYPE_EMAIL}
NEW: dict[str, Callable[[], str]] = {"mobile": mobile, "email": email}
UNREADABLE = {
    "mobile": [
        "1",
        "call me",
        "+",
        "+8613800000000 ext. 7",
        "++8613800000001",
        "+999123456789012",
        "1" * 65,
        "+8" * 5_000,
    ],
    "email": ["not-an-address", "@example.com", "ada@", "a@b@example.com", "ada@exa mple.com", "x" * 321],
}
SMS = redemption_pb2.VALIDATION_TYPE_SMS


def stated(shop: Shop, buyer_id: str, second: int, **changes: Any) -> customers_pb2.ApplyCustomerUpdateRequest:
    """Return an update with contacts at a second."""
    return customer_update(shop, buyer_id, updated_at=at(NOW_MS - 60_000 + second * 1_000), **changes)


async def apply(client: Client, *updates: customers_pb2.ApplyCustomerUpdateRequest) -> list[str]:
    """Apply updates one after another, and return their customer ids."""
    return [(await client.customers.ApplyCustomerUpdate(sent)).customer_id for sent in updates]


async def contact(client: Client, shop: Shop, buyer_id: str, field: str) -> str:
    """Return a contact of a buyer's customer."""
    return dict(zip(("mobile", "email"), await contacts_of_buyer(client, shop, buyer_id), strict=True))[field]


def buyer_of(shop: Shop, buyer_id: str) -> identity_pb2.Buyer:
    """Return a buyer of a shop."""
    return identity_pb2.Buyer(store_id=shop.store_id, buyer_id=buyer_id)


@pytest.fixture(scope="module")
async def clients(service: Service, admin_token: str) -> AsyncIterator[list[Client]]:
    """Clients of two servers on one database."""
    async with running_server(service.database_url, admin_token) as (_, second):
        yield [service.client, second]


def _changes() -> list[Any]:
    values = [(field, value) for field, unreadable in UNREADABLE.items() for value in unreadable]
    values += [(field, value) for field in TYPES for value in ("", "new", "taken")]
    return [pytest.param(field, value, id=f"{field} {value[:20] or 'empty'}") for field, value in values]


@pytest.mark.parametrize(("field", "value"), _changes())
async def test_a_released_contact_goes_to_its_claimant_in_every_order(
    client: Client, shop: Shop, field: str, value: str
) -> None:
    theirs = NEW[field]()
    await client.put_customer(shop.merchant_id, "other", **{field: theirs})
    for number, arrival in enumerate(permutations(range(3))):
        newest = {"new": NEW[field](), "taken": theirs}.get(value, value)
        freed, a, b = NEW[field](), f"a-{number}", f"b-{number}"
        updates = [
            stated(shop, a, 1, kind=CREATED, **{field: freed}),
            stated(shop, a, 2, **{field: newest}),
            stated(shop, b, 3, kind=CREATED, **{field: freed}),
        ]
        answers = [await client.customers.ApplyCustomerUpdate(updates[index]) for index in arrival]

        owner = answers[arrival.index(2)].customer_id
        assert await find_customer_id(client, shop, **{field: freed}) == owner != ""
        assert await contact(client, shop, b, field) == freed
        assert await contact(client, shop, a, field) == (newest if value == "new" else "")
        cause = {"": None, "new": None, "taken": TAKEN}.get(value, INVALID)
        assert skipped_causes(answers[arrival.index(1)]) == ({} if cause is None else {TYPES[field]: cause})
        again = await client.customers.ApplyCustomerUpdate(updates[1])
        assert update_outcome(again) == "DUPLICATE"


async def test_an_absent_field_detaches_nothing(client: Client, shop: Shop) -> None:
    number, address = mobile(), email()
    await apply(
        client, stated(shop, "a", 1, mobile=number, email=address), stated(shop, "a", 2, email="not-an-address")
    )
    await apply(client, stated(shop, "a", 3), stated(shop, "b", 4, mobile=number, email=address))

    assert await contacts_of_buyer(client, shop, "a") == (number, "")
    assert await contacts_of_buyer(client, shop, "b") == ("", address)


async def test_an_older_invalid_value_detaches_nothing(client: Client, shop: Shop) -> None:
    number = mobile()
    await apply(client, stated(shop, "a", 5, mobile=number))
    late = await client.customers.ApplyCustomerUpdate(stated(shop, "a", 4, mobile="call me"))
    taken = await client.customers.ApplyCustomerUpdate(stated(shop, "b", 3, mobile=number))

    assert (update_outcome(late), skipped_causes(late)) == ("OUTDATED", {TYPE_MOBILE: INVALID})
    assert (update_outcome(taken), skipped_causes(taken)) == ("APPLIED", {TYPE_MOBILE: TAKEN})
    assert await contacts_of_buyer(client, shop, "a") == (number, "")


async def test_a_valid_value_older_than_an_invalid_one_is_ignored(client: Client, shop: Shop) -> None:
    await apply(client, stated(shop, "a", 5, mobile="call me"))
    late = await client.customers.ApplyCustomerUpdate(stated(shop, "a", 4, mobile=mobile()))

    assert update_outcome(late) == "OUTDATED"
    assert await contacts_of_buyer(client, shop, "a") == ("", "")


Act = Callable[[Client, Shop, str], Coroutine[Any, Any, Any]]


async def replace_customer(client: Client, shop: Shop, customer_id: str, **changes: Any) -> None:
    """Replace the customer of buyer "a" or "b"."""
    buyer_id = {"alice": "a", "bob": "b"}[customer_id]
    await client.put_customer(shop.merchant_id, customer_id, buyers=[buyer_of(shop, buyer_id)], **changes)


async def move_another(client: Client, shop: Shop, _number: str) -> None:
    """Move another customer's number to alice."""
    other = mobile()
    await client.put_customer(shop.merchant_id, "giver", mobile=other)
    await move_identifier(client, shop, "giver", "alice", mobile=other)


FREEING: dict[str, Act] = {
    "another number": lambda client, shop, _: apply(client, stated(shop, "a", 20, mobile=mobile())),
    "an empty number": lambda client, shop, _: apply(client, stated(shop, "a", 20, mobile="")),
    "an unreadable number": lambda client, shop, _: apply(client, stated(shop, "a", 20, mobile="+1")),
    "a deletion": lambda client, shop, _: apply(client, stated(shop, "a", 20, kind=DELETED)),
    "a redaction webhook": lambda client, shop, _: apply(client, stated(shop, "a", 20, kind=REDACTED)),
    "RedactCustomer": lambda client, shop, _: redact_customer(client, shop, "alice"),
    "PutCustomer without it": lambda client, shop, _: replace_customer(client, shop, "alice"),
    "PutCustomer with another": lambda client, shop, _: replace_customer(client, shop, "alice", mobile=mobile()),
    "MoveIdentifier of another": move_another,
}


@pytest.mark.parametrize("act", FREEING.values(), ids=FREEING)
async def test_a_released_contact_changes_its_claimants_etag_and_pauses_codes(
    service: Service, client: Client, shop: Shop, act: Act
) -> None:
    number = mobile()
    await client.put_program(shop.merchant_id, shop.store_id, validation={"required": True, **CODE_SETTINGS})
    await earn(client, shop, 500, "b")
    await replace_customer(client, shop, "alice", mobile=number)
    await replace_customer(client, shop, "bob", language="zh", fraud_blocked=False)
    assert await apply(client, stated(shop, "b", 10, mobile=number)) == ["bob"]
    by_id = customers_pb2.GetCustomerRequest(merchant_id=shop.merchant_id, customer_id="bob")
    before = await client.customers.GetCustomer(by_id)
    await act(client, shop, number)

    after = await client.customers.GetCustomer(by_id)
    assert (after.customer.mobile, after.customer.language) == (number, "zh")
    assert int(after.etag) == int(before.etag) + 1
    assert await find_customer_id(client, shop, mobile=number) == "bob"
    assert await find_needless_claims(service, shop) == []
    error = await refused(issue_code(client, shop, 10, customer=customer_ref(shop, mobile=number), validation_type=SMS))
    assert error.reason == "CONTACT_CHANGED"


async def move_buyer(client: Client, shop: Shop, _number: str) -> None:
    """Move bob's buyer to a new customer."""
    await client.put_customer(shop.merchant_id, "carol")
    await move_identifier(client, shop, "bob", "carol", buyer=buyer_of(shop, "b"))


async def move_to_bob(client: Client, shop: Shop, _number: str) -> None:
    """Move another customer's number to bob."""
    other = mobile()
    await client.put_customer(shop.merchant_id, "giver", mobile=other)
    await move_identifier(client, shop, "giver", "bob", mobile=other)


ENDING: dict[str, Act] = {
    "another number": lambda client, shop, _: apply(client, stated(shop, "b", 20, mobile=mobile())),
    "an empty number": lambda client, shop, _: apply(client, stated(shop, "b", 20, mobile="")),
    "an unreadable number": lambda client, shop, _: apply(client, stated(shop, "b", 20, mobile="call me")),
    "a deletion": lambda client, shop, _: apply(client, stated(shop, "b", 20, kind=DELETED)),
    "a redaction webhook": lambda client, shop, _: apply(client, stated(shop, "b", 20, kind=REDACTED)),
    "RedactCustomer": lambda client, shop, _: redact_customer(client, shop, "bob"),
    "PutCustomer with another": lambda client, shop, _: replace_customer(client, shop, "bob", mobile=mobile()),
    "PutCustomer without the buyer": lambda client, shop, _: client.put_customer(shop.merchant_id, "bob"),
    "MoveIdentifier of another": move_to_bob,
    "MoveIdentifier of the buyer": move_buyer,
}


@pytest.mark.parametrize("act", ENDING.values(), ids=ENDING)
async def test_a_claim_ends_when_a_newer_change_decides_the_contact(
    service: Service, client: Client, shop: Shop, act: Act
) -> None:
    number = mobile()
    await replace_customer(client, shop, "alice", mobile=number)
    await replace_customer(client, shop, "bob")
    await apply(client, stated(shop, "b", 10, mobile=number))
    await act(client, shop, number)
    assert await fetch_rows(service, "SELECT * FROM customer_claims WHERE merchant_id = $1", shop.merchant_id) == []
    await apply(client, stated(shop, "a", 30, mobile=""))

    assert await find_customer_id(client, shop, mobile=number) == ""


async def pass_on(client: Client, shop: Shop, number: str) -> None:
    """Move alice's number to another customer and back."""
    await client.put_customer(shop.merchant_id, "carol")
    await move_identifier(client, shop, "alice", "carol", mobile=number)
    assert await find_customer_id(client, shop, mobile=number) == "carol"
    await move_identifier(client, shop, "carol", "alice", mobile=number)


KEEPING: dict[str, Act] = {
    "an update without a number": lambda client, shop, _: apply(client, stated(shop, "b", 20, email=email())),
    "an older number": lambda client, shop, _: apply(client, stated(shop, "b", 5, mobile=mobile())),
    "an older redaction": lambda client, shop, _: apply(client, stated(shop, "b", 5, kind=REDACTED)),
    "PutCustomer without a number": lambda client, shop, _: replace_customer(client, shop, "bob", email=email()),
    "the owner's move": pass_on,
}


@pytest.mark.parametrize("act", KEEPING.values(), ids=KEEPING)
async def test_a_claim_outlives_changes_that_do_not_concern_the_contact(client: Client, shop: Shop, act: Act) -> None:
    number = mobile()
    await replace_customer(client, shop, "alice", mobile=number)
    await replace_customer(client, shop, "bob")
    await apply(client, stated(shop, "b", 10, mobile=number))
    await act(client, shop, number)
    await apply(client, stated(shop, "a", 30, mobile=""))

    assert await find_customer_id(client, shop, mobile=number) == "bob"


async def test_a_claim_to_a_moved_contact_is_fulfilled(service: Service, client: Client, shop: Shop) -> None:
    number = mobile()
    await replace_customer(client, shop, "alice", mobile=number)
    await replace_customer(client, shop, "bob")
    await apply(client, stated(shop, "b", 10, mobile=number))
    await move_identifier(client, shop, "alice", "bob", mobile=number)

    assert await find_customer_id(client, shop, mobile=number) == "bob"
    assert await find_needless_claims(service, shop) == []


async def test_the_newest_claim_wins_in_every_order(client: Client, shop: Shop) -> None:
    """In the same second, the later kind wins, then the greater event id."""
    for arrival in permutations(range(4)):
        number, owner, names = mobile(), unique("owner"), [unique("b") for _ in range(4)]
        await client.put_customer(shop.merchant_id, owner, mobile=number)
        claims = [
            stated(shop, names[0], 2, mobile=number),
            stated(shop, names[1], 3, mobile=number, kind=CREATED),
            stated(shop, names[2], 3, mobile=number, event_id=f"{names[0]}-a"),
            stated(shop, names[3], 3, mobile=number, event_id=f"{names[0]}-b"),
        ]
        customers = dict(zip(arrival, await apply(client, *(claims[index] for index in arrival)), strict=True))
        await client.put_customer(shop.merchant_id, owner)

        for loser in (3, 2, 1, 0):
            assert await find_customer_id(client, shop, mobile=number) == customers[loser]
            await apply(client, stated(shop, names[loser], 9, mobile=""))
        assert await find_customer_id(client, shop, mobile=number) == ""


async def test_newer_claims_do_not_detach_an_owners_contact(client: Client, shop: Shop) -> None:
    number = mobile()
    [first, *_] = await apply(client, *(stated(shop, f"b-{second}", second, mobile=number) for second in (5, 9, 1)))
    await apply(client, stated(shop, "b-5", 20, mobile=number))

    assert await find_customer_id(client, shop, mobile=number) == first


async def test_the_newest_buyer_of_a_customer_decides_its_claim(client: Client, shop: Shop) -> None:
    number, other = mobile(), mobile()
    second = Shop(shop.merchant_id, unique("store"))
    await client.put_store(second.merchant_id, second.store_id)
    await client.put_customer(shop.merchant_id, "alice", mobile=number)
    await client.put_customer(shop.merchant_id, "bob", buyers=[buyer_of(shop, "b"), buyer_of(second, "b")])
    await apply(client, stated(shop, "b", 5, mobile=number), stated(second, "b", 6, mobile=other))
    await client.put_customer(shop.merchant_id, "alice")

    assert await contacts_of_buyer(client, shop, "b") == (other, "")
    assert await find_customer_id(client, shop, mobile=number) == ""


async def test_a_redaction_erases_claims_and_their_owners_stay(client: Client, service: Service, shop: Shop) -> None:
    theirs = await client.put_customer(shop.merchant_id, "other", mobile=mobile(), email=email())
    for by_webhook in (False, True):
        buyer_id, claim = unique("b"), {"mobile": theirs.mobile, "email": theirs.email}
        sent = stated(shop, buyer_id, 5, event_id=unique("digest"), **claim)
        [customer_id] = await apply(client, sent)
        assert sent.event_id in await read_all_tables(service)
        if by_webhook:
            await apply(client, stated(shop, buyer_id, 6, kind=REDACTED))
        else:
            await redact_customer(client, shop, customer_id)
        late = await client.customers.ApplyCustomerUpdate(sent)

        assert update_outcome(late) == "REDACTED"
        left = await read_all_tables(service)
        assert (left.count(theirs.mobile), left.count(theirs.email), sent.event_id in left) == (1, 1, False)
    await client.put_customer(shop.merchant_id, "other")
    assert (
        await find_customer_id(client, shop, mobile=theirs.mobile)
        == await find_customer_id(client, shop, email=theirs.email)
        == ""
    )


@pytest.mark.parametrize("by_webhook", [True, False])
async def test_a_redaction_erases_claims_of_copies_for_other_stores(
    client: Client, service: Service, shop: Shop, *, by_webhook: bool
) -> None:
    """The store of a webhook is not signed."""
    other = Shop(shop.merchant_id, unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    number, address, newer_number = mobile(), email(), mobile()
    await client.put_customer(shop.merchant_id, "newer_number", mobile=newer_number)
    contacts = {"mobile": number, "email": address}
    [customer_id] = await apply(client, stated(shop, "b", 5, **contacts))
    await apply(client, stated(other, "b", 5, **contacts))
    newer = customer_update(other, "b", mobile=newer_number, updated_at=at(NOW_MS + 60_000))
    if by_webhook:
        await apply(client, newer, stated(shop, "b", 6, kind=REDACTED))
    else:
        await redact_customer(client, shop, customer_id)
        await apply(client, newer)

    left = await read_all_tables(service)
    assert (number in left, address in left) == (False, False)
    await client.put_customer(shop.merchant_id, "newer_number")
    assert await contacts_of_buyer(client, other, "b") == (newer_number, "")


# Codes go with the contact.


@pytest.fixture
async def program(client: Client, shop: Shop) -> None:
    """A program that requires codes, and two customers; the first has the number."""
    await client.put_program(shop.merchant_id, shop.store_id, validation={"required": True, **CODE_SETTINGS})
    for buyer_id in ("a", "b"):
        await earn(client, shop, 500, buyer_id)


@pytest.mark.usefixtures("program")
@pytest.mark.parametrize("field", TYPES)
@pytest.mark.parametrize("value", ["unreadable", "", "taken"])
async def test_an_open_code_ends_when_its_contact_is_detached(
    service: Service, client: Client, shop: Shop, field: str, value: str
) -> None:
    theirs = NEW[field]()
    await client.put_customer(shop.merchant_id, "other", **{field: theirs})
    await replace_customer(client, shop, "alice", **{field: NEW[field]()})
    channel = redemption_pb2.VALIDATION_TYPE_SMS if field == "mobile" else redemption_pb2.VALIDATION_TYPE_EMAIL
    of_alice = customer_ref(shop, "a")
    challenge_id, code = await issue_and_read_code(service, shop, customer=of_alice, validation_type=channel)
    await apply(client, stated(shop, "a", 5, **{field: {"taken": theirs}.get(value, value)}))

    assert not await guess_code(client, shop, code, customer=of_alice)
    redeeming = redeem_request(shop, 100, customer=of_alice, validation_code=code, challenge_id=challenge_id)
    assert (await refused(client.redemption.RedeemPoints(redeeming))).metadata["status_code"] == "808"
    assert (await issue_code(client, shop, customer=of_alice, validation_type=channel)).destination == ""


@pytest.mark.usefixtures("program")
async def test_the_claimants_open_code_ends_and_the_number_is_theirs(
    service: Service, client: Client, shop: Shop
) -> None:
    number = mobile()
    await replace_customer(client, shop, "alice", mobile=number)
    await replace_customer(client, shop, "bob", email=email())
    await apply(client, stated(shop, "b", 5, mobile=number))
    of_bob = customer_ref(shop, "b")
    _, code = await issue_and_read_code(
        service, shop, customer=of_bob, validation_type=redemption_pb2.VALIDATION_TYPE_EMAIL
    )
    await apply(client, stated(shop, "a", 6, mobile="call me"))

    assert not await guess_code(client, shop, code, customer=of_bob)
    await client.apply(shop.update("b", updated_value=450, points_balance=50, update_type=2, updated_at=at(NOW_MS)))
    by_number = customer_ref(shop, mobile=number)
    assert 803 in await violation_codes(client, validate_request(shop, 100, customer=by_number))
    service.clock.move(86_400)
    count = len(service.outbox.messages)
    await issue_code(client, shop, 10, customer=of_bob, validation_type=SMS)
    [message] = service.outbox.messages[count:]
    service.clock.move(-86_400)
    assert message.destination == number


@pytest.mark.usefixtures("program")
async def test_a_call_from_a_detached_number_confirms_no_challenge(client: Client, shop: Shop) -> None:
    number, called = mobile(), "+862112345678"
    missed_call = redemption_pb2.VALIDATION_TYPE_MISSED_CALL
    settings = {"required": True, "channels": [missed_call], "missed_call_number": called}
    await client.put_program(shop.merchant_id, shop.store_id, validation=settings)
    await replace_customer(client, shop, "alice", mobile=number)
    await replace_customer(client, shop, "bob")
    await issue_code(client, shop, customer=customer_ref(shop, "a"))
    await apply(client, stated(shop, "b", 5, mobile=number), stated(shop, "a", 6, mobile="call me"))
    call = redemption_pb2.ConfirmMissedCallRequest(
        merchant_id=shop.merchant_id,
        caller_number=number,
        called_number=called,
        provider_call_id=unique("call"),
        call_time=at(NOW_MS),
    )

    assert not (await client.redemption.ConfirmMissedCall(call)).challenge_id


# Many at once.


async def test_no_claim_is_lost_between_two_servers(clients: list[Client], service: Service, shop: Shop) -> None:
    chance = random.Random(12)  # noqa: S311 - only chance
    for round_number in range(40):
        contacts = {"mobile": mobile(), "email": email()}
        a, b = f"a-{round_number}", f"b-{round_number}"
        await apply(clients[0], stated(shop, a, 1, **contacts))
        freeing, claiming = stated(shop, a, 2, mobile="call me", email=""), stated(shop, b, 3, **contacts)
        calls = [(clients[round_number % 2], freeing), (clients[1 - round_number % 2], claiming)]
        chance.shuffle(calls)
        await asyncio.gather(*(one.customers.ApplyCustomerUpdate(sent) for one, sent in calls))

        assert await contacts_of_buyer(clients[0], shop, a) == ("", "")
        assert await contacts_of_buyer(clients[0], shop, b) == (contacts["mobile"], contacts["email"])
    assert await find_needless_claims(service, shop) == []


@pytest.mark.parametrize("held", ["claim", "hand-over"])
async def test_no_claim_is_lost_while_the_other_transaction_is_open(
    clients: list[Client], service: Service, shop: Shop, monkeypatch: pytest.MonkeyPatch, held: str
) -> None:
    number = mobile()
    await apply(clients[0], stated(shop, "a", 1, mobile=number))
    calls = {"claim": stated(shop, "b", 3, mobile=number), "hand-over": stated(shop, "a", 2, mobile="")}
    first = calls.pop(held)
    [second] = calls.values()
    run = {"claim": Connection.execute, "hand-over": Connection.fetch}[held]
    running: list[asyncio.Future[Any]] = []

    async def begin_other(self: Connection, statement: Statement, values: Any = None) -> Any:
        answer = await run(self, statement, values)
        if statement is {"claim": queries.INSERT_CLAIMS, "hand-over": queries.READ_CLAIMANTS}[held] and not running:
            running.append(asyncio.ensure_future(clients[1].customers.ApplyCustomerUpdate(second)))
            await until_locks_are_awaited(service.database_url)
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(Connection, run.__name__, begin_other)
        await clients[0].customers.ApplyCustomerUpdate(first)
    await running[0]

    assert await contacts_of_buyer(clients[0], shop, "b") == (number, "")


@pytest.mark.parametrize("count", [2, 5])
async def test_concurrent_rotations_of_contacts_do_not_deadlock(
    clients: list[Client], service: Service, shop: Shop, count: int
) -> None:
    before = await count_deadlocks(service)
    for round_number in range(8):
        names = [f"b-{round_number}-{index}" for index in range(count)]
        numbers, addresses = [mobile() for _ in names], [email() for _ in names]
        for index, name in enumerate(names):
            await apply(clients[0], stated(shop, name, 1, mobile=numbers[index], email=addresses[index]))
        updates = [
            stated(shop, name, 2, mobile=numbers[(index + 1) % count], email=addresses[index - 1])
            for index, name in enumerate(names)
        ] * 2
        random.shuffle(updates)
        await asyncio.gather(
            *(clients[index % 2].customers.ApplyCustomerUpdate(sent) for index, sent in enumerate(updates))
        )

        for index, name in enumerate(names):
            expected = (numbers[(index + 1) % count], addresses[index - 1])
            assert await contacts_of_buyer(clients[0], shop, name) == expected
    assert await find_needless_claims(service, shop) == []
    assert await count_deadlocks(service) == before


async def test_a_put_and_a_concurrent_claim_of_one_number_do_not_deadlock(
    clients: list[Client], service: Service, shop: Shop
) -> None:
    before = await count_deadlocks(service)
    for round_number in range(25):
        name, old, buyer_id = unique("customer"), mobile(), f"b-{round_number}"
        await apply(clients[0], stated(shop, buyer_id, 1, kind=DELETED))
        await clients[0].put_customer(shop.merchant_id, name, mobile=old)
        calls: list[Any] = [
            clients[0].put_customer(shop.merchant_id, name, mobile=mobile(), buyers=[buyer_of(shop, buyer_id)]),
            clients[1].customers.ApplyCustomerUpdate(stated(shop, buyer_id, 2, mobile=old)),
        ]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        errors = {refusal(answer).reason for answer in answers if isinstance(answer, grpc.aio.AioRpcError)}
        assert errors <= {"IDENTIFIER_TAKEN"}
    assert await find_needless_claims(service, shop) == []
    assert await count_deadlocks(service) == before


async def test_a_contact_with_many_concurrent_claims_reaches_the_last_claimant(
    clients: list[Client], service: Service, shop: Shop
) -> None:
    number, keeper = mobile(), "keeper"
    updates = [stated(shop, keeper, 1, mobile=number)]
    for index in range(12):
        updates += [stated(shop, f"b-{index}", 2, mobile=number), stated(shop, f"b-{index}", 3, mobile="")]
    random.shuffle(updates)
    await asyncio.gather(
        *(clients[index % 2].customers.ApplyCustomerUpdate(sent) for index, sent in enumerate(updates))
    )

    assert await contacts_of_buyer(clients[0], shop, keeper) == (number, "")
    assert await find_needless_claims(service, shop) == []
