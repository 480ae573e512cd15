"""Any response of SHOPLINE survives import, export and a second import."""

import asyncio
import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointbook.v1 import benefits_pb2
from pointbook_cli.benefits_file import read_level
from pointbook_cli.benefits_import import BenefitsImportOptions, ItemResult, LevelBenefits, import_item
from pointbook_client.sync import connect
from pointbook_server.benefits.messages import ENUM_NAMES
from pointbook_server.benefits.model import MembershipType
from support.benefits import FIELDS, export_benefits, level_response
from support.examples import examples
from support.servers import Service
from support.unique_names import unique

NUMBERS = st.one_of(
    st.integers(1, 12),
    st.integers(1, 12).map(str),
    st.integers(1, 12).map(float),
    st.sampled_from((0, -1, "x", 2**31, 10**30, 1e300, 0.1, "9" * 5_000)),
)
TEXTS = st.one_of(st.text(max_size=30), st.sampled_from(("10", "12.50", "02-29", 7, 0.1, True, "x" * 600)))
IDS = st.lists(st.one_of(st.none(), st.sampled_from(("a", "b", 17)), st.text(max_size=3)), max_size=4)


def values_of(json_name: str) -> st.SearchStrategy[Any]:
    """Return values of a field: mostly valid ones, and often null."""
    field = FIELDS[json_name]
    if field.name in ENUM_NAMES:
        values: st.SearchStrategy[Any] = st.sampled_from([*ENUM_NAMES[field.name].values(), "NEW_NAME"])
    elif field.is_repeated:
        values = IDS
    elif field.type == field.TYPE_BOOL:
        values = st.sampled_from((True, False, "true", "false", "x"))
    else:
        values = NUMBERS if field.type == field.TYPE_INT32 or field.name == "periodically_months" else TEXTS
    return st.one_of(st.none(), st.just(""), values)


infos = st.fixed_dictionaries({name: values_of(name) for name in FIELDS})
memberships = st.sampled_from(["", *MembershipType])


def import_all(address: str, token: str, plan: BenefitsImportOptions, text: str) -> list[ItemResult]:
    """Import the benefits of a file."""
    with connect(address, token=token) as client:
        benefits = LevelBenefits(client, plan)
        items = read_level(text.encode()).benefits
        return [import_item(benefits, index, item) for index, item in enumerate(items)]


@settings(max_examples=examples(80), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(infos, min_size=1, max_size=5), memberships)
async def test_a_repeated_import_changes_nothing(
    service: Service, admin_token: str, infos: list[dict[str, Any]], membership_type: str
) -> None:
    """The same benefits are refused again."""
    plan = BenefitsImportOptions(Path("-"), unique("merchant"), "MLC7", membership_type, prune=False)
    address = f"127.0.0.1:{service.server.port}"

    async def imported(text: str) -> list[str]:
        return [each.outcome for each in await asyncio.to_thread(import_all, address, admin_token, plan, text)]

    async def listed() -> list[benefits_pb2.Benefit]:
        request = benefits_pb2.ListBenefitsRequest(merchant_id=plan.merchant_id)
        return list((await service.client.benefits.ListBenefits(request)).benefits)

    first = await imported(json.dumps(level_response(*infos)))
    stored = await listed()
    assert set(first) <= {"created", "refused"}
    assert first.count("created") == len(stored)

    expected = ["unchanged" if what == "created" else "refused" for what in first]
    assert await imported(json.dumps(level_response(*infos))) == expected

    places = {int(benefit.benefit_id.rpartition(":")[2]): benefit for benefit in stored}
    back = json.loads(export_benefits([places.get(n + 1, benefits_pb2.Benefit()) for n in range(len(infos))]))
    infos_back = back["data"]["benefitsOfMembership"]["benefitsInfo"]
    items = [infos_back[n] if n + 1 in places else None for n in range(len(infos))]
    assert await imported(json.dumps(level_response(*items))) == expected
    assert await listed() == stored
