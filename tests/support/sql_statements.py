"""The server's SQL statements, parsed, and what Citus needs of them."""

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

from pglast import ast, parse_sql

import pointbook_server
from pointbook_server.db.citus import DISTRIBUTED_TABLES, REFERENCE_TABLES
from pointbook_server.db.database import Statement

KEY = "merchant_id"
QUERIES = (ast.SelectStmt, ast.InsertStmt, ast.UpdateStmt, ast.DeleteStmt)


def module_statements() -> Iterator[tuple[str, Statement]]:
    """Yield every statement of a module of the server, with its name."""
    for package in pkgutil.walk_packages(pointbook_server.__path__, "pointbook_server."):
        if package.name.startswith("pointbook_server.db.migrations"):
            continue
        module = importlib.import_module(package.name)
        for name, value in vars(module).items():
            label = f"{package.name.removeprefix('pointbook_server.')}.{name}"
            if isinstance(value, Statement):
                yield label, value
            elif isinstance(value, dict):
                yield from ((f"{label}.{key}", item) for key, item in value.items() if isinstance(item, Statement))
            elif isinstance(value, list | tuple | set | frozenset):
                yield from ((f"{label}.{at}", item) for at, item in enumerate(value) if isinstance(item, Statement))


def citus_problems(sql: str) -> list[str]:
    """Return what keeps a statement from running on one shard of Citus.

    Each distributed table, at each level of the statement, must be limited to the merchant of the same parameter.
    """
    query = _parse(sql)
    check = _Check()
    if isinstance(query, QUERIES):
        check.visit(query, frozenset())
    problems = check.problems
    if check.shares_reference_table and not check.params:
        problems.append("shared locks of a reference table deadlock without a distributed table")
    if len(check.params) > 1:
        problems.append(f"several parameters are the merchant: {sorted(check.params)}")
    return problems


def has_returning(sql: str) -> bool:
    """Return whether a statement returns the rows that it writes."""
    return bool(_parse(sql).returningClause)


def mixes_constraints(sql: str) -> bool:
    """Return whether an ALTER TABLE adds a constraint and does something else."""
    statement = _parse(sql)
    if not isinstance(statement, ast.AlterTableStmt):
        return False
    commands: list[Any] = list(statement.cmds or ())
    return len(commands) > 1 and any(command.subtype.name == "AT_AddConstraint" for command in commands)


def _parse(sql: str) -> Any:
    """Return the tree of one statement."""
    (parsed,) = parse_sql(sql)
    return parsed.stmt


