"""Pools: the points of a user group's members, and those of a merchant's other programs."""

from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import patch

import grpc
import pytest

from pointbook.v1 import customers_pb2, identity_pb2, redemption_pb2
from pointbook_server.redemption.transactions import RedemptionTransactions
from support.harness import NOW_MS, Client, Service, Shop, at, refused
from support.redemption import (
    DAY_MS,
    customer_of,
    drawn,
    earn,
    findings,
    order,
    points_of,
    question,
    redeem,
    reverse,
)

POINTS = {"ada": 10, "bob": 20, "cyd": 40, "dan": 80, "eve": 160}
SELECTORS: dict[str, dict[str, Any]] = {
    "id": {"id": "family"},
    "external id": {"external_id": "Fam-1"},
    "primary member": {"primary_user_id": "ada"},
    "default": {"use_default": True},
    "all that agree": {"id": "family", "external_id": "Fam-1", "primary_user_id": "ada", "use_default": True},
}
GroupRef = identity_pb2.UserGroupRef
Member = customers_pb2.UserGroup.Member


def primary(source: str, kind: str, value: str, account_id: str = "") -> GroupRef:
    """Choose a group by its primary member's identifier in a source."""
    return GroupRef(
        primary_user_source=identity_pb2.UserSource.Value(f"USER_SOURCE_{source}"),
        primary_user_account_id=account_id,
        primary_user_identifier_type=identity_pb2.IdentifierType.Value(f"IDENTIFIER_TYPE_{kind}"),
        primary_user_identifier_value=value,
    )


PRIMARIES = [
    primary("INSTORE", "MOBILE", "138 1234 5678"),
    primary("INSTORE", "MOBILE", "+8613812345678"),
    primary("INSTORE", "EMAIL", "ADA@example.com"),
    primary("INSTORE", "CARD_NUMBER", "4711"),
    primary("INSTORE", "CARD_EXTERNAL_ID", "Card-1"),
    primary("INSTORE", "CUSTOMER_ID", "ada"),
    primary("INSTORE", "CARD_NUMBER", "till-card", "till-7"),
    primary("LINE", "CUSTOMER_ID", "U-ada"),
    primary("WECHAT", "MOBILE", "139 1234 5678", "wx-1"),
    primary("TMALL", "EMAIL", "ADA@tmall.example"),
]
NOBODYS = [
    GroupRef(id="Family"),
    GroupRef(external_id="family"),
    GroupRef(primary_user_id="bob"),
    GroupRef(primary_user_id="nobody"),
    primary("INSTORE", "MOBILE", "139 1234 5678"),
    primary("INSTORE", "MOBILE", "no number"),
    primary("INSTORE", "CARD_NUMBER", "till-card"),
    primary("LINE", "CUSTOMER_ID", "u-ada"),
    primary("LINE", "CUSTOMER_ID", "U-ada", "other"),
    primary("WECHAT", "MOBILE", "139 1234 5678", "wx-2"),
    primary("FACEBOOK", "CUSTOMER_ID", "U-ada"),
]
PARTIAL = {
    "nothing": (GroupRef(), {"user_group2"}),
    "WECHAT without its account": (
        primary("WECHAT", "MOBILE", "+8613912345678"),
        {"user_group2.primary_user_account_id"},
    ),
    "no source": (
        GroupRef(
            primary_user_identifier_type=identity_pb2.IDENTIFIER_TYPE_EMAIL, primary_user_identifier_value="a@b.c"
        ),
        {"user_group2.primary_user_source"},
    ),
    "only a source": (
        GroupRef(primary_user_source=identity_pb2.USER_SOURCE_LINE),
        {"user_group2.primary_user_identifier_type", "user_group2.primary_user_identifier_value"},
    ),
    "only an account": (
        GroupRef(primary_user_account_id="a"),
        {
            "user_group2.primary_user_source",
            "user_group2.primary_user_identifier_type",
            "user_group2.primary_user_identifier_value",
        },
    ),
}


def name_of(selector: GroupRef) -> str:
    """Name a selector in a test's id."""
    return " ".join(str(value) for _, value in selector.ListFields())


