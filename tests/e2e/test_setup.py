"""`make setup` on a fresh clone: one-line errors, and repairs of .venv."""

import asyncio
import os
import re
import shutil
import signal
import site
import socket
import sys
from pathlib import Path

import pytest

from support.processes import ROOT, Finished, finish
from support.waiting import until

PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "{name}"
version = "1"
"""
BACKEND = """
import pathlib, zipfile

METADATA = "Metadata-Version: 2.1\\nName: {name}\\nVersion: 1\\n"
WHEEL = "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"

def build_editable(folder, config_settings=None, metadata_directory=None):
    name = "{name}".replace("-", "_") + "-1"
    with zipfile.ZipFile(pathlib.Path(folder, name + "-py3-none-any.whl"), "w") as wheel:
        for file, text in (("METADATA", METADATA), ("WHEEL", WHEEL), ("RECORD", "")):
            wheel.writestr(name + ".dist-info/" + file, text)
    return name + "-py3-none-any.whl"
"""
"""Builds an empty package in a tenth of the time of setuptools."""
WITH_SETUPTOOLS = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "pointbook"
version = "1"
[tool.setuptools]
packages = ["pointbook"]
package-dir = {"" = "service"}
"""
VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
SETUP_SECONDS_MAX = 120.0
QUICK_VENV = """
import sys
if "venv" in sys.orig_argv:
    import pathlib, shutil, venv

    def copy_pip(self, context):
        packages = pathlib.Path(context.env_dir, "lib", "python{version}", "site-packages")
        for pattern in ("pip", "pip-*", "setuptools", "setuptools-*", "_distutils_hack"):
            for path in pathlib.Path({installed!r}).glob(pattern):
                shutil.copytree(path, packages / path.name)

    venv.EnvBuilder._setup_pip = copy_pip
"""


class Clone:
    """A folder with the set-up of the project and local packages, without network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.venv = folder / ".venv"
        self.programs = folder.parent / "programs"
        self.programs.mkdir()
        for name in ("Makefile", ".ci/setup.py"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        (folder / "requirements.lock").write_text("")
        distributions = {"pointbook": ".", "pointbook-stubs": "gen", "pointbook-client": "service/pointbook_client"}
        for name, path in distributions.items():
            (folder / path).mkdir(parents=True, exist_ok=True)
            (folder / path / "pyproject.toml").write_text(PROJECT.format(name=name))
            (folder / path / "backend.py").write_text(BACKEND.format(name=name))
        self.environment = {
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            "HOME": str(folder.parent),
            # Packages that are installed here are found without an index.
            "PYTHONPATH": os.pathsep.join([str(write_quick_venv(folder.parent / "quick")), *site.getsitepackages()]),
            "PIP_NO_INDEX": "1",
        }

    def program(self, name: str, script: str) -> Path:
        """Put a program at the start of PATH."""
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    async def make(self, *arguments: str, **more: str) -> Finished:
        """Run make."""
        environment = {**self.environment, **more}
        return await finish("make", *arguments, environment=environment, cwd=self.folder, seconds=SETUP_SECONDS_MAX)

    async def set_up(self, **more: str) -> str:
        """Run `make setup` successfully, and return its messages."""
        finished = await self.make("setup", **more)
        assert finished.exit_code == 0, finished
        return finished.err

    async def refusal(self, *arguments: str, **more: str) -> str:
        """Run `make setup`, which fails; return its one line without make's own."""
        finished = await self.make("setup", *arguments, **more)
        assert finished.exit_code != 0, finished
        lines = [line for line in finished.err.splitlines() if not line.startswith("make: ")]
        assert "Traceback" not in finished.err
        causes = [line for line in lines if not re.match("setup: (making|rebuilding|installing) ", line)]
        assert len(causes) == 1, finished
        return causes[0].removeprefix("setup: ")


