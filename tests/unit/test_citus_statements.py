"""Every statement of the server runs on Citus, most of them on one node."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import PrimaryKeyConstraint, UniqueConstraint

from pointbook_server.db.citus import DISTRIBUTED_TABLES, DISTRIBUTION_COLUMN
from pointbook_server.db.tables import metadata
from pointbook_server.ledger.model import AccountKey, EntryFilter, UpdateType
from pointbook_server.ledger.queries import list_entries
from pointbook_server.retention import TABLES
from support.docs_pages import ROOT
from support.sql_statements import citus_problems, has_returning, mixes_constraints, module_statements

SERVER = ROOT / "service" / "pointbook_server"
MIGRATIONS = SERVER / "db" / "migrations" / "versions"
KEYS = (PrimaryKeyConstraint, UniqueConstraint)
TWO_QUARANTINES = "A merchant sees its own webhooks and those in the shared quarantine."
VERIFICATION = "`pointbook verify` reads the whole ledger, or the merchant that is given."
NOT_ON_CITUS = "LedgerTransactions.apply_merchants sends it on plain PostgreSQL alone."
DOCTOR = "`pointbook doctor` reads what all merchants have stored, on request."
CLEAN_UP = "Maintenance finds the merchants with old rows, and works on one after the other."
ALL_MERCHANTS = {
    "ledger.queries.READ_ACCOUNTS_OF_MERCHANTS": NOT_ON_CITUS,
    "ledger.queries.WRITE_MERCHANTS": NOT_ON_CITUS,
    "ledger.queries.WRITE_MERCHANTS_AND_CHECKPOINTS": NOT_ON_CITUS,
    "ledger.queries.COUNT_ACCOUNTS_AND_ENTRIES": VERIFICATION,
    "ledger.queries.STREAM_KEYS": VERIFICATION,
    "ledger.queries.STREAM_ACCOUNTS": VERIFICATION,
    "ledger.queries.STREAM_ENTRIES": VERIFICATION,
    "ledger.queries.STREAM_CHECKPOINTS": VERIFICATION,
    "redemption.queries.STREAM_REDEMPTIONS": VERIFICATION,
    "redemption.queries.STREAM_HOLD_MISMATCHES": VERIFICATION,
    "redemption.queries.STREAM_SETTLEMENT_MISMATCHES": VERIFICATION,
    "ledger.queries.COUNT_DRIFTING_ACCOUNTS": "The metrics of drift are about all merchants, read once a minute.",
    "redemption.queries.COUNT_HELD": "The metrics of holds are about all merchants, read once a minute.",
    "webhooks.queries.COUNT_BY_REASON": "The metrics of the quarantine are about all merchants, read once a minute.",
    "ledger.report_queries.SUM_DRIFT": DOCTOR,
    "redemption.report_queries.COUNT_OVERDUE": DOCTOR,
    "programs.erasures.queries.COUNT_OPEN": "The metrics of open erasures are about all merchants.",
    "programs.erasures.queries.LIST_ALL_ERASURES": "An operator lists the erasures of all merchants.",
    "redemption.queries.LIST_OVERDUE_MERCHANTS": CLEAN_UP,
    **{f"retention.{name}.{table.name}": CLEAN_UP for name in ("FIND_OLD", "COUNT_OLD") for table in TABLES},
    "webhooks.queries.LIST_USAGE": "Metrics and `pointbook doctor` look at the quarantines of all merchants.",
    "webhooks.queries.SUM_USAGE": "The total limit of the quarantine is about all merchants; read once a second.",
    "webhooks.queries.FIND_BODY": TWO_QUARANTINES,
    "webhooks.queries.FIND_OWNER": TWO_QUARANTINES,
    "webhooks.queries.READ_WEBHOOK": TWO_QUARANTINES,
    "webhooks.queries.LIST_WEBHOOKS": TWO_QUARANTINES,
}
"""Statements that read several merchants, and why they may."""
BUILT = {
    "list_entries": list_entries(
        "merchant",
        AccountKey("store", "buyer"),
        EntryFilter(UpdateType.INCREASE, ("SCENE",), 1, 2),
        before=(1, "event"),
        limit=1,
    )
}
"""A statement of each function that builds one for each call, with every part that it can have."""


def source_trees() -> Iterator[tuple[Path, ast.Module]]:
    """Yield each file of the server but its migrations, parsed."""
    for path in sorted(SERVER.rglob("*.py")):
        if path.parent != MIGRATIONS:
            yield path, ast.parse(path.read_text())


def builders() -> dict[str, set[Path]]:
    """Return the functions that return a statement, with their files."""
    found: dict[str, set[Path]] = {}
    for path, tree in source_trees():
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.FunctionDef)
                and isinstance(node.returns, ast.Name)
                and node.returns.id == "Statement"
            ):
                found.setdefault(node.name, set()).add(path)
    return found


def calls_in_functions(tree: ast.Module, names: set[str]) -> Iterator[tuple[str, str]]:
    """Yield the calls of some functions inside other functions: caller and callee."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.Call):
                    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                    if name in names:
                        yield function.name, name