def member(name: str, **changes: bool) -> customers_pb2.UserGroup.Member:
    """Make a member who may redeem."""
    values: dict[str, Any] = {"customer_id": name, "can_redeem": True, **changes}
    return Member(**values)


async def put_group(
    client: Client, shop: Shop, *members: customers_pb2.UserGroup.Member, group_id: str = "family", **changes: Any
) -> None:
    """Put a group, whose first member is the primary one."""
    group = customers_pb2.UserGroup(
        merchant_id=shop.merchant_id,
        group_id=group_id,
        primary_customer_id=members[0].customer_id,
        members=members,
        **changes,
    )
    await client.customers.PutUserGroup(customers_pb2.PutUserGroupRequest(user_group=group))


def by(shop: Shop, name: str = "ada") -> identity_pb2.CustomerRef:
    """Name one of the shop's customers."""
    return customer_of(shop, external_id=name)


def ask(
    shop: Shop, points: int, group: GroupRef, name: str = "ada", **changes: Any
) -> redemption_pb2.ValidateRedemptionRequest:
    """Ask whether a customer may redeem points of a group's pool."""
    return question(shop, points, customer=by(shop, name), user_group2=group, **changes)


async def active_points(client: Client, request: redemption_pb2.ValidateRedemptionRequest) -> int:
    """How many points an ask may draw on."""
    return (await client.redemption.ValidateRedemption(request)).active_points


FAMILY = GroupRef(id="family")


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """A shop whose program lets groups pool points, and a family of Ada, Bob, Cyd who is blocked, and Dan, a fraud.

    Eve is of no group. Each has points of their own, which tell whose are in a pool by their sum.
    """
    client = service.client
    await client.put_program(
        shop.merchant_id, shop.store_id, criteria={}, allow_group_redemption=True, default_region="CN"
    )
    for name, points in POINTS.items():
        more: dict[str, Any] = {}
        if name == "ada":
            more = {
                "mobile": "+8613812345678",
                "email": "ada@example.com",
                "card_numbers": ["4711"],
                "card_external_ids": ["Card-1"],
                "source_identities": [
                    {"source": "USER_SOURCE_INSTORE", "account_id": "till-7", **_identity("CARD_NUMBER", "till-card")},
                    {"source": "USER_SOURCE_LINE", **_identity("CUSTOMER_ID", "U-ada")},
                    {"source": "USER_SOURCE_WECHAT", "account_id": "wx-1", **_identity("MOBILE", "+8613912345678")},
                    {"source": "USER_SOURCE_TMALL", **_identity("EMAIL", "ada@tmall.example")},
                ],
            }
        buyers = [{"store_id": shop.store_id, "buyer_id": name}]
        await client.put_customer(
            shop.merchant_id, name, external_id=name, fraud_blocked=name == "dan", buyers=buyers, **more
        )
        await earn(client, shop, points, name)
    await put_group(
        client,
        shop,
        member("ada", is_default=True),
        member("bob"),
        member("cyd", blocked=True),
        member("dan"),
        external_id="Fam-1",
    )
    yield shop
    service.clock.now_ms = NOW_MS


def _identity(kind: str, value: str) -> dict[str, str]:
    return {"identifier_type": f"IDENTIFIER_TYPE_{kind}", "value": value}


# Which group.


@pytest.mark.parametrize("selector", SELECTORS.values(), ids=SELECTORS)
async def test_a_group_is_chosen_by_every_selector(client: Client, shop: Shop, selector: dict[str, Any]) -> None:
    """The pool is what Ada and Bob have: neither blocked members nor frauds contribute."""
    group = GroupRef(**selector)

    assert await active_points(client, ask(shop, 30, group)) == 30
    assert await findings(client, ask(shop, 30, group)) == []
    assert await findings(client, ask(shop, 31, group)) == [803]
    redemption = await redeem(client, order(shop, 30, customer=by(shop), user_group2=group))
    assert sorted(drawn(redemption)) == [("ada", 10), ("bob", 20)]


