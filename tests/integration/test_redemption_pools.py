"""Pools: the points of a group's members, and of a merchant's other programs."""

from collections.abc import AsyncIterator
from typing import Any
from unittest.mock import patch

import grpc
import pytest

from pointbook.v1 import customers_pb2, identity_pb2, redemption_pb2
from pointbook_common.durations import DAY_MS
from pointbook_server.redemption.transactions import RedemptionTransactions
from support.clients import Client
from support.clocks import NOW_MS, at
from support.redemption import (
    account_points,
    customer_ref,
    draws_by_buyer,
    earn,
    redeem,
    redeem_request,
    reverse,
    validate_request,
    violation_codes,
)
from support.refusals import refused
from support.servers import Service
from support.shops import Shop

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


def by_primary(source: str, kind: str, value: str, account_id: str = "") -> GroupRef:
    """Build a selector of a group by its primary member's identifier in a source."""
    return GroupRef(
        primary_user_source=identity_pb2.UserSource.Value(f"USER_SOURCE_{source}"),
        primary_user_account_id=account_id,
        primary_user_identifier_type=identity_pb2.IdentifierType.Value(f"IDENTIFIER_TYPE_{kind}"),
        primary_user_identifier_value=value,
    )


PRIMARIES = [
    by_primary("INSTORE", "MOBILE", "138 1234 5678"),
    by_primary("INSTORE", "MOBILE", "+8613812345678"),
    by_primary("INSTORE", "EMAIL", "ADA@example.com"),
    by_primary("INSTORE", "CARD_NUMBER", "4711"),
    by_primary("INSTORE", "CARD_EXTERNAL_ID", "Card-1"),
    by_primary("INSTORE", "CUSTOMER_ID", "ada"),
    by_primary("INSTORE", "CARD_NUMBER", "till-card", "till-7"),
    by_primary("LINE", "CUSTOMER_ID", "U-ada"),
    by_primary("WECHAT", "MOBILE", "139 1234 5678", "wx-1"),
    by_primary("TMALL", "EMAIL", "ADA@tmall.example"),
]
UNKNOWN_GROUPS = [
    GroupRef(id="Family"),
    GroupRef(external_id="family"),
    GroupRef(primary_user_id="bob"),
    GroupRef(primary_user_id="unknown"),
    by_primary("INSTORE", "MOBILE", "139 1234 5678"),
    by_primary("INSTORE", "MOBILE", "no number"),
    by_primary("INSTORE", "CARD_NUMBER", "till-card"),
    by_primary("LINE", "CUSTOMER_ID", "u-ada"),
    by_primary("LINE", "CUSTOMER_ID", "U-ada", "other"),
    by_primary("WECHAT", "MOBILE", "139 1234 5678", "wx-2"),
    by_primary("FACEBOOK", "CUSTOMER_ID", "U-ada"),
]
PARTIAL = {
    "nothing": (GroupRef(), {"user_group2"}),
    "WECHAT without its account": (
        by_primary("WECHAT", "MOBILE", "+8613912345678"),
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


def selector_id(selector: GroupRef) -> str:
    """Return a selector as a test's id."""
    return " ".join(str(value) for _, value in selector.ListFields())


def member(name: str, **changes: bool) -> customers_pb2.UserGroup.Member:
    """Build a member who may redeem."""
    values: dict[str, Any] = {"customer_id": name, "can_redeem": True, **changes}
    return Member(**values)


async def put_group(
    client: Client, shop: Shop, *members: customers_pb2.UserGroup.Member, group_id: str = "family", **changes: Any
) -> None:
    """Put a group whose first member is the primary one."""
    group = customers_pb2.UserGroup(
        merchant_id=shop.merchant_id,
        group_id=group_id,
        primary_customer_id=members[0].customer_id,
        members=members,
        **changes,
    )
    await client.customers.PutUserGroup(customers_pb2.PutUserGroupRequest(user_group=group))


def customer_by_name(shop: Shop, name: str = "ada") -> identity_pb2.CustomerRef:
    """Build the reference of one of the shop's customers."""
    return customer_ref(shop, external_id=name)


def group_request(
    shop: Shop, points: int, group: GroupRef, name: str = "ada", **changes: Any
) -> redemption_pb2.ValidateRedemptionRequest:
    """Build a request to validate a redemption from a group's pool."""
    return validate_request(shop, points, customer=customer_by_name(shop, name), user_group2=group, **changes)


async def active_points(client: Client, request: redemption_pb2.ValidateRedemptionRequest) -> int:
    """Return how many points a request may draw on."""
    return (await client.redemption.ValidateRedemption(request)).active_points


FAMILY = GroupRef(id="family")


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """Create a shop with a group of Ada, Bob, Cyd (blocked) and Dan (a fraud).

    Eve is in no group. Each has a number of points of their own, so that a sum shows whose points are in it.
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


# Selectors.


@pytest.mark.parametrize("selector", SELECTORS.values(), ids=SELECTORS)
async def test_group_is_selected_by_every_selector(client: Client, shop: Shop, selector: dict[str, Any]) -> None:
    """The pool excludes blocked members and frauds."""
    group = GroupRef(**selector)

    assert await active_points(client, group_request(shop, 30, group)) == 30
    assert await violation_codes(client, group_request(shop, 30, group)) == []
    assert await violation_codes(client, group_request(shop, 31, group)) == [803]
    redemption = await redeem(client, redeem_request(shop, 30, customer=customer_by_name(shop), user_group2=group))
    assert sorted(draws_by_buyer(redemption)) == [("ada", 10), ("bob", 20)]


@pytest.mark.parametrize("selector", PRIMARIES, ids=selector_id)
async def test_group_is_selected_by_identifier_of_primary_member(
    client: Client, shop: Shop, selector: GroupRef
) -> None:
    assert await active_points(client, group_request(shop, 1, selector)) == 30
    assert await violation_codes(client, group_request(shop, 30, selector, "bob")) == []


@pytest.mark.parametrize("selector", UNKNOWN_GROUPS, ids=selector_id)
async def test_unknown_group_is_1632(client: Client, shop: Shop, selector: GroupRef) -> None:
    assert await violation_codes(client, group_request(shop, 1, selector)) == [1632]
    refusal = await refused(
        redeem(client, redeem_request(shop, 1, customer=customer_by_name(shop), user_group2=selector))
    )
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "GROUP_NOT_FOUND")
    assert refusal.metadata["status_code"] == "1632"


async def test_customer_without_default_group_is_1632(client: Client, shop: Shop) -> None:
    await earn(client, shop, 5, "stranger")
    default = GroupRef(use_default=True)

    assert await violation_codes(client, group_request(shop, 1, default, "bob")) == [1632]
    assert await violation_codes(
        client, validate_request(shop, 1, customer=customer_ref(shop, "stranger"), user_group2=default)
    ) == [1632]


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
async def test_contradictory_selectors_are_request_errors(client: Client, shop: Shop, selector: dict[str, Any]) -> None:
    await put_group(client, shop, member("bob"), member("ada"), group_id="other", external_id="Other")
    group = GroupRef(**selector)

    for call in (
        client.redemption.ValidateRedemption(group_request(shop, 1, group)),
        redeem(client, redeem_request(shop, 1, customer=customer_by_name(shop), user_group2=group)),
    ):
        refusal = await refused(call)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS")
        assert set(refusal.fields) == {"user_group2"}


async def test_selectors_that_disagree_under_locks_are_refused_for_retry(client: Client, shop: Shop) -> None:
    locked = RedemptionTransactions.redeem

    async def rename_and_redeem(*arguments: Any) -> Any:
        await put_group(client, shop, member("ada"), member("bob"), external_id="Renamed")
        return await locked(*arguments)

    request = redeem_request(
        shop, 30, customer=customer_by_name(shop), user_group2=GroupRef(id="family", external_id="Fam-1")
    )
    with patch.object(RedemptionTransactions, "redeem", rename_and_redeem):
        assert (await refused(redeem(client, request))).reason == "REDEMPTION_FAILED"
    assert (await refused(redeem(client, request))).reason == "INVALID_FIELDS"
    assert await account_points(client, shop, "ada") == (10, 10, 0)


@pytest.mark.parametrize(("selector", "fields"), PARTIAL.values(), ids=PARTIAL)
async def test_incomplete_selector_names_missing_fields(
    client: Client, shop: Shop, selector: GroupRef, fields: set[str]
) -> None:
    refusal = await refused(client.redemption.ValidateRedemption(group_request(shop, 1, selector)))

    assert (refusal.reason, set(refusal.fields)) == ("INVALID_FIELDS", fields)


# Members.


async def test_only_redeeming_members_redeem_from_group(client: Client, shop: Shop) -> None:
    await put_group(client, shop, member("ada", can_redeem=False), member("bob"), member("cyd", blocked=True))
    await earn(client, shop, 5, "stranger")
    strangers = [customer_by_name(shop, name) for name in ("ada", "cyd", "eve")] + [customer_ref(shop, "stranger")]
    for customer in strangers:
        assert await violation_codes(client, validate_request(shop, 1, customer=customer, user_group2=FAMILY)) == [1620]
        refusal = await refused(redeem(client, redeem_request(shop, 1, customer=customer, user_group2=FAMILY)))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_A_GROUP_MEMBER")
        assert refusal.metadata["status_code"] == "1620"

    assert await violation_codes(client, group_request(shop, 30, FAMILY, "bob")) == []
    assert await violation_codes(client, group_request(shop, 1, FAMILY, "dan")) == [809, 1620]


async def test_program_without_group_redemption_is_828_with_own_points_only(client: Client, shop: Shop) -> None:
    await client.put_program(shop.merchant_id, shop.store_id, criteria={})

    assert await violation_codes(client, group_request(shop, 11, FAMILY)) == [803, 828]
    refusal = await refused(
        redeem(client, redeem_request(shop, 10, customer=customer_by_name(shop), user_group2=FAMILY))
    )
    assert (refusal.reason, refusal.metadata["status_code"]) == ("GROUP_REDEMPTION_NOT_ALLOWED", "828")


async def test_balance_and_lifetime_criteria_exclude_pool(client: Client, shop: Shop) -> None:
    for name, code in (("min_balance_required", 804), ("min_lifetime_points", 805)):
        for least, expected in ((10, []), (11, [code])):
            await client.put_program(
                shop.merchant_id, shop.store_id, criteria={name: least}, allow_group_redemption=True
            )
            assert await violation_codes(client, group_request(shop, 30, FAMILY)) == expected


async def test_pool_points_are_held_and_reversed_in_their_accounts(client: Client, shop: Shop) -> None:
    redemption = await redeem(client, redeem_request(shop, 25, customer=customer_by_name(shop), user_group2=FAMILY))
    assert redemption.active_points == 5
    refusal = await refused(redeem(client, redeem_request(shop, 21, customer=customer_by_name(shop, "bob"))))
    assert refusal.reason == "INSUFFICIENT_POINTS"
    assert await active_points(client, group_request(shop, 1, FAMILY, "bob")) == 5

    held = [(await account_points(client, shop, name))[2] for name in ("ada", "bob", "cyd")]
    assert (sum(held), held[2]) == (25, 0)
    part = await reverse(client, redemption, 5)
    whole = await reverse(client, redemption)
    assert [made.current_active_points for made in (part, whole)] == [10, 30]
    assert [(await account_points(client, shop, name))[2] for name in ("ada", "bob", "cyd")] == [0, 0, 0]
    assert await active_points(client, group_request(shop, 1, FAMILY, "bob")) == 30


async def test_pool_is_drawn_by_expiry_then_age_then_customer_id(client: Client, shop: Shop) -> None:
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

    redemption = await redeem(
        client, redeem_request(shop, 45, customer=customer_by_name(shop, "zed"), user_group2=GroupRef(id="many"))
    )
    assert draws_by_buyer(redemption) == [
        ("e-buyer", 10),
        ("b-buyer", 10),
        ("d-buyer", 10),
        ("c-buyer", 10),
        ("a-buyer", 5),
    ]


# The merchant's other programs.


@pytest.fixture
async def chain(client: Client, shop: Shop) -> Shop:
    """Create a shop with more programs.

    Program 2 has the store of program 1 and another one, 3 lends nothing, 4 has no buyers.
    Ada has 10 points in program 1, 100 in program 2 only, and 1,000 in program 3.
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
    """Put four programs, all but 3 of which lend their points.

    `changes` has the settings of the programs one, two, three and four.
    """
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


def cross_program_request(
    shop: Shop, points: int, name: str = "ada", **changes: Any
) -> redemption_pb2.ValidateRedemptionRequest:
    """Build a request to redeem points of any program in program 1."""
    return validate_request(shop, points, customer=customer_by_name(shop, name), group_redemption=True, **changes)


async def test_points_of_other_allowing_programs_count_once(client: Client, chain: Shop) -> None:
    assert await active_points(client, validate_request(chain, 1, customer=customer_by_name(chain))) == 10
    assert await active_points(client, cross_program_request(chain, 1)) == 110
    assert await violation_codes(client, cross_program_request(chain, 111)) == [803]
    two = validate_request(chain, 1, customer=customer_by_name(chain), program_id=2)
    assert await active_points(client, two) == 110

    redemption = await redeem(
        client, redeem_request(chain, 110, customer=customer_by_name(chain), group_redemption=True)
    )
    assert sorted(draws_by_buyer(redemption)) == [("ada", 10), ("ada", 100)]
    assert await violation_codes(
        client, validate_request(chain, 1, customer=customer_by_name(chain), program_id=2)
    ) == [803]


async def test_points_of_all_programs_are_drawn_by_expiry(client: Client, chain: Shop) -> None:
    other = Shop(chain.merchant_id, f"{chain.store_id}-2")
    await client.put_customer(
        chain.merchant_id,
        "fay",
        external_id="fay",
        buyers=[{"store_id": other.store_id, "buyer_id": "fay"}, {"store_id": chain.store_id, "buyer_id": "yaf"}],
    )
    await earn(client, chain, 10, "yaf", points_expiry_time=at(NOW_MS + 2 * DAY_MS))
    await earn(client, other, 10, "fay", points_expiry_time=at(NOW_MS + DAY_MS))

    redemption = await redeem(
        client, redeem_request(chain, 15, customer=customer_by_name(chain, "fay"), group_redemption=True)
    )
    assert draws_by_buyer(redemption) == [("fay", 10), ("yaf", 5)]


async def test_program_without_cross_program_redemption_is_828(client: Client, chain: Shop) -> None:
    await put_programs(client, chain, one={"allow_cross_program_redemption": False})

    assert await violation_codes(client, cross_program_request(chain, 11)) == [803, 828]
    refusal = await refused(
        redeem(client, redeem_request(chain, 1, customer=customer_by_name(chain), group_redemption=True))
    )
    assert (refusal.reason, refusal.metadata["status_code"]) == ("CROSS_PROGRAM_REDEMPTION_NOT_ALLOWED", "828")
    await put_programs(client, chain, two={"allow_cross_program_redemption": False})
    assert await violation_codes(client, cross_program_request(chain, 11)) == [803]


@pytest.mark.parametrize("changes", [{"point_value": "0.02"}, {"currency_code": "EUR"}], ids=str)
async def test_allowing_program_with_other_point_value_is_3316(
    client: Client, chain: Shop, changes: dict[str, str]
) -> None:
    await put_programs(client, chain, two={"point_value": "0.0100"}, three=changes)
    assert await violation_codes(client, cross_program_request(chain, 110)) == []

    await put_programs(client, chain, two=changes)
    response = await client.redemption.ValidateRedemption(cross_program_request(chain, 110))
    assert [(violation.code, violation.metadata["program_id"]) for violation in response.violations] == [(3316, "2")]
    refusal = await refused(
        redeem(client, redeem_request(chain, 1, customer=customer_by_name(chain), group_redemption=True))
    )
    assert (refusal.reason, refusal.metadata["status_code"]) == ("CROSS_PROGRAM_MISCONFIGURED", "3316")
    assert await violation_codes(client, validate_request(chain, 10, customer=customer_by_name(chain))) == []


async def test_criteria_and_caps_are_those_of_requested_program(client: Client, chain: Shop) -> None:
    strict = {"max_points_per_redemption": 1, "max_points_per_day": 1, "min_balance_required": 10_000}
    await put_programs(client, chain, two={"criteria": strict, "redemption_enabled": False})
    assert await violation_codes(client, cross_program_request(chain, 110)) == []

    await put_programs(client, chain, one={"criteria": {"max_points_per_day": 50, "min_balance_required": 10}})
    await redeem(client, redeem_request(chain, 50, customer=customer_by_name(chain), group_redemption=True))
    assert 819 in await violation_codes(client, cross_program_request(chain, 1))


async def test_program_without_active_points_requires_no_validation(client: Client, chain: Shop) -> None:
    await put_programs(client, chain, two={"validation": {"required": True}})
    other = Shop(chain.merchant_id, f"{chain.store_id}-2")
    buyers = [
        {"store_id": chain.store_id, "buyer_id": "fay"},
        {"store_id": other.store_id, "buyer_id": "fay"},
    ]
    await client.put_customer(chain.merchant_id, "fay", external_id="fay", buyers=buyers)
    await earn(client, chain, 50, "fay")
    assert await violation_codes(client, cross_program_request(chain, 10, "fay")) == []

    await earn(client, other, 1, "fay")
    assert await violation_codes(client, cross_program_request(chain, 10, "fay")) == [824]


async def test_every_program_drawn_on_must_allow_skipping(client: Client, chain: Shop) -> None:
    may_skip = {"allow_skip": True}
    wants = {"validation": {"required": True}}
    await put_programs(client, chain, one={"validation": may_skip}, two=wants)
    assert await violation_codes(client, cross_program_request(chain, 110, skip_validation=True)) == [824]

    await put_programs(client, chain, one={"validation": may_skip}, two={"validation": {"required": True, **may_skip}})
    assert await violation_codes(client, cross_program_request(chain, 110, skip_validation=True)) == []


async def test_program_drawn_on_may_require_validation(client: Client, chain: Shop) -> None:
    await put_programs(client, chain, two={"validation": {"required": True}}, three={"validation": {"required": True}})

    assert await violation_codes(client, validate_request(chain, 10, customer=customer_by_name(chain))) == []
    assert await violation_codes(client, cross_program_request(chain, 110)) == [824]
    assert await violation_codes(client, cross_program_request(chain, 20, "bob")) == []
    refusal = await refused(
        redeem(client, redeem_request(chain, 110, customer=customer_by_name(chain), group_redemption=True))
    )
    assert refusal.metadata["status_code"] == "824"


# Group and programs together.


async def test_group_pools_points_of_all_allowing_programs(client: Client, chain: Shop) -> None:
    assert await active_points(client, cross_program_request(chain, 130, user_group2=FAMILY)) == 130
    assert await violation_codes(client, cross_program_request(chain, 130, "bob", user_group2=FAMILY)) == []
    assert await violation_codes(client, cross_program_request(chain, 131, "bob", user_group2=FAMILY)) == [803]

    request = redeem_request(
        chain, 130, customer=customer_by_name(chain, "bob"), group_redemption=True, user_group2=FAMILY
    )
    redemption = await redeem(client, request)
    assert sorted(draws_by_buyer(redemption)) == [("ada", 10), ("ada", 100), ("bob", 20)]
    assert await redeem(client, request) == redemption
    request.ClearField("user_group2")
    assert (await refused(redeem(client, request))).reason == "REFERENCE_REUSED"
