"""`pointbook benefits import` on a real server."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pointbook.v1 import benefits_pb2
from pointbook_server.access.model import Scope
from support.benefits import benefits_info, export_benefits, level_response, shopline_privilege
from support.clients import Client
from support.processes import (
    POINTBOOK,
    Finished,
    clean_environment,
    finish,
    one_line,
    pointbook,
    running,
    without_request_ids,
)
from support.servers import Service
from support.shops import Shop
from support.tokens import make_token

POINTS = benefits_info(
    rewardType="POINTS", benefitsDetails="1000", benefitsStatus="ACTIVE", usageLimitsType="UNLIMITED"
)
BIRTHDAY = benefits_info(
    rewardType="PERCENTAGE_DISCOUNT",
    benefitsDetails="15",
    benefitsStatus="ACTIVE",
    autoStackLimit=True,
    codeStackLimit=False,
    benefitsUsageInstructionType="MIN_PURCHASE_AMOUNT",
    benefitsUsageInstructionValue="100.00",
    productsApplicableType="ALL_PRODUCTS",
    birthBenefitsReleaseType="FIXED_BEFORE",
    daysBefore="7",
    usageLimitsType="LIMITS",
    usageLimitsTimes=1,
)
SHIPPING = benefits_info(
    rewardType="FREE_SHIPPING", benefitsDetails="0", benefitsStatus="INACTIVE", periodicallyMonths="3"
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with three benefits."""
    return write(tmp_path, level_response(POINTS, BIRTHDAY, SHIPPING))


def write(folder: Path, content: Any, name: str = "gold.json") -> Path:
    """Write a file, as JSON unless it is text."""
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


async def run(file: Path | str, shop: Shop, settings: dict[str, str], *options: str, level: str = "MLC7") -> Finished:
    """Import a file for a level."""
    arguments = ("benefits", "import", str(file), "--merchant", shop.merchant_id, "--level", level, *options)
    return await pointbook(*arguments, **settings)


async def list_benefits(client: Client, shop: Shop) -> list[benefits_pb2.Benefit]:
    """Return a merchant's benefits."""
    request = benefits_pb2.ListBenefitsRequest(merchant_id=shop.merchant_id, page_size=1_000)
    return list((await client.benefits.ListBenefits(request)).benefits)


async def test_a_file_is_imported_once(client: Client, shop: Shop, settings: dict[str, str], file: Path) -> None:
    level = "gid://shopline/Membership/MLC7"
    first = await run(file, shop, settings, "--membership-type", "LEVEL", level=level)
    assert (first.exit_code, first.err) == (0, ""), first
    assert first.out.splitlines() == [
        "MLC7:1  created",
        "MLC7:2  created",
        "    stored by its name: productsApplicableType ALL_PRODUCTS",
        "MLC7:3  created",
        "    set aside: periodicallyMonths, which is only relevant when benefits_issurance_type = PERIODICALLY",
        "3 benefits: 3 created, 0 changed, 0 unchanged, 0 refused; 0 vanished.",
    ]
    stored = await list_benefits(client, shop)
    points, birthday, shipping = stored
    assert (points.benefit_id, points.level_code, points.benefits_details) == ("MLC7:1", "MLC7", "1000")
    assert points.membership_type == benefits_pb2.MEMBERSHIP_TYPE_LEVEL
    assert birthday.days_before == 7
    assert birthday.unrecognized_values == {"products_applicable_type": "ALL_PRODUCTS"}
    assert dict(shipping.irrelevant_values) == {"periodically_months": "3"}

    again = write(file.parent, export_benefits(stored), "exported.json")
    for same, options in ((file, ()), (again, ()), (again, ("--membership-type", "LEVEL", "--prune"))):
        second = await run(same, shop, settings, *options)
        assert second.exit_code == 0, second
        assert "3 benefits: 0 created, 0 changed, 3 unchanged, 0 refused; 0 " in second.out
    assert await list_benefits(client, shop) == stored


