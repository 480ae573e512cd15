"""Customer webhooks on a real database: whatever way they come, the customer is the same in the end."""

import asyncio
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness import NOW_MS, Client, at, unique
from pointbook.v1 import customers_pb2, identity_pb2

TAKEN = "+8613800000009"
MOBILES = [None, "", "+8613800000001", "+8613800000002", TAKEN, "13800000001"]
EMAILS = [None, "", "one@example.com", "Two@Example.com", "no address"]
LEFT_OUT = {TAKEN, "13800000001", "no address"}
KINDS = [
    customers_pb2.CUSTOMER_UPDATE_KIND_CREATED,
    customers_pb2.CUSTOMER_UPDATE_KIND_UPDATED,
    customers_pb2.CUSTOMER_UPDATE_KIND_UPDATED,
    customers_pb2.CUSTOMER_UPDATE_KIND_DELETED,
    customers_pb2.CUSTOMER_UPDATE_KIND_REDACTED,
]
BUYERS = {"here": "buyer-1", "there": "buyer-2"}


@dataclass(frozen=True)
class Told:
    """What a webhook tells, of which second."""

    kind: Any
    mobile: str | None
    email: str | None
    second: int
    place: str


tellings = st.lists(
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
        # Buyers of different customers compete for a number, and there the first one keeps it.
        place = item.place if registered else "here"
        calls.append(
            customers_pb2.ApplyCustomerUpdateRequest(
                event_id=f"e-{number}",
                merchant_id=merchant_id,
                store_id=stores[place],
                buyer_id=BUYERS[place],
                kind=item.kind,
                mobile=item.mobile,
                email=item.email,
                updated_at=at(NOW_MS - 10_000 + item.second * 1_000),
            )
        )
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
    max_examples=40,
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


def expected(told: list[Told], *, registered: bool) -> tuple[str, str, str]:
    """Say what a customer is in the end by all webhooks together, without looking at any order of arrival."""
    redactions = [item.second for item in told if item.kind == customers_pb2.CUSTOMER_UPDATE_KIND_REDACTED]
    redacted = max(redactions, default=-1)
    newest: dict[str, tuple[tuple[int, int, str], str]] = {}
    for number, item in enumerate(told):
        if item.second <= redacted:
            continue
        says = {"mobile": item.mobile, "email": item.email}
        if item.kind == customers_pb2.CUSTOMER_UPDATE_KIND_DELETED:
            says = {"mobile": "", "email": ""}
        for name, value in says.items():
            stamp = (item.second, item.kind, f"e-{number}")
            if value is not None and value not in LEFT_OUT and stamp > newest.get(name, ((-1, 0, ""), ""))[0]:
                newest[name] = (stamp, value.lower())
    mobile, email = (newest.get(name, ((), ""))[1] for name in ("mobile", "email"))
    return mobile, email, "crm" if registered and not redactions else ""


@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(tellings.map(lambda told: told[0]), min_size=4, max_size=4), st.booleans())
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
