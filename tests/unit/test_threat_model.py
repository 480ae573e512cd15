"""The threat model names every scope and every secret that there is."""

from pathlib import Path

import pytest

from pointbook_common.secret_files import secret_file_fields
from pointbook_server.access.model import Scope
from pointbook_server.settings import ServerSettings
from shopline_shim.settings import ShimSettings

PAGE = (Path(__file__).parents[2] / "docs" / "threat-model.md").read_text()


@pytest.mark.parametrize("scope", Scope)
def test_every_scope_has_a_line(scope: Scope) -> None:
    """With what a stolen token of it can do."""
    assert f"| `{scope}` | " in PAGE


@pytest.mark.parametrize("name", sorted({*secret_file_fields(ServerSettings), *secret_file_fields(ShimSettings)}))
def test_every_secret_setting_is_named(name: str) -> None:
    """With what its holder can do."""
    assert f"`POINTBOOK_{name.upper()}`" in PAGE
