"""The rules of migrations that run while servers use the database.

A migration runs on a connection that records its statements and returns no rows. What is not known to be safe is a
problem: CONTRIBUTING.md says how to do it in steps.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from pglast import ast, parse_sql
from sqlalchemy import Executable, Result
from sqlalchemy.engine.result import IteratorResult, SimpleResultMetaData

from pointbook_server.db.database import DIALECT
from pointbook_server.db.migrations.revisions import Revision
from support.sql_statements import is_node

REPEATABLE = (ast.CommentStmt, ast.SelectStmt, ast.VariableSetStmt)
HARMLESS = (
    ast.CommentStmt,
    ast.CompositeTypeStmt,
    ast.CreateFunctionStmt,
    ast.CreateStmt,
    ast.CreateTrigStmt,
    ast.SelectStmt,
)
"""Statements that need no long lock on what exists before the migration."""
CHANGES = (ast.DeleteStmt, ast.InsertStmt, ast.UpdateStmt)
RELAXING = {"AT_DropConstraint", "AT_DropNotNull", "AT_ColumnDefault", "AT_SetStatistics", "AT_SetRelOptions"}
"""Changes of a table's description that refuse nothing that was accepted before."""
WITHOUT_ROWS = {"CONSTR_DEFAULT", "CONSTR_NULL", "CONSTR_NOTNULL"}
"""Constraints of a new column that need no look at the rows, with a constant as the default."""
ADDED_LATER = {"CONSTR_CHECK", "CONSTR_FOREIGN"}
"""Constraints that can be added without a look at the rows, and validated later."""


def recorded_statements(upgrade: Callable[[], None]) -> list[str]:
    """Return the SQL that a migration runs on a database without rows."""
    connection = _Recorder()
    # Alembic only calls the methods that the recorder has.
    context: Any = MigrationContext(DIALECT, connection, opts={})  # type: ignore[arg-type] # it needs no open connection
    with Operations.context(context):
        upgrade()
    return connection.statements


def find_problems(revisions: Iterable[Revision]) -> list[str]:
    """Return what keeps migrations from running beside servers, oldest first.

    A constraint that one of them validates allows a later one to use it.
    """
    history = _History()
    return [
        f"{revision.number}: {problem}"
        for revision in revisions
        for problem in _Check(revision, history).find_problems()
    ]


def find_broken_promises(revisions: Sequence[Revision], previous: str) -> list[str]:
    """Return which migrations take away what the previous release needs.

    Its newest revision is given. Nor may a promise be wider than that of an earlier migration.
    """
    problems, promised = [], ""
    for revision in revisions:
        if revision.compatible_from is not None:
            if revision.compatible_from > previous:
                problems.append(f"{revision.number}: the previous release, {previous}, cannot use the schema")
            if revision.compatible_from < promised:
                problems.append(f"{revision.number}: an earlier migration took away more")
            promised = revision.compatible_from
    return problems


@dataclass
class _History:
    """What migrations have made sure of so far, by table."""

    required: dict[tuple[str, str], str] = field(default_factory=dict)
    """The column that each constraint CHECK (column IS NOT NULL) requires."""
    validated: set[tuple[str, str]] = field(default_factory=set)
    """The columns of which a validated constraint proves that they are set."""


class _Recorder:
    """A connection without a database: its results have no rows."""

    def __init__(self) -> None:
        self.statements: list[str] = []
        self.dialect = DIALECT

    def execute(self, statement: Executable, *_params: object) -> Result[Any]:
        """Record a statement, and return a result without rows."""
        compiled: Any = statement.compile(dialect=DIALECT)  # type: ignore[attr-defined] # every Core statement has this method
        self.statements.append(compiled.string)
        return IteratorResult(SimpleResultMetaData(()), iter(()))

    def scalar(self, statement: Executable, *params: object) -> None:
        """Record a statement."""
        self.execute(statement, *params)

    def in_transaction(self) -> bool:
        """Return True: Alembic begins no transaction."""
        return True


