"""The README's tables are true to the code."""

from inspect import iscoroutinefunction
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from pydantic_settings import BaseSettings

from pointbook.v1 import access_pb2, benefits_pb2, customers_pb2, points_pb2, programs_pb2, redemption_pb2, webhooks_pb2
from pointbook_server.access.model import METHODS, Scope
from pointbook_server.access.servicer import AccessServicer
from pointbook_server.benefits.servicer import BenefitsServicer
from pointbook_server.customers.servicer import CustomersServicer
from pointbook_server.errors import REASONS, Reason
from pointbook_server.ledger.servicer import PointsServicer
from pointbook_server.programs.servicer import ProgramsServicer
from pointbook_server.redemption.rules import STATUS_CODES
from pointbook_server.redemption.servicer import RedemptionServicer
from pointbook_server.rpc.status_mapping import grpc_code
from pointbook_server.settings import ServerSettings
from pointbook_server.webhooks.servicer import WebhooksServicer
from shopline_shim.settings import ShimSettings

README = (Path(__file__).parents[2] / "README.md").read_text()
SERVICERS: tuple[type, ...] = (
    PointsServicer,
    RedemptionServicer,
    ProgramsServicer,
    CustomersServicer,
    BenefitsServicer,
    WebhooksServicer,
    AccessServicer,
)
MODULES = (points_pb2, redemption_pb2, programs_pb2, customers_pb2, benefits_pb2, webhooks_pb2, access_pb2)


def method_rows() -> list[str]:
    """Tell every method of the contract, its scope, and whether it works."""
    working = {name for servicer in SERVICERS for name, value in vars(servicer).items() if iscoroutinefunction(value)}
    rows = []
    for module in MODULES:
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                scope = METHODS[f"{service.name}/{method.name}"].scope
                state = "works" if method.name in working else "later"
                needed = "any token" if scope is None else f"`{scope}`"
                rows.append(f"| {service.name} | {method.name} | {needed} | {state} |")
    return rows


def reason_rows() -> list[str]:
    """Return a row for every reason: its gRPC code, its status, and whether a retry helps."""
    rows = []
    for reason in Reason:
        code = {Reason.CODE_NOT_ISSUED: "OK, as a warning"}.get(reason, grpc_code(reason).name)
        rows.append(f"| {reason} | {code} | {STATUS_CODES.get(reason, '')} | {REASONS[reason].retry} |")
    return rows


def setting_rows() -> list[str]:
    """Tell every setting of the server and the shim."""
    rows = []
    for settings, owner in ((ServerSettings, "server"), (ShimSettings, "shim")):
        for name, field in settings.model_fields.items():
            rows.append(f"| `POINTBOOK_{name.upper()}` | {_default(settings, name)} | {owner} | {field.description} |")
    return rows


def _default(settings: type[BaseSettings], name: str) -> str:
    value: Any = settings.model_fields[name].get_default(call_default_factory=True)
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, bool):
        value = str(value).lower()
    return "" if value in (None, "", (), {}) else f"`{value}`"


def test_the_table_of_methods_is_true() -> None:
    """Whoever reads the README knows which methods work, and the scope of each."""
    for row in method_rows():
        assert row in README


def test_the_table_of_errors_is_true() -> None:
    """The README lists every reason with its gRPC code, its status, and whether a retry helps."""
    for row in reason_rows():
        assert row in README


def test_the_table_of_settings_is_true() -> None:
    """Every setting stands in the README with its default and its meaning."""
    for row in setting_rows():
        assert row in README


def test_every_scope_is_named() -> None:
    """An operator finds every scope in the README."""
    for scope in Scope:
        assert f"`{scope}`" in README
