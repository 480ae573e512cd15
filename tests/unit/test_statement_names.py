"""The names of statements in metrics."""

from sqlalchemy import text

from pointbook_server.db.database import UNNAMED, Statement
from support.sql_statements import module_statements


def test_every_statement_of_the_server_has_a_name_of_its_own() -> None:
    statements = {id(statement): statement for _, statement in module_statements()}
    names = [statement.name for statement in statements.values()]

    assert len(names) > 150
    assert UNNAMED not in names
    assert {name for name in names if names.count(name) > 1} == set()
    assert all(name == name.lower() and "." in name for name in names)


def test_a_statement_that_no_constant_holds_is_unnamed() -> None:
    assert Statement(text("SELECT 1")).name == UNNAMED