async def test_changed_fields_and_vanished_benefits_are_printed(
    client: Client, shop: Shop, settings: dict[str, str], file: Path, tmp_path: Path
) -> None:
    await run(file, shop, settings)
    changed = {**BIRTHDAY, "benefitsDetails": 20, "daysBefore": None, "productsApplicableType": "SPECIFIC_CATEGORY"}
    changed |= {"specificCategoryList": ["tea", "cups"], "benefitsIcon": "\u001b[2J" + "x" * 100}
    other = write(tmp_path, level_response(POINTS, {**changed, "benefitsIcon": "i" * 100}), "other.json")
    finished = await run(other, shop, settings)

    assert finished.exit_code == 0, finished
    assert finished.out.splitlines() == [
        "MLC7:1  unchanged",
        "MLC7:2  changed",
        '    benefits_details: "15" -> "20"',
        f'    benefits_icon: nothing -> "{"i" * 79}…',
        "    days_before: 7 -> nothing",
        "    products_applicable_type: ALL_PRODUCTS -> SPECIFIC_CATEGORY",
        '    specific_category_list: nothing -> ["tea", "cups"]',
        "MLC7:3  vanished",
        "    not in the file; --prune deletes it",
        "2 benefits: 0 created, 1 changed, 1 unchanged, 0 refused; 1 vanished.",
    ]
    assert len(await list_benefits(client, shop)) == 3

    pruned = await run(other, shop, settings, "--prune")
    assert pruned.out.splitlines()[-3:] == [
        "MLC7:3  deleted",
        "    not in the file",
        "2 benefits: 0 created, 0 changed, 2 unchanged, 0 refused; 1 deleted.",
    ]
    assert [benefit.benefit_id for benefit in await list_benefits(client, shop)] == ["MLC7:1", "MLC7:2"]


async def test_a_long_value_is_printed_from_the_first_difference(
    shop: Shop, settings: dict[str, str], tmp_path: Path
) -> None:
    ids = [f"product-{number:02}" for number in range(40)]
    before = benefits_info(rewardType="CASH_VOUCHER", benefitsDetails="5", productsApplicableType="SPECIFIC_PRODUCT")
    await run(write(tmp_path, level_response({**before, "specificProductIds": ids})), shop, settings)
    after = {**before, "specificProductIds": [*ids[:-1], "product-99"], "benefitsIcon": "a:cat:b"}
    finished = await run(write(tmp_path, level_response(after)), shop, settings)

    message = '"product-36", "product-37", "product-38", "product-'
    assert finished.out.splitlines()[1:3] == [
        '    benefits_icon: nothing -> "a:cat:b"',
        f'    specific_product_ids: …{message[-40:]}39"] -> …{message[-40:]}99"]',
    ]


async def test_prune_deletes_only_imported_benefits(
    client: Client, shop: Shop, settings: dict[str, str], tmp_path: Path
) -> None:
    others = [("MLC7:x", "MLC7"), ("MLC7:01", "MLC7"), ("own", "MLC7"), ("MLC77:9", "MLC77"), ("MLC7:9", "other")]
    for benefit_id, level_code in [*others, ("MLC7:12", "MLC7"), ("MLC7:2", "MLC7")]:
        benefit = benefits_pb2.Benefit(merchant_id=shop.merchant_id, benefit_id=benefit_id, level_code=level_code)
        await client.benefits.PutBenefit(benefits_pb2.PutBenefitRequest(benefit=benefit))
    finished = await run(write(tmp_path, level_response()), shop, settings, "--prune")

    assert [line for line in finished.out.splitlines() if not line.startswith(" ")] == [
        "MLC7:2  deleted",
        "MLC7:12  deleted",
        "0 benefits: 0 created, 0 changed, 0 unchanged, 0 refused; 2 deleted.",
    ]
    assert sorted(benefit.benefit_id for benefit in await list_benefits(client, shop)) == sorted(
        name for name, _ in others
    )


async def test_fields_that_are_not_in_the_file_stay_unchanged(
    client: Client, shop: Shop, settings: dict[str, str], file: Path
) -> None:
    await run(file, shop, settings)
    birthday = (await list_benefits(client, shop))[1]
    birthday.store_ids.append(shop.store_id)
    birthday.reward_scene = benefits_pb2.REWARD_SCENE_BIRTH_BENEFITS
    birthday.unrecognized_values["membership_type"] = "VIP"
    await client.benefits.PutBenefit(benefits_pb2.PutBenefitRequest(benefit=birthday))

    finished = await run(file, shop, settings)
    assert "3 unchanged" in finished.out
    assert (await list_benefits(client, shop))[1] == birthday

    finished = await run(file, shop, settings, "--membership-type", "PAID")
    assert "    membership_type: VIP -> PAID" in finished.out.splitlines()


