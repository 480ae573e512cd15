"""The folder of the embedded database: owner, cluster, log and socket."""

import hashlib
import os
import shutil
import stat
import tempfile
from pathlib import Path

from pointbook_cli.embedded_postgres.binaries import run_program
from pointbook_cli.embedded_postgres.errors import EmbeddedPostgresError
from pointbook_cli.embedded_postgres.os_account import OsAccount, own_uids

SUPERUSER = "pointbook"
PORT = 5432
"""Part of the socket's name; the server does not listen on TCP."""
_PRIVATE = 0o700
_SOCKET_PATH_BYTES_MAX = 103
"""The limit of macOS; that of Linux is 107."""

_INITDB_OPTIONS = (
    f"--username={SUPERUSER}",
    "--auth=trust",  # Only the owner may enter the socket's folder.
    "--encoding=UTF8",
    "--locale=C",
    "--locale-provider=builtin",
    "--builtin-locale=C.UTF-8",
    "--no-instructions",
)


def create_folder(folder: Path) -> None:
    """Create the folder, or check that it is ours; make it private."""
    folder.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
    owner = folder.stat().st_uid
    if owner not in own_uids():
        raise EmbeddedPostgresError(f"the database folder {folder} belongs to user {owner}: run Pointbook as that user")
    folder.chmod(_PRIVATE)


def change_owner(folder: Path, account: OsAccount) -> None:
    """Make the account the owner of the folder and its files."""
    if folder.stat().st_uid == account.uid:
        return
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            os.chown(Path(parent, name), account.uid, account.gid, follow_symlinks=False)
    os.chown(folder, account.uid, account.gid)  # Last, so that an interrupted change is repeated.


async def create_cluster(folder: Path, major: str, initdb: tuple[str, ...], server_lock: int) -> None:
    """Create the cluster unless it exists.

    initdb writes to another folder, so that `data` is always complete.
    """
    data, unfinished = folder / "data", folder / "data.new"
    if data.exists():
        created_by = (data / "PG_VERSION").read_text().strip()
        if created_by != major:
            raise EmbeddedPostgresError(
                f"the database folder {folder} was created by PostgreSQL {created_by}, this is PostgreSQL {major}: "
                "move the data with pg_dump, or choose another folder"
            )
        return
    if unfinished.exists():
        shutil.rmtree(unfinished)
    try:
        await run_program(*initdb, f"--pgdata={unfinished}", *_INITDB_OPTIONS, inherit=(server_lock,))
    except EmbeddedPostgresError as error:
        raise EmbeddedPostgresError(f"cannot create a database in {folder}: {error}") from error
    unfinished.rename(data)
    _sync_folder(folder)


def remove_cluster(folder: Path) -> None:
    """Remove the cluster, and what an interrupted initdb or removal has left."""
    data, unfinished = folder / "data", folder / "data.new"
    if unfinished.exists():
        shutil.rmtree(unfinished)
    if data.exists():
        data.rename(unfinished)  # So that an interrupted removal leaves no incomplete cluster.
        shutil.rmtree(unfinished)


def open_log(folder: Path) -> int:
    """Return the file descriptor of a new log.

    The previous log is preserved, since it may explain a crash.
    """
    log = folder / "server.log"
    if log.exists():
        log.replace(folder / "server.log.1")
    return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def socket_folder(folder: Path) -> Path:
    """Return the socket's folder for a database folder.

    It is always the same, and short enough for a socket's path.
    """
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    name = f"pointbook-{os.geteuid()}-{digest}"
    path = Path(tempfile.gettempdir(), name)
    if len(os.fsencode(path / f".s.PGSQL.{PORT}")) <= _SOCKET_PATH_BYTES_MAX:
        return path
    return Path("/tmp", name)  # noqa: S108 - create_socket_folder checks an existing folder


def create_socket_folder(path: Path, account: OsAccount) -> None:
    """Create the socket's folder.

    An existing one is replaced only if a killed server of ours left it.
    """
    try:
        existing = path.lstat()
    except FileNotFoundError:
        pass
    else:
        is_private_folder = stat.S_ISDIR(existing.st_mode) and stat.S_IMODE(existing.st_mode) == _PRIVATE
        if not is_private_folder or existing.st_uid not in own_uids():
            raise EmbeddedPostgresError(f"{path} is not ours, but is needed for the database's socket: remove it")
        shutil.rmtree(path)
    path.mkdir(mode=_PRIVATE)
    if account.uid != os.geteuid():
        os.chown(path, account.uid, account.gid)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
