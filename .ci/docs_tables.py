"""Write the generated parts of docs/: methods, reasons, settings, metrics, tables.

`make tables` runs it. Each part stands between `<!-- generated: NAME -->` and `<!-- end: NAME -->`; a test fails where
one is not current.
"""
# ruff: noqa: INP001 - a script.

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from pydantic_settings import BaseSettings
from sqlalchemy import ForeignKeyConstraint, Table
from sqlalchemy.dialects import postgresql

from pointbook.v1 import access_pb2, benefits_pb2, customers_pb2, points_pb2, programs_pb2, redemption_pb2, webhooks_pb2
from pointbook_cli.services.worker_metrics import WorkerMetrics
from pointbook_common.metric_registry import MetricDefinition
from pointbook_server.access.methods import METHODS
from pointbook_server.db.tables import metadata
from pointbook_server.metrics import Metrics as ServerMetrics
from pointbook_server.reasons import REASONS, Reason
from pointbook_server.settings import ServerSettings
from shopline_shim.metrics import Metrics as ShimMetrics
from shopline_shim.settings import ShimSettings

DOCS = Path(__file__).resolve().parents[1] / "docs"
MODULES = (points_pb2, redemption_pb2, programs_pb2, customers_pb2, benefits_pb2, webhooks_pb2, access_pb2)
DIALECT = postgresql.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy's own
TABLE_GROUPS = {
    "Ledger": ("points_accounts", "points_entries", "points_checkpoints", "points_voidings"),
    "Redemption": ("redemptions", "redemption_reversals", "redemption_refusals", "redemption_audit"),
    "One-time codes": ("validation_challenges", "validation_tallies", "missed_calls", "validation_audit"),
    "Customers": (
        "customers",
        "customer_identifiers",
        "customer_buyers",
        "customer_claims",
        "customer_updates",
        "customer_tombstones",
        "customer_audit",
        "user_groups",
        "user_group_members",
    ),
    "Stores, programs and access": ("stores", "store_erasures", "programs", "api_tokens"),
    "Benefits": ("benefits", "custom_privileges"),
    "Quarantine": ("quarantined_webhooks", "quarantine_usage"),
}
"""The diagrams, each with its tables. Every table is in one of them."""


def methods() -> Iterator[str]:
    """Return a table of every method with its scope."""
    yield from ("| service | method | scope |", "|---|---|---|")
    for module in MODULES:
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                scope = METHODS[f"{service.name}/{method.name}"].scope
                needed = "any token" if scope is None else f"`{scope}`"
                yield f"| {service.name} | {method.name} | {needed} |"


def reasons() -> Iterator[str]:
    """Return a table of every reason: gRPC code, status, and whether a retry helps.

    Each links to its section in the API reference.
    """
    yield from ("| reason | gRPC code | status | does a retry help |", "|---|---|---|---|")
    for reason, spec in REASONS.items():
        code = f"{spec.grpc_code}, as a warning" if reason is Reason.CODE_NOT_ISSUED else spec.grpc_code
        link = f"[{reason}](api-reference/errors.md#{reason.lower()})"
        yield f"| {link} | {code} | {spec.status_code or ''} | {spec.retry} |"


def settings_of(settings: type[BaseSettings]) -> Iterator[str]:
    """Return a table of settings with their defaults and meanings."""
    yield from ("| variable | default | meaning |", "|---|---|---|")
    for name, field in settings.model_fields.items():
        yield f"| `POINTBOOK_{name.upper()}` | {_default(settings, name)} | {field.description} |"


def metrics_of(definitions: list[MetricDefinition]) -> Iterator[str]:
    """Return a table of metrics with their types, labels and meanings."""
    yield from ("| metric | type | labels | meaning |", "|---|---|---|---|")
    for each in definitions:
        labels = ", ".join(f"`{label}`" for label in each.labels)
        yield f"| `{each.name}` | {each.kind} | {labels} | {each.documentation} |"


