"""Helpers of tests stand once, in tests/support or in the one file that uses them."""

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parents[1]
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@cache
def definitions(path: Path) -> list[Definition]:
    """Return the functions and classes of a file, without its tests and fixtures."""
    return [
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, Definition) and not node.name.startswith("test_") and not is_fixture(node)
    ]


def is_fixture(node: Definition) -> bool:
    """Return whether a definition is a fixture, which a file may replace by its own."""
    return any("fixture" in ast.dump(decorator) for decorator in node.decorator_list)


def content(node: Definition) -> str:
    """Return the parameters and the body of a definition, without its docstring."""
    body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
    parameters = [] if isinstance(node, ast.ClassDef) else [node.args]
    return "\n".join(map(ast.dump, [*parameters, *body]))


def test_no_test_file_redefines_a_shared_helper() -> None:
    shared = {node.name for path in (TESTS / "support").glob("*.py") for node in definitions(path)}
    redefined = [
        f"{path.relative_to(TESTS)}: {node.name}"
        for path in TESTS.rglob("test_*.py")
        for node in definitions(path)
        if not node.name.startswith("_") and node.name in shared
    ]

    assert redefined == []


def test_no_helper_is_copied() -> None:
    places = defaultdict(list)
    for path in TESTS.rglob("*.py"):
        for node in definitions(path):
            places[content(node)].append(f"{path.relative_to(TESTS)}: {node.name}")

    assert [copies for copies in places.values() if len(copies) > 1] == []