@pytest.mark.parametrize("selector", PRIMARIES, ids=name_of)
async def test_a_group_is_chosen_by_its_primary_members_identifier(
    client: Client, shop: Shop, selector: GroupRef
) -> None:
    """Their own ones are INSTORE's without an account, written as every identifier is; the others a source's."""
    assert await active_points(client, ask(shop, 1, selector)) == 30
    assert await findings(client, ask(shop, 30, selector, "bob")) == []


@pytest.mark.parametrize("selector", NOBODYS, ids=name_of)
async def test_there_is_no_such_group(client: Client, shop: Shop, selector: GroupRef) -> None:
    """1632: an answer to a question, NOT_FOUND where points are to be redeemed."""
    assert await findings(client, ask(shop, 1, selector)) == [1632]
    found = await refused(redeem(client, order(shop, 1, customer=by(shop), user_group2=selector)))
    assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "GROUP_NOT_FOUND")
    assert found.metadata["status_code"] == "1632"


async def test_whoever_has_no_default_group(client: Client, shop: Shop) -> None:
    """Is answered like an unknown group, a buyer whom nobody registered too."""
    await earn(client, shop, 5, "stranger")
    default = GroupRef(use_default=True)

    assert await findings(client, ask(shop, 1, default, "bob")) == [1632]
    assert await findings(client, question(shop, 1, customer=customer_of(shop, "stranger"), user_group2=default)) == [
        1632
    ]


@pytest.mark.parametrize(
    "selector",
    [
        {"id": "family", "external_id": "Other"},
        {"id": "family", "primary_user_id": "bob"},
        {"id": "other", "use_default": True},
        {"id": "family", "external_id": "unknown"},
    ],
    ids=str,
)
async def test_selectors_that_disagree(client: Client, shop: Shop, selector: dict[str, Any]) -> None:
    """They are an error of the request, whatever is asked."""
    await put_group(client, shop, member("bob"), member("ada"), group_id="other", external_id="Other")
    group = GroupRef(**selector)

    for call in (
        client.redemption.ValidateRedemption(ask(shop, 1, group)),
        redeem(client, order(shop, 1, customer=by(shop), user_group2=group)),
    ):
        found = await refused(call)
        assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS")
        assert set(found.fields) == {"user_group2"}


async def test_selectors_that_come_to_disagree_in_between(client: Client, shop: Shop) -> None:
    """The call is to be repeated, which then is told so; it holds nothing."""
    locked = RedemptionTransactions.redeem

    async def rename_and_redeem(*arguments: Any) -> Any:
        await put_group(client, shop, member("ada"), member("bob"), external_id="Renamed")
        return await locked(*arguments)

    request = order(shop, 30, customer=by(shop), user_group2=GroupRef(id="family", external_id="Fam-1"))
    with patch.object(RedemptionTransactions, "redeem", rename_and_redeem):
        assert (await refused(redeem(client, request))).reason == "REDEMPTION_FAILED"
    assert (await refused(redeem(client, request))).reason == "INVALID_FIELDS"
    assert await points_of(client, shop, "ada") == (10, 10, 0)


@pytest.mark.parametrize(("selector", "fields"), PARTIAL.values(), ids=PARTIAL)
async def test_half_a_selector(client: Client, shop: Shop, selector: GroupRef, fields: set[str]) -> None:
    """Every field that is missing is named."""
    found = await refused(client.redemption.ValidateRedemption(ask(shop, 1, selector)))

    assert (found.reason, set(found.fields)) == ("INVALID_FIELDS", fields)


# Who may redeem from it.


async def test_only_members_redeem_from_a_group(client: Client, shop: Shop) -> None:
    """1620 for whoever is no member, may not redeem, is blocked in it, or is not registered."""
    await put_group(client, shop, member("ada", can_redeem=False), member("bob"), member("cyd", blocked=True))
    await earn(client, shop, 5, "stranger")
    strangers = [by(shop, name) for name in ("ada", "cyd", "eve")] + [customer_of(shop, "stranger")]
    for customer in strangers:
        assert await findings(client, question(shop, 1, customer=customer, user_group2=FAMILY)) == [1620]
        found = await refused(redeem(client, order(shop, 1, customer=customer, user_group2=FAMILY)))
        assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_A_GROUP_MEMBER")
        assert found.metadata["status_code"] == "1620"

    assert await findings(client, ask(shop, 30, FAMILY, "bob")) == []
    assert await findings(client, ask(shop, 1, FAMILY, "dan")) == [809, 1620]


