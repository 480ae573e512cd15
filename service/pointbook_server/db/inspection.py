"""What `pointbook doctor` reads of the database server itself."""

from typing import NamedTuple

from sqlalchemy import text

from pointbook_server.db.database import SESSION_SETTINGS, Connection, Statement
from pointbook_server.db.tables import metadata

READ_SERVER = Statement(
    text("""
        SELECT current_setting('server_version') AS version,
            CAST(current_setting('server_version_num') AS integer) / 10000 AS major_version,
            pg_is_in_recovery() OR current_setting('default_transaction_read_only') = 'on' AS is_read_only,
            CAST(current_setting('max_connections') AS integer)
                - CAST(current_setting('superuser_reserved_connections') AS integer)
                - coalesce(CAST(current_setting('reserved_connections', true) AS integer), 0) AS connections_max,
            (SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user) AS role_max,
            (SELECT datconnlimit FROM pg_database WHERE datname = current_database()) AS database_max,
            (SELECT count(*) FROM pg_stat_activity WHERE datid IS NOT NULL AND usesysid IS NOT NULL
                AND (datname <> current_database() OR coalesce(application_name, '') <> :application_name)
            ) AS others_in_use,
            current_setting('autovacuum') = 'on' AS has_autovacuum
    """)
)
FIND_UNVACUUMED = Statement(
    text("""
        SELECT relname AS name FROM pg_class
        WHERE oid = ANY(SELECT to_regclass(name) FROM unnest(CAST(:names AS text[])) AS v (name))
            AND reloptions && ARRAY['autovacuum_enabled=false', 'autovacuum_enabled=off', 'autovacuum_enabled=0']
        ORDER BY relname
    """)
)

UNLIMITED = -1
"""The connection limit of a role or a database without one."""


class ServerState(NamedTuple):
    """A database server: its version, its connections, and whether it vacuums.

    `connections_max` is the most connections that this role can have to this database, `others_in_use` the connections
    of other programs, which count against the same limit. `unvacuumed` are tables without autovacuum.
    """

    version: str
    major_version: int
    is_read_only: bool
    connections_max: int
    others_in_use: int
    has_autovacuum: bool
    unvacuumed: tuple[str, ...]


async def inspect_server(connection: Connection) -> ServerState:
    """Return the state of a connection's server."""
    (row,) = await connection.fetch(READ_SERVER, {"application_name": SESSION_SETTINGS["application_name"]})
    limits = [limit for limit in (row.role_max, row.database_max) if limit != UNLIMITED]
    tables = await connection.fetch(FIND_UNVACUUMED, {"names": list(metadata.tables)})
    return ServerState(
        version=row.version,
        major_version=row.major_version,
        is_read_only=row.is_read_only,
        connections_max=min(row.connections_max, *limits) if limits else row.connections_max,
        others_in_use=row.others_in_use,
        has_autovacuum=row.has_autovacuum,
        unvacuumed=tuple(table.name for table in tables),
    )
