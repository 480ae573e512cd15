"""Wheels and source distributions: their contents, and use in clean environments."""

import asyncio
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

from support.clean_venvs import CleanVenv, find_python
from support.clocks import NOW_MS
from support.distributions import FOLDERS, project, supported_pythons
from support.processes import ROOT, clean_environment, finish
from support.servers import Service
from support.shops import Shop

BUILD_SECONDS_MAX = 120.0
VERSION = project("pointbook")["version"]
PYTHONS = supported_pythons("pointbook")
OWN_PYTHON = "{}.{}".format(*sys.version_info)
CLIENT_PACKAGES = {"pointbook-stubs", "pointbook-client", "grpcio", "protobuf", "googleapis-common-protos"}
# grpcio needs it.
CLIENT_PACKAGES_MAX = CLIENT_PACKAGES | {"typing_extensions"}
IMPORT_EVERYTHING = """
import importlib, pkgutil, sys

for name in sys.argv[1:]:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, f"{name}."):
        importlib.import_module(module.name)
"""
CALLS = """
import asyncio, sys

from pointbook.v1 import points_pb2
from pointbook_client import Buyer, NotFoundError, connect, reasons, sync

address, token, merchant_id, store_id, updated_at = sys.argv[1:]
update = points_pb2.PointsUpdate(
    event_id="clean",
    merchant_id=merchant_id,
    store_id=store_id,
    buyer_id="buyer",
    update_type=points_pb2.POINTS_UPDATE_TYPE_INCREASE,
    updated_scene=points_pb2.POINTS_UPDATE_SCENE_SUCCESSFUL_REGISTRATION,
    updated_value=20,
    points_balance=20,
)
update.updated_at.FromMilliseconds(int(updated_at))


async def main():
    async with connect(address, token=token) as pointbook:
        (applied,) = await pointbook.apply_updates([update])
        print(points_pb2.ApplyOutcome.Name(applied.outcome))
        try:
            await pointbook.get_redemption(merchant_id, redemption_id="r-000000000000000000000000")
        except NotFoundError as error:
            print(type(error).__name__)


asyncio.run(main())
with sync.connect(address, token=token) as pointbook:
    print(pointbook.get_points_account(merchant_id, Buyer(store_id, "buyer")).active_points)
"""
# assert_type fails for Any, too.
TYPED = """
from typing import assert_type

import grpc

from pointbook.v1 import points_pb2, points_pb2_grpc
from pointbook_client import Buyer, PointbookError, PointsAccount, connect, sync

REQUEST = points_pb2.GetPointsAccountRequest(merchant_id="merchant")


async def calls() -> None:
    async with connect("127.0.0.1:50051") as pointbook:
        assert_type(await pointbook.get_points_account("merchant", Buyer("store", "buyer")), PointsAccount)
        assert_type(await pointbook.points.GetPointsAccount(REQUEST), points_pb2.GetPointsAccountResponse)
        stub: points_pb2_grpc.PointsServiceAsyncStub = points_pb2_grpc.PointsServiceStub(pointbook.channel)
        assert_type((await stub.GetPointsAccount(REQUEST, timeout=1.0)).account.active_points, int)


def calls_of_threads() -> None:
    with sync.connect("127.0.0.1:50051") as pointbook:
        assert_type(pointbook.points.GetPointsAccount(REQUEST), points_pb2.GetPointsAccountResponse)


def code(error: PointbookError) -> grpc.StatusCode:
    return assert_type(error.grpc_code, grpc.StatusCode)
"""


async def build(folder: Path) -> Path:
    """Build all distributions into a folder."""
    script = ROOT / ".ci" / "dist.py"
    built = await finish(sys.executable, script, folder, environment=clean_environment({}), seconds=BUILD_SECONDS_MAX)
    assert built.exit_code == 0, built
    return folder


