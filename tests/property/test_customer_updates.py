"""Customer webhooks on a real database: whatever way they come, the customer is the same in the end."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointbook.v1 import customers_pb2, identity_pb2
from pointbook_server.programs.model import Channel
from pointbook_server.server import Server
from support.customers import found, needless_claims, of_buyer
from support.examples import examples
from support.harness import NOW_MS, Client, Outbox, Service, Shop, TestClock, at, refused, server_settings, unique

TAKEN = "+8613800000009"
MOBILES = [None, "", "+8613800000001", "+541123456789", "+5491123456789", TAKEN, "13800000001"]
EMAILS = [None, "", "one@example.com", "Two@Example.com", "two@example.com", "no address"]
LEFT_OUT = {TAKEN, "13800000001", "no address"}
"""Values that another customer owns or that are unreadable: they leave a customer without a contact."""
KINDS = [
    customers_pb2.CUSTOMER_UPDATE_KIND_CREATED,
    customers_pb2.CUSTOMER_UPDATE_KIND_UPDATED,
    customers_pb2.CUSTOMER_UPDATE_KIND_UPDATED,
    customers_pb2.CUSTOMER_UPDATE_KIND_DELETED,
    customers_pb2.CUSTOMER_UPDATE_KIND_REDACTED,
]
BUYERS = {"here": "buyer-1", "there": "buyer-2"}
PEOPLE = ["ann", "ben", "cem"]
FIELDS = ("mobile", "email")


@dataclass(frozen=True)
class Told:
    """What a webhook tells, of which second."""

    kind: Any
    mobile: str | None
    email: str | None
    second: int
    place: str


def consistent(told: list[Told]) -> list[Told]:
    """Leave out what contradicts an earlier one: of a deletion and an update of one moment, the first alone counts."""
    deletes: dict[tuple[int, str], bool] = {}
    kept = []
    for item in told:
        is_deletion = item.kind == customers_pb2.CUSTOMER_UPDATE_KIND_DELETED
        moment = (item.second, item.place if item.place in PEOPLE else "")
        is_redaction = item.kind == customers_pb2.CUSTOMER_UPDATE_KIND_REDACTED
        if is_redaction or deletes.setdefault(moment, is_deletion) == is_deletion:
            kept.append(item)
    return kept


any_tellings = st.lists(
    st.builds(
        Told,
        st.sampled_from(KINDS),
        st.sampled_from(MOBILES),
        st.sampled_from(EMAILS),
        st.integers(0, 3),
        st.sampled_from(list(BUYERS)),
    ),
    min_size=1,
    max_size=7,
)
tellings = any_tellings.map(consistent)


def update(shop: Shop, buyer_id: str, number: int, item: Told) -> customers_pb2.ApplyCustomerUpdateRequest:
    """Make the update of a buyer."""
    return customers_pb2.ApplyCustomerUpdateRequest(
        event_id=f"e-{number}",
        merchant_id=shop.merchant_id,
        store_id=shop.store_id,
        buyer_id=buyer_id,
        kind=item.kind,
        mobile=item.mobile,
        email=item.email,
        updated_at=at(NOW_MS - 10_000 + item.second * 1_000),
    )


async def final(client: Client, told: list[tuple[int, Told]], *, registered: bool, at_once: bool) -> tuple[str, ...]:
    """Tell of a new merchant's customer, and read what they are in the end: nobody is like one without anything."""
    merchant_id = unique("merchant")
    stores = {place: unique("store") for place in BUYERS}
    for store_id in stores.values():
        await client.put_store(merchant_id, store_id)
    await client.put_customer(merchant_id, "other", mobile=TAKEN)
    if registered:
        buyers = [identity_pb2.Buyer(store_id=stores[place], buyer_id=BUYERS[place]) for place in BUYERS]
        await client.put_customer(merchant_id, "alice", buyers=buyers, external_id="crm")
    calls = []
    for number, item in told:
        # The buyers of an unregistered customer would be two customers.
        place = item.place if registered else "here"
        calls.append(update(Shop(merchant_id, stores[place]), BUYERS[place], number, item))
    if at_once:
        await asyncio.gather(*map(client.customers.ApplyCustomerUpdate, calls))
    else:
        for call in calls:
            await client.customers.ApplyCustomerUpdate(call)
    buyer = identity_pb2.Buyer(store_id=stores["here"], buyer_id=BUYERS["here"])
    request = customers_pb2.GetCustomerRequest(merchant_id=merchant_id, customer=identity_pb2.CustomerRef(buyer=buyer))
    try:
        customer = (await client.customers.GetCustomer(request)).customer
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
        return "", "", ""
    return customer.mobile, customer.email, customer.external_id


