"""The distributions of this repository, as their pyproject.toml describes them."""

import re
import tomllib
from typing import Any

from support.processes import ROOT

FOLDERS = {"pointbook": ".", "pointbook_client": "service/pointbook_client", "pointbook_stubs": "gen"}
"""The folder of each distribution, by its name as file names have it."""


def project(name: str) -> dict[str, Any]:
    """Return the metadata of a distribution."""
    described = tomllib.loads((ROOT / FOLDERS[name] / "pyproject.toml").read_text())
    return dict(described["project"])


def supported_pythons(name: str) -> list[str]:
    """Return the Pythons that a distribution is said to work with, such as 3.11."""
    return re.findall(r"Programming Language :: Python :: (3\.\d+)", "\n".join(project(name)["classifiers"]))
