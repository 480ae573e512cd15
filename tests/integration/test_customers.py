"""CustomersService on a real database: puts, webhooks, moves and redactions."""

import asyncio
import itertools
import random
from contextlib import suppress
from typing import Any

import asyncpg
import grpc
import pytest

from pointbook.v1 import customers_pb2, identity_pb2, webhooks_pb2
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.customers import servicer as servicer_module
from pointbook_server.db.database import Connection, Statement
from pointbook_server.programs.model import Channel
from pointbook_server.rpc import method_handlers as handlers_module
from pointbook_server.server import Server
from pointbook_server.webhooks.queries import LOCK_BUYERS_BODIES
from support.clients import Client
from support.clocks import NOW_MS, TestClock, at
from support.connections import fetch_rows
from support.customers import (
    CREATED,
    DELETED,
    INVALID,
    REDACTED,
    TAKEN,
    TYPE_EMAIL,
    TYPE_MOBILE,
    UPDATED,
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
from support.embedded_database import Cluster
from support.json_logs import json_logs
from support.outbox import Outbox
from support.refusals import Refusal, refusal, refused
from support.servers import Service, server_settings
from support.shops import Shop
from support.statements import recorded_statements
from support.tokens import make_token
from support.unique_names import unique


def full_customer(shop: Shop, **changes: Any) -> customers_pb2.Customer:
    """Return a customer with a value in every field."""
    values: dict[str, Any] = {
        "merchant_id": shop.merchant_id,
        "customer_id": "alice",
        "mobile": mobile(),
        "email": email(),
        "external_id": "crm-1",
        "card_numbers": ["card-1", "card-2"],
        "card_external_ids": ["cx-1"],
        "buyers": [identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")],
        "source_identities": [
            identity_pb2.SourceIdentity(
                source=identity_pb2.USER_SOURCE_WECHAT, account_id="mp-1", identifier_type=TYPE_MOBILE, value=mobile()
            )
        ],
        "language": "zh-Hant",
        "fraud_blocked": True,
    }
    return customers_pb2.Customer(**(values | changes))


async def put_customer(
    client: Client, customer: customers_pb2.Customer, etag: str = ""
) -> customers_pb2.PutCustomerResponse:
    """Put a customer."""
    return await client.customers.PutCustomer(customers_pb2.PutCustomerRequest(customer=customer, etag=etag))


async def test_put_and_get_return_every_field_of_a_customer(client: Client, shop: Shop) -> None:
    customer = full_customer(shop)
    assert {field.name for field, _ in customer.ListFields()} == set(customers_pb2.Customer.DESCRIPTOR.fields_by_name)

    answer = await put_customer(client, customer)
    stored = await client.customers.GetCustomer(
        customers_pb2.GetCustomerRequest(merchant_id=shop.merchant_id, customer_id="alice")
    )

    assert customer == answer.customer == stored.customer
    assert answer.etag == stored.etag == "1"
    for identifier in (
        {"mobile": customer.mobile},
        {"email": customer.email.upper()},
        {"external_id": "crm-1"},
        {"card_number": "card-2"},
        {"card_external_id": "cx-1"},
        {"buyer": customer.buyers[0]},
    ):
        assert await find_customer_id(client, shop, **identifier) == "alice"


async def test_a_lookup_is_one_statement(client: Client, shop: Shop) -> None:
    """Every redemption looks up its customer."""
    customer = full_customer(shop)
    await put_customer(client, customer)
    with recorded_statements(shop) as statements:
        for identifier in ({"mobile": customer.mobile}, {"buyer": customer.buyers[0]}, {"card_number": "card-1"}):
            assert await find_customer_id(client, shop, **identifier) == "alice"

    assert len(statements) == 3


async def test_identifiers_are_found_in_every_written_form(client: Client, shop: Shop) -> None:
    number, address = mobile(), email()
    spaced = f"{number[:3]} {number[3:6]}-{number[6:]}"

    stored = await client.put_customer(shop.merchant_id, "alice", mobile=spaced, email=address.upper())

    assert (stored.mobile, stored.email) == (number, address.upper())
    assert await find_customer_id(client, shop, mobile=f"{number[:3]}({number[3:6]}) {number[6:]}") == "alice"
    assert await find_customer_id(client, shop, email=address.title()) == "alice"


async def test_putting_a_customer_replaces_every_field(client: Client, shop: Shop) -> None:
    customer = full_customer(shop)
    await put_customer(client, customer)
    bare = customers_pb2.Customer(merchant_id=shop.merchant_id, customer_id="alice")

    answer = await put_customer(client, bare)
    customer.customer_id = "bob"
    other = await put_customer(client, customer)

    assert (answer.customer, answer.etag) == (bare, "2")
    assert other.customer == customer
    assert await client.customer(shop.merchant_id, "alice") == bare


async def test_merchants_may_use_the_same_ids_and_identifiers(client: Client, shop: Shop) -> None:
    other = Shop(unique("merchant"), unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    ours = await client.put_customer(shop.merchant_id, "alice", mobile=mobile())
    theirs = await client.put_customer(other.merchant_id, "alice", mobile=ours.mobile, language="de")

    assert await client.customer(shop.merchant_id, "alice") == ours
    assert await client.customer(other.merchant_id, "alice") == theirs


async def test_an_etag_guards_against_lost_updates(client: Client, shop: Shop) -> None:
    customer = full_customer(shop)
    for etag in ("1", "x", "-1"):
        error = await refused(put_customer(client, customer, etag))
        assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, "STALE_ETAG")
    first = await put_customer(client, customer, "0")
    second = await put_customer(client, customer, first.etag)

    assert (await refused(put_customer(client, customer, first.etag))).reason == "STALE_ETAG"
    assert second.etag == "2"


TAKEN_FIELDS = (
    "customer.mobile",
    "customer.email",
    "customer.external_id",
    "customer.card_numbers[1]",
    "customer.card_external_ids[0]",
    "customer.source_identities[0]",
    "customer.buyers[0]",
)


async def test_every_taken_identifier_is_named_by_its_field(client: Client, shop: Shop) -> None:
    """The error names the fields, and quotes no value."""
    theirs = full_customer(shop)
    await put_customer(client, theirs)
    ours = full_customer(shop, customer_id="bob", card_numbers=["own", "card-2"])
    ours.mobile, ours.email = theirs.mobile, theirs.email.upper()
    ours.source_identities[0].CopyFrom(theirs.source_identities[0])

    error = await refused(put_customer(client, ours))

    assert (error.code, error.reason) == (grpc.StatusCode.ALREADY_EXISTS, "IDENTIFIER_TAKEN")
    assert set(error.fields) == set(TAKEN_FIELDS)
    assert error.metadata == {"identifier": "customer.mobile"}
    assert theirs.mobile not in str(error)
    assert theirs.email not in str(error).lower()
    assert await find_customer_id(client, shop, card_number="own") == ""
    assert await client.customer(shop.merchant_id, "alice") == theirs


async def test_two_customers_cannot_swap_identifiers_by_puts(client: Client, shop: Shop) -> None:
    numbers = {"alice": mobile(), "bob": mobile()}
    for customer_id, number in numbers.items():
        await client.put_customer(shop.merchant_id, customer_id, mobile=number)

    for _ in range(10):
        answers = await asyncio.gather(
            refused(client.put_customer(shop.merchant_id, "alice", mobile=numbers["bob"])),
            refused(client.put_customer(shop.merchant_id, "bob", mobile=numbers["alice"])),
        )
        assert {answer.reason for answer in answers} == {"IDENTIFIER_TAKEN"}
    assert await find_customer_id(client, shop, mobile=numbers["alice"]) == "alice"


BUYER = {"store_id": "s", "buyer_id": "b"}
WECHAT = {"source": identity_pb2.USER_SOURCE_WECHAT, "account_id": "a", "identifier_type": TYPE_MOBILE}
WRONG: tuple[tuple[str, Any, str], ...] = (
    ("merchant_id", "", "merchant_id"),
    ("merchant_id", "m" * 65, "merchant_id"),
    ("customer_id", "", "customer_id"),
    ("customer_id", "a b", "customer_id"),
    ("mobile", "13900000000", "mobile"),
    ("mobile", "+8613800000000 ext 5", "mobile"),
    ("mobile", "+1 800 FLOWERS", "mobile"),
    ("mobile", "+86 12", "mobile"),
    ("mobile", "+" + "1" * 40, "mobile"),
    ("mobile", "\x00", "mobile"),
    ("email", "unknown", "email"),
    ("email", "a@b@example.com", "email"),
    ("email", "Some One <one@example.com>", "email"),
    ("email", f"{'a' * 250}@example.com", "email"),
    ("external_id", "x y", "external_id"),
    ("external_id", "x" * 65, "external_id"),
    ("card_numbers", ["a", ""], "card_numbers[1]"),
    ("card_numbers", ["a", "a"], "card_numbers[1]"),
    ("card_numbers", [str(n) for n in range(51)], "card_numbers"),
    ("card_external_ids", ["é"], "card_external_ids[0]"),
    ("buyers", [{"store_id": "", "buyer_id": "b"}], "buyers[0].store_id"),
    ("buyers", [{"store_id": "s", "buyer_id": ""}], "buyers[0].buyer_id"),
    ("buyers", [BUYER, BUYER | {"buyer_id": "c"}], "buyers"),
    ("buyers", [BUYER, BUYER], "buyers[1]"),
    ("buyers", [{"store_id": f"s{n}", "buyer_id": "b"} for n in range(101)], "buyers"),
    ("source_identities", [WECHAT | {"value": "x"}], "source_identities[0].value"),
    ("source_identities", [WECHAT | {"value": "+8613800000000", "source": 0}], "source_identities[0].source"),
    ("source_identities", [WECHAT | {"value": "+8613800000000", "source": 99}], "source_identities[0].source"),
    ("source_identities", [WECHAT | {"value": "x", "identifier_type": 0}], "source_identities[0].identifier_type"),
    ("source_identities", [WECHAT | {"value": "+8613800000000", "account_id": ""}], "source_identities[0].account_id"),
    (
        "source_identities",
        [WECHAT | {"value": "+8613800000000"}, WECHAT | {"value": "+86 138 0000 0000"}],
        "source_identities[1]",
    ),
    ("language", "chinese language", "language"),
    ("language", "a" * 36, "language"),
)


@pytest.mark.parametrize(("name", "value", "path"), WRONG, ids=[f"{name}-{n}" for n, (name, _, _) in enumerate(WRONG)])
async def test_each_limit_of_a_customer_is_named_by_its_path(
    client: Client, shop: Shop, name: str, value: Any, path: str
) -> None:
    changes: dict[str, Any] = {"buyers": [], name: value}
    error = await refused(put_customer(client, full_customer(shop, **changes)))

    assert (error.reason, set(error.fields)) == ("INVALID_FIELDS", {f"customer.{path}"})
    if isinstance(value, str) and len(value) > 5:
        assert value not in str(error)


async def test_every_wrong_field_is_named_at_once(client: Client) -> None:
    wrong = customers_pb2.Customer(mobile="1", email="x", card_numbers=[""], language="?")
    error = await refused(put_customer(client, wrong))
    nothing = await refused(client.customers.PutCustomer(customers_pb2.PutCustomerRequest()))

    fields = {"merchant_id", "customer_id", "mobile", "email", "card_numbers[0]", "language"}
    assert set(error.fields) == {f"customer.{field}" for field in fields}
    assert set(nothing.fields) == {"customer", "customer.merchant_id", "customer.customer_id"}


async def test_a_buyers_store_must_be_the_merchants(client: Client, shop: Shop) -> None:
    other = Shop(unique("merchant"), unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    for store_id in (unique("store"), other.store_id):
        buyers = [identity_pb2.Buyer(store_id=store_id, buyer_id="b")]
        error = await refused(client.put_customer(shop.merchant_id, "alice", buyers=buyers))
        assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "STORE_NOT_FOUND")
        assert error.metadata == {"store_id": store_id}


async def test_unknown_customers_are_not_found(client: Client, shop: Shop) -> None:
    async def get(**key: Any) -> Refusal:
        request = customers_pb2.GetCustomerRequest(merchant_id=shop.merchant_id, **key)
        return await refused(client.customers.GetCustomer(request))

    buyer = identity_pb2.Buyer(store_id=shop.store_id, buyer_id="unknown")
    for key in (
        {"customer_id": "unknown"},
        {"customer": {"mobile": mobile()}},
        {"customer": {"buyer": buyer, "merchant_id": shop.merchant_id}},
    ):
        error = await get(**key)
        assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "CUSTOMER_NOT_FOUND")
    assert set((await get()).fields) == {"key"}
    assert set((await get(customer={})).fields) == {"customer.identifier"}
    assert set((await get(customer={"mobile": "1380000"})).fields) == {"customer.mobile"}
    assert set((await get(customer={"mobile": mobile(), "merchant_id": "x"})).fields) == {"customer.merchant_id"}


async def test_one_of_several_concurrent_puts_gets_a_number(client: Client, shop: Shop) -> None:
    for _ in range(5):
        number = mobile()
        names = [unique("customer") for _ in range(12)]
        answers = await asyncio.gather(
            *(client.put_customer(shop.merchant_id, name, mobile=number, email=email()) for name in names),
            return_exceptions=True,
        )
        won = [name for name, answer in zip(names, answers, strict=True) if not isinstance(answer, BaseException)]
        errors = {answer.code() for answer in answers if isinstance(answer, grpc.aio.AioRpcError)}
        assert [await find_customer_id(client, shop, mobile=number)] == won
        assert errors == {grpc.StatusCode.ALREADY_EXISTS}


async def test_concurrent_puts_of_one_customer_all_succeed(client: Client, shop: Shop) -> None:
    puts = [full_customer(shop, language="de" if n % 2 else "fr") for n in range(16)]
    answers = await asyncio.gather(*(put_customer(client, customer) for customer in puts))

    assert sorted(int(answer.etag) for answer in answers) == list(range(1, 17))
    last = max(answers, key=lambda answer: int(answer.etag))
    assert await client.customer(shop.merchant_id, "alice") == last.customer


async def test_concurrent_puts_of_the_same_keys_never_fail_internally(client: Client, shop: Shop) -> None:
    numbers, cards = [mobile() for _ in range(4)], ["c1", "c2", "c3", "c4"]
    chance = random.Random(7)  # noqa: S311 - only chance

    async def put_random(name: str) -> grpc.StatusCode:
        customer = full_customer(
            shop,
            customer_id=name,
            mobile=chance.choice(numbers),
            card_numbers=chance.sample(cards, 2),
            external_id="",
            card_external_ids=[],
            buyers=[identity_pb2.Buyer(store_id=shop.store_id, buyer_id=chance.choice("xyz"))],
        )
        try:
            await put_customer(client, customer)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK

    codes = await asyncio.gather(*(put_random(f"c-{n % 5}") for n in range(150)))

    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.ALREADY_EXISTS}
    assert grpc.StatusCode.OK in codes


