"""The folder of the embedded database: whose it is, who runs on it, and the cluster inside."""

import asyncio
import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import stat
import tempfile
from pathlib import Path

from pointbook_cli.embedded_postgres.programs import Account, EmbeddedPostgresError, own_uids, run

SUPERUSER = "pointbook"
PORT = 5432  # Nothing listens on TCP; the number only names the socket's file.
_PRIVATE = 0o700  # Its owner may enter a folder, and nobody else.
_SOCKET_PATH_MAX_BYTES = 103  # What macOS takes; Linux takes four more.
FAST_SHUTDOWN_MAX_SECONDS = 20
IMMEDIATE_SHUTDOWN_MAX_SECONDS = 5

_INITDB_OPTIONS = (
    f"--username={SUPERUSER}",
    "--auth=trust",  # Whoever reaches the socket has passed a folder that only its owner may enter.
    "--encoding=UTF8",
    "--locale=C",
    "--locale-provider=builtin",
    "--builtin-locale=C.UTF-8",
    "--no-instructions",
)


def make_folder(folder: Path) -> None:
    """Make the folder, or make sure that it is ours, and private."""
    folder.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
    owner = folder.stat().st_uid
    if owner not in own_uids():
        raise EmbeddedPostgresError(f"the database folder {folder} belongs to user {owner}: run Pointbook as that user")
    folder.chmod(_PRIVATE)


def give_folder(folder: Path, account: Account) -> None:
    """Make the account the owner of all files, whichever account made them."""
    if folder.stat().st_uid == account.uid:
        return
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            os.chown(Path(parent, name), account.uid, account.gid, follow_symlinks=False)
    os.chown(folder, account.uid, account.gid)  # Last, so that an interrupted round is done again.


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def _lock(descriptor: int) -> bool:
    """Take the lock unless somebody holds it; the kernel frees it when its last holder is gone, however it died."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def take_owner_lock(folder: Path) -> int:
    """Return the descriptor that makes this process the folder's owner until it is closed."""
    descriptor = _open_lock(folder / "owner.lock")
    if not _lock(descriptor):
        owner = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise EmbeddedPostgresError(f"the database folder {folder} is in use by process {owner}: stop that one first")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


async def take_server_lock(folder: Path) -> int:
    """Return the descriptor that the server is to inherit, once no process of an earlier server is left."""
    descriptor = _open_lock(folder / "server.lock")
    taken = False
    try:
        taken = await _outlive_earlier_server(descriptor, folder)
    finally:
        if not taken:
            os.close(descriptor)
    if not taken:
        raise EmbeddedPostgresError(f"an earlier PostgreSQL of {folder} does not stop: end its processes first")
    return descriptor


async def _outlive_earlier_server(server_lock: int, folder: Path) -> bool:
    """Take the server's lock, ending a server whose owner is gone: cleanly, or else at once.

    Where the kernel has told the server of its owner's death, it is ending already.
    """
    for order, seconds in (
        (signal.SIGINT, FAST_SHUTDOWN_MAX_SECONDS),
        (signal.SIGQUIT, IMMEDIATE_SHUTDOWN_MAX_SECONDS),
    ):
        if _lock(server_lock):
            return True
        pid = _living_server(folder)
        if pid is not None:  # An initdb, or the last child of a killed server, ends by itself.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, order)
        if await _locked_within(server_lock, seconds):
            return True
    return False


async def _locked_within(descriptor: int, seconds: float) -> bool:
    deadline = asyncio.get_running_loop().time() + seconds
    while not _lock(descriptor):
        if asyncio.get_running_loop().time() >= deadline:
            return False
        await asyncio.sleep(0.02)
    return True


def pid_file(folder: Path) -> Path:
    """Return where the server says who it is, and whether it accepts connections."""
    return folder / "data" / "postmaster.pid"


def _living_server(folder: Path) -> int | None:
    """Return the pid of the server that runs on the folder's data, whoever started it.

    A server names its data on its command line, which tells it from a stranger who has a dead server's pid. Without
    /proc (macOS) any living process passes for the server, as it does with PostgreSQL itself.
    """
    try:
        pid = int(pid_file(folder).read_text().split()[0])
        if Path("/proc/self").exists():
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            return pid if os.fsencode(folder / "data") in words else None
        os.kill(pid, 0)
    except (OSError, ValueError, IndexError):
        return None
    return pid


def clear_stale_pid(folder: Path) -> None:
    """Remove what a killed server left: its pid may be a stranger's by now, for whose sake PostgreSQL would not start.

    The server's lock has proved that none of our servers lives, but somebody may have started one by hand.
    """
    pid = _living_server(folder)
    if pid is not None:
        raise EmbeddedPostgresError(
            f"another PostgreSQL, process {pid}, runs on {folder / 'data'}: stop that one first"
        )
    pid_file(folder).unlink(missing_ok=True)


async def make_cluster(folder: Path, major: str, initdb: tuple[str, ...], server_lock: int) -> None:
    """Run initdb beside the cluster's place, so that only a whole, synced cluster ever stands there."""
    data, unfinished = folder / "data", folder / "data.new"
    if data.exists():
        made_by = (data / "PG_VERSION").read_text().strip()
        if made_by != major:
            raise EmbeddedPostgresError(
                f"the database folder {folder} was made by PostgreSQL {made_by}, this is PostgreSQL {major}: "
                "move the data with pg_dump, or choose another folder"
            )
        return
    if unfinished.exists():
        shutil.rmtree(unfinished)
    try:
        await run(*initdb, f"--pgdata={unfinished}", *_INITDB_OPTIONS, inherit=(server_lock,))
    except EmbeddedPostgresError as error:
        raise EmbeddedPostgresError(f"cannot make a database in {folder}: {error}") from error
    unfinished.rename(data)
    _sync_folder(folder)


def remove_cluster(folder: Path) -> None:
    """Remove the cluster, or what an interrupted initdb or removal has left of one."""
    data, unfinished = folder / "data", folder / "data.new"
    if unfinished.exists():
        shutil.rmtree(unfinished)
    if data.exists():
        data.rename(unfinished)  # A removal that is interrupted leaves nothing that could pass for a cluster.
        shutil.rmtree(unfinished)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_log(folder: Path) -> int:
    """Return the descriptor of a fresh log; the log before it is kept, because it may tell of a crash."""
    log = folder / "server.log"
    if log.exists():
        log.replace(folder / "server.log.1")
    return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def socket_folder(folder: Path) -> Path:
    """Return the socket folder of a database folder: always the same one, and always short enough for a socket."""
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    name = f"pointbook-{os.geteuid()}-{digest}"
    place = Path(tempfile.gettempdir(), name)
    if len(os.fsencode(place / f".s.PGSQL.{PORT}")) <= _SOCKET_PATH_MAX_BYTES:
        return place
    return Path("/tmp", name)  # noqa: S108 - make_socket_folder trusts nothing that it finds there.


def make_socket_folder(path: Path, account: Account) -> None:
    """Make the socket folder afresh; what stands in its place must be what a killed server of ours left."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        pass
    else:
        if not stat.S_ISDIR(found.st_mode) or stat.S_IMODE(found.st_mode) != _PRIVATE or found.st_uid not in own_uids():
            raise EmbeddedPostgresError(
                f"{path} stands where the database's socket belongs, and is not ours: remove it"
            )
        shutil.rmtree(path)
    path.mkdir(mode=_PRIVATE)
    if account.uid != os.geteuid():
        os.chown(path, account.uid, account.gid)
