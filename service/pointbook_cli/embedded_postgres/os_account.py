"""The operating system's account that PostgreSQL runs under."""

import contextlib
import os
import pwd
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from pointbook_cli.embedded_postgres.binaries import run_program
from pointbook_cli.embedded_postgres.errors import EmbeddedPostgresError

_ADVICE = "run Pointbook as a non-root user that owns the folder, or set POINTBOOK_DATABASE_URL"


@dataclass(frozen=True, slots=True)
class OsAccount:
    """An account that can run the server.

    `prefix` starts its command lines; `uid` and `gid` own its files.
    """

    prefix: tuple[str, ...]
    uid: int
    gid: int


def own_uids() -> set[int]:
    """Return the owners of our files.

    For root, they include the unprivileged account that the server may have run as.
    """
    uid = os.geteuid()
    return {uid, _unprivileged_user().pw_uid} if uid == 0 else {uid}


async def choose_account(postgres: Path, folder: Path) -> tuple[OsAccount, str]:
    """Return the first account that can access the program and the folder.

    The second value is the program's major version.
    """
    failure = ""
    for account in _possible_accounts():
        try:
            version = await run_program(*account.prefix, str(postgres), "--version")
            await run_program(*account.prefix, shutil.which("ls") or "ls", "-d", str(folder))
        except EmbeddedPostgresError as error:
            failure = str(error)
        else:
            return account, re.findall(r"\(PostgreSQL\) (\d+)", version)[0]
    raise EmbeddedPostgresError(f"cannot run {postgres} on {folder} ({failure}): {_ADVICE}")


def _unprivileged_user() -> pwd.struct_passwd:
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise EmbeddedPostgresError(f"PostgreSQL refuses root, and there is no user postgres or nobody: {_ADVICE}")


def _possible_accounts() -> list[OsAccount]:
    """Return the accounts that may run PostgreSQL, best first.

    PostgreSQL refuses root. In a user namespace it runs under another uid without root's privileges, and root still
    owns every file, so that folders that only root may enter need no change. Containers often forbid namespaces. There,
    an unprivileged user owns the files and has one capability of root, to enter closed folders. With setpriv, the
    kernel shuts the server down cleanly (SIGINT) when we die; it must run last, because a change of credentials resets
    that.
    """
    uid, gid = os.geteuid(), os.getegid()
    setpriv, unshare = shutil.which("setpriv"), shutil.which("unshare")
    if uid != 0:
        plain = OsAccount((), uid, gid)
        return [OsAccount((setpriv, "--pdeathsig=INT", "--"), uid, gid), plain] if setpriv else [plain]
    if setpriv is None:
        raise EmbeddedPostgresError(f"PostgreSQL refuses root, and the program setpriv is missing: {_ADVICE}")
    user = _unprivileged_user()
    ids = (f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups")
    # The secure bit makes access(2), which PostgreSQL uses to find its own programs, respect the capability.
    capability = ("--securebits=+no_setuid_fixup", "--inh-caps=+dac_override", "--ambient-caps=+dac_override")
    switched = OsAccount((setpriv, *ids, *capability, "--pdeathsig=INT", "--"), user.pw_uid, user.pw_gid)
    if unshare is None:
        return [switched]
    mapping = ("--user", f"--map-user={user.pw_uid}", f"--map-group={user.pw_gid}", "--")
    return [OsAccount((unshare, *mapping, setpriv, "--pdeathsig=INT", "--"), uid, gid), switched]