async def test_a_program_that_lets_no_groups_pool_points(client: Client, shop: Shop) -> None:
    """828, and only one's own points count."""
    await client.put_program(shop.merchant_id, shop.store_id, criteria={})

    assert await findings(client, ask(shop, 11, FAMILY)) == [803, 828]
    found = await refused(redeem(client, order(shop, 10, customer=by(shop), user_group2=FAMILY)))
    assert (found.reason, found.metadata["status_code"]) == ("GROUP_REDEMPTION_NOT_ALLOWED", "828")


async def test_what_is_required_of_a_member_is_their_own(client: Client, shop: Shop) -> None:
    """A balance and earned points are not those of the pool."""
    for name, code in (("min_balance_required", 804), ("min_lifetime_points", 805)):
        for least, expected in ((10, []), (11, [code])):
            await client.put_program(
                shop.merchant_id, shop.store_id, criteria={name: least}, allow_group_redemption=True
            )
            assert await findings(client, ask(shop, 30, FAMILY)) == expected


async def test_a_pools_points_are_held_where_they_are_drawn(client: Client, shop: Shop) -> None:
    """A member's points are promised once, whoever redeems them, and given back to whom they belong."""
    redemption = await redeem(client, order(shop, 25, customer=by(shop), user_group2=FAMILY))
    assert redemption.active_points == 5
    found = await refused(redeem(client, order(shop, 21, customer=by(shop, "bob"))))
    assert found.reason == "INSUFFICIENT_POINTS"
    assert await active_points(client, ask(shop, 1, FAMILY, "bob")) == 5

    held = [(await points_of(client, shop, name))[2] for name in ("ada", "bob", "cyd")]
    assert (sum(held), held[2]) == (25, 0)
    await reverse(client, redemption)
    assert [(await points_of(client, shop, name))[2] for name in ("ada", "bob", "cyd")] == [0, 0, 0]
    assert await active_points(client, ask(shop, 1, FAMILY, "bob")) == 30


async def test_the_order_in_which_a_pool_is_drawn(client: Client, shop: Shop) -> None:
    """Soonest expiry first, then created earlier, then by customer id: not by whose store or buyer it is."""
    moment, soon = NOW_MS - DAY_MS, at(NOW_MS + DAY_MS)
    lots = (
        ("zed", "a-buyer", moment, None),
        ("una", "c-buyer", moment, None),
        ("tom", "d-buyer", moment - 1, None),
        ("sue", "b-buyer", moment + 1, soon),
        ("rex", "e-buyer", moment, soon),
    )
    for name, buyer_id, at_ms, expiry in lots:
        await earn(client, shop, 10, buyer_id, updated_at=at(at_ms), points_expiry_time=expiry)
        buyers = [{"store_id": shop.store_id, "buyer_id": buyer_id}]
        await client.put_customer(shop.merchant_id, name, external_id=name, buyers=buyers)
    await put_group(client, shop, *(member(name) for name, *_ in lots), group_id="many")

    redemption = await redeem(client, order(shop, 45, customer=by(shop, "zed"), user_group2=GroupRef(id="many")))
    assert drawn(redemption) == [("e-buyer", 10), ("b-buyer", 10), ("d-buyer", 10), ("c-buyer", 10), ("a-buyer", 5)]


# The merchant's other programs.


@pytest.fixture
async def chain(client: Client, shop: Shop) -> Shop:
    """A shop with more programs: 2 of another store and the same one, 3 which gives nothing away, 4 of no buyer's.

    Ada has 10 points in program 1, 100 in program 2 alone, and 1,000 in program 3.
    """
    stores = [f"{shop.store_id}-{number}" for number in (2, 3, 4)]
    for store_id, points in zip(stores, (100, 1_000, 0), strict=True):
        await client.put_store(shop.merchant_id, store_id)
        if points:
            await earn(client, Shop(shop.merchant_id, store_id), points, "ada")
    buyers = [{"store_id": store_id, "buyer_id": "ada"} for store_id in (shop.store_id, *stores[:2])]
    await client.put_customer(shop.merchant_id, "ada", external_id="ada", buyers=buyers)
    await put_programs(client, shop)
    return shop


