"""User groups on a real database, and how redemptions look them up."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from pointbook.v1 import customers_pb2, identity_pb2
from pointbook_server.customers.customer_repository import CustomerRepository
from pointbook_server.customers.model import GroupKey, Identifier, IdentifierKind
from pointbook_server.customers.tombstones import Tombstones
from pointbook_server.customers.transactions import CustomerTransactions
from pointbook_server.db.database import Connection, Database
from pointbook_server.ledger.model import AccountKey
from pointbook_server.metrics import Metrics
from pointbook_server.validation_codes.transactions import ValidationCodeTransactions
from pointbook_server.webhooks.encryption import PayloadCipher
from pointbook_server.webhooks.model import Capacity, QuarantineLimits
from pointbook_server.webhooks.transactions import QuarantineTransactions
from support.clients import Client
from support.refusals import refused
from support.servers import Service
from support.shops import Shop
from support.statements import recorded_statements
from support.unique_names import unique

NAMES = ("ada", "bob", "cyd", "dan")


@pytest.fixture
async def people(client: Client, shop: Shop) -> Shop:
    """A shop with four customers, each with one buyer."""
    for name in NAMES:
        buyers = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id=f"buyer-{name}")]
        await client.put_customer(shop.merchant_id, name, buyers=buyers, fraud_blocked=name == "dan")
    return shop


@pytest.fixture(scope="module")
async def store(service: Service) -> AsyncIterator[CustomerTransactions]:
    """The transactions of customers."""
    database = Database(service.database_url, pool_size=2)
    limits = QuarantineLimits(merchant=Capacity(1, 1), shared=Capacity(1, 1), total=Capacity(1, 1))
    quarantine = QuarantineTransactions(database, PayloadCipher({}), limits, Metrics())
    yield CustomerTransactions(database, quarantine, ValidationCodeTransactions(database), Tombstones([]))
    await database.dispose()


def group(shop: Shop, *members: str, group_id: str = "g", **changes: Any) -> customers_pb2.UserGroup:
    """Return a group whose first member is the primary one."""
    values: dict[str, Any] = {
        "merchant_id": shop.merchant_id,
        "group_id": group_id,
        "primary_customer_id": members[0] if members else "",
        "members": [customers_pb2.UserGroup.Member(customer_id=member, can_redeem=True) for member in members],
    }
    return customers_pb2.UserGroup(**(values | changes))


def defaults(shop: Shop, *members: str, group_id: str) -> customers_pb2.UserGroup:
    """Return a group that is the default group of all its members."""
    made = group(shop, *members, group_id=group_id)
    for member in made.members:
        member.is_default = True
    return made


async def put_group(
    client: Client, groups: customers_pb2.UserGroup, etag: str = ""
) -> customers_pb2.PutUserGroupResponse:
    """Put a group."""
    return await client.customers.PutUserGroup(customers_pb2.PutUserGroupRequest(user_group=groups, etag=etag))


async def get_group(client: Client, shop: Shop, group_id: str = "g") -> customers_pb2.GetUserGroupResponse:
    """Return a group."""
    request = customers_pb2.GetUserGroupRequest(merchant_id=shop.merchant_id, group_id=group_id)
    return await client.customers.GetUserGroup(request)


async def delete_group(client: Client, shop: Shop, group_id: str = "g", etag: str = "") -> None:
    """Delete a group."""
    request = customers_pb2.DeleteUserGroupRequest(merchant_id=shop.merchant_id, group_id=group_id, etag=etag)
    await client.customers.DeleteUserGroup(request)


async def test_put_and_get_return_every_field_of_a_group(client: Client, people: Shop) -> None:
    full = group(people, "ada", "bob", external_id="family-1")
    full.members[1].can_redeem = False
    full.members[1].blocked = True
    full.members[0].is_default = True

    first = await put_group(client, full)
    stored = await get_group(client, people)
    second = await put_group(client, group(people, "ada", "cyd"), first.etag)

    assert full == first.user_group == stored.user_group
    assert first.etag == stored.etag != second.etag
    assert (await get_group(client, people)).user_group == group(people, "ada", "cyd")


async def test_the_primary_member_never_changes(client: Client, people: Shop) -> None:
    """Two groups share neither the primary member nor the external id."""
    await put_group(client, group(people, "ada", "bob", external_id="family-1"))

    changed = await refused(put_group(client, group(people, "bob", "ada")))
    same = group(people, "ada", "cyd", group_id="h", external_id="family-1")
    taken = await refused(put_group(client, same))

    assert (changed.reason, set(changed.fields)) == ("INVALID_FIELDS", {"user_group.primary_customer_id"})
    assert (taken.code, taken.reason) == (grpc.StatusCode.ALREADY_EXISTS, "IDENTIFIER_TAKEN")
    assert set(taken.fields) == {"user_group.external_id", "user_group.primary_customer_id"}


async def test_only_the_conflicting_fields_of_a_group_are_named(client: Client, people: Shop) -> None:
    await put_group(client, group(people, "ada", "bob"))

    taken = await refused(put_group(client, group(people, "ada", "cyd", group_id="h")))

    assert set(taken.fields) == {"user_group.primary_customer_id"}
    assert taken.metadata == {"identifier": "user_group.primary_customer_id"}


async def test_stale_etags_and_unknown_groups_are_refused(client: Client, people: Shop) -> None:
    assert (await refused(put_group(client, group(people, "ada"), "1"))).reason == "STALE_ETAG"
    first = await put_group(client, group(people, "ada"), "0")
    second = await put_group(client, group(people, "ada", "bob"))

    assert (await refused(put_group(client, group(people, "ada"), first.etag))).reason == "STALE_ETAG"
    assert (await refused(delete_group(client, people, etag=first.etag))).reason == "STALE_ETAG"
    await delete_group(client, people, etag=second.etag)
    for call in (get_group(client, people), delete_group(client, people)):
        error = await refused(call)
        assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "GROUP_NOT_FOUND")
        assert error.metadata == {"group_id": "g"}


async def test_the_etag_of_a_deleted_group_does_not_match_its_successor(client: Client, people: Shop) -> None:
    gone = await put_group(client, group(people, "ada", "bob"))
    await delete_group(client, people)
    await put_group(client, group(people, "ada", "cyd"))

    assert (await refused(put_group(client, group(people, "ada", "bob"), gone.etag))).reason == "STALE_ETAG"
    assert (await refused(delete_group(client, people, etag=gone.etag))).reason == "STALE_ETAG"
    assert (await get_group(client, people)).user_group == group(people, "ada", "cyd")


async def test_members_must_be_customers_of_the_merchant(client: Client, people: Shop) -> None:
    error = await refused(put_group(client, group(people, "ada", "unknown")))

    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "CUSTOMER_NOT_FOUND")
    assert error.metadata == {"field": "user_group.members[1].customer_id"}
    other = Shop(unique("merchant"), "s")
    assert (await refused(put_group(client, group(other, "ada")))).reason == "CUSTOMER_NOT_FOUND"


async def test_every_invalid_field_of_a_group_is_named_at_once(client: Client, people: Shop) -> None:
    nothing = await refused(client.customers.PutUserGroup(customers_pb2.PutUserGroupRequest()))
    wrong = group(people, "ada", "ada", "b b", external_id="x y", primary_customer_id="bob")
    error = await refused(put_group(client, wrong))
    many = await refused(put_group(client, group(people, *(f"c{n}" for n in range(101)))))
    without = await refused(put_group(client, group(people, "ada", "bob", primary_customer_id="cyd")))

    names = {"user_group", "user_group.merchant_id", "user_group.group_id"}
    assert set(nothing.fields) == names | {"user_group.primary_customer_id", "user_group.members"}
    assert set(error.fields) == {"user_group.external_id", "user_group.members", "user_group.members[2].customer_id"}
    assert many.fields == {"user_group.members": "must have at most 100 items"}
    assert without.fields == {"user_group.members": "must include the primary member"}
    assert set((await refused(get_group(client, Shop("", ""), ""))).fields) == {"merchant_id", "group_id"}
    assert set((await refused(delete_group(client, Shop("", ""), ""))).fields) == {"merchant_id", "group_id"}


async def test_a_customer_has_one_default_group(client: Client, people: Shop) -> None:
    """A new default group clears the mark of the former one, and changes its etag."""
    first = await put_group(client, defaults(people, "ada", "bob", group_id="g"))
    await put_group(client, defaults(people, "bob", "cyd", group_id="h"))

    former = await get_group(client, people, "g")
    assert [member.is_default for member in former.user_group.members] == [True, False]
    assert former.etag != first.etag
    assert [member.is_default for member in (await get_group(client, people, "h")).user_group.members] == [True, True]


async def test_concurrent_puts_leave_one_default_group_per_customer(client: Client, people: Shop) -> None:
    groups = [
        defaults(people, "ada", "bob", group_id="g1"),
        defaults(people, "bob", "cyd", group_id="g2"),
        defaults(people, "cyd", "ada", group_id="g3"),
    ]
    await asyncio.gather(*(put_group(client, made) for made in groups * 8))

    stored = [(await get_group(client, people, made.group_id)).user_group for made in groups]
    marked = [member.customer_id for made in stored for member in made.members if member.is_default]
    assert sorted(marked) == ["ada", "bob", "cyd"]


async def test_one_of_several_concurrent_puts_gets_an_external_id(client: Client, people: Shop) -> None:
    groups = [group(people, name, group_id=f"g-{name}", external_id="one") for name in NAMES]
    answers = await asyncio.gather(*(put_group(client, made) for made in groups), return_exceptions=True)
    same = [group(people, "ada", group_id=f"same-{n}") for n in range(8)]
    await asyncio.gather(*(delete_group(client, people, made.group_id) for made in groups), return_exceptions=True)
    again = await asyncio.gather(*(put_group(client, made) for made in same), return_exceptions=True)

    for outcomes in (answers, again):
        errors = [answer.code() for answer in outcomes if isinstance(answer, grpc.aio.AioRpcError)]
        assert errors == [grpc.StatusCode.ALREADY_EXISTS] * (len(outcomes) - 1)


async def test_concurrent_puts_and_deletes_of_one_group_never_fail_internally(client: Client, people: Shop) -> None:
    async def some(number: int) -> str:
        try:
            if number % 3 == 0:
                await delete_group(client, people)
            else:
                await put_group(client, group(people, "ada", NAMES[1 + number % 3]))
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"

    assert set(await asyncio.gather(*map(some, range(40)))) <= {"OK", "NOT_FOUND"}


async def test_a_redemption_finds_a_group_in_one_statement(
    client: Client, store: CustomerTransactions, people: Shop
) -> None:
    made = group(people, "ada", "bob", "dan", external_id="family-1")
    made.members[1].blocked = made.members[1].is_default = True
    await put_group(client, made)
    with recorded_statements(people) as statements:
        found = [
            await store.find_group(people.merchant_id, by, key)
            for by, key in (
                (GroupKey.ID, "g"),
                (GroupKey.EXTERNAL_ID, "family-1"),
                (GroupKey.PRIMARY_CUSTOMER, "ada"),
                (GroupKey.DEFAULT_OF_CUSTOMER, "bob"),
            )
        ]

    assert len(statements) == 4
    assert found.count(found[0]) == 4
    assert found[0] is not None
    assert [
        (member.customer_id, member.can_redeem, member.blocked, member.is_default, member.fraud_blocked, member.buyers)
        for member in found[0].members
    ] == [
        ("ada", True, False, False, False, (AccountKey(people.store_id, "buyer-ada"),)),
        ("bob", True, True, True, False, (AccountKey(people.store_id, "buyer-bob"),)),
        ("dan", True, False, False, True, (AccountKey(people.store_id, "buyer-dan"),)),
    ]
    assert await store.find_group(people.merchant_id, GroupKey.DEFAULT_OF_CUSTOMER, "ada") is None
    assert await store.find_group(people.merchant_id, GroupKey.EXTERNAL_ID, "") is None


async def test_the_repository_reads_inside_the_callers_transaction(
    service: Service, store: CustomerTransactions, people: Shop
) -> None:
    database = Database(service.database_url, pool_size=1)

    async def work(connection: Connection) -> Any:
        repository = CustomerRepository(connection, people.merchant_id)
        locked = await repository.lock(["ada", "unknown"])
        found = await repository.find(Identifier(IdentifierKind.CUSTOMER_ID, "ada"))
        of_buyer = await repository.find(AccountKey(people.store_id, "buyer-ada"))
        return locked, found, of_buyer, await repository.find_group(GroupKey.PRIMARY_CUSTOMER, "ada")

    locked, found, of_buyer, made = await database.transaction(work)
    await database.dispose()

    assert (locked, found.customer_id, of_buyer, made) == ({"ada"}, "ada", found, None)
    assert await store.find(people.merchant_id, AccountKey(people.store_id, "unknown")) is None
