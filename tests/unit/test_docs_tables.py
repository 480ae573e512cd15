"""Generated parts of docs/ are current, and all API methods are implemented."""

import re
import runpy
from inspect import iscoroutinefunction
from pathlib import Path

import pytest

from pointbook_server.access.methods import METHODS
from pointbook_server.access.model import Scope
from pointbook_server.access.servicer import AccessServicer
from pointbook_server.benefits.servicer import BenefitsServicer
from pointbook_server.customers.servicer import CustomersServicer
from pointbook_server.ledger.servicer import PointsServicer
from pointbook_server.programs.servicer import ProgramsServicer
from pointbook_server.reasons import Reason
from pointbook_server.redemption.servicer import RedemptionServicer
from pointbook_server.webhooks.servicer import WebhooksServicer

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GENERATOR = runpy.run_path(str(ROOT / ".ci" / "docs_tables.py"))
SERVICERS: tuple[type, ...] = (
    PointsServicer,
    RedemptionServicer,
    ProgramsServicer,
    CustomersServicer,
    BenefitsServicer,
    WebhooksServicer,
    AccessServicer,
)


@pytest.mark.parametrize("name", sorted(GENERATOR["PARTS"]))
def test_generated_part_is_current(name: str) -> None:
    page = GENERATOR["PARTS"][name][0]
    text = page.read_text()

    assert text == GENERATOR["updated"](name, text), f"docs/{page.name} is not current: run `make tables`"


def test_every_method_of_the_contract_is_implemented() -> None:
    implemented = {name for each in SERVICERS for name, value in vars(each).items() if iscoroutinefunction(value)}

    assert {method.partition("/")[2] for method in METHODS} <= implemented


def test_the_api_page_names_every_scope() -> None:
    api = (DOCS / "api.md").read_text()

    assert [scope for scope in Scope if f"`{scope}`" not in api] == []


def test_every_reason_has_a_section_to_link_to() -> None:
    """The table of reasons links to it, and clients may."""
    page = (DOCS / "api-reference" / "errors.md").read_text()
    sections = dict(re.findall(r"(?ms)^## (\w+)\n(.*?)(?=^## |\Z)", page))

    assert set(sections) == {reason.value for reason in Reason}
    for label in ("Cure", "gRPC code", "Metadata", "Retry"):
        assert [reason for reason, text in sections.items() if f"\n- {label}: " not in text] == []