async def test_an_invalid_benefit_does_not_stop_the_others(
    client: Client, shop: Shop, settings: dict[str, str], tmp_path: Path
) -> None:
    wrong = {**BIRTHDAY, "daysBefore": "a week", "autoStackLimit": "maybe", "specificProductIds": "p"}
    wrong |= {"usageLimitsType": 3, "benefitsName": "\ud800"}
    wrong |= {"productsApplicableType": "SPECIFIC_PRODUCT"}
    newer = {**POINTS, "new\u001bField": 1, "emptyField": None}
    finished = await run(
        write(tmp_path, level_response(wrong, None, {**POINTS, "benefitsDetails": "many"}, newer)), shop, settings
    )

    assert finished.exit_code == 1, finished
    field = "benefit.benefits_details"
    refusal = f"INVALID_ARGUMENT: INVALID_FIELDS: Wrong fields: {field}. ({field}: must be whole points, 1 to 10^15)"
    assert without_request_ids(finished.out).splitlines() == [
        "MLC7:1  refused",
        "    benefitsInfo[0].autoStackLimit must be true or false",
        "    benefitsInfo[0].benefitsName must be a text",
        "    benefitsInfo[0].daysBefore must be a whole number of 32 bits",
        "    benefitsInfo[0].specificProductIds must be a list",
        "    benefitsInfo[0].usageLimitsType must be a name",
        "MLC7:2  refused",
        "    benefitsInfo[1] is required",
        "MLC7:3  refused",
        f"    {refusal} (request …)",
        "MLC7:4  created",
        "    ignored: new\\x1bField, which is not a field of BenefitsInfo",
        "4 benefits: 1 created, 0 changed, 0 unchanged, 3 refused; 0 vanished.",
    ]
    assert [benefit.benefit_id for benefit in await list_benefits(client, shop)] == ["MLC7:4"]


async def test_a_benefit_that_is_too_large_does_not_stop_the_others(
    client: Client, shop: Shop, settings: dict[str, str], tmp_path: Path
) -> None:
    big = {**BIRTHDAY, "benefitsIcon": "i" * 2**21}
    finished = await run(write(tmp_path, level_response(big, POINTS)), shop, settings)

    assert finished.exit_code == 1, finished
    lines = finished.out.splitlines()
    assert (lines[0], lines[2]) == ("MLC7:1  refused", "MLC7:2  created")
    assert lines[1].startswith("    INVALID_ARGUMENT: INVALID_FIELDS: The request has 2,097,")
    assert [benefit.benefit_id for benefit in await list_benefits(client, shop)] == ["MLC7:2"]


async def test_ignored_fields_are_printed_in_the_order_of_the_file(
    shop: Shop, settings: dict[str, str], tmp_path: Path
) -> None:
    newer = {f"newField{number}": number for number in (3, 1, 4, 5, 9, 2, 6)}
    finished = await run(write(tmp_path, level_response({**POINTS, **newer})), shop, settings)

    message = [f"    ignored: {name}, which is not a field of BenefitsInfo" for name in newer]
    assert finished.out.splitlines()[1:-1] == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be JSON in UTF-8"),
        ('{"data": NaN}', "must be JSON in UTF-8"),
        ("[" * 100_000, "must be JSON in UTF-8"),
        ("[]", "must have data.benefitsOfMembership.benefitsInfo"),
        ({"data": {"benefitsOfMembership": None}}, "must have data.benefitsOfMembership.benefitsInfo"),
        ({"data": {"benefitsOfMembership": {"benefitsInfo": {}}}}, "must have a list of at most 1,000 benefits"),
        ({"data": {"benefitsOfMembership": {"benefitsInfo": None}}}, "must have a list of at most 1,000 benefits"),
        (level_response(*[POINTS] * 1_001), "must have a list of at most 1,000 benefits"),
        ({**level_response(POINTS), "errors": [{"message": "throttled"}]}, "is a response with errors"),
        (level_response(POINTS, customPrivileges={}), "must have a list of at most 1,000 custom privileges"),
        (level_response(POINTS, customPrivileges="none"), "must have a list of at most 1,000 custom privileges"),
        (
            level_response(customPrivileges=[shopline_privilege()] * 1_001),
            "must have a list of at most 1,000 custom privileges",
        ),
    ],
)
async def test_a_file_that_is_not_a_response_changes_nothing(
    shop: Shop, settings: dict[str, str], tmp_path: Path, content: Any, message: str
) -> None:
    error_line = one_line(await run(write(tmp_path, content), shop, settings, "--prune"))

    assert f"gold.json: the file {message}" in error_line


async def privileges(client: Client, shop: Shop, level: str = "MLC7") -> list[benefits_pb2.CustomPrivilege]:
    """Return the custom privileges of a level."""
    request = benefits_pb2.ListCustomPrivilegesRequest(merchant_id=shop.merchant_id, level_code=level, page_size=1_000)
    return list((await client.benefits.ListCustomPrivileges(request)).custom_privileges)


