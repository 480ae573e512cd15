"""Every sender can be chosen, and import-linter knows it and its library."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVER = ROOT / "service/pointbook_server"
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
OWN = ("pointbook_common", "pointbook_server")
SHARED_LIBRARIES = {"structlog"}
SENDERS = sorted({path.stem for path in (SERVER / "delivery").glob("*.py")} - {"__init__", "sender", "senders"})
CHOOSERS = (SERVER / "delivery/senders.py", ROOT / "service/pointbook_cli/services/dev.py")


def imported(path: Path) -> Iterator[str]:
    """Yield the full names of the modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("sender", SENDERS)
def test_the_sender_is_chosen(sender: str) -> None:
    assert any(f"pointbook_server.delivery.{sender}" in imported(path) for path in CHOOSERS)


def test_import_linter_watches_the_libraries_of_providers() -> None:
    libraries = {name.partition(".")[0] for sender in SENDERS for name in imported(SERVER / f"delivery/{sender}.py")}
    libraries -= {*sys.stdlib_module_names, *OWN, *SHARED_LIBRARIES}
    [watched] = [
        each["forbidden_modules"] for each in CONTRACTS if each["name"] == "Each provider's library has one place"
    ]

    assert libraries <= set(watched)


def test_import_linter_knows_the_layer_of_every_sender() -> None:
    [layers] = [each["layers"] for each in CONTRACTS if each.get("containers") == ["pointbook_server.delivery"]]

    assert set(SENDERS) <= set(" ".join(layers).split())