async def test_an_update_creates_the_customer_of_a_buyer(client: Client, shop: Shop) -> None:
    """An absent contact stays, and an empty one is removed."""
    first, second = mobile(), mobile()
    address = email()
    created = await client.customers.ApplyCustomerUpdate(
        customer_update(shop, kind=CREATED, mobile=first, email=address.upper(), updated_at=at(NOW_MS - 9_000))
    )
    assert (update_outcome(created), skipped_causes(created)) == ("APPLIED", {})
    assert await contacts_of_buyer(client, shop) == (first, address.upper())
    changed = customer_update(shop, mobile=second, updated_at=at(NOW_MS - 8_000))
    again = await client.customers.ApplyCustomerUpdate(changed)
    assert again.customer_id == created.customer_id != ""
    assert await contacts_of_buyer(client, shop) == (second, address.upper())
    await client.customers.ApplyCustomerUpdate(customer_update(shop, email="", updated_at=at(NOW_MS - 7_000)))
    assert await contacts_of_buyer(client, shop) == (second, "")
    assert await find_customer_id(client, shop, mobile=first) == ""
    repeated = await client.customers.ApplyCustomerUpdate(changed)
    assert (update_outcome(repeated), repeated.customer_id) == ("DUPLICATE", created.customer_id)


async def test_an_event_id_with_other_content_is_refused(client: Client, shop: Shop) -> None:
    sent = customer_update(shop, mobile=mobile())
    await client.customers.ApplyCustomerUpdate(sent)
    for change in ({"mobile": mobile()}, {"buyer_id": "other"}, {"kind": CREATED}, {"updated_at": at(NOW_MS)}):
        other = customers_pb2.ApplyCustomerUpdateRequest()
        other.CopyFrom(sent)
        for name, value in change.items():
            if name == "updated_at":
                other.updated_at.CopyFrom(at(NOW_MS))
            else:
                setattr(other, name, value)
        error = await refused(client.customers.ApplyCustomerUpdate(other))
        assert (error.code, error.reason) == (grpc.StatusCode.ALREADY_EXISTS, "EVENT_ID_REUSED")
        assert error.metadata == {"event_id": sent.event_id}
    assert update_outcome(await client.customers.ApplyCustomerUpdate(sent)) == "DUPLICATE"