def write_quick_venv(folder: Path) -> Path:
    """Make `python -m venv` copy the installed pip, which saves seconds."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(QUICK_VENV.format(installed=site.getsitepackages()[0], version=VERSION))
    return folder


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    """A fresh clone."""
    folder = tmp_path / "clone"
    folder.mkdir()
    return Clone(folder)


async def test_setup_runs_once_and_repairs_damage(clone: Clone) -> None:
    # `make run` and `make test` on a fresh clone: the second waits for the first, and uses its result.
    said = await asyncio.gather(clone.set_up(), clone.set_up())
    assert sorted("done in" in each for each in said) == [False, True]

    marker = clone.venv / "marker"
    marker.touch()
    (clone.folder / "requirements.lock").write_text("# changed\n")
    assert "making .venv" not in await clone.set_up()
    assert marker.exists()
    assert await clone.set_up() == ""
    await _check_failed_update(clone)
    assert marker.exists()

    # `python3` may be the one of the environment to replace.
    (clone.venv / ".installed").unlink()
    said_again = await clone.set_up(PATH=f"{clone.venv}/bin:{clone.environment['PATH']}")
    assert "rebuilding .venv" in said_again
    assert not marker.exists()
    await _check_damages(clone)

    for name in ("service", "tests", "bench", ".pointbook"):
        (clone.folder / name).mkdir(exist_ok=True)
    assert (await clone.make("clean")).exit_code == 0
    assert not clone.venv.exists()
    assert (clone.folder / ".pointbook").exists(), "the database of `pointbook dev` is the developer's"


async def _check_failed_update(clone: Clone) -> None:
    """Check that a failed update preserves the environment and its previous lock."""
    lock = clone.folder / "requirements.lock"
    before = lock.read_text()
    lock.write_text(f"nothing-like-it==1 --hash=sha256:{'0' * 64}\n")
    assert "nothing-like-it" in await clone.refusal()
    assert "nothing-like-it" in await clone.refusal()
    lock.write_text(before)
    assert "making .venv" not in await clone.set_up()
    assert await clone.set_up() == ""


async def _check_damages(clone: Clone) -> None:
    """Check that each kind of damage is detected."""
    packages = next(clone.venv.glob("lib/*/site-packages"))
    assert await _is_usable(clone)
    for path in (
        clone.venv / ".installed",
        clone.venv / "bin",
        next(packages.glob("pointbook-*.dist-info")),
        packages / "setuptools",
        next(packages.glob("pip-*.dist-info")),
    ):
        path.rename(clone.folder / "away")
        assert not await _is_usable(clone), path
        (clone.folder / "away").rename(path)
    stamp = (clone.venv / ".installed").read_text()
    for other in (stamp.replace(VERSION, "3.99"), stamp.replace(str(clone.folder), "/elsewhere"), "", "[]", "null"):
        (clone.venv / ".installed").write_text(other)
        assert not await _is_usable(clone), other


async def _is_usable(clone: Clone) -> bool:
    """Return whether the set-up would accept the environment."""
    code = "import runpy; print(runpy.run_path('.ci/setup.py')['is_usable']())"
    finished = await finish(sys.executable, "-c", code, environment=clone.environment, cwd=clone.folder)
    assert finished.exit_code == 0, finished
    return finished.out == "True\n"


@pytest.mark.parametrize("minor", [6, 9, 10])
async def test_an_old_python_is_reported_with_a_newer_one(clone: Clone, minor: int) -> None:
    setup = clone.folder / ".ci" / "setup.py"
    old = f"import sys, platform; sys.version_info = (3, {minor}, 0); platform.python_version = lambda: '3.{minor}.0'"
    clone.program("python3", f"exec {sys.executable} -c \"{old}; exec(open('{setup}').read())\"")
    setup.write_text(setup.read_text().replace("__file__", repr(str(setup))))
    clone.program("python3.13", "exit 0")

    line = await clone.refusal()

    assert f"is Python 3.{minor}.0, and Pointbook needs 3.11 or later" in line
    assert "PYTHON=python3.1" in line
    assert not clone.venv.exists()


async def test_a_missing_python_is_reported_in_one_line(clone: Clone) -> None:
    assert "there is no /nowhere/python3" in await clone.refusal("PYTHON=/nowhere/python3")


@pytest.mark.parametrize(("module", "cure"), [("venv", "-venv"), ("ensurepip", "-venv"), ("ssl", "PYTHON=")])
async def test_a_python_without_a_required_module_is_reported(
    clone: Clone, tmp_path: Path, module: str, cure: str
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / f"{module}.py").write_text("raise ImportError")

    line = await clone.refusal(PYTHONPATH=str(broken))

    assert f"no module {module}" in line
    assert cure in line
    assert not clone.venv.exists()


async def test_an_unreachable_index_is_reported_and_the_next_run_starts_over(clone: Clone) -> None:
    (clone.folder / "requirements.lock").write_text(f"nothing-like-it==1 --hash=sha256:{'0' * 64}\n")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # It does not listen.
        index = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        line = await clone.refusal(PIP_NO_INDEX="0", PIP_INDEX_URL=index, PIP_RETRIES="0")

    assert "cannot reach its package index" in line
    assert "network" in line
    assert not clone.venv.exists()


async def test_a_locale_that_cannot_encode_the_path_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "\u65e5\u672c \u00fc"
    folder.mkdir()
    clone = Clone(folder)
    (folder / "service" / "pointbook").mkdir(parents=True)
    # It writes the path of the sources into the environment.
    (folder / "pyproject.toml").write_text(WITH_SETUPTOOLS)

    if sys.version_info < (3, 13):
        assert "LC_ALL=C.UTF-8" in await clone.refusal(LC_ALL="C")
    await clone.set_up(LC_ALL="C.UTF-8")
    assert await clone.set_up(LC_ALL="C.UTF-8") == ""


async def test_a_missing_package_is_reported_with_the_python(clone: Clone) -> None:
    (clone.folder / "requirements.lock").write_text(f"nothing-like-it==1 --hash=sha256:{'0' * 64}\n")

    line = await clone.refusal()

    assert "nothing-like-it" in line
    assert VERSION in line


@pytest.mark.parametrize("order", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupted_setup_starts_over(clone: Clone, order: signal.Signals) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, clone.folder / ".ci" / "setup.py", env=clone.environment, stderr=asyncio.subprocess.PIPE
    )
    await until((clone.venv / "pyvenv.cfg").exists)
    process.send_signal(order)
    _, said = await process.communicate()

    assert process.returncode == 130
    assert "stopped" in said.decode()
    assert not clone.venv.exists()