@pytest.fixture(scope="module")
async def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheels and source distributions of this working tree."""
    return await build(tmp_path_factory.mktemp("distributions"))


def wheel_of(folder: Path, name: str) -> Path:
    """Return the wheel of a distribution."""
    return folder / f"{name}-{VERSION}-py3-none-any.whl"


def tracked(folder: str) -> list[str]:
    """Return the files of a folder that git tracks, relative to it."""
    listed = subprocess.run(
        ("git", "ls-files", "--deduplicate", "."), cwd=ROOT / folder, capture_output=True, text=True, check=True
    )
    return [name for name in listed.stdout.splitlines() if (ROOT / folder / name).exists()]


def expected_files(name: str) -> set[str]:
    """Return the files of the packages of a distribution, as its wheel has them."""
    if name == "pointbook":
        return {file for file in tracked("service") if not file.startswith("pointbook_client/")}
    about = {"pyproject.toml", "README.md", "LICENSE"}
    files = {file for file in tracked(FOLDERS[name]) if file not in about}
    return {f"pointbook_client/{file}" for file in files} if name == "pointbook_client" else files


def names_of(archive: zipfile.ZipFile, prefix: str) -> set[str]:
    """Return the names of an archive's files that do not start with a prefix."""
    return {name for name in archive.namelist() if not name.startswith(prefix)}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_wheel_has_the_packages_and_nothing_else(distributions: Path, name: str) -> None:
    about = f"{name}-{VERSION}.dist-info/"
    with zipfile.ZipFile(wheel_of(distributions, name)) as wheel:
        assert names_of(wheel, about) == expected_files(name)
        assert wheel.read(f"{about}licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        check_metadata(message_from_bytes(wheel.read(f"{about}METADATA")), name)
    packages = {file.partition("/")[0] for file in expected_files(name)}
    typed = {file.rpartition("/")[0] for file in expected_files(name) if file.endswith("/py.typed")}
    assert typed == ({"pointbook/v1"} if name == "pointbook_stubs" else packages)


def check_metadata(metadata: Message, name: str) -> None:
    """Check what an index shows of a distribution."""
    described = project(name)
    assert (metadata["Name"], metadata["Version"]) == (described["name"], VERSION)
    assert (metadata["License-Expression"], metadata["License-File"]) == ("Apache-2.0", "LICENSE")
    assert metadata.get_all("Classifier") == described["classifiers"]
    assert (metadata["Requires-Python"], metadata["Summary"]) == (">=3.11", described["description"])
    assert metadata["Description-Content-Type"] == "text/markdown"
    readme = (ROOT / FOLDERS[name] / "README.md").read_text()
    assert str(metadata.get_payload()).strip() == readme.strip()


@pytest.mark.parametrize("name", FOLDERS)
def test_a_source_distribution_has_what_its_wheel_is_built_from(distributions: Path, name: str) -> None:
    top = f"{name}-{VERSION}/"
    with tarfile.open(distributions / f"{name}-{VERSION}.tar.gz") as archive:
        names = {member.name.removeprefix(top) for member in archive.getmembers() if member.isfile()}
    sources = {
        "pointbook": {f"service/{file}" for file in expected_files(name)},
        "pointbook_client": {file.removeprefix("pointbook_client/") for file in expected_files(name)},
        "pointbook_stubs": expected_files(name),
    }
    written = {file for file in names if ".egg-info/" in file} | {"PKG-INFO", "setup.cfg"}
    assert names - written == sources[name] | {"pyproject.toml", "README.md", "LICENSE"}


async def test_the_same_sources_give_the_same_bytes(distributions: Path, tmp_path: Path) -> None:
    again = await build(tmp_path)

    assert contents(again) == contents(distributions)
    assert len(contents(again)) == 2 * len(FOLDERS)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of a folder's files by their names."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def caller(service: Service, shop: Shop, admin_token: str) -> tuple[str, ...]:
    """The arguments of CALLS: a running server, and a shop of its own."""
    time_ms = str(NOW_MS - 60_000)
    return f"127.0.0.1:{service.server.port}", admin_token, shop.merchant_id, shop.store_id, time_ms


# Each installation takes a quarter of a minute.
@pytest.mark.parametrize(
    "version", [pytest.param(one, marks=() if one == OWN_PYTHON else pytest.mark.soak) for one in PYTHONS]
)
async def test_the_client_works_where_nothing_else_is_installed(
    distributions: Path, tmp_path: Path, version: str, caller: tuple[str, ...]
) -> None:
    venv = await CleanVenv.create(await find_python(version), tmp_path / "venv")

    await venv.install("pointbook-stubs", wheels=distributions)
    assert (await venv.run("python", "-W", "error", "-c", IMPORT_EVERYTHING, "pointbook.v1")).exit_code == 0

    await venv.install("pointbook-client", wheels=distributions)
    assert CLIENT_PACKAGES <= await venv.packages() <= CLIENT_PACKAGES_MAX
    called = await venv.run("python", "-W", "error", "-c", CALLS, *caller)
    assert (called.exit_code, called.err) == (0, "")
    assert called.out.split() == ["APPLY_OUTCOME_APPLIED", "RedemptionNotFoundError", "20"]


@pytest.mark.soak  # Each installation, with all that a server needs, takes a minute.
@pytest.mark.parametrize("version", PYTHONS)
async def test_the_server_starts_where_nothing_else_is_installed(
    distributions: Path, tmp_path: Path, version: str
) -> None:
    venv = await CleanVenv.create(await find_python(version), tmp_path / "venv")

    await venv.install("pointbook", wheels=distributions)

    assert {"pointbook", *CLIENT_PACKAGES} <= await venv.packages()
    assert (await venv.run("pointbook", "--version")).out == f"pointbook {VERSION}\n"
    helped = await venv.run("pointbook", "dev", "--help")
    assert (helped.exit_code, "Usage: pointbook dev" in helped.out) == (0, True)
    imported = await venv.run("python", "-W", "error", "-c", "import pointbook_server.server, shopline_shim.server")
    assert imported.exit_code == 0, imported


@pytest.mark.soak  # It installs mypy, which then reads all of grpcio, three times.
async def test_the_client_is_typed_for_mypy_with_its_extra(distributions: Path, tmp_path: Path) -> None:
    venv = await CleanVenv.create(sys.executable, tmp_path / "venv")
    (tmp_path / "typed.py").write_text(TYPED)
    files = [str(tmp_path / "typed.py"), *map(str, sorted((ROOT / "examples" / "python").glob("*.py")))]
    assert len(files) > 1

    await venv.install("pointbook-client", "mypy", wheels=distributions)
    strict = ("--strict", "--config-file=", "--cache-dir", tmp_path / "cache", "--scripts-are-modules")
    untyped = await venv.run("mypy", *strict, files[0])
    assert 'Expression is of type "Any", not "GetPointsAccountResponse"' in untyped.out
    await venv.install("pointbook-client[types]", wheels=distributions)
    checked = await asyncio.gather(*(venv.run("mypy", *strict, file) for file in files))
    assert [one.out for one in checked] == ["Success: no issues found in 1 source file\n"] * len(files)