@pytest.mark.parametrize("kind", [DELETED, REDACTED])
async def test_ignored_contacts_are_not_part_of_the_digest(client: Client, shop: Shop, kind: Any) -> None:
    sent = customer_update(shop, kind=kind, mobile=mobile(), email=email())
    bare = customer_update(shop, kind=kind, event_id=sent.event_id)

    assert update_outcome(await client.customers.ApplyCustomerUpdate(sent)) == "APPLIED"
    assert update_outcome(await client.customers.ApplyCustomerUpdate(bare)) == "DUPLICATE"


async def test_an_update_never_moves_an_identifier(client: Client, shop: Shop) -> None:
    """An identifier that is taken or invalid detaches the old one."""
    theirs = await client.put_customer(shop.merchant_id, "alice", mobile=mobile(), email=email())
    address, number = email(), mobile()

    with json_logs(servicer_module, handlers_module) as logs:
        first = await client.customers.ApplyCustomerUpdate(customer_update(shop, mobile=theirs.mobile, email=address))
        second = await client.customers.ApplyCustomerUpdate(
            customer_update(shop, mobile="13800000000", email=theirs.email, updated_at=at(NOW_MS - 8_000))
        )
        third = await client.customers.ApplyCustomerUpdate(
            customer_update(shop, mobile=number, email="unknown", updated_at=at(NOW_MS - 7_000))
        )

    assert (update_outcome(first), skipped_causes(first)) == ("APPLIED", {TYPE_MOBILE: TAKEN})
    assert (update_outcome(second), skipped_causes(second)) == ("APPLIED", {TYPE_MOBILE: INVALID, TYPE_EMAIL: TAKEN})
    assert (update_outcome(third), skipped_causes(third)) == ("APPLIED", {TYPE_EMAIL: INVALID})
    assert await contacts_of_buyer(client, shop) == (number, "")
    assert await client.customer(shop.merchant_id, "alice") == theirs
    written = logs.getvalue()
    assert "left out" in written
    for private in (theirs.mobile, theirs.email, "13800000000", address, number):
        assert private not in written


