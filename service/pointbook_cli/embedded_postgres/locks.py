"""The locks of a database folder, and the server process that runs on it."""

import asyncio
import contextlib
import fcntl
import os
import signal
from pathlib import Path

from pointbook_cli.embedded_postgres.errors import EmbeddedPostgresError

FAST_SHUTDOWN_SECONDS_MAX = 20
IMMEDIATE_SHUTDOWN_SECONDS_MAX = 5
_POLL_SECONDS = 0.02


def acquire_owner_lock(folder: Path) -> int:
    """Return a descriptor that makes this process the folder's owner until closed."""
    descriptor = _open_lock(folder / "owner.lock")
    if not _try_lock(descriptor):
        owner = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise EmbeddedPostgresError(f"the database folder {folder} is in use by process {owner}: stop that one first")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


async def acquire_server_lock(folder: Path) -> int:
    """Return the descriptor that the server inherits.

    Wait until all processes of earlier servers have ended, and stop them if necessary.
    """
    descriptor = _open_lock(folder / "server.lock")
    is_locked = False
    try:
        is_locked = await _lock_after_earlier_server(descriptor, folder)
    finally:
        if not is_locked:
            os.close(descriptor)
    if not is_locked:
        raise EmbeddedPostgresError(f"an earlier PostgreSQL of {folder} does not stop: end its processes first")
    return descriptor


def pid_file(folder: Path) -> Path:
    """Return the path of the server's pid file, which also has its state."""
    return folder / "data" / "postmaster.pid"


def remove_stale_pid_file(folder: Path) -> None:
    """Remove the pid file of a killed server.

    Another process may have its pid, and PostgreSQL would not start. The server lock proves that none of our servers
    runs, but one may have been started by hand.
    """
    pid = _running_server(folder)
    if pid is not None:
        raise EmbeddedPostgresError(
            f"another PostgreSQL, process {pid}, runs on {folder / 'data'}: stop that one first"
        )
    pid_file(folder).unlink(missing_ok=True)


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)


def _try_lock(descriptor: int) -> bool:
    """Lock a file, unless another process has.

    The kernel unlocks it when its last holder ends.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


async def _lock_after_earlier_server(server_lock: int, folder: Path) -> bool:
    """Acquire the server's lock; stop a server whose owner has ended.

    The server is stopped cleanly, or else immediately. On Linux the kernel has sent it SIGINT already.
    """
    for stop_signal, seconds in (
        (signal.SIGINT, FAST_SHUTDOWN_SECONDS_MAX),
        (signal.SIGQUIT, IMMEDIATE_SHUTDOWN_SECONDS_MAX),
    ):
        if _try_lock(server_lock):
            return True
        pid = _running_server(folder)
        if pid is not None:  # An initdb, or the last child of a killed server, ends by itself.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, stop_signal)
        if await _lock_within(server_lock, seconds):
            return True
    return False


async def _lock_within(descriptor: int, seconds: float) -> bool:
    deadline = asyncio.get_running_loop().time() + seconds
    while not _try_lock(descriptor):
        if asyncio.get_running_loop().time() >= deadline:
            return False
        await asyncio.sleep(_POLL_SECONDS)
    return True


def _running_server(folder: Path) -> int | None:
    """Return the pid of the server that runs on the folder's data.

    A server's command line contains the folder, which distinguishes it from another process that got a dead server's
    pid. Without /proc (macOS), any process with the pid counts as the server, as for PostgreSQL itself.
    """
    try:
        pid = int(pid_file(folder).read_text().split()[0])
        if Path("/proc/self").exists():
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            return pid if os.fsencode(folder / "data") in arguments else None
        os.kill(pid, 0)
    except (OSError, ValueError, IndexError):
        return None
    return pid
