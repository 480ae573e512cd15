"""The threat model names every scope and every secret setting."""

from pathlib import Path

import pytest

from pointbook_common.secret_files import secret_file_fields
from pointbook_server.access.model import Scope
from pointbook_server.settings import ServerSettings
from shopline_shim.settings import ShimSettings

PAGE = (Path(__file__).parents[2] / "docs" / "threat-model.md").read_text()


@pytest.mark.parametrize("scope", Scope)
def test_every_scope_has_a_row_with_what_a_stolen_token_can_do(scope: Scope) -> None:
    assert f"| `{scope}` | " in PAGE


@pytest.mark.parametrize("name", sorted({*secret_file_fields(ServerSettings), *secret_file_fields(ShimSettings)}))
def test_every_secret_setting_is_named(name: str) -> None:
    assert f"`POINTBOOK_{name.upper()}`" in PAGE
