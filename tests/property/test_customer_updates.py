"""Customer webhooks on a real database: the order of arrival does not matter."""

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
from support.clients import Client
from support.clocks import NOW_MS, at
from support.customers import contacts_of_buyer, find_customer_id, find_needless_claims
from support.examples import examples
from support.refusals import refused
from support.servers import Service, running_server
from support.shops import Shop
from support.unique_names import unique

TAKEN = "+8613800000009"
MOBILES = [None, "", "+8613800000001", "+541123456789", "+5491123456789", TAKEN, "13800000001"]
EMAILS = [None, "", "one@example.com", "Two@Example.com", "two@example.com", "no address"]
LEFT_OUT = {TAKEN, "13800000001", "no address"}
"""Values that are invalid or belong to another customer: they leave a customer without a contact."""
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
class Stated:
    """The contacts that a webhook states, and its second."""

    kind: Any
    mobile: str | None
    email: str | None
    second: int
    place: str


def consistent(updates: list[Stated]) -> list[Stated]:
    """Drop updates that contradict an earlier one: the first of a time counts."""
    deletes: dict[tuple[int, str], bool] = {}
    accepted = []
    for item in updates:
        is_deletion = item.kind == customers_pb2.CUSTOMER_UPDATE_KIND_DELETED
        moment = (item.second, item.place if item.place in PEOPLE else "")
        is_redaction = item.kind == customers_pb2.CUSTOMER_UPDATE_KIND_REDACTED
        if is_redaction or deletes.setdefault(moment, is_deletion) == is_deletion:
            accepted.append(item)
    return accepted


any_updates = st.lists(
    st.builds(
        Stated,
        st.sampled_from(KINDS),
        st.sampled_from(MOBILES),
        st.sampled_from(EMAILS),
        st.integers(0, 3),
        st.sampled_from(list(BUYERS)),
    ),
    min_size=1,
    max_size=7,
)
consistent_updates = any_updates.map(consistent)


def update(shop: Shop, buyer_id: str, number: int, item: Stated) -> customers_pb2.ApplyCustomerUpdateRequest:
    """Return the update of a buyer."""
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


async def final(
    client: Client, updates: list[tuple[int, Stated]], *, registered: bool, at_once: bool
) -> tuple[str, ...]:
    """Apply updates to a new merchant's customer, and return its final state."""
    merchant_id = unique("merchant")
    stores = {place: unique("store") for place in BUYERS}
    for store_id in stores.values():
        await client.put_store(merchant_id, store_id)
    await client.put_customer(merchant_id, "other", mobile=TAKEN)
    if registered:
        buyers = [identity_pb2.Buyer(store_id=stores[place], buyer_id=BUYERS[place]) for place in BUYERS]
        await client.put_customer(merchant_id, "alice", buyers=buyers, external_id="crm")
    calls = []
    for number, item in updates:
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
@given(consistent_updates, st.data(), st.booleans())
async def test_the_order_of_webhooks_decides_nothing(
    client: Client,
    updates: list[Stated],
    data: st.DataObject,
    registered: bool,  # noqa: FBT001 - Hypothesis gives it
) -> None:
    """Neither do repetitions, nor concurrency."""
    numbered = list(enumerate(updates))
    order = data.draw(st.permutations(numbered))
    again = data.draw(st.permutations(numbered + numbered[:3]))

    one = await final(client, order, registered=registered, at_once=False)
    other = await final(client, again, registered=registered, at_once=False)
    parallel = await final(client, again, registered=registered, at_once=True)

    assert one == other == parallel


def newest(updates: list[tuple[int, Stated]]) -> dict[str, tuple[tuple[int, int, str], str]]:
    """Return the newest value of each contact of a customer, with its stamp."""
    redactions = [item.second for _, item in updates if item.kind == customers_pb2.CUSTOMER_UPDATE_KIND_REDACTED]
    redacted = max(redactions, default=-1)
    found = dict.fromkeys(FIELDS, ((-1, 0, ""), ""))
    for number, item in updates:
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


def expected(updates: list[Stated], *, registered: bool) -> tuple[str, str, str]:
    """Return the final state of a customer after all webhooks."""
    values = [value for _, value in newest(list(enumerate(updates))).values()]
    mobile, email = ("" if value in LEFT_OUT else value for value in values)
    is_redacted = any(item.kind == customers_pb2.CUSTOMER_UPDATE_KIND_REDACTED for item in updates)
    return mobile, email, "crm" if registered and not is_redacted else ""