async def test_an_older_update_sets_only_contacts_that_no_newer_one_has(client: Client, shop: Shop) -> None:
    number, address = mobile(), email()
    await client.customers.ApplyCustomerUpdate(customer_update(shop, mobile=number, updated_at=at(NOW_MS - 5_000)))
    older = await client.customers.ApplyCustomerUpdate(
        customer_update(shop, mobile=mobile(), updated_at=at(NOW_MS - 6_000))
    )
    partly = await client.customers.ApplyCustomerUpdate(
        customer_update(shop, mobile=mobile(), email=address, updated_at=at(NOW_MS - 7_000))
    )

    assert (update_outcome(older), update_outcome(partly)) == ("OUTDATED", "APPLIED")
    assert await contacts_of_buyer(client, shop) == (number, address)


async def test_a_deletion_detaches_and_a_newer_update_restores(client: Client, shop: Shop) -> None:
    number = mobile()
    customer = await client.put_customer(
        shop.merchant_id,
        "alice",
        mobile=number,
        external_id="crm",
        buyers=[{"store_id": shop.store_id, "buyer_id": "buyer"}],
    )
    deleted = await client.customers.ApplyCustomerUpdate(
        customer_update(shop, kind=DELETED, mobile="ignored", updated_at=at(NOW_MS - 5_000))
    )
    assert (update_outcome(deleted), deleted.customer_id) == ("APPLIED", "alice")
    customer.mobile = ""
    assert await client.customer(shop.merchant_id, "alice") == customer
    late = await client.customers.ApplyCustomerUpdate(
        customer_update(shop, mobile=number, updated_at=at(NOW_MS - 6_000))
    )
    assert update_outcome(late) == "OUTDATED"
    await client.customers.ApplyCustomerUpdate(customer_update(shop, mobile=number, updated_at=at(NOW_MS - 4_000)))
    assert await find_customer_id(client, shop, mobile=number) == "alice"

    unknown = await client.customers.ApplyCustomerUpdate(customer_update(shop, "gone", kind=DELETED))
    assert (update_outcome(unknown), unknown.customer_id) == ("APPLIED", "")
    late = await client.customers.ApplyCustomerUpdate(
        customer_update(shop, "gone", mobile=mobile(), updated_at=at(NOW_MS - 90_000))
    )
    assert (update_outcome(late), late.customer_id) == ("OUTDATED", "")


async def test_an_update_of_an_unknown_store_is_refused(client: Client, shop: Shop) -> None:
    """The error says whether another merchant has the store, for the quarantine."""
    other = Shop(unique("merchant"), shop.store_id)
    unknown = await refused(
        client.customers.ApplyCustomerUpdate(customer_update(Shop(shop.merchant_id, unique("store"))))
    )
    elsewhere = await refused(client.customers.ApplyCustomerUpdate(customer_update(other)))

    assert (unknown.code, unknown.reason) == (grpc.StatusCode.NOT_FOUND, "STORE_NOT_FOUND")
    assert "registered_elsewhere" not in unknown.metadata
    assert elsewhere.metadata == {"store_id": shop.store_id, "registered_elsewhere": "true"}


async def test_each_limit_of_an_update_is_named_by_its_path(client: Client, shop: Shop) -> None:
    nothing = await refused(client.customers.ApplyCustomerUpdate(customers_pb2.ApplyCustomerUpdateRequest()))
    wrong = customer_update(shop, kind=9, mobile="1" * 65, email="x" * 321, updated_at=at(NOW_MS + 2 * 86_400_000))
    error = await refused(client.customers.ApplyCustomerUpdate(wrong))
    old = await refused(client.customers.ApplyCustomerUpdate(customer_update(shop, updated_at=at(1))))

    assert set(nothing.fields) == {"event_id", "merchant_id", "store_id", "buyer_id", "kind", "updated_at"}
    assert set(error.fields) == {"kind", "updated_at"}
    assert set(old.fields) == {"updated_at"}


async def test_concurrent_copies_of_an_update_are_applied_once(client: Client, shop: Shop) -> None:
    sent = customer_update(shop, mobile=mobile(), email=email())
    answers = await asyncio.gather(*(client.customers.ApplyCustomerUpdate(sent) for _ in range(30)))

    assert sorted(map(update_outcome, answers)) == ["APPLIED"] + ["DUPLICATE"] * 29
    assert len({answer.customer_id for answer in answers}) == 1
    assert await contacts_of_buyer(client, shop) == (sent.mobile, sent.email)


