"""The check of a database's schema: tables, revision, and the role's privileges."""

from collections.abc import Iterable
from functools import cache

from sqlalchemy import text

from pointbook_server.db.database import Connection, Row, Statement
from pointbook_server.db.migrations.revisions import StoredRevision, all_revisions, find_problem
from pointbook_server.db.tables import metadata
from pointbook_server.errors import UnusableDatabaseError

PRIVILEGES = ("SELECT", "INSERT", "UPDATE", "DELETE")
NEVER_INSERTED_INTO = {"api_tokens"}
"""Tables whose rows are inserted by commands, which can run as another role."""
NEVER_UPDATED = {
    "points_checkpoints",
    "points_voidings",
    "customer_audit",
    "customer_claims",
    "customer_updates",
    "redemption_audit",
    "redemption_refusals",
    "redemption_reversals",
}
DELETED_FROM = {
    "benefits",
    "custom_privileges",
    "customer_audit",
    "customer_buyers",
    "customer_claims",
    "customer_identifiers",
    "customer_updates",
    "missed_calls",
    "points_checkpoints",
    "points_entries",
    "quarantined_webhooks",
    "redemption_audit",
    "redemption_refusals",
    "stores",
    "user_groups",
    "validation_audit",
    "validation_challenges",
    "validation_tallies",
}

# A table that does not exist, or is invisible to the role, has no privileges: NULL.
UNUSABLE = Statement(
    text("""
        SELECT t.name, t.privilege, to_regclass(t.name) IS NULL AS is_missing
        FROM unnest(CAST(:names AS text[]), CAST(:privileges AS text[])) AS t (name, privilege)
        WHERE has_table_privilege(to_regclass(t.name), t.privilege) IS NOT TRUE
        ORDER BY t.name
    """)
)
# Databases of older revisions lack the column `compatible_from`.
REVISION = Statement(
    text("""
        SELECT version_num, to_jsonb(v) ->> 'compatible_from' AS compatible_from,
            current_setting('transaction_read_only') = 'on' AS is_read_only
        FROM alembic_version AS v
    """)
)


class SchemaError(UnusableDatabaseError):
    """The schema, or the privileges of the role, are not what this release needs."""


async def check_schema(connection: Connection) -> StoredRevision:
    """Return what the database stores about its schema.

    A newer revision passes, unless it took away what this release needs: the previous release continues to run while
    its successor is rolled out. Raises SchemaError if tables are missing, outdated, read-only or inaccessible.
    """
    unusable = await connection.fetch(UNUSABLE, _needed())
    missing = sorted({row.name for row in unusable if row.is_missing})
    if missing:
        raise SchemaError(
            f"the database, or the search_path of its role, lacks the tables {', '.join(missing)}: "
            "run `pointbook migrate`, or correct POINTBOOK_DATABASE_URL"
        )
    if unusable:
        raise SchemaError(f"the role of POINTBOOK_DATABASE_URL lacks privileges: grant it {_describe_grants(unusable)}")
    row = await connection.fetch_one(REVISION)
    if row is not None and row.is_read_only:
        raise SchemaError(
            "the database is read-only (25006): it is a standby, or has default_transaction_read_only; "
            "correct POINTBOOK_DATABASE_URL"
        )
    stored = StoredRevision(row.version_num, row.compatible_from) if row else StoredRevision(None)
    if problem := find_problem(stored, all_revisions()):
        raise SchemaError(problem)
    return stored


def needed_privileges(table: str) -> tuple[str, ...]:
    """Return the privileges that the server's statements need on a table."""
    insert = () if table in NEVER_INSERTED_INTO else ("INSERT",)
    update = () if table in NEVER_UPDATED else ("UPDATE",)
    delete = ("DELETE",) if table in DELETED_FROM else ()
    return ("SELECT", *insert, *update, *delete)


def _describe_grants(missing: Iterable[Row]) -> str:
    """Return missing privileges as text, tables that lack the same ones together."""
    by_table: dict[str, list[str]] = {}
    for row in missing:
        by_table.setdefault(row.name, []).append(row.privilege)
    tables: dict[tuple[str, ...], list[str]] = {}
    for name, privileges in by_table.items():
        tables.setdefault(tuple(sorted(privileges, key=PRIVILEGES.index)), []).append(name)
    return "; ".join(f"{', '.join(privileges)} on {', '.join(names)}" for privileges, names in tables.items())


@cache
def _needed() -> dict[str, list[str]]:
    """Return the needed pairs of table and privilege, as two columns."""
    pairs = [(name, privilege) for name in metadata.tables for privilege in needed_privileges(name)]
    pairs.append(("alembic_version", "SELECT"))
    return {"names": [name for name, _ in pairs], "privileges": [privilege for _, privilege in pairs]}
