"""The distributions agree on their version and their Pythons."""

import re
import runpy

import pytest

from support.distributions import FOLDERS, project, supported_pythons
from support.processes import ROOT

VERSION = project("pointbook")["version"]


@pytest.mark.parametrize("name", FOLDERS)
def test_all_have_one_version_and_require_each_other_in_it(name: str) -> None:
    described = project(name)
    extras = [one for extra in described.get("optional-dependencies", {}).values() for one in extra]
    required = [one for one in described["dependencies"] + extras if re.match(r"pointbook\b", one)]

    assert described["version"] == VERSION
    assert [one.partition("==")[2] for one in required] == [VERSION] * len(required)


def test_the_server_requires_client_and_stubs_and_the_client_requires_the_stubs() -> None:
    stubs = f"pointbook-stubs=={VERSION}"

    assert {f"pointbook-client=={VERSION}", stubs} <= set(project("pointbook")["dependencies"])
    assert stubs in project("pointbook_client")["dependencies"]


@pytest.mark.parametrize("name", FOLDERS)
def test_the_pythons_are_those_of_make_setup(name: str) -> None:
    setup = runpy.run_path(str(ROOT / ".ci" / "setup.py"))
    minors = range(setup["OLDEST"][1], setup["NEWEST_KNOWN"][1] + 1)

    assert supported_pythons(name) == [f"3.{minor}" for minor in minors]
    assert project(name)["requires-python"] == f">=3.{minors[0]}"