async def put_programs(client: Client, shop: Shop, **changes: dict[str, Any]) -> None:
    """Put four programs of which all but 3 give their points away, with changes by name: one, two, three, four."""
    stores = {
        "one": [shop.store_id],
        "two": [f"{shop.store_id}-2", shop.store_id],
        "three": [f"{shop.store_id}-3"],
        "four": [f"{shop.store_id}-4"],
    }
    for number, (name, store_ids) in enumerate(stores.items(), start=1):
        values = {
            "program_id": number,
            "store_ids": store_ids,
            "criteria": {},
            "allow_cross_program_redemption": name != "three",
            "allow_group_redemption": name == "one",
            **changes.get(name, {}),
        }
        await client.put_program(shop.merchant_id, shop.store_id, **values)


def across(shop: Shop, points: int, name: str = "ada", **changes: Any) -> redemption_pb2.ValidateRedemptionRequest:
    """Ask whether a customer may redeem points of any program in program 1."""
    return question(shop, points, customer=by(shop, name), group_redemption=True, **changes)


async def test_points_of_other_allowing_programs(client: Client, chain: Shop) -> None:
    """They count where they are asked for; an account in two programs counts once."""
    assert await active_points(client, question(chain, 1, customer=by(chain))) == 10
    assert await active_points(client, across(chain, 1)) == 110
    assert await findings(client, across(chain, 111)) == [803]
    two = question(chain, 1, customer=by(chain), program_id=2)
    assert await active_points(client, two) == 110

    redemption = await redeem(client, order(chain, 110, customer=by(chain), group_redemption=True))
    assert sorted(drawn(redemption)) == [("ada", 10), ("ada", 100)]
    assert await findings(client, question(chain, 1, customer=by(chain), program_id=2)) == [803]


async def test_points_of_other_programs_are_drawn_soonest_expiring_first(client: Client, chain: Shop) -> None:
    """Whichever program they are of."""
    other = Shop(chain.merchant_id, f"{chain.store_id}-2")
    await client.put_customer(
        chain.merchant_id,
        "fay",
        external_id="fay",
        buyers=[{"store_id": other.store_id, "buyer_id": "fay"}, {"store_id": chain.store_id, "buyer_id": "yaf"}],
    )
    await earn(client, chain, 10, "yaf", points_expiry_time=at(NOW_MS + 2 * DAY_MS))
    await earn(client, other, 10, "fay", points_expiry_time=at(NOW_MS + DAY_MS))

    redemption = await redeem(client, order(chain, 15, customer=by(chain, "fay"), group_redemption=True))
    assert drawn(redemption) == [("fay", 10), ("yaf", 5)]


async def test_a_program_that_takes_no_points_of_others(client: Client, chain: Shop) -> None:
    """828 for the named program alone: of the others only the points of those that allow it are drawn."""
    await put_programs(client, chain, one={"allow_cross_program_redemption": False})

    assert await findings(client, across(chain, 11)) == [803, 828]
    found = await refused(redeem(client, order(chain, 1, customer=by(chain), group_redemption=True)))
    assert (found.reason, found.metadata["status_code"]) == ("CROSS_PROGRAM_REDEMPTION_NOT_ALLOWED", "828")
    await put_programs(client, chain, two={"allow_cross_program_redemption": False})
    assert await findings(client, across(chain, 11)) == [803]


