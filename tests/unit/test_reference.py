"""The reference's tables are true to the code, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

from pointbook.v1 import identity_pb2, points_pb2
from pointbook_server.benefits.model import CONTEXT_FIELDS, ENUM_FIELDS, Benefit
from pointbook_server.benefits.relevance import RELEVANCE_RULES
from pointbook_server.ledger.holds import SETTLEMENT_SCENES
from pointbook_server.ledger.scenes import DECREASING_SCENES, INCREASING_SCENES
from pointbook_server.redemption.status_codes import STATUS_CODES
from support.reference_pages import REFERENCE, anchors, section, table_rows

PAGES = sorted(REFERENCE.glob("*.md"))
LINK = re.compile(r"\]\((?!https://)([^)\s]+)\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_pages_lead_to_headings(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_headings_of_a_page_have_different_anchors(page: Path) -> None:
    assert len(anchors(page)) == len(set(anchors(page)))


def test_the_index_lists_every_page() -> None:
    listed = set(LINK.findall((REFERENCE / "index.md").read_text()))

    assert {page.name for page in PAGES} - {"index.md"} <= listed


def test_the_scenes_are_those_of_the_contract_with_their_directions() -> None:
    names = [name.removeprefix("POINTS_UPDATE_SCENE_") for name in points_pb2.PointsUpdateScene.keys()]  # noqa: SIM118 - no dict
    table = {scene: direction for scene, direction, _, _ in table_rows("shopline-webhooks.md", "Scenes")}

    assert names[1:] == list(table)
    assert {scene for scene, direction in table.items() if direction == "decrease"} == DECREASING_SCENES
    assert {scene for scene, direction in table.items() if direction == "increase"} == INCREASING_SCENES


def test_the_default_settlement_scenes_are_named() -> None:
    assert set(re.findall(r"[A-Z]+_?[A-Z_]+", section("ledger.md", "Settlement"))) >= SETTLEMENT_SCENES


def test_the_status_codes_have_their_reasons() -> None:
    table = {
        reason: int(code)
        for code, reasons in table_rows("redemption.md", "Status codes")
        for reason in re.findall(r"[A-Z_]{2,}", reasons)
    }
    capillary = {int(code) for code, _ in table_rows("capillary-isredeemable.md", "Status codes")}

    assert {reason.value: code for reason, code in STATUS_CODES.items()} == table
    assert set(STATUS_CODES.values()) == capillary


def test_the_fields_of_benefits_are_those_of_the_model() -> None:
    ours = {"merchant_id", "benefit_id", "store_ids", "level_code", "irrelevant_values", *CONTEXT_FIELDS}
    table = [name.strip("`") for name, *_ in table_rows("shopline-benefits.md", "Fields")]

    assert [name for name in Benefit.__dataclass_fields__ if name not in ours] == table


def test_the_relevance_of_benefit_fields_is_that_of_the_rules() -> None:
    table = {
        name: set(re.findall(r"\b[A-Z_]{2,}\b", condition)) | set(re.findall(r"`(\w+)`", condition))
        for names, condition in table_rows("shopline-benefits.md", "Relevance")
        for name in re.findall(r"`(\w+)`", names)
    }

    assert table == {
        name: {part for condition in conditions for part in (condition.field, *map(str, condition.values))}
        for name, conditions in RELEVANCE_RULES.items()
    }


def test_the_enums_of_benefits_have_their_values() -> None:
    text = "\n".join(
        section("shopline-benefits.md", name) for name in ("Enum values", "Reward scenes", "Membership types")
    )
    for enum in ENUM_FIELDS.values():
        assert enum.__name__ in text or enum.__name__ == "MembershipType"
        assert set(enum.__members__) <= set(re.findall(r"\b[A-Z_]{2,}\b", text)), enum.__name__


def test_the_user_sources_and_identifier_types_are_those_of_the_contract() -> None:
    sources = re.findall(r"\b[A-Z_]{2,}\b", section("capillary-isredeemable.md", "User sources"))
    types = [ours for _, ours in table_rows("capillary-isredeemable.md", "Identifier types")]

    assert sources == [name.removeprefix("USER_SOURCE_") for name in identity_pb2.UserSource.keys()][1:]  # noqa: SIM118 - no dict
    assert types == [name.removeprefix("IDENTIFIER_TYPE_") for name in identity_pb2.IdentifierType.keys()][1:]  # noqa: SIM118 - no dict