def tables() -> Iterator[str]:
    """Return an ER diagram and the column comments of each group of tables."""
    grouped = [name for names in TABLE_GROUPS.values() for name in names]
    if sorted(grouped) != sorted(metadata.tables):
        raise ValueError(f"TABLE_GROUPS must name each table once: {set(grouped) ^ set(metadata.tables)}")
    for number, (title, names) in enumerate(TABLE_GROUPS.items()):
        group = [metadata.tables[name] for name in names]
        yield from ([""] if number else [])
        yield from (f"## {title}", "", "```mermaid", "erDiagram")
        for table in group:
            yield from _relations(table, group)
        for table in group:
            yield from _entity(table)
        yield "```"
        comments = [(table, column) for table in group for column in table.columns if column.comment]
        if comments:
            yield from ("", "| column | meaning |", "|---|---|")
        for table, column in comments:
            yield f"| `{table.name}.{column.name}` | {column.comment} |"


PARTS: dict[str, tuple[Path, Callable[[], Iterator[str]]]] = {
    "methods": (DOCS / "api.md", methods),
    "reasons": (DOCS / "api.md", reasons),
    "server-settings": (DOCS / "configuration.md", lambda: settings_of(ServerSettings)),
    "shim-settings": (DOCS / "configuration.md", lambda: settings_of(ShimSettings)),
    "server-metrics": (DOCS / "metrics.md", lambda: metrics_of(ServerMetrics().definitions)),
    "shim-metrics": (DOCS / "metrics.md", lambda: metrics_of(ShimMetrics().definitions)),
    "worker-metrics": (DOCS / "metrics.md", lambda: metrics_of(WorkerMetrics(1).definitions)),
    "tables": (DOCS / "tables.md", tables),
}
"""The page and the content of each generated part."""


def updated(name: str, text: str) -> str:
    """Return a page's text with one part as the code has it now."""
    start, end = f"<!-- generated: {name} -->\n", f"<!-- end: {name} -->"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    content = "\n".join(PARTS[name][1]())
    return f"{before}{start}\n{content}\n\n{end}{after}"


def main() -> None:
    """Write every part to its page."""
    for name, (page, _) in PARTS.items():
        page.write_text(updated(name, page.read_text()))


def _default(settings: type[BaseSettings], name: str) -> str:
    value: Any = settings.model_fields[name].get_default(call_default_factory=True)
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if isinstance(value, bool):
        value = str(value).lower()
    return "" if value in (None, "", (), {}) else f"`{value}`"


def _entity(table: Table) -> Iterator[str]:
    foreign = {column.name for key in _foreign_keys(table) for column in key.columns}
    yield f"    {table.name} {{"
    for column in table.columns:
        kind = column.type.compile(dialect=DIALECT).lower().partition(" collate")[0]
        marks = ", ".join(
            mark for mark, is_set in (("PK", column.primary_key), ("FK", column.name in foreign)) if is_set
        )
        yield f"        {kind} {column.name} {marks}".rstrip()
    yield "    }"


def _relations(table: Table, group: list[Table]) -> Iterator[str]:
    """Return a table's foreign keys, and references inside its group by key columns."""
    related = {table.name}
    for key in sorted(_foreign_keys(table), key=lambda key: str(key.name)):
        related.add(key.referred_table.name)
        names = ", ".join(column.name for column in key.columns)
        yield f'    {key.referred_table.name} ||--o{{ {table.name} : "{names}"'
    for other in group:
        ids = [column.name for column in other.primary_key.columns]
        is_key = len(ids) > 1 and all(name.endswith("_id") for name in ids)
        if is_key and other.name not in related and set(ids) <= set(table.columns.keys()):
            yield f'    {other.name} |o..o{{ {table.name} : "{", ".join(ids)}"'


def _foreign_keys(table: Table) -> list[ForeignKeyConstraint]:
    return [each for each in table.constraints if isinstance(each, ForeignKeyConstraint)]


if __name__ == "__main__":
    main()
