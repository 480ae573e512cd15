"""The embedded PostgreSQL with its real binaries."""
# ruff: noqa: ASYNC110, ASYNC240 - A test has its loop to itself, and other processes set no events.

import asyncio
import os
import shutil
import signal
import socket
import stat
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from pointbook_cli.embedded_postgres import EmbeddedPostgres, EmbeddedPostgresError
from support.connections import fetch_value
from support.probes import is_alive
from support.waiting import until

OWNER = """
import asyncio, pathlib, sys
from pointbook_cli.embedded_postgres import EmbeddedPostgres

async def main():
    await EmbeddedPostgres(pathlib.Path(sys.argv[1]), fsync=False).start()
    print("started", flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@asynccontextmanager
async def running_postgres(folder: Path) -> AsyncIterator[EmbeddedPostgres]:
    """Run a server on a folder while the context is open."""
    postgres = EmbeddedPostgres(folder, fsync=False)
    await postgres.start()
    try:
        yield postgres
    finally:
        await postgres.stop()


def mode(path: Path) -> int:
    """Return a file's permissions."""
    return stat.S_IMODE(path.lstat().st_mode)


def server_pid(folder: Path) -> int:
    """Return the pid of the folder's server."""
    return int((folder / "data" / "postmaster.pid").read_text().split()[0])


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Create one folder for tests that do not damage it, since initdb takes a second."""
    parent = tmp_path_factory.mktemp("embedded")
    parent.chmod(0o700)
    yield parent / "postgres"
    assert mode(parent) == 0o700


async def test_start_creates_the_database_and_stop_removes_the_socket(module_folder: Path) -> None:
    async with running_postgres(module_folder) as postgres:
        query = "SELECT concat_ws(' ', current_database(), current_user, getdatabaseencoding(), datlocprovider,"
        query += " datlocale) FROM pg_database WHERE datname = current_database()"
        assert await fetch_value(postgres.url(), query) == "pointbook pointbook UTF8 b C.UTF-8"
        assert await fetch_value(postgres.url(), "SHOW listen_addresses") == ""
        assert await fetch_value(postgres.url(), "SHOW timezone") == "UTC"
        socket_folder = Path(str(await fetch_value(postgres.url(), "SHOW unix_socket_directories")).strip('"'))
        assert mode(socket_folder) == 0o700
    assert not socket_folder.exists()


async def test_a_restart_preserves_committed_data(module_folder: Path) -> None:
    postgres = EmbeddedPostgres(module_folder, fsync=False)
    await postgres.start()
    await fetch_value(postgres.url(), "CREATE TABLE numbers AS SELECT 42 AS number")
    await postgres.stop()
    await postgres.stop()
    await postgres.start()
    await postgres.start()
    assert await fetch_value(postgres.url(), "SELECT number FROM numbers") == 42
    await postgres.stop()
    async with running_postgres(module_folder) as another:
        assert await fetch_value(another.url(), "SELECT number FROM numbers") == 42


@pytest.mark.parametrize("cancel", [False, True])
async def test_stop_waits_for_a_concurrent_start(module_folder: Path, *, cancel: bool) -> None:
    postgres = EmbeddedPostgres(module_folder, fsync=False)
    start = asyncio.create_task(postgres.start())
    await until(postgres._lifecycle_lock.locked)
    if cancel:
        start.cancel()
    await postgres.stop()
    assert start.done()
    assert start.cancelled() is cancel
    async with running_postgres(module_folder) as another:
        assert await fetch_value(another.url(), "SELECT 1") == 1


async def test_start_recreates_a_dropped_database(module_folder: Path) -> None:
    async with running_postgres(module_folder) as postgres:
        connection = await asyncpg.connect(postgres.url("postgres"))
        await connection.execute("DROP DATABASE pointbook WITH (FORCE)")
        await connection.close()
    async with running_postgres(module_folder) as postgres:
        assert await fetch_value(postgres.url(), "SELECT current_database()") == "pointbook"


async def test_the_folder_is_private_and_its_parents_are_unchanged(module_folder: Path) -> None:
    module_folder.mkdir(exist_ok=True)
    module_folder.chmod(0o755)
    parents = [(parent, mode(parent), parent.stat().st_uid) for parent in module_folder.parents]
    async with running_postgres(module_folder):
        assert {path.name: mode(path) for path in (module_folder, *module_folder.iterdir()) if path.is_dir()} == {
            module_folder.name: 0o700,
            "data": 0o700,
        }
    assert parents == [(parent, mode(parent), parent.stat().st_uid) for parent in module_folder.parents]


@pytest.mark.parametrize(("fsync", "expected"), [(True, "on"), (False, "off")])
async def test_commits_are_durable_unless_fsync_is_off(module_folder: Path, *, fsync: bool, expected: str) -> None:
    postgres = EmbeddedPostgres(module_folder, fsync=fsync)
    await postgres.start()
    try:
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            assert await fetch_value(postgres.url(), f"SHOW {setting}") == expected
    finally:
        await postgres.stop()


async def test_the_log_contains_no_statements_or_values(module_folder: Path) -> None:
    async with running_postgres(module_folder) as postgres:
        connection = await asyncpg.connect(postgres.url())
        await connection.execute("CREATE TEMPORARY TABLE private (phone text PRIMARY KEY)")
        for _ in range(2):
            try:
                await connection.execute("INSERT INTO private VALUES ($1)", "+886912345678")
            except asyncpg.UniqueViolationError:
                break
        with pytest.raises(asyncpg.InvalidTextRepresentationError):
            await connection.execute("SELECT '+886912345678x'::bigint")
        await connection.close()
    log = (module_folder / "server.log").read_text()
    assert "ready to accept connections" in log
    assert "8869" not in log


async def test_a_second_owner_is_refused(module_folder: Path) -> None:
    async with running_postgres(module_folder) as postgres:
        with pytest.raises(EmbeddedPostgresError) as refusal:
            await EmbeddedPostgres(module_folder, fsync=False).start()
        assert str(refusal.value) == (
            f"the database folder {module_folder} is in use by process {os.getpid()}: stop that one first"
        )
        assert await fetch_value(postgres.url(), "SELECT 1") == 1


async def test_wait_raises_if_the_server_was_not_started(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedPostgresError, match="was not started"):
        await EmbeddedPostgres(tmp_path).wait()


async def test_a_killed_server_can_be_started_again(module_folder: Path) -> None:
    postgres = EmbeddedPostgres(module_folder)
    await postgres.start()
    try:
        waiting = asyncio.create_task(postgres.wait())
        await fetch_value(postgres.url(), "CREATE TABLE before_the_crash AS SELECT 1 AS value")
        os.kill(server_pid(module_folder), signal.SIGKILL)
        assert await asyncio.wait_for(waiting, 5) == -signal.SIGKILL
        await postgres.start()
        assert await fetch_value(postgres.url(), "SELECT value FROM before_the_crash") == 1
    finally:
        await postgres.stop()


async def killed_owner(folder: Path) -> int:
    """Start a server in another process, kill that process, return the server's pid."""
    owner = await asyncio.create_subprocess_exec(sys.executable, "-c", OWNER, folder, stdout=asyncio.subprocess.PIPE)
    assert owner.stdout is not None
    assert await owner.stdout.readline() == b"started\n"
    pid = server_pid(folder)
    owner.kill()
    await owner.communicate()
    return pid


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="Only Linux has a parent-death signal.")
async def test_the_server_ends_with_its_killed_owner(module_folder: Path) -> None:
    pid = await killed_owner(module_folder)
    async with asyncio.timeout(5):
        while is_alive(pid):
            await asyncio.sleep(0.02)
    async with running_postgres(module_folder) as postgres:
        assert await fetch_value(postgres.url(), "SELECT 1") == 1


