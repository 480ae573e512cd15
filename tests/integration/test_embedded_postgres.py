"""The embedded PostgreSQL, on the real binaries: its folders, its owners, its deaths."""
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
async def running(folder: Path) -> AsyncIterator[EmbeddedPostgres]:
    """Run a server on the folder for the length of a block."""
    postgres = EmbeddedPostgres(folder, fsync=False)
    await postgres.start()
    try:
        yield postgres
    finally:
        await postgres.stop()


async def fetch_value(postgres: EmbeddedPostgres, query: str) -> object:
    """Run one statement over the address that callers get."""
    connection = await asyncpg.connect(postgres.url())
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


def mode(path: Path) -> int:
    """Return a file's permissions."""
    return stat.S_IMODE(path.lstat().st_mode)


def server_pid(folder: Path) -> int:
    """Return the pid of the folder's server."""
    return int((folder / "data" / "postmaster.pid").read_text().split()[0])


def is_alive(pid: int) -> bool:
    """Say whether a process runs; a zombie that nobody has buried does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Give one cluster's folder to all tests that leave it whole, since each initdb takes a second."""
    parent = tmp_path_factory.mktemp("embedded")
    parent.chmod(0o700)
    yield parent / "postgres"
    assert mode(parent) == 0o700


async def test_start_makes_the_database(module_folder: Path) -> None:
    """The first start makes a UTF-8 database that sorts the same on every machine, and a stop frees the socket."""
    async with running(module_folder) as postgres:
        query = "SELECT concat_ws(' ', current_database(), current_user, getdatabaseencoding(), datlocprovider,"
        query += " datlocale) FROM pg_database WHERE datname = current_database()"
        assert await fetch_value(postgres, query) == "pointbook pointbook UTF8 b C.UTF-8"
        assert await fetch_value(postgres, "SHOW listen_addresses") == ""
        assert await fetch_value(postgres, "SHOW timezone") == "UTC"
        socket_folder = Path(str(await fetch_value(postgres, "SHOW unix_socket_directories")).strip('"'))
        assert mode(socket_folder) == 0o700
    assert not socket_folder.exists()


async def test_restart_keeps_the_data(module_folder: Path) -> None:
    """What was committed is there after a stop and a start, also of the same object."""
    postgres = EmbeddedPostgres(module_folder, fsync=False)
    await postgres.start()
    await fetch_value(postgres, "CREATE TABLE kept AS SELECT 42 AS answer")
    await postgres.stop()
    await postgres.stop()
    await postgres.start()
    await postgres.start()
    assert await fetch_value(postgres, "SELECT answer FROM kept") == 42
    await postgres.stop()
    async with running(module_folder) as another:
        assert await fetch_value(another, "SELECT answer FROM kept") == 42


@pytest.mark.parametrize("cancel", [False, True])
async def test_stop_during_a_start(module_folder: Path, *, cancel: bool) -> None:
    """A stop from another task, as at the end of `pointbook dev`, waits for the start and leaves the folder free."""
    postgres = EmbeddedPostgres(module_folder, fsync=False)
    start = asyncio.create_task(postgres.start())
    await until(postgres._turn.locked)
    if cancel:
        start.cancel()
    await postgres.stop()
    assert start.done()
    assert start.cancelled() is cancel
    async with running(module_folder) as another:
        assert await fetch_value(another, "SELECT 1") == 1


async def test_dropped_database_is_made_again(module_folder: Path) -> None:
    """An operator may drop the database to begin afresh."""
    async with running(module_folder) as postgres:
        connection = await asyncpg.connect(postgres.url("postgres"))
        await connection.execute("DROP DATABASE pointbook WITH (FORCE)")
        await connection.close()
    async with running(module_folder) as postgres:
        assert await fetch_value(postgres, "SELECT current_database()") == "pointbook"


async def test_folder_is_private_and_parents_untouched(module_folder: Path) -> None:
    """Only the owner may enter the folder; also root's server runs below a folder that only root may enter."""
    module_folder.mkdir(exist_ok=True)
    module_folder.chmod(0o755)
    parents = [(parent, mode(parent), parent.stat().st_uid) for parent in module_folder.parents]
    async with running(module_folder):
        assert {path.name: mode(path) for path in (module_folder, *module_folder.iterdir()) if path.is_dir()} == {
            module_folder.name: 0o700,
            "data": 0o700,
        }
    assert parents == [(parent, mode(parent), parent.stat().st_uid) for parent in module_folder.parents]