async def test_the_newest_of_several_concurrent_updates_remains(client: Client, shop: Shop) -> None:
    for _ in range(4):
        buyer_ids = [unique("buyer"), unique("buyer")]
        second = Shop(shop.merchant_id, unique("store"))
        await client.put_store(second.merchant_id, second.store_id)
        shops = dict(zip(buyer_ids, (shop, second), strict=True))
        await client.put_customer(
            shop.merchant_id,
            unique("customer"),
            buyers=[identity_pb2.Buyer(store_id=own.store_id, buyer_id=buyer) for buyer, own in shops.items()],
        )
        updates = [
            customer_update(shops[buyer], buyer, mobile=mobile(), updated_at=at(NOW_MS - n * 1_000))
            for n, buyer in enumerate(buyer_ids * 6)
        ]
        random.shuffle(updates)
        answers = await asyncio.gather(*map(client.customers.ApplyCustomerUpdate, updates))
        newest = max(updates, key=lambda sent: sent.updated_at.seconds)
        assert {update_outcome(answer) for answer in answers} <= {"APPLIED", "OUTDATED"}
        assert await contacts_of_buyer(client, shop, buyer_ids[0]) == (newest.mobile, "")


async def test_one_of_several_concurrent_updates_gets_a_number(client: Client, shop: Shop) -> None:
    number = mobile()
    answers = await asyncio.gather(
        *(client.customers.ApplyCustomerUpdate(customer_update(shop, f"b{n}", mobile=number)) for n in range(20))
    )

    assert sorted(len(answer.skipped_identifiers) for answer in answers) == [0] + [1] * 19
    assert len({answer.customer_id for answer in answers}) == 20


async def test_every_kind_of_key_can_be_moved(client: Client, service: Service, shop: Shop) -> None:
    """The receiver's own number is released, and the audit has no value."""
    customer = full_customer(shop)
    await put_customer(client, customer)
    old = mobile()
    await client.put_customer(shop.merchant_id, "bob", mobile=old, card_numbers=["own"])
    moves: list[dict[str, Any]] = [
        {"mobile": customer.mobile},
        {"email": customer.email},
        {"external_id": "crm-1"},
        {"card_number": "card-1"},
        {"card_external_id": "cx-1"},
        {"buyer": customer.buyers[0]},
        {"source_identity": customer.source_identities[0]},
    ]
    for number, identifier in enumerate(moves, 2):
        assert await move_identifier(client, shop, "alice", "bob", **identifier) == (str(number), str(number))
        assert await move_identifier(client, shop, "alice", "bob", **identifier) == (str(number), str(number))

    bob = await client.customer(shop.merchant_id, "bob")
    assert (bob.mobile, bob.email, bob.external_id) == (customer.mobile, customer.email, "crm-1")
    assert list(bob.card_numbers) == ["card-1", "own"]
    assert (bob.buyers, bob.source_identities) == (customer.buyers, customer.source_identities)
    alice = await client.customer(shop.merchant_id, "alice")
    assert (alice.mobile, list(alice.card_numbers), len(alice.buyers)) == ("", ["card-2"], 0)
    assert await find_customer_id(client, shop, mobile=old) == ""
    audit = await fetch_rows(service, "SELECT * FROM customer_audit WHERE merchant_id = $1", shop.merchant_id)
    assert {row["kind"] for row in audit} == {
        "MOBILE", "EMAIL", "EXTERNAL_ID", "CARD_NUMBER", "CARD_EXTERNAL_ID", "BUYER", "WECHAT MOBILE",
    }  # fmt: skip
    assert {(row["customer_id"], row["to_customer_id"], row["reason"]) for row in audit} == {
        ("alice", "bob", "the till registered twice")
    }
    assert customer.mobile not in str(audit)


async def test_audit_rows_cannot_be_changed(client: Client, service: Service, shop: Shop) -> None:
    await client.put_customer(shop.merchant_id, "alice")
    await redact_customer(client, shop, "alice")
    for query in ("UPDATE customer_audit SET reason = ''", "TRUNCATE customer_audit"):
        with pytest.raises(asyncpg.RestrictViolationError):
            await fetch_rows(service, query)


async def test_moves_that_are_refused(client: Client, shop: Shop) -> None:
    customer = full_customer(shop)
    await put_customer(client, customer)
    full = [f"card {n}".replace(" ", "-") for n in range(10, 60)]
    buyers = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id="other")]
    await client.put_customer(shop.merchant_id, "bob", card_numbers=full, buyers=buyers)
    await client.put_customer(shop.merchant_id, "carol")

    async def refusal_of(giver: str, receiver: str, **identifier: Any) -> tuple[str, Any]:
        error = await refused(move_identifier(client, shop, giver, receiver, **identifier))
        assert customer.mobile not in str(error)
        return error.reason, set(error.fields) or dict(error.metadata)

    number = {"mobile": customer.mobile}
    assert await refusal_of("alice", "unknown", **number) == ("CUSTOMER_NOT_FOUND", {"field": "to_customer_id"})
    assert await refusal_of("unknown", "alice", **number) == ("CUSTOMER_NOT_FOUND", {"field": "from_customer_id"})
    assert await refusal_of("alice", "bob", mobile=mobile()) == ("CUSTOMER_NOT_FOUND", {"field": "identifier"})
    assert await refusal_of("bob", "carol", **number) == ("IDENTIFIER_TAKEN", {"mobile"})
    assert await refusal_of("alice", "bob", card_number="card-1") == ("INVALID_FIELDS", {"card_number"})
    assert await refusal_of("alice", "bob", buyer=customer.buyers[0]) == ("INVALID_FIELDS", {"buyer"})
    assert await refusal_of("alice", "alice", **number) == ("INVALID_FIELDS", {"to_customer_id"})
    assert await refusal_of("alice", "bob", mobile="x") == ("INVALID_FIELDS", {"mobile"})
    assert await refusal_of("alice", "bob") == ("INVALID_FIELDS", {"identifier"})
    nothing = await refused(client.customers.MoveIdentifier(customers_pb2.MoveIdentifierRequest()))
    assert set(nothing.fields) >= {"merchant_id", "from_customer_id", "to_customer_id", "identifier", "reason"}
    assert await client.customer(shop.merchant_id, "alice") == customer


