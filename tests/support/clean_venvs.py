"""Virtual environments of any Python, with only what a test installs."""

import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.processes import ROOT, Finished, clean_environment, finish

INSTALL_SECONDS_MAX = 300.0
# An install needs the package registry, with the machine's network settings.
INHERITED_PREFIXES = ("PIP_", "SSL_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "REQUESTS_CA_BUNDLE")
LOCKED = re.compile(r"^([\w.-]+)==([^\s;\\]+)( ; [^\\]+)?", re.MULTILINE)


def index_environment() -> dict[str, str]:
    """Return the variables by which this machine's pip reaches its index."""
    return {name: value for name, value in os.environ.items() if name.upper().startswith(INHERITED_PREFIXES)}


async def find_python(version: str) -> str:
    """Return the command of a Python, such as 3.12.

    Skips the test without it. A version manager may have a command for a Python that is not installed.
    """
    command = f"python{version}"
    if shutil.which(command) is None:
        pytest.skip(f"{command} is not on the path")
    script = "import ensurepip, venv, sys; print('{}.{}'.format(*sys.version_info))"
    started = await finish(command, "-c", script, environment=clean_environment({}))
    if started.out.strip() != version:
        pytest.skip(
            f"{command} does not start, or has no venv: {(started.err.strip().splitlines() or ['no output'])[-1]}"
        )
    return command


@dataclass(frozen=True)
class CleanVenv:
    """A virtual environment without the packages of this one."""

    folder: Path

    @classmethod
    async def create(cls, python: str, folder: Path) -> "CleanVenv":
        """Create the environment with a Python.

        It has no pip either, whose installation takes seconds. Skips the test if pip cannot reach its index.
        """
        command = (python, "-m", "venv", "--without-pip", folder)
        created = await finish(*command, environment=clean_environment({}), seconds=INSTALL_SECONDS_MAX)
        assert created.exit_code == 0, created
        venv = cls(folder)
        reached = await venv._pip(
            "download", "--retries", "1", "--timeout", "10", "--no-deps", "--dest", folder, "typing-extensions"
        )
        if reached.exit_code != 0:
            pytest.skip(f"pip cannot reach its index: {reached.err.strip().splitlines()[-1]}")
        return venv

    async def run(self, program: str, *arguments: str | Path, cwd: Path | None = None) -> Finished:
        """Run a program of the environment to its end."""
        return await self._finish(self.folder / "bin" / program, *arguments, cwd=cwd)

    async def _pip(self, *arguments: str | Path) -> Finished:
        """Run the pip of this process's environment for the other one."""
        return await self._finish(sys.executable, "-m", "pip", "--python", self.folder / "bin" / "python", *arguments)

    async def _finish(self, *command: str | Path, cwd: Path | None = None) -> Finished:
        return await finish(
            *command,
            environment=clean_environment({}) | index_environment(),
            cwd=cwd or self.folder,
            seconds=INSTALL_SECONDS_MAX,
        )

    async def install(self, *requirements: str, wheels: Path) -> None:
        """Install requirements from a folder of wheels and from the index.

        Packages of requirements.lock have the version that it states.
        """
        constraints = self.folder / "constraints.txt"
        lock = (ROOT / "requirements.lock").read_text()
        constraints.write_text("".join(f"{''.join(found)}\n" for found in LOCKED.findall(lock)))
        # A test imports few of the modules, so it need not wait until all are compiled.
        options = ("--no-compile", "--find-links", wheels, "--constraint", constraints)
        installed = await self._pip("install", *options, *requirements)
        assert installed.exit_code == 0, installed

    async def packages(self) -> set[str]:
        """Return the names of what is installed, after checking that nothing is missing."""
        checked = await self._pip("check")
        assert checked.exit_code == 0, checked
        listed = await self._pip("list", "--format", "freeze")
        return {line.partition("==")[0] for line in listed.out.splitlines()}