async def test_custom_privileges_are_imported_once(
    client: Client, shop: Shop, settings: dict[str, str], tmp_path: Path
) -> None:
    lounge = shopline_privilege(privilegeDescription="Coffee\nand tea", benefitsIcon="https://img.example/l.png")
    odd = shopline_privilege(privilegeName=7, previlegeStatus="ACTIVE", privilegeColour="red")
    file = write(
        tmp_path, level_response(POINTS, customPrivileges=[lounge, odd, shopline_privilege(privilegeName=None)])
    )

    first = await run(file, shop, settings)
    stored = await privileges(client, shop)
    second = await run(file, shop, settings, "--prune")

    assert first.exit_code == 0, first
    assert first.out.splitlines() == [
        "MLC7:1  created",
        "1 benefit: 1 created, 0 changed, 0 unchanged, 0 refused; 0 vanished.",
        "MLC7:p1  created",
        "MLC7:p2  created",
        "    ignored: privilegeColour, which is not a field of custom privileges",
        "MLC7:p3  created",
        "3 custom privileges: 3 created, 0 changed, 0 unchanged, 0 refused; 0 vanished.",
    ]
    named = {"merchant_id": shop.merchant_id, "level_code": "MLC7"}
    assert stored == [
        benefits_pb2.CustomPrivilege(
            **named,
            privilege_id="MLC7:p1",
            privilege_name="Lounge",
            privilege_description="Coffee\nand tea",
            benefits_icon="https://img.example/l.png",
        ),
        benefits_pb2.CustomPrivilege(**named, privilege_id="MLC7:p2", privilege_name="7", previlege_status="ACTIVE"),
        benefits_pb2.CustomPrivilege(**named, privilege_id="MLC7:p3"),
    ]
    assert "3 custom privileges: 0 created, 0 changed, 3 unchanged, 0 refused; 0 deleted." in second.out
    assert await privileges(client, shop) == stored


async def test_changed_and_vanished_custom_privileges_are_printed(
    client: Client, shop: Shop, settings: dict[str, str], tmp_path: Path
) -> None:
    await run(
        write(
            tmp_path,
            level_response(customPrivileges=[shopline_privilege(), shopline_privilege(), shopline_privilege()]),
        ),
        shop,
        settings,
    )
    for privilege_id, level_code in (("MLC7:px", "MLC7"), ("MLC7:p03", "MLC7"), ("own", "MLC7"), ("MLC7:p9", "other")):
        own = benefits_pb2.CustomPrivilege(
            merchant_id=shop.merchant_id, privilege_id=privilege_id, level_code=level_code
        )
        await client.benefits.PutCustomPrivilege(benefits_pb2.PutCustomPrivilegeRequest(custom_privilege=own))
    other = write(
        tmp_path, level_response(customPrivileges=[shopline_privilege(), shopline_privilege(privilegeName="Bar")])
    )

    vanished = await run(other, shop, settings)
    pruned = await run(other, shop, settings, "--prune")

    assert vanished.out.splitlines()[1:] == [
        "MLC7:p1  unchanged",
        "MLC7:p2  changed",
        '    privilege_name: "Lounge" -> "Bar"',
        "MLC7:p3  vanished",
        "    not in the file; --prune deletes it",
        "2 custom privileges: 0 created, 1 changed, 1 unchanged, 0 refused; 1 vanished.",
    ]
    assert pruned.out.splitlines()[-1].endswith("2 unchanged, 0 refused; 1 deleted.")
    ids = {each.privilege_id for each in await privileges(client, shop)}
    assert ids == {"MLC7:p1", "MLC7:p2", "MLC7:px", "MLC7:p03", "own"}