class _Check:
    """Checks the statements of one revision."""

    def __init__(self, revision: Revision, history: _History) -> None:
        self._revision = revision
        self._history = history
        self._statements: list[Any] = [
            parsed.stmt for sql in recorded_statements(revision.upgrade) for parsed in parse_sql(sql)
        ]
        self._created = {each.relation.relname for each in self._statements if is_node(each, ast.CreateStmt)}

    def find_problems(self) -> Iterator[str]:
        """Yield the problems of the revision, and extend the history."""
        altered = {
            each.relation.relname for each in self._statements if is_node(each, ast.AlterTableStmt, ast.CreateTrigStmt)
        } - self._created
        if len(altered) > 1:
            yield f"locks several tables: {', '.join(sorted(altered))}"
        for statement in self._statements:
            yield from self._statement_problems(statement)
            if not self._revision.in_transaction and not _is_repeatable(statement):
                yield f"commits step by step, but cannot repeat a {type(statement).__name__}"

    def _statement_problems(self, statement: Any) -> Iterator[str]:
        if is_node(statement, ast.IndexStmt):
            yield from self._index_problems(statement)
        elif is_node(statement, ast.DropStmt):
            yield from self._drop_problems(statement)
        elif is_node(statement, ast.AlterTableStmt):
            yield from self._table_problems(statement)
        elif is_node(statement, *CHANGES):
            if self._revision.in_transaction and statement.relation.relname not in self._created:
                yield f"changes rows of {statement.relation.relname} in one transaction: use backfill"
        elif is_node(statement, ast.RenameStmt):
            yield from self._contraction("renames")
        elif not is_node(statement, *HARMLESS) and not self._sets_lock_timeout(statement):
            yield f"runs a {type(statement).__name__}, which is not known to be safe"

    def _index_problems(self, statement: Any) -> Iterator[str]:
        if statement.relation.relname in self._created:
            return
        if not statement.concurrent:
            yield f"blocks writes of {statement.relation.relname} while it builds {statement.idxname}"
        elif self._revision.in_transaction:
            yield f"builds {statement.idxname} concurrently in a transaction: set in_transaction to False"

    def _drop_problems(self, statement: Any) -> Iterator[str]:
        kind = statement.removeType.name.removeprefix("OBJECT_").lower()
        yield from self._contraction(f"drops an object ({kind})")
        if kind == "index" and not statement.concurrent:
            yield "blocks reads while it drops an index"
        elif kind == "index" and self._revision.in_transaction:
            yield "drops an index concurrently in a transaction: set in_transaction to False"

    def _table_problems(self, statement: Any) -> Iterator[str]:
        table = statement.relation.relname
        if statement.objtype.name != "OBJECT_TABLE":
            yield f"alters {table}, which is no table and not known to be safe"
        elif table not in self._created:
            for command in statement.cmds:
                yield from self._alter_problems(table, command, command.subtype.name)

    def _alter_problems(self, table: str, command: Any, kind: str) -> Iterator[str]:
        match kind:
            case "AT_AddColumn":
                yield from self._column_problems(table, command.def_)
            case "AT_AddConstraint":
                yield from self._constraint_problems(table, command.def_)
            case "AT_ValidateConstraint":
                yield from self._validation_problems(table, command.name)
            case "AT_SetNotNull":
                yield from self._requirement_problems(table, command.name)
            case "AT_DropColumn":
                yield from self._contraction(f"drops {table}.{command.name}")
            case _ if kind not in RELAXING:
                yield f"alters {table} by {kind.removeprefix('AT_')}, which is not known to be safe"

    def _column_problems(self, table: str, column: Any) -> Iterator[str]:
        constraints = {each.contype.name: each for each in column.constraints or ()}
        default = constraints.get("CONSTR_DEFAULT")
        if default is not None and not _is_constant(default.raw_expr):
            yield f"rewrites {table}: the default of {column.colname} is no constant"
        if "CONSTR_NOTNULL" in constraints and default is None:
            yield f"requires {table}.{column.colname}, which servers of the previous release leave out"
        names = [name.sval for name in column.typeName.names]
        if unsafe := sorted(set(constraints) - WITHOUT_ROWS) or names[-1].endswith("serial"):
            yield f"rewrites or reads {table} for {column.colname}: {unsafe if unsafe is not True else names[-1]}"

    def _constraint_problems(self, table: str, constraint: Any) -> Iterator[str]:
        kind = constraint.contype.name
        if kind in ADDED_LATER:
            if not constraint.skip_validation:
                yield f"reads all rows of {table} under a lock: add {constraint.conname} as NOT VALID"
            elif (column := _required_column(constraint)) is not None:
                self._history.required[table, constraint.conname] = column
        elif not constraint.indexname:
            yield f"blocks {table} while it builds the index of {constraint.conname}: use one that was built before"

    def _validation_problems(self, table: str, constraint: str) -> Iterator[str]:
        if (column := self._history.required.get((table, constraint))) is not None:
            self._history.validated.add((table, column))
        if self._revision.in_transaction and self._locks_out_calls():
            yield f"reads all rows of {table} under a lock: validate constraints in a migration of their own"

    def _requirement_problems(self, table: str, column: str) -> Iterator[str]:
        yield from self._contraction(f"requires {table}.{column}")
        if (table, column) not in self._history.validated:
            yield (
                f"reads all rows of {table} under a lock: an earlier migration validates a constraint "
                f"CHECK ({column} IS NOT NULL)"
            )

    def _locks_out_calls(self) -> bool:
        """Return whether the revision takes a lock that calls wait for."""
        return any(
            command.subtype.name != "AT_ValidateConstraint"
            for each in self._statements
            if is_node(each, ast.AlterTableStmt)
            for command in each.cmds
        )

    def _sets_lock_timeout(self, statement: Any) -> bool:
        """Return whether a step outside a transaction chooses how long it waits for locks."""
        is_setting = is_node(statement, ast.VariableSetStmt) and statement.name == "lock_timeout"
        return is_setting and not self._revision.in_transaction

    def _contraction(self, what: str) -> Iterator[str]:
        if self._revision.compatible_from is None:
            yield f"{what}, but is not marked as contracting the schema by compatible_from"


def _is_repeatable(statement: Any) -> bool:
    """Return whether a statement can run again after it succeeded."""
    if is_node(statement, ast.IndexStmt):
        return bool(statement.if_not_exists)
    if is_node(statement, ast.DropStmt):
        return bool(statement.missing_ok)
    if is_node(statement, ast.CreateTrigStmt):
        return bool(statement.replace)
    if is_node(statement, ast.AlterTableStmt):
        return all(command.subtype.name == "AT_ValidateConstraint" for command in statement.cmds)
    return is_node(statement, *CHANGES, *REPEATABLE)


def _is_constant(node: Any) -> bool:
    """Return whether an expression is a constant, also if it is cast."""
    while is_node(node, ast.TypeCast):
        node = node.arg
    return is_node(node, ast.A_Const)


def _required_column(constraint: Any) -> str | None:
    """Return the column that a CHECK (column IS NOT NULL) requires."""
    test = constraint.raw_expr
    if is_node(test, ast.NullTest) and test.nulltesttype.name == "IS_NOT_NULL" and is_node(test.arg, ast.ColumnRef):
        return str(test.arg.fields[-1].sval)
    return None
