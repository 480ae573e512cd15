"""Whether a database can be served from: it has the tables of this release, and its role may use them."""

from functools import cache

from sqlalchemy import text

from pointbook_server.database import Connection, Statement
from pointbook_server.migrations import older_revisions
from pointbook_server.tables import metadata

APPEND_ONLY_SUFFIX = "_audit"
"""Tables of which rows are only added and read."""

# A table that is not there, or not to be seen by the role, has no privileges either: NULL.
UNUSABLE = Statement(
    text("""
        SELECT t.name, to_regclass(t.name) IS NULL AS is_missing
        FROM unnest(CAST(:names AS text[]), CAST(:privileges AS text[])) AS t (name, privilege)
        WHERE has_table_privilege(to_regclass(t.name), t.privilege) IS NOT TRUE
        ORDER BY t.name
    """)
)
REVISION = Statement(text("SELECT version_num FROM alembic_version"))


class SchemaError(Exception):
    """What keeps a database from being served from, and the cure: one line without personal data."""


async def check_schema(connection: Connection) -> None:
    """Raise SchemaError where tables are missing or older than this release, or where the role may not use them.

    A newer revision passes: the release before it goes on while its successor is rolled out.
    """
    unusable = await connection.fetch(UNUSABLE, _needed())
    missing = sorted({row.name for row in unusable if row.is_missing})
    if missing:
        raise SchemaError(
            f"the database, or the search_path of its role, lacks the tables {', '.join(missing)}: "
            "run `pointbook migrate`, or correct POINTBOOK_DATABASE_URL"
        )
    if unusable:
        names = ", ".join(sorted({row.name for row in unusable}))
        raise SchemaError(
            f"the role of POINTBOOK_DATABASE_URL may not use the tables {names}: "
            "grant it SELECT, INSERT, UPDATE and DELETE"
        )
    revisions = {row.version_num for row in await connection.fetch(REVISION)}
    if not revisions or revisions & older_revisions():
        raise SchemaError("the database is not at the newest revision; run `pointbook migrate`")


@cache
def _needed() -> dict[str, list[str]]:
    """Return which privilege is needed on which table, as two columns."""
    pairs = [("alembic_version", "SELECT")]
    for name in metadata.tables:
        privileges = ("SELECT", "INSERT") if name.endswith(APPEND_ONLY_SUFFIX) else ("SELECT", "INSERT", "UPDATE")
        pairs += [(name, privilege) for privilege in privileges]
    return {"names": [name for name, _ in pairs], "privileges": [privilege for _, privilege in pairs]}