async def test_an_invalid_custom_privilege_does_not_stop_the_others(
    client: Client, shop: Shop, settings: dict[str, str], tmp_path: Path
) -> None:
    wrong = [
        shopline_privilege(privilegeName=["a"], benefitsIcon={"url": "x"}, privilegeDescription="\ud800"),
        None,
        "Lounge",
        {},
        shopline_privilege(privilegeName="x" * 256, privilegeDescription="x" * 2_001, previlegeStatus="two words"),
        shopline_privilege(benefitsIcon="i" * 2**21),
        shopline_privilege(),
    ]
    finished = await run(write(tmp_path, level_response(customPrivileges=wrong)), shop, settings)

    assert finished.exit_code == 1, finished
    lines = finished.out.splitlines()
    assert lines[1:12] == [
        "MLC7:p1  refused",
        "    customPrivileges[0].privilegeName must be a text",
        "    customPrivileges[0].privilegeDescription must be a text",
        "    customPrivileges[0].benefitsIcon must be a text",
        "MLC7:p2  refused",
        "    customPrivileges[1] is required",
        "MLC7:p3  refused",
        "    customPrivileges[2] is required",
        "MLC7:p4  refused",
        "    customPrivileges[3] is required",
        "MLC7:p5  refused",
    ]
    for name in ("privilege_name", "privilege_description", "previlege_status"):
        assert f"custom_privilege.{name}: must be at most" in lines[12]
    assert lines[13:15] == ["MLC7:p6  refused", lines[14]]
    assert lines[14].startswith("    INVALID_ARGUMENT: INVALID_FIELDS: The request has 2,097,")
    assert lines[15:] == [
        "MLC7:p7  created",
        "7 custom privileges: 1 created, 0 changed, 0 unchanged, 6 refused; 0 vanished.",
    ]
    assert [each.privilege_id for each in await privileges(client, shop)] == ["MLC7:p7"]


@pytest.mark.parametrize("others", [{}, {"customPrivileges": None}])
async def test_a_response_without_custom_privileges_deletes_none(
    others: dict[str, Any], client: Client, shop: Shop, settings: dict[str, str], tmp_path: Path
) -> None:
    await run(write(tmp_path, level_response(customPrivileges=[shopline_privilege()])), shop, settings)
    silent = await run(write(tmp_path, level_response(POINTS, **others)), shop, settings, "--prune")
    assert "custom privilege" not in silent.out
    assert len(await privileges(client, shop)) == 1

    empty = await run(write(tmp_path, level_response(POINTS, customPrivileges=[])), shop, settings, "--prune")
    assert "0 custom privileges: 0 created, 0 changed, 0 unchanged, 0 refused; 1 deleted." in empty.out
    assert await privileges(client, shop) == []


async def test_invalid_options_files_and_servers_are_reported_in_one_line(
    service: Service, shop: Shop, settings: dict[str, str], file: Path, tmp_path: Path
) -> None:
    assert "--membership-type must be one of LEVEL, PAID, BASIC, DUAL" in one_line(
        await run(file, shop, settings, "--membership-type", "GOLD")
    )
    for level in ("", "two words", "x" * 59):
        assert "--level must be 1 to 58 visible ASCII characters" in one_line(
            await run(file, shop, settings, level=level)
        )
    assert "No such file" in one_line(await run(tmp_path / "nothing.json", shop, settings))
    away = await run(file, shop, settings, "--server", "127.0.0.1:1")
    assert (away.exit_code, "UNAVAILABLE" in away.err) == (2, True)
    token = await make_token(service.database_url, [shop.merchant_id], [Scope.POINTS_READ])
    denied = await run(file, shop, {**settings, "TOKEN": token})
    assert (denied.exit_code, "SCOPE_MISSING" in denied.err) == (2, True)


async def test_a_file_can_be_read_from_standard_input(shop: Shop, settings: dict[str, str], file: Path) -> None:
    command = f"{POINTBOOK} benefits import - --merchant {shop.merchant_id} --level MLC7 < {file}"
    finished = await finish("bash", "-c", command, environment=clean_environment(settings))

    assert "3 created" in finished.out, finished


async def test_a_killed_import_can_be_repeated(
    client: Client, shop: Shop, settings: dict[str, str], tmp_path: Path
) -> None:
    file = write(tmp_path, level_response(*({**POINTS, "benefitsDetails": str(number + 1)} for number in range(600))))
    arguments = ("benefits", "import", str(file), "--merchant", shop.merchant_id, "--level", "MLC7")
    async with running(*arguments, folder=tmp_path, settings=settings) as process:

        async def has_begun() -> bool:
            return bool(await list_benefits(client, shop))

        await process.until(has_begun)
        await process.kill()
    count = len(await list_benefits(client, shop))
    assert 0 < count < 600

    second = await run(file, shop, settings)
    summary = re.search(
        r"^600 benefits: (\d+) created, 0 changed, (\d+) unchanged, 0 refused; 0 vanished\.$", second.out, re.MULTILINE
    )
    assert summary is not None
    created, unchanged = map(int, summary.groups())
    # The server may have stored one more for the killed process.
    assert (created + unchanged, unchanged - count in {0, 1}) == (600, True)
    third = await run(file, shop, settings)
    assert "600 benefits: 0 created, 0 changed, 600 unchanged" in third.out