@settings(
    max_examples=examples(10),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    any_updates.filter(lambda updates: len(consistent(updates)) >= 4).map(lambda updates: consistent(updates)[:4]),
    st.booleans(),
)
async def test_every_order_of_four_webhooks_has_the_same_result(
    client: Client,
    updates: list[Stated],
    registered: bool,  # noqa: FBT001 - Hypothesis gives it
) -> None:
    orders = [(*order, order[number % 4]) for number, order in enumerate(permutations(enumerate(updates)))]
    found = await asyncio.gather(
        *(final(client, list(order), registered=registered, at_once=False) for order in orders)
    )

    assert set(found) == {expected(updates, registered=registered)}


@settings(
    max_examples=examples(30),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(any_updates, st.data())
async def test_the_first_of_a_deletion_and_an_update_of_the_same_time_stays(
    client: Client, updates: list[Stated], data: st.DataObject
) -> None:
    shop = Shop(unique("merchant"), unique("store"))
    await client.put_store(shop.merchant_id, shop.store_id)
    await client.put_customer(shop.merchant_id, "other", mobile=TAKEN)
    numbered = list(enumerate(updates))
    accepted: dict[int, Stated] = {}
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
    assert await contacts_of_buyer(client, shop, "buyer") == (mobile, email)


rivalries = st.lists(
    st.builds(
        Stated,
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
    async with running_server(service.database_url, admin_token) as (_, second):
        yield [service.client, second]


Named = dict[str, tuple[str, str]]
"""The mobile number and the e-mail address of each person."""


def check(updates: list[tuple[int, Stated]], named: Named) -> None:
    """Check that each contact belongs to one customer whose newest webhook names it."""
    claims = {person: newest([each for each in updates if each[1].place == person]) for person in PEOPLE}
    for index, field in enumerate(FIELDS):
        values = {person: claims[person][field][1] for person in PEOPLE}
        newest_values = {person: "" if value in LEFT_OUT else value for person, value in values.items()}
        owned = {person: contacts[index] for person, contacts in named.items()}
        for person in PEOPLE:
            assert owned[person] in {newest_values[person], ""}
        for value in {value.lower() for value in newest_values.values()} - {""}:
            assert [contact.lower() for contact in owned.values()].count(value) == 1


def claimant(updates: list[tuple[int, Stated]]) -> str:
    """Return the owner of the newest webhook that names another customer's number."""
    claims = [(newest([each for each in updates if each[1].place == person])["mobile"], person) for person in PEOPLE]
    return max([(stamp, person) for (stamp, value), person in claims if value == TAKEN], default=((), ""))[1]


@settings(
    max_examples=examples(30),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(rivalries, st.data())
async def test_the_newest_webhook_decides_the_owner_of_a_contact(
    clients: list[Client], service: Service, updates: list[Stated], data: st.DataObject
) -> None:
    """In every order, with repetitions, one by one and concurrently over two servers."""
    client, numbered = clients[0], list(enumerate(updates))
    for at_once in (False, True):
        shop = Shop(unique("merchant"), unique("store"))
        await client.put_store(shop.merchant_id, shop.store_id)
        await client.put_customer(shop.merchant_id, "other", mobile=TAKEN)
        order = data.draw(st.permutations(numbered + numbered[:3]))
        requests = [update(shop, item.place, number, item) for number, item in order]
        if at_once:
            calls = [clients[index % 2].customers.ApplyCustomerUpdate(sent) for index, sent in enumerate(requests)]
            await asyncio.gather(*calls)
        else:
            for sent in requests:
                await client.customers.ApplyCustomerUpdate(sent)

        check(numbered, {person: await contacts_of_buyer(client, shop, person) for person in PEOPLE})
        assert await find_customer_id(client, shop, mobile=TAKEN) == "other"
        await client.put_customer(shop.merchant_id, "other")
        after = {person: await contacts_of_buyer(client, shop, person) for person in PEOPLE}
        assert {person for person in PEOPLE if after[person][0] == TAKEN} == {claimant(numbered)} - {""}
        assert await find_needless_claims(service, shop) == []