async def test_start_succeeds_right_after_the_owner_was_killed(module_folder: Path) -> None:
    await killed_owner(module_folder)
    async with running_postgres(module_folder) as postgres:
        assert await fetch_value(postgres.url(), "SELECT 1") == 1


async def test_start_stops_a_server_that_outlived_its_owner(module_folder: Path) -> None:
    lingering = EmbeddedPostgres(module_folder, fsync=False)
    await lingering.start()
    assert lingering._owner_lock is not None
    os.close(lingering._owner_lock)  # As the kernel does when the owner ends.
    lingering._owner_lock = None
    async with running_postgres(module_folder) as postgres:
        assert await asyncio.wait_for(lingering.wait(), 5) == 0
        assert await fetch_value(postgres.url(), "SELECT 1") == 1


async def test_a_stale_pid_file_with_another_processes_pid_is_removed(module_folder: Path) -> None:
    async with running_postgres(module_folder) as postgres:
        socket_folder = postgres._socket_folder
        pid_file = (module_folder / "data" / "postmaster.pid").read_text()
    stranger = await asyncio.create_subprocess_exec("sleep", "60")
    try:
        stale = pid_file.replace(pid_file.split()[0], str(stranger.pid), 1)
        (module_folder / "data" / "postmaster.pid").write_text(stale)
        (module_folder / "owner.lock").write_text(f"{stranger.pid}\n")
        socket_folder.mkdir(mode=0o700)
        (socket_folder / ".s.PGSQL.5432.lock").write_text(stale)
        with socket.socket(socket.AF_UNIX) as leftover:
            leftover.bind(str(socket_folder / ".s.PGSQL.5432"))
        async with running_postgres(module_folder) as postgres:
            assert await fetch_value(postgres.url(), "SELECT 1") == 1
        assert stranger.returncode is None
    finally:
        stranger.kill()
        await stranger.wait()


async def test_a_server_started_by_hand_is_not_stopped(module_folder: Path) -> None:
    async with running_postgres(module_folder):
        pid_file = (module_folder / "data" / "postmaster.pid").read_text()
    other = await asyncio.create_subprocess_exec(
        sys.executable, "-c", "import time; time.sleep(60)", module_folder / "data"
    )
    try:
        foreign = pid_file.replace(pid_file.split()[0], str(other.pid), 1)
        (module_folder / "data" / "postmaster.pid").write_text(foreign)
        with pytest.raises(EmbeddedPostgresError, match=f"another PostgreSQL, process {other.pid}, runs on"):
            await EmbeddedPostgres(module_folder, fsync=False).start()
        assert (module_folder / "data" / "postmaster.pid").read_text() == foreign
    finally:
        other.kill()
        await other.wait()