@pytest.mark.parametrize(("fsync", "expected"), [(True, "on"), (False, "off")])
async def test_durability(module_folder: Path, *, fsync: bool, expected: str) -> None:
    """A commit is on the disk when it is acknowledged, unless a test asked otherwise."""
    postgres = EmbeddedPostgres(module_folder, fsync=fsync)
    await postgres.start()
    try:
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            assert await fetch_value(postgres, f"SHOW {setting}") == expected
    finally:
        await postgres.stop()


async def test_log_holds_no_data(module_folder: Path) -> None:
    """A failing statement leaves neither itself nor its values in the log."""
    async with running(module_folder) as postgres:
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


async def test_second_start_is_refused(module_folder: Path) -> None:
    """The second owner learns in one line which folder is taken and by whom, and the first is not disturbed."""
    async with running(module_folder) as postgres:
        with pytest.raises(EmbeddedPostgresError) as refusal:
            await EmbeddedPostgres(module_folder, fsync=False).start()
        assert str(refusal.value) == (
            f"the database folder {module_folder} is in use by process {os.getpid()}: stop that one first"
        )
        assert await fetch_value(postgres, "SELECT 1") == 1


async def test_waiting_for_a_server_never_started(tmp_path: Path) -> None:
    """Nothing to wait for is an error, not an endless wait."""
    with pytest.raises(EmbeddedPostgresError, match="was not started"):
        await EmbeddedPostgres(tmp_path).wait()


async def test_killed_server_is_noticed_and_started_again(module_folder: Path) -> None:
    """The one who waits learns of the server's death, and the same object starts it again, with all its commits."""
    postgres = EmbeddedPostgres(module_folder)
    await postgres.start()
    try:
        waiting = asyncio.create_task(postgres.wait())
        await fetch_value(postgres, "CREATE TABLE before_the_crash AS SELECT 1 AS value")
        os.kill(server_pid(module_folder), signal.SIGKILL)
        assert await asyncio.wait_for(waiting, 5) == -signal.SIGKILL
        await postgres.start()
        assert await fetch_value(postgres, "SELECT value FROM before_the_crash") == 1
    finally:
        await postgres.stop()


async def killed_owner(folder: Path) -> int:
    """Start a server in another process, kill that process hard, and return the server's pid."""
    owner = await asyncio.create_subprocess_exec(sys.executable, "-c", OWNER, folder, stdout=asyncio.subprocess.PIPE)
    assert owner.stdout is not None
    assert await owner.stdout.readline() == b"started\n"
    pid = server_pid(folder)
    owner.kill()
    await owner.communicate()
    return pid


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="Only Linux tells a process of its parent's death.")
async def test_server_follows_its_killed_owner(module_folder: Path) -> None:
    """No server lingers when its owner had no chance to stop it."""
    pid = await killed_owner(module_folder)
    async with asyncio.timeout(5):
        while is_alive(pid):
            await asyncio.sleep(0.02)
    async with running(module_folder) as postgres:
        assert await fetch_value(postgres, "SELECT 1") == 1


async def test_start_at_once_after_the_owner_was_killed(module_folder: Path) -> None:
    """The next start does not stumble over the last one's locks, pid file, socket or dying server."""
    await killed_owner(module_folder)
    async with running(module_folder) as postgres:
        assert await fetch_value(postgres, "SELECT 1") == 1


async def test_start_ends_a_server_that_outlived_its_owner(module_folder: Path) -> None:
    """Where the kernel does not tell the server of its owner's death, the next start ends it."""
    lingering = EmbeddedPostgres(module_folder, fsync=False)
    await lingering.start()
    assert lingering._owner_lock is not None
    os.close(lingering._owner_lock)  # As the kernel does when an owner dies.
    lingering._owner_lock = None
    async with running(module_folder) as postgres:
        assert await asyncio.wait_for(lingering.wait(), 5) == 0
        assert await fetch_value(postgres, "SELECT 1") == 1


async def test_stale_files_with_the_pid_of_somebody_else(module_folder: Path) -> None:
    """Leftovers whose pid now belongs to a living stranger block nothing, and the stranger is left alone."""
    async with running(module_folder) as postgres:
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
        async with running(module_folder) as postgres:
            assert await fetch_value(postgres, "SELECT 1") == 1
        assert stranger.returncode is None
    finally:
        stranger.kill()
        await stranger.wait()


async def test_server_started_by_hand_is_left_alone(module_folder: Path) -> None:
    """A PostgreSQL that holds no lock of ours keeps its data and its pid file."""
    async with running(module_folder):
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


async def test_squatted_socket_folder_is_refused(module_folder: Path, tmp_path: Path) -> None:
    """A socket folder that others can enter, or a link to another place, is not used and not removed."""
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
    async with running(module_folder):
        pass