def test_statements_run_on_one_node() -> None:
    checked = [(name, citus_problems(statement.sql)) for name, statement in [*module_statements(), *BUILT.items()]]
    of_all_merchants = [each for each in checked if each[0] in ALL_MERCHANTS]

    assert [(name, problems) for name, problems in checked if problems and name not in ALL_MERCHANTS] == []
    for name, problems in of_all_merchants:
        if ALL_MERCHANTS[name] == NOT_ON_CITUS:
            assert problems, name
        else:
            kinds = {problem.partition(" is ")[2] for problem in problems}
            assert kinds == {"not limited to one merchant"}, name


def test_every_statement_is_checked() -> None:
    """A statement is a constant of its module, or is built by a function in BUILT."""
    known = builders()
    unchecked = [
        f"{path.name}: {caller} calls {callee}"
        for path, tree in source_trees()
        for caller, callee in calls_in_functions(tree, {"Statement", *(name for name in known if path in known[name])})
        if path not in known.get(caller, ()) and callee not in BUILT
    ]

    assert {name for name in known if not name.startswith("_")} == set(BUILT)
    assert unchecked == []


def test_exceptions_exist() -> None:
    assert set(ALL_MERCHANTS) <= {name for name, _ in module_statements()}


def test_counted_statements_return_the_rows_that_they_write() -> None:
    counted = [
        (path, name)
        for path, _ in source_trees()
        for name in re.findall(r"count_written\(\s*queries\.(\w+)", path.read_text())
    ]
    uncounted = []
    for path, name in counted:
        module = ".".join(path.parent.relative_to(ROOT / "service").parts)
        statement = getattr(importlib.import_module(f"{module}.queries"), name)
        uncounted += [] if has_returning(statement.sql) else [name]

    assert len(counted) > 10
    assert uncounted == []


def test_every_unique_key_of_a_distributed_table_contains_its_merchant() -> None:
    tables = [metadata.tables[name] for name in DISTRIBUTED_TABLES]
    keys: list[Any] = [index for table in tables for index in table.indexes if index.unique]
    keys += [each for table in tables for each in table.constraints if isinstance(each, KEYS)]

    assert keys
    assert [key.name for key in keys if DISTRIBUTION_COLUMN not in key.columns] == []


def test_migrations_add_constraints_alone() -> None:
    """Citus refuses an ALTER TABLE that adds a constraint and does something else."""
    sql = [
        (path.name, node.value)
        for path in sorted(MIGRATIONS.glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "ADD CONSTRAINT" in node.value
    ]

    assert sql
    assert [(name, statement) for name, statement in sql if mixes_constraints(statement)] == []


@pytest.mark.parametrize(
    ("sql", "problem"),
    [
        ("SELECT FROM customers WHERE customer_id = $1", "customers is not limited to one merchant"),
        (
            "SELECT FROM customers WHERE merchant_id = $1 OR customer_id = $2",
            "customers is not limited to one merchant",
        ),
        (
            """
            SELECT FROM customers AS c JOIN customer_buyers AS b ON b.merchant_id = c.merchant_id
            WHERE c.merchant_id = $1
            """,
            "customer_buyers is not limited to one merchant",
        ),
        (
            """
            SELECT FROM customers AS c WHERE merchant_id = $1
                AND EXISTS (SELECT FROM customer_buyers AS b WHERE b.merchant_id = c.merchant_id)
            """,
            "customer_buyers is not limited to one merchant",
        ),
        (
            "SELECT FROM customers AS c, customer_buyers AS b WHERE c.merchant_id = $1 AND b.merchant_id = $2",
            "several parameters are the merchant: [1, 2]",
        ),
        ("UPDATE customers SET merchant_id = $1 WHERE merchant_id = $1", "merchant_id is updated"),
        (
            "DELETE FROM customers AS c USING stores AS s WHERE c.merchant_id = s.merchant_id",
            "customers is not limited to one merchant",
        ),
        (
            "INSERT INTO customers (customer_id, merchant_id) SELECT 'c', merchant_id FROM stores",
            "the merchant of a row of customers is no parameter",
        ),
        (
            """
            INSERT INTO customers (customer_id, merchant_id) VALUES ($1, $2)
            ON CONFLICT (customer_id, merchant_id) DO UPDATE SET merchant_id = excluded.merchant_id
            """,
            "merchant_id is updated",
        ),
        (
            "UPDATE stores SET revision = (ARRAY[$1])[1] WHERE store_id = $2",
            "revision gets an element of an array, which crashes Citus",
        ),
        (
            "SELECT store_id FROM stores WHERE store_id = $1 FOR KEY SHARE",
            "shared locks of a reference table deadlock without a distributed table",
        ),
        (
            "WITH locked AS (SELECT FROM customers WHERE merchant_id = $1 FOR UPDATE) SELECT count(*) FROM locked",
            "the common table expression locked has no columns",
        ),
    ],
)
def test_check_finds_what_citus_cannot_run_on_one_node(sql: str, problem: str) -> None:
    assert citus_problems(sql) == [problem]


def test_check_finds_mixed_constraints() -> None:
    assert mixes_constraints("ALTER TABLE t DROP CONSTRAINT a, ADD CONSTRAINT a CHECK (true)")
    assert not mixes_constraints("ALTER TABLE t ADD COLUMN a text, ADD COLUMN b text")
