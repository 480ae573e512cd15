"""The files and tests that CONTRIBUTING.md names exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`([\w./*-]+/[\w./*-]*)`", GUIDE))))
def test_the_path_exists(path: str) -> None:
    assert list(ROOT.glob(path)) or list((ROOT / "service/pointbook_server").glob(path))


@pytest.mark.parametrize(("path", "test"), re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", GUIDE))
def test_the_test_exists(path: str, test: str) -> None:
    assert re.search(rf"def {test}\(", (ROOT / path).read_text())


@pytest.mark.parametrize(
    ("name", "path"), re.findall(r"`([A-Z]\w+)` (?:in|of|and the sets next to it in) `([\w./]+)`", GUIDE)
)
def test_the_name_is_defined_in_the_file(name: str, path: str) -> None:
    files = (ROOT / path).glob("*.py") if path.endswith("/") else [ROOT / path, *(ROOT / "service").rglob(path)]

    assert any(re.search(rf"\b{name}\b", file.read_text()) for file in files if file.is_file())


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?m)(?:^|`)make ([a-z]+)", GUIDE))))
def test_the_make_target_exists(target: str) -> None:
    assert re.search(rf"(?m)^{target}:", (ROOT / "Makefile").read_text())