@pytest.mark.parametrize("changes", [{"point_value": "0.02"}, {"currency_code": "EUR"}], ids=str)
async def test_an_allowing_program_whose_points_are_worth_something_else(
    client: Client, chain: Shop, changes: dict[str, str]
) -> None:
    """3316, which names the program; the same value written otherwise is the same."""
    await put_programs(client, chain, two={"point_value": "0.0100"}, three=changes)
    assert await findings(client, across(chain, 110)) == []

    await put_programs(client, chain, two=changes)
    answer = await client.redemption.ValidateRedemption(across(chain, 110))
    assert [(found.code, found.metadata["program_id"]) for found in answer.violations] == [(3316, "2")]
    found = await refused(redeem(client, order(chain, 1, customer=by(chain), group_redemption=True)))
    assert (found.reason, found.metadata["status_code"]) == ("CROSS_PROGRAM_MISCONFIGURED", "3316")
    assert await findings(client, question(chain, 10, customer=by(chain))) == []


async def test_the_named_programs_criteria_and_caps_apply(client: Client, chain: Shop) -> None:
    """Not those of the programs that are drawn on."""
    strict = {"max_points_per_redemption": 1, "max_points_per_day": 1, "min_balance_required": 10_000}
    await put_programs(client, chain, two={"criteria": strict, "redemption_enabled": False})
    assert await findings(client, across(chain, 110)) == []

    await put_programs(client, chain, one={"criteria": {"max_points_per_day": 50, "min_balance_required": 10}})
    await redeem(client, order(chain, 50, customer=by(chain), group_redemption=True))
    assert 819 in await findings(client, across(chain, 1))


async def test_a_program_without_points_requires_nothing(client: Client, chain: Shop) -> None:
    """Nothing of it can be drawn; with the first point it is asked."""
    await put_programs(client, chain, two={"validation": {"required": True}})
    other = Shop(chain.merchant_id, f"{chain.store_id}-2")
    buyers = [
        {"store_id": chain.store_id, "buyer_id": "fay"},
        {"store_id": other.store_id, "buyer_id": "fay"},
    ]
    await client.put_customer(chain.merchant_id, "fay", external_id="fay", buyers=buyers)
    await earn(client, chain, 50, "fay")
    assert await findings(client, across(chain, 10, "fay")) == []

    await earn(client, other, 1, "fay")
    assert await findings(client, across(chain, 10, "fay")) == [824]


async def test_every_program_that_is_drawn_on_must_let_the_validation_be_skipped(client: Client, chain: Shop) -> None:
    """The named program cannot waive what another one wants for its points."""
    may_skip = {"allow_skip": True}
    wants = {"validation": {"required": True}}
    await put_programs(client, chain, one={"validation": may_skip}, two=wants)
    assert await findings(client, across(chain, 110, skip_validation=True)) == [824]

    await put_programs(client, chain, one={"validation": may_skip}, two={"validation": {"required": True, **may_skip}})
    assert await findings(client, across(chain, 110, skip_validation=True)) == []


async def test_a_program_that_is_drawn_on_may_require_validation(client: Client, chain: Shop) -> None:
    """824 for whoever has points there, and nobody else."""
    await put_programs(client, chain, two={"validation": {"required": True}}, three={"validation": {"required": True}})

    assert await findings(client, question(chain, 10, customer=by(chain))) == []
    assert await findings(client, across(chain, 110)) == [824]
    assert await findings(client, across(chain, 20, "bob")) == []
    found = await refused(redeem(client, order(chain, 110, customer=by(chain), group_redemption=True)))
    assert found.metadata["status_code"] == "824"


# Both.


async def test_a_groups_points_of_all_programs(client: Client, chain: Shop) -> None:
    """The members' points of all allowing programs are one pool."""
    assert await active_points(client, across(chain, 130, user_group2=FAMILY)) == 130
    assert await findings(client, across(chain, 130, "bob", user_group2=FAMILY)) == []
    assert await findings(client, across(chain, 131, "bob", user_group2=FAMILY)) == [803]

    request = order(chain, 130, customer=by(chain, "bob"), group_redemption=True, user_group2=FAMILY)
    redemption = await redeem(client, request)
    assert sorted(drawn(redemption)) == [("ada", 10), ("ada", 100), ("bob", 20)]
    assert await redeem(client, request) == redemption
    request.ClearField("user_group2")
    assert (await refused(redeem(client, request))).reason == "REFERENCE_REUSED"