async def test_other_major_version_is_refused(tmp_path: Path) -> None:
    """PostgreSQL's files change between major versions; the line names both."""
    folder = tmp_path / "postgres"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "PG_VERSION").write_text("16\n")
    with pytest.raises(EmbeddedPostgresError, match=r"made by PostgreSQL 16, this is PostgreSQL 18"):
        await EmbeddedPostgres(folder).start()


async def test_unusable_folder_is_one_clear_line(tmp_path: Path) -> None:
    """A file where the folder should be is the operator's mistake, and is told as one."""
    (tmp_path / "postgres").write_text("")
    with pytest.raises(EmbeddedPostgresError, match=r"cannot use the database folder .*File exists"):
        await EmbeddedPostgres(tmp_path / "postgres").start()


async def test_broken_cluster_is_one_clear_line(tmp_path: Path) -> None:
    """A server that refuses its data says why, and nothing is left running or locked."""
    folder = tmp_path / "postgres"
    (folder / "data").mkdir(parents=True, mode=0o700)
    (folder / "data").chmod(0o700)
    (folder / "data" / "PG_VERSION").write_text("18\n")
    for _ in range(2):
        with pytest.raises(EmbeddedPostgresError, match=r"^PostgreSQL does not start on .*: .*postgresql.conf.*\)$"):
            await EmbeddedPostgres(folder).start()


async def test_missing_package_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The binaries are an extra of the installation; the line says which one."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(EmbeddedPostgresError, match=r"pip install 'pointbook\[embedded\]'"):
        await EmbeddedPostgres(tmp_path).start()


async def test_half_made_cluster_and_long_path(tmp_path: Path) -> None:
    """A killed initdb's leftovers do not block the next start, nor does a path too long for any socket."""
    folder = tmp_path / ("long" * 50) / "postgres"
    (folder / "data.new" / "base").mkdir(parents=True)
    (folder / "data.new" / "PG_VERSION").write_text("18\n")
    async with running(folder) as postgres:
        assert await fetch_value(postgres, "SELECT 1") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["data", "owner.lock", "server.lock", "server.log"]


async def test_cancelled_start_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C in the middle of initdb frees the folder, and the next start makes the cluster."""
    folder = tmp_path / "postgres"
    start = asyncio.create_task(EmbeddedPostgres(folder, fsync=False).start())
    async with asyncio.timeout(5):
        while not (folder / "data.new").exists():
            await asyncio.sleep(0.005)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert not (folder / "data").exists()
    async with running(folder) as postgres:
        assert await fetch_value(postgres, "SELECT 1") == 1


def forbid(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a program fail as it does where the kernel, or the container, does not let it work."""
    folder.mkdir(exist_ok=True)
    (folder / program).write_text(f"#!/bin/sh\necho '{program}: Operation not permitted' >&2\nexit 1\n")
    (folder / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.skipif(os.geteuid() != 0, reason="Only root needs another account.")
async def test_root_with_and_without_namespaces(
    module_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder made with a user namespace works where there are none, below a closed folder, and back again."""
    async with running(module_folder) as postgres:
        await fetch_value(postgres, "CREATE TABLE moved AS SELECT 7 AS value")
    with monkeypatch.context() as context:
        forbid("unshare", tmp_path / "programs", context)
        async with running(module_folder) as postgres:
            assert await fetch_value(postgres, "SELECT value FROM moved") == 7
            assert Path(f"/proc/{server_pid(module_folder)}").stat().st_uid != 0
            assert module_folder.stat().st_uid != 0
        pid = await killed_owner(module_folder)
        async with asyncio.timeout(5):
            while is_alive(pid):
                await asyncio.sleep(0.02)
    async with running(module_folder) as postgres:
        assert await fetch_value(postgres, "SELECT value FROM moved") == 7


@pytest.mark.skipif(os.geteuid() != 0, reason="Only root needs another account.")
async def test_root_without_any_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where root can neither make a namespace nor change its user, the line says what to do instead."""
    forbid("unshare", tmp_path / "programs", monkeypatch)
    forbid("setpriv", tmp_path / "programs", monkeypatch)
    with pytest.raises(EmbeddedPostgresError, match=r"setpriv: Operation not permitted.*: run Pointbook as a non-root"):
        await EmbeddedPostgres(tmp_path / "postgres").start()


@pytest.mark.skipif(os.geteuid() != 0, reason="Only root can give a folder to somebody else.")
async def test_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    """Root takes nobody's database away from them."""
    folder = tmp_path / "postgres"
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    with pytest.raises(EmbeddedPostgresError, match="belongs to user 12345: run Pointbook as that user"):
        await EmbeddedPostgres(folder).start()
    assert folder.stat().st_uid == 12345
