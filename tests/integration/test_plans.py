"""Query plans: indexes only, even for plans made while a table is empty."""

import json
import re
from collections.abc import AsyncIterator, Iterator
from types import ModuleType
from typing import Any

import asyncpg
import pytest

import pointbook_server.access.queries
import pointbook_server.benefits.queries
import pointbook_server.customers.queries
import pointbook_server.db.clock_skew
import pointbook_server.ledger.queries
import pointbook_server.programs.erasures.queries
import pointbook_server.programs.queries
import pointbook_server.redemption.queries
import pointbook_server.retention
import pointbook_server.support.queries
import pointbook_server.validation_codes.queries
import pointbook_server.webhooks.queries
from pointbook_server.customers import queries as customers
from pointbook_server.db.database import PLANNED_ONCE, SESSION_SETTINGS, Statement
from pointbook_server.redemption import queries as redemptions
from pointbook_server.retention import TABLES
from pointbook_server.support import queries as refusals
from pointbook_server.validation_codes import queries as codes

MODULES = (
    pointbook_server.access.queries,
    pointbook_server.benefits.queries,
    pointbook_server.db.clock_skew,
    pointbook_server.customers.queries,
    pointbook_server.ledger.queries,
    pointbook_server.programs.erasures.queries,
    pointbook_server.programs.queries,
    pointbook_server.support.queries,
    pointbook_server.redemption.queries,
    pointbook_server.retention,
    pointbook_server.validation_codes.queries,
    pointbook_server.webhooks.queries,
)
READS_ALL = {"LIST_USAGE", "READ_TOKENS", "SUM_USAGE"}
"""Statements that read a small table as a whole, at most once a second."""
IN_TRANSACTIONS = {
    "DELETE_UPDATES",
    "READ_NEWEST_UPDATE",
    "LOCK_BUYERS",
    "COUNT_BY_REASON",
    "COUNT_DRIFTING_ACCOUNTS",
    "COUNT_HELD",
    "COUNT_OPEN",
    "LIST_SILENT_STORES",
    "READ_USES",
    "READ_WEBHOOK_TIMES",
    "SHARE_STORES",
    "DELETE_FINISHED",
    *(f"DELETE_OLD.{table.name}" for table in TABLES),
}
"""Statements of transactions, which are planned for each execution."""
AUDIT = re.compile("COUNT_ACCOUNTS_AND_ENTRIES|STREAM_.*|LIFT_TIME_LIMIT")
"""Statements of audits, which read the whole ledger in a transaction of their own."""
LISTS = ("LIST_", "READ_CROSS_PROGRAM")
"""Prefixes of statements that list the resources of a merchant."""
KEYED_BY_MERCHANT = {"pk_quarantine_usage", "uq_stores_merchant_id_store_id"}
"""Indexes with one row per merchant, or of which one row per merchant is read."""
LEADING_COLUMNS = """
    SELECT indexrelid::regclass::text AS name, pg_get_indexdef(indexrelid, 1, false) AS column FROM pg_index
"""
"""The first column of each index, or its first expression."""


def statements() -> Iterator[tuple[str, Statement]]:
    """Yield every statement that commits by itself, with its name."""
    for module in MODULES:
        for name, statement in statements_of(module):
            if name not in READS_ALL | IN_TRANSACTIONS and not AUDIT.fullmatch(name):
                yield name, statement


def statements_of(module: ModuleType) -> Iterator[tuple[str, Statement]]:
    """Yield the statements of a module, with their names."""
    for name, value in vars(module).items():
        if isinstance(value, Statement):
            yield name, value
        elif isinstance(value, dict):
            yield from ((f"{name}.{key}", item) for key, item in value.items() if isinstance(item, Statement))


@pytest.fixture(scope="module")
async def connection(database_url: str) -> AsyncIterator[Any]:
    """A connection like those of the pool, to a database with empty tables."""
    connection = await asyncpg.connect(database_url, server_settings=SESSION_SETTINGS | PLANNED_ONCE)
    yield connection
    await connection.close()


@pytest.mark.parametrize(("name", "statement"), [pytest.param(*each, id=each[0]) for each in statements()])
async def test_plan_made_for_an_empty_table_suits_a_full_one(connection: Any, name: str, statement: Statement) -> None:
    """Only lists may find rows by merchant_id alone; no index is scanned as a whole."""
    leading = {row["name"]: row["column"] for row in await connection.fetch(LEADING_COLUMNS)}
    for node in await _plan(connection, statement):
        assert node["Node Type"] != "Seq Scan", node
        if "Index Name" in node:
            condition = node.get("Index Cond", "")
            assert re.search(rf"\b{re.escape(leading[node['Index Name']])}(?!\w)", condition), node
            is_alone = set(re.findall(r"(\w+)\)* [<>=]", condition)) == {"merchant_id"}
            assert name.startswith(LISTS) or not is_alone or node["Index Name"] in KEYED_BY_MERCHANT, node


@pytest.mark.parametrize(
    ("statement", "index"),
    [
        (customers.LOCK_IDENTIFIERS, "pk_customer_identifiers"),
        (customers.READ_CLAIMANTS, "ix_customer_claims_value"),
        (customers.DELETE_CLAIMS_UNTIL, "ix_customer_claims_buyer"),
        (redemptions.READ_BY_ID, "pk_redemptions"),
        (redemptions.READ_BY_REFERENCES, "uq_redemptions_reference"),
        (redemptions.READ_USAGE, "ix_redemptions_redeemer"),
        (redemptions.LIST_BY_REDEEMERS, "ix_redemptions_redeemer"),
        (redemptions.LIST_BY_MERCHANT, "ix_redemptions_created"),
        (codes.LOCK_LIVE, "uq_validation_challenges_live"),
        (codes.READ_LIVE, "uq_validation_challenges_live"),
        (codes.LOCK_CALLED, "ix_validation_challenges_called"),
        (codes.LOCK_COUNTERS, "pk_validation_tallies"),
        (codes.READ_CALL, "pk_missed_calls"),
        (codes.LIST_EVENTS, "pk_validation_audit"),
        (refusals.LIST_BY_CUSTOMERS, "pk_redemption_refusals"),
        (refusals.LIST_BY_REFERENCE, "ix_redemption_refusals_reference"),
        (redemptions.LIST_NEWEST_REDEMPTIONS, "ix_redemptions_redeemer"),
        (redemptions.LIST_NEWEST_REVERSALS, "ix_redemption_reversals_redeemer"),
        (redemptions.LIST_NEWEST_CLOSINGS, "ix_redemption_audit_redeemer"),
        (redemptions.READ_REVERSALS, "ix_redemption_reversals_redemption"),
    ],
)
async def test_no_plan_scans_all_rows_of_a_merchant(connection: Any, statement: Statement, index: str) -> None:
    """The cost of a redemption or a code does not grow with their number."""
    assert [node["Index Name"] for node in await _plan(connection, statement) if "Index Name" in node] == [index]


async def _plan(connection: Any, statement: Statement) -> list[dict[str, Any]]:
    """Return the nodes of a statement's generic plan."""
    await connection.execute(f"PREPARE planned AS {statement.sql}")
    count = len(set(re.findall(r"\$\d+", statement.sql)))
    execute = f"EXECUTE planned ({', '.join(['NULL'] * count)})" if count else "EXECUTE planned"
    try:
        plan = json.loads(await connection.fetchval(f"EXPLAIN (FORMAT JSON) {execute}"))
    finally:
        await connection.execute("DEALLOCATE planned")

    return list(_nodes(plan[0]["Plan"]))


def _nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", ()):
        yield from _nodes(child)