async def test_concurrent_moves_in_a_circle_end_with_one_owner(client: Client, shop: Shop) -> None:
    names = ["alice", "bob", "carol"]
    for name in names:
        await client.put_customer(shop.merchant_id, name, card_numbers=["card"] if name == "alice" else [])

    async def move_card(giver: str, receiver: str) -> str:
        try:
            await move_identifier(client, shop, giver, receiver, card_number="card")
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"

    pairs = [pair for pair in itertools.permutations(names, 2) for _ in range(6)]
    random.shuffle(pairs)
    codes = await asyncio.gather(*(move_card(*pair) for pair in pairs))

    assert set(codes) <= {"OK", "ALREADY_EXISTS"}
    owners = [name for name in names if list((await client.customer(shop.merchant_id, name)).card_numbers) == ["card"]]
    assert [await find_customer_id(client, shop, card_number="card")] == owners


async def quarantine_webhook(client: Client, shop: Shop, body: bytes, topic: str = "customers/update") -> str:
    """Quarantine a webhook."""
    request = webhooks_pb2.QuarantineWebhookRequest(
        merchant_id=shop.merchant_id, topic=topic, body=body, reason=webhooks_pb2.QUARANTINE_REASON_MALFORMED
    )
    return (await client.webhooks.QuarantineWebhook(request)).quarantine_id


async def quarantined(client: Client, shop: Shop, quarantine_id: str) -> webhooks_pb2.QuarantinedWebhook:
    """Return a quarantined webhook."""
    request = webhooks_pb2.GetQuarantinedWebhookRequest(merchant_id=shop.merchant_id, quarantine_id=quarantine_id)
    return (await client.webhooks.GetQuarantinedWebhook(request)).webhook


@pytest.mark.parametrize("by_webhook", [False, True])
async def test_a_redaction_leaves_no_personal_data(
    client: Client, service: Service, shop: Shop, *, by_webhook: bool
) -> None:
    customer = full_customer(shop, external_id="crm-private-7", card_numbers=["card-private-7"])
    await put_customer(client, customer)
    contacts, old_mobile = email(), mobile()
    sent = customer_update(shop, mobile=old_mobile, email=contacts, event_id=unique("digest"))
    await client.customers.ApplyCustomerUpdate(sent)
    await client.apply(shop.update("buyer"))
    note = b', "x": "%s"}' % shop.store_id.encode()
    ours = await quarantine_webhook(client, shop, b'{"id": "buyer", "email": "private@example.com"' + note)
    also = await quarantine_webhook(client, shop, b'{"customer": {"id": "buyer"}' + note, "customers/redact")
    elsewhere = await quarantine_webhook(
        client, shop, b'{"id": "buyer", "phone": "1"' + note, "app_memberSystem_points/challenged"
    )
    other = await quarantine_webhook(client, shop, b'{"id": "other"' + note)
    before = await read_all_tables(service)
    assert old_mobile in before
    assert sent.event_id in before

    if by_webhook:
        redaction = customer_update(shop, kind=REDACTED, updated_at=at(NOW_MS - 1_000))
        answer = await client.customers.ApplyCustomerUpdate(redaction)
        assert (update_outcome(answer), answer.customer_id) == ("APPLIED", "alice")
        assert update_outcome(await client.customers.ApplyCustomerUpdate(redaction)) == "DUPLICATE"
    else:
        assert await redact_customer(client, shop, "alice") == NOW_MS

    left = await read_all_tables(service)
    for private in (
        customer.mobile, customer.email, old_mobile, contacts, "crm-private-7", "card-private-7",
        customer.source_identities[0].value, sent.event_id,
    ):  # fmt: skip
        assert private not in left
    bare = customers_pb2.Customer(
        merchant_id=shop.merchant_id, customer_id="alice", buyers=customer.buyers, fraud_blocked=True
    )
    assert await client.customer(shop.merchant_id, "alice") == bare
    assert (await client.account(shop.merchant_id, shop.store_id, "buyer")).points_balance == 20
    for quarantine_id in (ours, also, elsewhere):
        stored = await quarantined(client, shop, quarantine_id)
        assert (stored.body, stored.body_erased) == (b"", True)
    assert (await quarantined(client, shop, other)).body == b'{"id": "other"' + note
    late = await client.customers.ApplyCustomerUpdate(sent)
    assert (update_outcome(late), late.customer_id) == ("REDACTED", "alice")
    assert await client.customer(shop.merchant_id, "alice") == bare
    audit = await fetch_rows(service, "SELECT reason FROM customer_audit WHERE merchant_id = $1", shop.merchant_id)
    assert [row["reason"] for row in audit] == ["customers/redact" if by_webhook else "requested by letter"]
    for place in ("", shop.merchant_id):
        query = """
            SELECT bytes, (SELECT coalesce(sum(kept_bytes), 0) FROM quarantined_webhooks WHERE merchant_id = $1) AS s
            FROM quarantine_usage WHERE merchant_id = $1
        """
        [used] = await fetch_rows(service, query, place)
        assert used["bytes"] == used["s"]
    newer = await client.customers.ApplyCustomerUpdate(
        customer_update(shop, mobile=mobile(), updated_at=at(NOW_MS + 1))
    )
    assert update_outcome(newer) == "APPLIED"


