"""Citus: how the tables are spread over several machines.

All rows of a merchant are on one node, so that a call runs there. Small tables are copied to every node.
"""

from sqlalchemy import Connection, text

from pointbook_server.db.database import SESSION_SETTINGS
from pointbook_server.db.tables import metadata
from pointbook_server.errors import UnusableDatabaseError

DISTRIBUTION_COLUMN = "merchant_id"
REFERENCE_TABLES = ("stores", "api_tokens", "alembic_version")
"""Tables with few rows, of which every node has a copy."""
DISTRIBUTED_TABLES = tuple(table.name for table in metadata.sorted_tables if table.name not in REFERENCE_TABLES)
"""The other tables, each after those that its foreign keys refer to."""
WORKER_SETTINGS = {name: SESSION_SETTINGS[name] for name in ("jit", "lock_timeout")} | {"enable_seqscan": "off"}
"""Settings of a session that Citus does not pass on to the workers."""
TRANSACTION_SETTINGS = {
    # Parallel commands could not see each other's changes of one transaction.
    "citus.multi_shard_modify_mode": "sequential",
    # Citus calls any trigger unsafe. Those of the ledger look at nothing but their own row.
    "citus.enable_unsafe_triggers": "on",
    # Foreign keys must not turn local tables into another kind before it is their turn.
    "citus.enable_local_reference_table_foreign_keys": "off",
    # From here on, SET LOCAL reaches the workers.
    "citus.propagate_set_commands": "local",
    "lock_timeout": "0",
    "statement_timeout": "0",
}
"""Settings of a transaction that changes distributed tables."""

_HAS_LIBRARY = "SELECT current_setting('citus.version', true) IS NOT NULL"
_HAS_EXTENSION = "SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'citus')"
_IS_COORDINATOR = "SELECT citus_is_coordinator()"
_NODES_WITH_SHARDS = "SELECT count(*) FROM pg_dist_node WHERE shouldhaveshards AND noderole = 'primary'"
_INACTIVE_NODES = """
    SELECT format('%s:%s', nodename, nodeport) FROM pg_dist_node
    WHERE noderole = 'primary' AND NOT isactive ORDER BY 1
"""
_NODES_WITHOUT_PREPARED_TRANSACTIONS = """
    SELECT format('%s:%s', nodename, nodeport)
    FROM run_command_on_all_nodes('SHOW max_prepared_transactions') JOIN pg_dist_node USING (nodeid)
    WHERE success AND result = '0' ORDER BY 1
"""
_PLACEMENTS = """
    SELECT relname, CASE WHEN partkey IS NOT NULL THEN column_to_column_name(logicalrelid, partkey) END AS key
    FROM pg_dist_partition JOIN pg_class ON pg_class.oid = logicalrelid
    WHERE relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = to_regclass('stores'))
        AND partmethod IN ('h', 'n')
"""
_LOCAL_ROW_TYPES = """
    SELECT quote_ident(typname) FROM pg_type JOIN pg_class ON pg_class.oid = typrelid
    WHERE relkind = 'c' AND relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = to_regclass('stores'))
        AND NOT EXISTS (
            SELECT FROM pg_dist_object WHERE classid = to_regclass('pg_type') AND objid = pg_type.oid
        )
    ORDER BY 1
"""
_TRUNCATE_TRIGGERS = """
    SELECT format('DROP TRIGGER %I ON %s', tgname, tgrelid::regclass), pg_get_triggerdef(oid) FROM pg_trigger
    WHERE tgrelid = ANY(CAST(:names AS regclass[])) AND NOT tgisinternal AND tgtype & 32 <> 0 ORDER BY 1, 2
"""
_FAILED_WORKERS = """
    SELECT format('%s:%s: %s', nodename, nodeport, result) FROM run_command_on_workers(:command) WHERE NOT success
"""


class CitusError(UnusableDatabaseError):
    """The database does not run on Citus as it must.

    The message is one line with the cause and the remedy.
    """


def is_distributed(connection: Connection) -> bool:
    """Return whether the tables of a database are distributed."""
    return bool(connection.scalar(text(_HAS_EXTENSION))) and bool(_placements(connection))


def prepare_transaction(connection: Connection) -> None:
    """Allow changes of distributed tables in the current transaction."""
    for name, value in TRANSACTION_SETTINGS.items():
        connection.execute(text(f"SET LOCAL {name} = '{value}'"))


