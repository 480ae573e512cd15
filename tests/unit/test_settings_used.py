"""Every setting has an effect."""

import re
from pathlib import Path

import pytest

from pointbook_server.settings import ServerSettings
from shopline_shim.settings import ShimSettings

SOURCES = "\n".join(path.read_text() for path in (Path(__file__).parents[2] / "service").rglob("*.py"))


@pytest.mark.parametrize("name", sorted({*ServerSettings.model_fields, *ShimSettings.model_fields}))
def test_the_setting_is_read(name: str) -> None:
    assert re.search(rf"\.{name}\b|[\[(]\"{name}\"", SOURCES)