@settings(
    max_examples=examples(40),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(tellings, st.data(), st.booleans())
async def test_the_order_of_webhooks_decides_nothing(
    client: Client,
    told: list[Told],
    data: st.DataObject,
    registered: bool,  # noqa: FBT001 - Hypothesis gives it
) -> None:
    """Neither do repetitions, nor whether they come one by one or all at once."""
    numbered = list(enumerate(told))
    order = data.draw(st.permutations(numbered))
    again = data.draw(st.permutations(numbered + numbered[:3]))

    one = await final(client, order, registered=registered, at_once=False)
    other = await final(client, again, registered=registered, at_once=False)
    parallel = await final(client, again, registered=registered, at_once=True)

    assert one == other == parallel


def newest(told: list[tuple[int, Told]]) -> dict[str, tuple[tuple[int, int, str], str]]:
    """Return the newest value of each contact of one customer, with its stamp, whatever order they arrive in."""
    redactions = [item.second for _, item in told if item.kind == customers_pb2.CUSTOMER_UPDATE_KIND_REDACTED]
    redacted = max(redactions, default=-1)
    found = dict.fromkeys(FIELDS, ((-1, 0, ""), ""))
    for number, item in told:
        if item.second <= redacted:
            continue
        says = {"mobile": item.mobile, "email": item.email}
        if item.kind == customers_pb2.CUSTOMER_UPDATE_KIND_DELETED:
            says = {"mobile": "", "email": ""}
        for name, value in says.items():
            stamp = (item.second, item.kind, f"e-{number}")
            if value is not None and stamp > found[name][0]:
                found[name] = (stamp, value)
    return found


def expected(told: list[Told], *, registered: bool) -> tuple[str, str, str]:
    """Return what a customer is in the end by all webhooks together."""
    values = [value for _, value in newest(list(enumerate(told))).values()]
    mobile, email = ("" if value in LEFT_OUT else value for value in values)
    is_redacted = any(item.kind == customers_pb2.CUSTOMER_UPDATE_KIND_REDACTED for item in told)
    return mobile, email, "crm" if registered and not is_redacted else ""


@settings(
    max_examples=examples(10),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    any_tellings.filter(lambda told: len(consistent(told)) >= 4).map(lambda told: consistent(told)[:4]), st.booleans()
)
async def test_every_order_of_four_webhooks_ends_as_they_say(
    client: Client,
    told: list[Told],
    registered: bool,  # noqa: FBT001 - Hypothesis gives it
) -> None:
    """All twenty-four, each with a repetition of one that has come before."""
    orders = [(*order, order[number % 4]) for number, order in enumerate(permutations(enumerate(told)))]
    found = await asyncio.gather(
        *(final(client, list(order), registered=registered, at_once=False) for order in orders)
    )

    assert set(found) == {expected(told, registered=registered)}


@settings(
    max_examples=examples(30),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(any_tellings, st.data())
async def test_of_a_deletion_and_an_update_of_one_moment_the_first_stays(
    client: Client, told: list[Told], data: st.DataObject
) -> None:
    """In every order and with every repetition: the other one is refused each time, and changes nothing."""
    shop = Shop(unique("merchant"), unique("store"))
    await client.put_store(shop.merchant_id, shop.store_id)
    await client.put_customer(shop.merchant_id, "other", mobile=TAKEN)
    numbered = list(enumerate(told))
    accepted: dict[int, Told] = {}
    redacted = -1
    for number, item in data.draw(st.permutations(numbered + numbered[:4])):
        rivals = [each for each in accepted.values() if each.second == item.second > redacted]
        is_deletion = item.kind == customers_pb2.CUSTOMER_UPDATE_KIND_DELETED
        is_redaction = item.kind == customers_pb2.CUSTOMER_UPDATE_KIND_REDACTED
        is_refused = (
            number not in accepted
            and not is_redaction
            and any(
                (each.kind == customers_pb2.CUSTOMER_UPDATE_KIND_DELETED) != is_deletion
                for each in rivals
                if each.kind != customers_pb2.CUSTOMER_UPDATE_KIND_REDACTED
            )
        )
        call = client.customers.ApplyCustomerUpdate(update(shop, "buyer", number, item))
        if is_refused:
            assert (await refused(call)).reason == "EVENT_ID_REUSED"
            continue
        await call
        accepted[number] = item
        if is_redaction:
            redacted = max(redacted, item.second)

    values = [value for _, value in newest(sorted(accepted.items())).values()]
    mobile, email = ("" if value in LEFT_OUT else value for value in values)
    assert await of_buyer(client, shop, "buyer") == (mobile, email)


rivalries = st.lists(
    st.builds(
        Told,
        st.sampled_from(KINDS[:4] * 2 + KINDS[4:]),
        st.sampled_from([None, "", "+8613800000001", "+8613800000002", TAKEN, "13800000001"]),
        st.sampled_from([None, "one@example.com", "ONE@Example.com", "two@example.com", "no address"]),
        st.integers(0, 5),
        st.sampled_from(PEOPLE),
    ),
    min_size=2,
    max_size=9,
).map(consistent)


@pytest.fixture(scope="module")
async def clients(service: Service, admin_token: str) -> AsyncIterator[list[Client]]:
    """Clients of two servers on one database."""
    server = Server(server_settings(), service.database_url, senders={Channel.SMS: Outbox()}, clock=TestClock())
    await server.start()
    second = Client(server.port, admin_token)
    yield [service.client, second]
    await second.close()
    await server.stop()


Named = dict[str, tuple[str, str]]
"""The mobile number and the e-mail address of each person."""


def check(told: list[tuple[int, Told]], named: Named) -> None:
    """Check that a contact that one person's newest webhook names is theirs, and one that several name is one's."""
    claims = {person: newest([each for each in told if each[1].place == person]) for person in PEOPLE}
    for index, field in enumerate(FIELDS):
        wanted = {person: "" if claims[person][field][1] in LEFT_OUT else claims[person][field][1] for person in PEOPLE}
        owned = {person: contacts[index] for person, contacts in named.items()}
        for person in PEOPLE:
            assert owned[person] in {wanted[person], ""}
        for value in {value.lower() for value in wanted.values()} - {""}:
            assert [contact.lower() for contact in owned.values()].count(value) == 1


def heir(told: list[tuple[int, Told]]) -> str:
    """Return whose newest webhook names the number that another customer has, and is the newest of those."""
    claims = [(newest([each for each in told if each[1].place == person])["mobile"], person) for person in PEOPLE]
    return max([(stamp, person) for (stamp, value), person in claims if value == TAKEN], default=((), ""))[1]


@settings(
    max_examples=examples(30),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(rivalries, st.data())
async def test_the_newest_webhooks_decide_whose_a_contact_is(
    clients: list[Client], service: Service, told: list[Told], data: st.DataObject
) -> None:
    """In every order, with repetitions, one by one or all at once over two servers; and so once its owner loses it."""
    client, numbered = clients[0], list(enumerate(told))
    for at_once in (False, True):
        shop = Shop(unique("merchant"), unique("store"))
        await client.put_store(shop.merchant_id, shop.store_id)
        await client.put_customer(shop.merchant_id, "other", mobile=TAKEN)
        order = data.draw(st.permutations(numbered + numbered[:3]))
        updates = [update(shop, item.place, number, item) for number, item in order]
        if at_once:
            calls = [clients[index % 2].customers.ApplyCustomerUpdate(sent) for index, sent in enumerate(updates)]
            await asyncio.gather(*calls)
        else:
            for sent in updates:
                await client.customers.ApplyCustomerUpdate(sent)

        check(numbered, {person: await of_buyer(client, shop, person) for person in PEOPLE})
        assert await found(client, shop, mobile=TAKEN) == "other"
        await client.put_customer(shop.merchant_id, "other")
        after = {person: await of_buyer(client, shop, person) for person in PEOPLE}
        assert {person for person in PEOPLE if after[person][0] == TAKEN} == {heir(numbered)} - {""}
        assert await needless_claims(service, shop) == []
