"""`make setup` for a newcomer: every obstacle is one line, and an incomplete .venv is rebuilt."""

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

PROJECT = (
    '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n[project]\nversion = "1"\n'
)
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
    """A folder with the project's own set-up, and little to install: the tests need no network."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.venv = folder / ".venv"
        self.programs = folder.parent / "programs"
        self.programs.mkdir()
        for name in ("Makefile", ".ci/setup.py"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
        (folder / "requirements.lock").write_text("")
        (folder / "gen").mkdir()
        (folder / "pyproject.toml").write_text(f'{PROJECT}name = "pointbook"\n[tool.setuptools]\npackages = []\n')
        (folder / "gen" / "pyproject.toml").write_text(
            f'{PROJECT}name = "pointbook-stubs"\n[tool.setuptools]\npackages = []\n'
        )
        self.environment = {
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            "HOME": str(folder.parent),
            # What is installed here already is found without an index.
            "PYTHONPATH": os.pathsep.join([str(write_quick_venv(folder.parent / "quick")), *site.getsitepackages()]),
            "PIP_NO_INDEX": "1",
        }

    def program(self, name: str, script: str) -> Path:
        """Put a program on the path, in front of all others."""
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    async def make(self, *arguments: str, **more: str) -> Finished:
        """Run make."""
        environment = {**self.environment, **more}
        return await finish("make", *arguments, environment=environment, cwd=self.folder, seconds=SETUP_SECONDS_MAX)

    async def set_up(self, **more: str) -> str:
        """Run `make setup`, which succeeds, and return its messages."""
        finished = await self.make("setup", **more)
        assert finished.exit_code == 0, finished
        return finished.err

    async def refusal(self, *arguments: str, **more: str) -> str:
        """Run `make setup`, which fails; return its one line of cause and cure, without make's own."""
        finished = await self.make("setup", *arguments, **more)
        assert finished.exit_code != 0, finished
        lines = [line for line in finished.err.splitlines() if not line.startswith("make: ")]
        assert "Traceback" not in finished.err
        causes = [line for line in lines if not re.match("setup: (making|rebuilding|installing) ", line)]
        assert len(causes) == 1, finished
        return causes[0].removeprefix("setup: ")


def write_quick_venv(folder: Path) -> Path:
    """Write a module with which `python -m venv` copies pip from here, where its own way takes seconds."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(QUICK_VENV.format(installed=site.getsitepackages()[0], version=VERSION))
    return folder


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    """A fresh clone."""
    folder = tmp_path / "clone"
    folder.mkdir()
    return Clone(folder)


async def test_setup_is_done_once_and_healed_where_it_is_broken(clone: Clone) -> None:
    """A complete environment is kept silently, other packages are added, and an incomplete one is rebuilt."""
    # `make run` and `make test` on a fresh clone: the second waits for the first, and finds what that has made.
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

    # `python3` may be the one inside the environment that is to be replaced.
    (clone.venv / ".installed").unlink()
    said_again = await clone.set_up(PATH=f"{clone.venv}/bin:{clone.environment['PATH']}")
    assert "rebuilding .venv" in said_again
    assert not marker.exists()
    await _check_damages(clone)

    for name in ("service", "tests", "bench", ".pointbook"):
        (clone.folder / name).mkdir()
    assert (await clone.make("clean")).exit_code == 0
    assert not clone.venv.exists()
    assert (clone.folder / ".pointbook").exists(), "the database of `pointbook dev` is the developer's"


async def _check_failed_update(clone: Clone) -> None:
    """An update that fails keeps the environment, which is complete again with the previous lock."""
    lock = clone.folder / "requirements.lock"
    before = lock.read_text()
    lock.write_text(f"nothing-like-it==1 --hash=sha256:{'0' * 64}\n")
    assert "nothing-like-it" in await clone.refusal()
    assert "nothing-like-it" in await clone.refusal()
    lock.write_text(before)
    assert "making .venv" not in await clone.set_up()
    assert await clone.set_up() == ""


async def _check_damages(clone: Clone) -> None:
    """Each damage to a whole environment is seen."""
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
    """Return whether the set-up would keep the environment."""
    code = "import runpy; print(runpy.run_path('.ci/setup.py')['is_usable']())"
    finished = await finish(sys.executable, "-c", code, environment=clone.environment, cwd=clone.folder)
    assert finished.exit_code == 0, finished
    return finished.out == "True\n"


@pytest.mark.parametrize("minor", [6, 9, 10])
async def test_an_old_python_is_named_with_a_newer_one(clone: Clone, minor: int) -> None:
    """The line says which Python is too old, and which one on the path is not."""
    setup = clone.folder / ".ci" / "setup.py"
    old = f"import sys, platform; sys.version_info = (3, {minor}, 0); platform.python_version = lambda: '3.{minor}.0'"
    clone.program("python3", f"exec {sys.executable} -c \"{old}; exec(open('{setup}').read())\"")
    setup.write_text(setup.read_text().replace("__file__", repr(str(setup))))
    clone.program("python3.13", "exit 0")

    line = await clone.refusal()

    assert f"is Python 3.{minor}.0, and Pointbook needs 3.11 or later" in line
    assert "PYTHON=python3.1" in line
    assert not clone.venv.exists()


async def test_no_python_is_one_line(clone: Clone) -> None:
    """Also where the one that was named is not there."""
    assert "there is no /nowhere/python3" in await clone.refusal("PYTHON=/nowhere/python3")


@pytest.mark.parametrize(("module", "cure"), [("venv", "-venv"), ("ensurepip", "-venv"), ("ssl", "PYTHON=")])
async def test_a_python_without_a_module_is_named(clone: Clone, tmp_path: Path, module: str, cure: str) -> None:
    """Debian has venv in a package of its own, and a Python may have been built without OpenSSL."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / f"{module}.py").write_text("raise ImportError")

    line = await clone.refusal(PYTHONPATH=str(broken))

    assert f"no module {module}" in line
    assert cure in line
    assert not clone.venv.exists()