async def test_a_redaction_erases_copies_under_unknown_merchants(client: Client, shop: Shop) -> None:
    """Copies under another registered merchant stay."""
    buyer_id, other = unique("buyer"), Shop(unique("merchant"), unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    nobodys = [Shop(unique("merchant"), ""), Shop("", "")]
    bodies = {place: b'{"id": "%s", "n": %d}' % (buyer_id.encode(), n) for n, place in enumerate([*nobodys, other])}
    ids = {place: await quarantine_webhook(client, place, body) for place, body in bodies.items()}
    await client.put_customer(
        shop.merchant_id, "alice", buyers=[identity_pb2.Buyer(store_id=shop.store_id, buyer_id=buyer_id)]
    )
    await redact_customer(client, shop, "alice")

    for place in nobodys:
        assert (await quarantined(client, place, ids[place])).body_erased
    assert (await quarantined(client, other, ids[other])).body == bodies[other]


async def test_a_redaction_of_an_unknown_buyer_stores_only_a_hash(client: Client, service: Service, shop: Shop) -> None:
    redaction = customer_update(shop, "unregistered-9", kind=REDACTED)
    redacted = await client.customers.ApplyCustomerUpdate(redaction)
    assert (update_outcome(redacted), redacted.customer_id) == ("APPLIED", "")
    stored = await fetch_rows(service, "SELECT 1 FROM customer_buyers WHERE buyer_id = 'unregistered-9'")
    late = await client.customers.ApplyCustomerUpdate(
        customer_update(shop, "unregistered-9", mobile=mobile(), updated_at=at(NOW_MS - 99_000))
    )
    again = await client.customers.ApplyCustomerUpdate(redaction)
    still = await fetch_rows(service, "SELECT 1 FROM customer_buyers WHERE buyer_id = 'unregistered-9'")

    assert (update_outcome(late), update_outcome(again), stored, still) == ("REDACTED", "DUPLICATE", [], [])


async def test_a_redaction_keeps_contacts_of_newer_updates(client: Client, shop: Shop) -> None:
    number, address = mobile(), email()
    await client.customers.ApplyCustomerUpdate(customer_update(shop, email=address, updated_at=at(NOW_MS - 9_000)))
    await client.customers.ApplyCustomerUpdate(customer_update(shop, mobile=number, updated_at=at(NOW_MS - 5_000)))
    await client.customers.ApplyCustomerUpdate(customer_update(shop, kind=REDACTED, updated_at=at(NOW_MS - 7_000)))

    assert await contacts_of_buyer(client, shop) == (number, "")


async def test_an_operators_redaction_erases_updates_dated_in_the_future(client: Client, shop: Shop) -> None:
    """SHOPLINE's clock may be ahead."""
    ahead = customer_update(shop, mobile=mobile(), updated_at=at(NOW_MS + 60_000))
    applied = await client.customers.ApplyCustomerUpdate(ahead)

    assert await redact_customer(client, shop, applied.customer_id) == NOW_MS + 60_000
    assert update_outcome(await client.customers.ApplyCustomerUpdate(ahead)) == "REDACTED"
    assert await contacts_of_buyer(client, shop) == ("", "")


async def test_an_operators_redaction_erases_digests_of_skipped_future_updates(
    client: Client, service: Service, shop: Shop
) -> None:
    theirs = (await client.put_customer(shop.merchant_id, "other", mobile=mobile())).mobile
    ahead = customer_update(shop, mobile=theirs, updated_at=at(NOW_MS + 60_000))
    applied = await client.customers.ApplyCustomerUpdate(ahead)
    assert ahead.event_id in await read_all_tables(service)

    assert await redact_customer(client, shop, applied.customer_id) == NOW_MS + 60_000
    assert ahead.event_id not in await read_all_tables(service)


async def test_a_redaction_needs_a_known_customer_and_a_reason(client: Client, shop: Shop) -> None:
    error = await refused(redact_customer(client, shop, "unknown"))
    nothing = await refused(client.customers.RedactCustomer(customers_pb2.RedactCustomerRequest()))

    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "CUSTOMER_NOT_FOUND")
    assert set(nothing.fields) == {"merchant_id", "customer_id", "reason"}


async def test_tombstones_outlive_a_key_rotation(service: Service, admin_token: str, shop: Shop) -> None:
    old, new = "b2xkLWtleS1vbGQta2V5LW9sZC1rZXktb2xkLWtleS0=", "bmV3LWtleS1uZXcta2V5LW5ldy1rZXktbmV3LWtleS0="

    async def apply_on_server(code_keys: dict[str, str], sent: customers_pb2.ApplyCustomerUpdateRequest) -> Any:
        settings = server_settings(code_keys=code_keys)
        server = Server(settings, service.database_url, senders={Channel.SMS: Outbox()}, clock=TestClock())
        await server.start()
        own = Client(server.port, admin_token)
        try:
            return update_outcome(await own.customers.ApplyCustomerUpdate(sent))
        except grpc.aio.AioRpcError as error:
            return refusal(error).reason
        finally:
            await own.close()
            await server.stop()

    redaction = customer_update(shop, kind=REDACTED)
    late = customer_update(shop, mobile=mobile(), updated_at=at(NOW_MS - 70_000))
    assert await apply_on_server({}, redaction) == "KEY_NOT_CONFIGURED"
    assert await apply_on_server({"old": old}, redaction) == "APPLIED"
    assert await apply_on_server({"new": new, "old": old}, late) == "REDACTED"
    assert await apply_on_server({"new": new}, late) == "APPLIED"


async def test_no_older_update_remains_after_a_concurrent_redaction(
    client: Client, service: Service, shop: Shop
) -> None:
    for _ in range(6):
        buyer = unique("buyer")
        older = [customer_update(shop, buyer, mobile=mobile(), updated_at=at(NOW_MS - 9_000 - n)) for n in range(8)]
        calls = [*older, customer_update(shop, buyer, kind=REDACTED, updated_at=at(NOW_MS - 8_000))]
        random.shuffle(calls)
        answers = await asyncio.gather(*map(client.customers.ApplyCustomerUpdate, calls))
        assert {update_outcome(answer) for answer in answers} <= {"APPLIED", "OUTDATED", "REDACTED"}
        assert await contacts_of_buyer(client, shop, buyer) == ("", "")
        left = await read_all_tables(service)
        assert not any(sent.mobile in left or sent.event_id in left for sent in older)