class _Check:
    """Visits the levels of a statement, and collects problems and merchant parameters."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.params: set[int] = set()
        self.shares_reference_table = False

    def visit(self, query: Any, ctes: frozenset[str]) -> None:
        """Check a query and its subqueries, which can read some common table expressions."""
        if query.withClause:
            for cte in query.withClause.ctes:
                if is_node(cte.ctequery, ast.SelectStmt) and _is_without_columns(cte.ctequery):
                    self.problems.append(f"the common table expression {cte.ctename} has no columns")
                ctes |= {cte.ctename}
        self._check_level(query, ctes)
        for subquery in _subqueries(query):
            self.visit(subquery, ctes)

    def _check_level(self, query: Any, ctes: frozenset[str]) -> None:
        tables = [
            table for table in _tables(query) if table.relname in DISTRIBUTED_TABLES and table.relname not in ctes
        ]
        if is_node(query, ast.InsertStmt):
            if query.relation.relname in DISTRIBUTED_TABLES:
                self._check_insert(query)
        else:
            conditions = list(_conditions(query))
            for table in tables:
                self._check_table(table, conditions, is_alone=len(tables) == 1)
        for clause in getattr(query, "lockingClause", None) or ():
            is_shared = clause.strength.name in {"LCS_FORSHARE", "LCS_FORKEYSHARE"}
            self.shares_reference_table |= is_shared and any(t.relname in REFERENCE_TABLES for t in _tables(query))
        for target in _assigned(query):
            if target.name == KEY:
                self.problems.append(f"{KEY} is updated")
            if _has_subscript(target.val):
                self.problems.append(f"{target.name} gets an element of an array, which crashes Citus")

    def _check_table(self, table: Any, conditions: list[Any], *, is_alone: bool) -> None:
        name = table.alias.aliasname if table.alias else table.relname
        own = {(name, KEY), (KEY,)} if is_alone else {(name, KEY)}
        params = {
            param
            for condition in conditions
            if is_node(condition, ast.A_Expr) and condition.kind.name == "AEXPR_OP" and condition.name[0].sval == "="
            for column, value in ((condition.lexpr, condition.rexpr), (condition.rexpr, condition.lexpr))
            if _column(column) in own and (param := _param(value)) is not None
        }
        if not params:
            self.problems.append(f"{table.relname} is not limited to one merchant")
        self.params |= params

    def _check_insert(self, query: Any) -> None:
        columns = [column.name for column in query.cols or ()]
        rows = query.selectStmt.valuesLists or [[target.val for target in query.selectStmt.targetList]]
        for row in rows:
            param = _param(row[columns.index(KEY)]) if KEY in columns else None
            if param is None:
                self.problems.append(f"the merchant of a row of {query.relation.relname} is no parameter")
            else:
                self.params.add(param)


def _is_without_columns(query: Any) -> bool:
    return not query.targetList and not query.valuesLists and not query.larg


def _tables(query: Any) -> Iterator[Any]:
    """Yield the tables that a query reads or writes, without those of subqueries."""
    items = list(getattr(query, "fromClause", None) or ())
    items += getattr(query, "usingClause", None) or ()
    if is_node(query, ast.UpdateStmt, ast.DeleteStmt):
        items.append(query.relation)
    while items:
        item = items.pop()
        if is_node(item, ast.JoinExpr):
            items += [item.larg, item.rarg]
        elif is_node(item, ast.RangeVar):
            yield item


def _conditions(query: Any) -> Iterator[Any]:
    """Yield the conditions of a query and of its joins that must all hold."""
    expressions = [query.whereClause]
    items = [*(getattr(query, "fromClause", None) or ()), *(getattr(query, "usingClause", None) or ())]
    while items:
        item = items.pop()
        if is_node(item, ast.JoinExpr):
            items += [item.larg, item.rarg]
            expressions.append(item.quals)
    while expressions:
        expression = expressions.pop()
        if is_node(expression, ast.BoolExpr) and expression.boolop.name == "AND_EXPR":
            expressions += expression.args
        elif expression is not None:
            yield expression


def _assigned(query: Any) -> tuple[Any, ...]:
    """Return the columns that a query updates."""
    if is_node(query, ast.UpdateStmt):
        return tuple(query.targetList)
    conflict = getattr(query, "onConflictClause", None)
    return tuple(conflict.targetList or ()) if conflict else ()


def _column(node: Any) -> tuple[str, ...]:
    """Return the qualified name of a column; empty for another expression."""
    if not is_node(node, ast.ColumnRef):
        return ()
    return tuple(getattr(field, "sval", "*") for field in node.fields)


def _param(node: Any) -> int | None:
    """Return the number of a parameter, also if it is cast."""
    while is_node(node, ast.TypeCast):
        node = node.arg
    return int(node.number) if is_node(node, ast.ParamRef) else None


def _has_subscript(node: Any) -> bool:
    """Return whether an expression reads an element of an array."""
    if is_node(node, ast.A_Indices):
        return True
    children = node if isinstance(node, tuple | list) else [getattr(node, name) for name in node]
    return any(_has_subscript(child) for child in children if isinstance(child, tuple | list | ast.Node))


def _subqueries(node: Any) -> Iterator[Any]:
    """Yield the queries directly inside a node, at any depth of other nodes."""
    children = node if isinstance(node, tuple | list) else [getattr(node, name) for name in node]
    for child in children:
        if isinstance(child, QUERIES):
            yield child
        elif isinstance(child, tuple | list | ast.Node):
            yield from _subqueries(child)


def is_node(node: Any, *kinds: type[ast.Node]) -> bool:
    """Return whether a node is of some kinds, without a promise to mypy.

    pglast declares every attribute of its nodes as optional.
    """
    return isinstance(node, kinds)