def check_cluster(connection: Connection) -> None:
    """Raise CitusError if tables cannot be distributed from this connection."""
    if not connection.scalar(text(_HAS_LIBRARY)):
        raise CitusError(
            "the database server does not load Citus: add citus to shared_preload_libraries on every node, and "
            "restart them"
        )
    if not connection.scalar(text(_HAS_EXTENSION)):
        raise CitusError("the database lacks the extension: run CREATE EXTENSION citus in it on every node")
    if not connection.scalar(text(_IS_COORDINATOR)):
        raise CitusError("POINTBOOK_DATABASE_URL leads to a worker: name the coordinator, which changes the tables")
    if not connection.scalar(text(_NODES_WITH_SHARDS)):
        raise CitusError("the cluster has no node for shards: add workers on the coordinator with citus_add_node")
    if inactive := _names(connection, _INACTIVE_NODES):
        raise CitusError(f"the nodes {inactive} are not active: run citus_activate_node for them on the coordinator")
    if unprepared := _names(connection, _NODES_WITHOUT_PREPARED_TRANSACTIONS):
        raise CitusError(
            f"the nodes {unprepared} cannot commit in two phases: set max_prepared_transactions there to the value of "
            "max_connections, and restart them"
        )


def distribute_tables(connection: Connection) -> list[str]:
    """Distribute the tables that are still local, and return their names.

    Their rows move to the nodes. Raises CitusError if a table is distributed by another column.
    """
    placements = _placements(connection)
    for name in (*REFERENCE_TABLES, *DISTRIBUTED_TABLES):
        wanted = DISTRIBUTION_COLUMN if name in DISTRIBUTED_TABLES else None
        if name in placements and placements[name] != wanted:
            raise CitusError(
                f"the table {name} is {_describe(placements[name])} instead of {_describe(wanted)}: run "
                f"undistribute_table('{name}') on the coordinator, and this command again"
            )
    local = [name for name in (*REFERENCE_TABLES, *DISTRIBUTED_TABLES) if name not in placements]
    if local:
        prepare_transaction(connection)
        # A table that refuses TRUNCATE would also refuse that its local copy is cleared. Citus does not enable a
        # disabled trigger on the shards, so these triggers are created again.
        triggers = connection.execute(text(_TRUNCATE_TRIGGERS), {"names": local}).all()
        for drop, _ in triggers:
            connection.exec_driver_sql(drop)
        for name in local:
            _distribute(connection, name)
        for name in local:
            connection.execute(text("SELECT truncate_local_data_after_distributing_table(:name)"), {"name": name})
        for _, create in triggers:
            connection.exec_driver_sql(create)
    return local


def distribute_row_types(connection: Connection) -> None:
    """Create the types of rows on the nodes that lack them.

    Citus creates a type on all nodes together with the coordinator's, or with the first table that uses it. Types from
    before the extension need such a table, if only for a moment.
    """
    types = connection.scalars(text(_LOCAL_ROW_TYPES)).all()
    if types:
        prepare_transaction(connection)
        columns = ", ".join(f"{name} {name}" for name in types)
        connection.exec_driver_sql(f"CREATE TABLE row_types ({columns})")
        connection.execute(text("SELECT create_reference_table('row_types')"))
        connection.exec_driver_sql("DROP TABLE row_types")


def configure_workers(connection: Connection) -> None:
    """Set the settings that sessions of the server need on the workers.

    New sessions have them. Raises CitusError if the role may not set them.
    """
    database = connection.dialect.identifier_preparer.quote(connection.scalar(text("SELECT current_database()")))
    # A worker refuses commands that it would have to pass on to the other nodes.
    commands = ["SET citus.enable_ddl_propagation = off"]
    commands += (f"ALTER DATABASE {database} SET {name} = '{value}'" for name, value in WORKER_SETTINGS.items())
    if failures := _names(connection, _FAILED_WORKERS, command="; ".join(commands)):
        raise CitusError(f"the settings of the workers cannot be changed: {failures}")


def _distribute(connection: Connection, name: str) -> None:
    if name in REFERENCE_TABLES:
        connection.execute(text("SELECT create_reference_table(:name)"), {"name": name})
        return
    first = DISTRIBUTED_TABLES[0]
    params = {"name": name, "column": DISTRIBUTION_COLUMN, "with": "none" if name == first else first}
    connection.execute(text("SELECT create_distributed_table(:name, :column, colocate_with => :with)"), params)


def _placements(connection: Connection) -> dict[str, str | None]:
    """Return the column by which each table is distributed.

    None stands for a reference table.
    """
    return {row.relname: row.key for row in connection.execute(text(_PLACEMENTS))}


def _describe(column: str | None) -> str:
    return "a reference table" if column is None else f"distributed by {column}"


def _names(connection: Connection, query: str, **params: object) -> str:
    return ", ".join(connection.scalars(text(query), params))
