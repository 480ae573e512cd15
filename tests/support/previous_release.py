"""The release before this one, which tests run beside it with the same libraries.

A release moves both constants to itself, as CONTRIBUTING.md describes. Until the first release, they name a commit that
later ones must be able to replace without downtime.
"""

import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMIT = "833448439fe07173cbdbdec044c7c63b0ba747d9"
REVISION = "0027"
"""The newest revision of the previous release."""
START = "from pointbook_cli.main import run\n\nrun()\n"


def previous_program(folder: Path) -> Path:
    """Write the previous release's sources into a folder, and return its `pointbook`.

    Skips the test without git, or if the repository lacks the commit, such as a shallow clone.
    """
    git = shutil.which("git")
    if git is None:
        pytest.skip("git is not installed, which has the sources of the previous release")
    archive = folder / "previous.tar"
    command = (git, "-C", ROOT, "archive", "--output", archive, COMMIT, "service", "gen/pointbook")
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(f"the repository has no commit {COMMIT}, the previous release: fetch the whole history")
    with tarfile.open(archive) as sources:
        sources.extractall(folder / "previous", filter="data")
    service = folder / "previous" / "service"
    (folder / "previous" / "gen" / "pointbook").rename(service / "pointbook")
    return _program(service)


def next_program(folder: Path, migrations: dict[str, str]) -> Path:
    """Copy this release's sources, add migrations, and return its `pointbook`.

    `migrations` are sources by file name.
    """
    service = folder / "next" / "service"
    shutil.copytree(ROOT / "service", service)
    for name, source in migrations.items():
        (service / "pointbook_server" / "db" / "migrations" / "versions" / name).write_text(source)
    return _program(service)


def _program(service: Path) -> Path:
    """Write the program that runs the `pointbook` of a folder."""
    program = service / "start.py"
    program.write_text(START)
    return program