async def test_a_socket_folder_that_is_not_private_is_refused(module_folder: Path, tmp_path: Path) -> None:
    postgres = EmbeddedPostgres(module_folder, fsync=False)
    postgres._socket_folder.mkdir()
    postgres._socket_folder.chmod(0o755)
    with pytest.raises(EmbeddedPostgresError, match="is not ours"):
        await postgres.start()
    postgres._socket_folder.rmdir()
    postgres._socket_folder.symlink_to(tmp_path)
    with pytest.raises(EmbeddedPostgresError, match="is not ours"):
        await postgres.start()
    assert tmp_path.exists()
    postgres._socket_folder.unlink()
    async with running_postgres(module_folder):
        pass


async def test_a_cluster_of_another_major_version_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "postgres"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "PG_VERSION").write_text("16\n")
    with pytest.raises(EmbeddedPostgresError, match=r"created by PostgreSQL 16, this is PostgreSQL 18"):
        await EmbeddedPostgres(folder).start()


async def test_an_unusable_folder_is_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "postgres").write_text("")
    with pytest.raises(EmbeddedPostgresError, match=r"cannot use the database folder .*File exists"):
        await EmbeddedPostgres(tmp_path / "postgres").start()


async def test_a_corrupt_cluster_is_reported_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "postgres"
    (folder / "data").mkdir(parents=True, mode=0o700)
    (folder / "data").chmod(0o700)
    (folder / "data" / "PG_VERSION").write_text("18\n")
    for _ in range(2):
        with pytest.raises(EmbeddedPostgresError, match=r"^PostgreSQL does not start on .*: .*postgresql.conf.*\)$"):
            await EmbeddedPostgres(folder).start()


async def test_a_missing_package_is_reported_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(EmbeddedPostgresError, match=r"pip install 'pointbook\[embedded\]'"):
        await EmbeddedPostgres(tmp_path).start()


async def test_start_handles_an_unfinished_cluster_and_a_long_path(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 50) / "postgres"
    (folder / "data.new" / "base").mkdir(parents=True)
    (folder / "data.new" / "PG_VERSION").write_text("18\n")
    async with running_postgres(folder) as postgres:
        assert await fetch_value(postgres.url(), "SELECT 1") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["data", "owner.lock", "server.lock", "server.log"]


async def test_a_cancelled_start_releases_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "postgres"
    start = asyncio.create_task(EmbeddedPostgres(folder, fsync=False).start())
    async with asyncio.timeout(5):
        while not (folder / "data.new").exists():
            await asyncio.sleep(0.005)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert not (folder / "data").exists()
    async with running_postgres(folder) as postgres:
        assert await fetch_value(postgres.url(), "SELECT 1") == 1


def forbid(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a program fail as if the kernel or the container forbade it."""
    folder.mkdir(exist_ok=True)
    (folder / program).write_text(f"#!/bin/sh\necho '{program}: Operation not permitted' >&2\nexit 1\n")
    (folder / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.skipif(os.geteuid() != 0, reason="Only root needs another account.")
async def test_root_can_start_with_and_without_user_namespaces(
    module_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_postgres(module_folder) as postgres:
        await fetch_value(postgres.url(), "CREATE TABLE moved AS SELECT 7 AS value")
    with monkeypatch.context() as context:
        forbid("unshare", tmp_path / "programs", context)
        async with running_postgres(module_folder) as postgres:
            assert await fetch_value(postgres.url(), "SELECT value FROM moved") == 7
            assert Path(f"/proc/{server_pid(module_folder)}").stat().st_uid != 0
            assert module_folder.stat().st_uid != 0
        pid = await killed_owner(module_folder)
        async with asyncio.timeout(5):
            while is_alive(pid):
                await asyncio.sleep(0.02)
    async with running_postgres(module_folder) as postgres:
        assert await fetch_value(postgres.url(), "SELECT value FROM moved") == 7


@pytest.mark.skipif(os.geteuid() != 0, reason="Only root needs another account.")
async def test_root_without_namespaces_or_setuid_gets_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forbid("unshare", tmp_path / "programs", monkeypatch)
    forbid("setpriv", tmp_path / "programs", monkeypatch)
    with pytest.raises(EmbeddedPostgresError, match=r"setpriv: Operation not permitted.*: run Pointbook as a non-root"):
        await EmbeddedPostgres(tmp_path / "postgres").start()


@pytest.mark.skipif(os.geteuid() != 0, reason="Only root can change the owner of a folder.")
async def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "postgres"
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    with pytest.raises(EmbeddedPostgresError, match="belongs to user 12345: run Pointbook as that user"):
        await EmbeddedPostgres(folder).start()
    assert folder.stat().st_uid == 12345