async def test_quarantine_usage_is_right_after_a_concurrent_redaction(
    client: Client, service: Service, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, first = Connection.fetch, []

    async def quarantine_meanwhile(self: Connection, statement: Statement, values: Any = None) -> Any:
        answer = await fetch(self, statement, values)
        if statement is LOCK_BUYERS_BODIES:
            first.append(
                asyncio.ensure_future(
                    quarantine_webhook(client, shop, b'{"id": "buyer", "store_id": "%s"}' % shop.store_id.encode())
                )
            )
            await asyncio.wait(first, timeout=0.5)
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "fetch", quarantine_meanwhile)
        await client.customers.ApplyCustomerUpdate(customer_update(shop, kind=REDACTED))
    await first[0]

    query = "SELECT u.bytes, q.kept_bytes FROM quarantine_usage u NATURAL JOIN quarantined_webhooks q"
    [room] = await fetch_rows(service, f"{query} WHERE merchant_id = $1", shop.merchant_id)
    assert room["bytes"] == room["kept_bytes"]


async def test_identifiers_never_reach_errors_or_logs(client: Client, shop: Shop) -> None:
    theirs = await client.put_customer(shop.merchant_id, "alice", mobile=mobile(), email=email())
    with json_logs(servicer_module, handlers_module) as logs:
        errors = [
            await refused(client.put_customer(shop.merchant_id, "bob", mobile=theirs.mobile, email=theirs.email)),
            await refused(client.put_customer(shop.merchant_id, "bob", mobile=f"{theirs.mobile}x")),
            await refused(move_identifier(client, shop, "alice", "unknown", mobile=theirs.mobile)),
        ]
    written = logs.getvalue() + str(errors)

    assert theirs.mobile[3:] not in written
    assert theirs.email not in written


async def test_the_databases_own_log_quotes_no_identifier(
    cluster: Cluster,
    database_url: str,  # noqa: ARG001 - it makes the template
) -> None:
    url = await cluster.clone("pointbook_template")
    connection = await asyncpg.connect(url)
    database = await connection.fetchval("SELECT current_database()")
    for setting in ("log_min_messages = warning", "log_min_error_statement = error", "log_error_verbosity = 'default'"):
        await connection.execute(f"ALTER DATABASE {database} SET {setting}")
    await connection.close()
    server = Server(server_settings(), url, senders={Channel.SMS: Outbox()}, clock=TestClock())
    await server.start()
    client = Client(server.port, await make_token(url, [ALL_MERCHANTS], list(Scope)))
    shop = Shop(unique("merchant"), unique("store"))
    await client.put_store(shop.merchant_id, shop.store_id)
    shared: dict[str, Any] = {
        "mobile": mobile(),
        "email": email(),
        "external_id": unique("crm"),
        "card_numbers": [unique("card")],
    }
    contacts = {name: shared[name] for name in ("mobile", "email")}
    puts = [client.put_customer(shop.merchant_id, f"c-{number}", **shared) for number in range(20)]
    updates = [
        client.customers.ApplyCustomerUpdate(customer_update(shop, f"b-{number}", **contacts)) for number in range(20)
    ]
    await asyncio.gather(*puts, *updates, return_exceptions=True)
    await client.close()
    await server.stop()

    connection = await asyncpg.connect(url)
    for _ in range(2):
        with suppress(asyncpg.UniqueViolationError):
            await connection.execute("INSERT INTO quarantine_usage VALUES ('quoted', 0, 0)")
    await connection.close()
    assert "(merchant_id)=(quoted)" in cluster.log
    for private in (shared["mobile"], shared["email"], shared["external_id"], *shared["card_numbers"]):
        assert private not in cluster.log


async def test_concurrent_puts_updates_moves_and_redactions_never_deadlock(
    client: Client, service: Service, shop: Shop
) -> None:
    chance = random.Random(11)  # noqa: S311 - only chance
    names, buyers = [f"c-{n}" for n in range(5)], [f"b-{n}" for n in range(10)]
    numbers, cards = [mobile() for _ in range(15)], [f"card-{n}" for n in range(25)]
    for name in names:
        await client.put_customer(shop.merchant_id, name)

    def call_randomly() -> Any:
        giver, receiver = chance.sample(names, 2)
        buyer = identity_pb2.Buyer(store_id=shop.store_id, buyer_id=chance.choice(buyers))
        kind, second = chance.choice([CREATED, UPDATED, DELETED, REDACTED]), chance.randrange(60)
        number, some_cards = chance.choice(numbers), chance.sample(cards, 2)
        calls = (
            lambda: client.put_customer(
                shop.merchant_id, giver, mobile=number, card_numbers=some_cards, buyers=[buyer]
            ),
            lambda: client.customers.ApplyCustomerUpdate(
                customer_update(shop, buyer.buyer_id, kind=kind, mobile=number, updated_at=at(NOW_MS - second * 1_000))
            ),
            lambda: move_identifier(client, shop, giver, receiver, card_number=some_cards[0]),
            lambda: move_identifier(client, shop, giver, receiver, buyer=buyer),
            lambda: redact_customer(client, shop, giver),
        )
        return chance.choices(calls, [8, 8, 3, 3, 1])[0]()

    answers = await asyncio.gather(*(call_randomly() for _ in range(600)), return_exceptions=True)

    errors = {answer.code().name for answer in answers if isinstance(answer, grpc.aio.AioRpcError)}
    assert errors <= {"ALREADY_EXISTS", "NOT_FOUND", "INVALID_ARGUMENT"}
    single = "customer_id, kind FROM customer_identifiers WHERE kind = 'MOBILE' AND source = '' AND merchant_id = $1"
    assert await fetch_rows(service, f"SELECT {single} GROUP BY 1, 2 HAVING count(*) > 1", shop.merchant_id) == []
    in_store = "customer_id, store_id FROM customer_buyers WHERE customer_id IS NOT NULL AND merchant_id = $1"
    assert await fetch_rows(service, f"SELECT {in_store} GROUP BY 1, 2 HAVING count(*) > 1", shop.merchant_id) == []
    assert await find_needless_claims(service, shop) == []