async def test_no_network_is_named_and_leaves_nothing_half_made(clone: Clone) -> None:
    """An unreachable index is named, and the next run starts over."""
    (clone.folder / "requirements.lock").write_text(f"nothing-like-it==1 --hash=sha256:{'0' * 64}\n")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # It does not listen.
        index = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        line = await clone.refusal(PIP_NO_INDEX="0", PIP_INDEX_URL=index, PIP_RETRIES="0")

    assert "cannot reach its package index" in line
    assert "network" in line
    assert not clone.venv.exists()


async def test_a_locale_without_the_letters_of_the_path_is_named(tmp_path: Path) -> None:
    """Python 3.11 and 3.12 cannot install into such a folder; with a UTF-8 locale they can."""
    folder = tmp_path / "\u65e5\u672c \u00fc"
    folder.mkdir()
    clone = Clone(folder)
    (folder / "service" / "pointbook").mkdir(parents=True)
    layout = '[tool.setuptools]\npackages = ["pointbook"]\npackage-dir = {"" = "service"}\n'
    (folder / "pyproject.toml").write_text(f'{PROJECT}name = "pointbook"\n{layout}')

    if sys.version_info < (3, 13):
        assert "LC_ALL=C.UTF-8" in await clone.refusal(LC_ALL="C")
    await clone.set_up(LC_ALL="C.UTF-8")
    assert await clone.set_up(LC_ALL="C.UTF-8") == ""


async def test_a_package_that_the_index_lacks_is_named(clone: Clone) -> None:
    """The line names the package and the Python."""
    (clone.folder / "requirements.lock").write_text(f"nothing-like-it==1 --hash=sha256:{'0' * 64}\n")

    line = await clone.refusal()

    assert "nothing-like-it" in line
    assert VERSION in line


@pytest.mark.parametrize("order", [signal.SIGINT, signal.SIGTERM])
async def test_ctrl_c_leaves_nothing_half_made(clone: Clone, order: signal.Signals) -> None:
    """An interrupted set-up starts over the next time."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, clone.folder / ".ci" / "setup.py", env=clone.environment, stderr=asyncio.subprocess.PIPE
    )
    await until((clone.venv / "pyvenv.cfg").exists)
    process.send_signal(order)
    _, said = await process.communicate()

    assert process.returncode == 130
    assert "stopped" in said.decode()
    assert not clone.venv.exists()
