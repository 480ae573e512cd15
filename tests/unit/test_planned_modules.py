"""tests/integration/test_plans.py covers every module that defines statements."""

import importlib
import pkgutil
from pathlib import Path

import pointbook_server
from pointbook_server.db.database import Statement

PLANS = (Path(__file__).parents[1] / "integration/test_plans.py").read_text()
NOT_PLANNED = (
    ".database",
    ".database_health",
    ".schema",
    ".inspection",
    ".audit",
    ".verifier",
    ".report",
    ".report_queries",
)
"""Statements of start-up, health checks, `pointbook verify`, `pointbook doctor` and `pointbook report`."""


def test_plans_cover_every_statement() -> None:
    planned: set[int] = set()
    others: dict[str, set[int]] = {}
    for package in pkgutil.walk_packages(pointbook_server.__path__, "pointbook_server."):
        if package.name.endswith(NOT_PLANNED) or package.name.startswith("pointbook_server.db.migrations"):
            continue
        values = vars(importlib.import_module(package.name)).values()
        statements = {id(value) for value in values if isinstance(value, Statement)}
        if f"    {package.name},\n" in PLANS:
            planned |= statements
        else:
            others[package.name] = statements

    assert planned
    assert {name: len(statements - planned) for name, statements in others.items() if statements - planned} == {}
