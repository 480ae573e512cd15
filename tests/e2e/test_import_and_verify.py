"""`pointbook import` and `pointbook verify` on a server that may be killed."""

import asyncio
import contextlib
import re
import signal
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest

from pointbook_client.testing.ports import free_port
from support.clients import Client
from support.probes import grpc_health, handles_sigterm
from support.processes import (
    HAS_PROC,
    POINTBOOK,
    START_SECONDS_MAX,
    Finished,
    Running,
    clean_environment,
    finish,
    one_line,
    pointbook,
    running,
)
from support.shops import Shop
from support.unique_names import unique
from support.waiting import until, until_locks_are_awaited

LINES = 10_000
BUYERS = 100
START_MS = int(time.time() * 1_000) - 10**9
HEADER = "event_id,buyer_id,update_type,updated_scene,updated_value,points_balance,updated_at\n"
PROGRESS = re.compile(r"^\d+%, .*\n", re.MULTILINE)


@dataclass
class Site:
    """A server's settings, and a merchant with a store."""

    folder: Path
    database_url: str
    token: str
    shop: Shop
    address: str

    @contextlib.asynccontextmanager
    async def server(self) -> AsyncIterator[Running]:
        """Run the server; it serves while the context is open."""

        async def serves() -> bool:
            return await grpc_health(self.address) == "SERVING"

        settings = {"DATABASE_URL": self.database_url, "GRPC_ADDRESS": self.address}
        async with running("serve", folder=self.folder, settings=settings) as process:
            await process.until(serves)
            yield process

    @property
    def options(self) -> tuple[str, ...]:
        """Return the options of an import into the shop."""
        return ("--merchant", self.shop.merchant_id, "--store", self.shop.store_id)

    @property
    def settings(self) -> dict[str, str]:
        """Return the settings of a command, with server and database."""
        return {"GRPC_ADDRESS": self.address, "TOKEN": self.token, "DATABASE_URL": self.database_url}

    async def put_store(self) -> None:
        """Register the store."""
        client = Client(int(self.address.rpartition(":")[2]), self.token)
        await client.put_store(self.shop.merchant_id, self.shop.store_id)
        await client.close()

    async def run(self, *arguments: str | Path) -> Finished:
        """Run a command to its end."""
        return await pointbook(*arguments, **self.settings)

    async def count(self) -> int:
        """Count the entries of the shop."""
        connection = await asyncpg.connect(self.database_url)
        count: int = await connection.fetchval(
            "SELECT count(*) FROM points_entries WHERE merchant_id = $1", self.shop.merchant_id
        )
        await connection.close()
        return count


@pytest.fixture
async def site(database_url: str, admin_token: str, tmp_path: Path) -> Site:
    """A site for one test."""
    return Site(
        tmp_path,
        database_url,
        admin_token,
        Shop(unique("merchant"), unique("store")),
        f"127.0.0.1:{free_port()}",
    )


def rows(count: int) -> str:
    """Return a consistent history of accounts: each event adds one point."""
    return "".join(
        f"{unique('event')},buyer-{n % BUYERS},INCREASE,SUCCESSFUL_ORDERS,1,{n // BUYERS + 1},{START_MS + n}\n"
        for n in range(count)
    )


def write(site: Site, text: str, name: str = "events.csv") -> Path:
    """Write a file."""
    path = site.folder / name
    path.write_text(text)
    return path


async def test_an_import_survives_a_killed_server(site: Site) -> None:
    file = write(site, HEADER + rows(LINES))
    async with contextlib.AsyncExitStack() as stack:
        async with site.server() as first:
            await site.put_store()
            importing = await stack.enter_async_context(
                running("import", file, *site.options, folder=site.folder, settings=site.settings)
            )

            async def is_under_way() -> bool:
                return await site.count() >= LINES // 10

            await importing.until(is_under_way)
            await first.kill()
        await importing.printed("UNAVAILABLE: retrying")
        async with site.server():
            assert await importing.wait(60.0) == 0, importing.err
            again = await site.run("import", file, *site.options)

    assert f"{LINES:,} lines" in importing.out
    assert ", 0 refused" in importing.out
    assert f"0 applied, 0 late, {LINES:,} duplicate, 0 refused" in again.out
    assert await site.count() == LINES
    verified = await site.run("verify", "--merchant", site.shop.merchant_id)
    assert verified == Finished(0, f"{BUYERS} accounts, {LINES:,} entries: 0 differences.\n", "")


async def test_verify_prints_differences_up_to_the_limit(site: Site) -> None:
    async with site.server():
        await site.put_store()
        assert (await site.run("import", write(site, HEADER + rows(BUYERS)), *site.options)).exit_code == 0
    connection = await asyncpg.connect(site.database_url)
    await connection.execute("UPDATE points_accounts SET drift = 7 WHERE merchant_id = $1", site.shop.merchant_id)
    await connection.close()

    few = await site.run("verify", "--merchant", site.shop.merchant_id, "--limit", "3")
    one = await site.run("verify", "--merchant", site.shop.merchant_id, "--buyer", "buyer-7")

    assert few.exit_code == 1
    assert few.out.count(": drift: stored 7, folded 0\n") == 3
    assert f"and {BUYERS - 3} more differences" in few.out
    assert one.out.splitlines()[0] == (
        f"merchant {site.shop.merchant_id}, store {site.shop.store_id}, buyer buyer-7: drift: stored 7, folded 0"
    )
    assert one.out.splitlines()[1] == "1 account, 1 entry: 1 difference."


async def test_a_verification_can_be_interrupted(site: Site) -> None:
    connection = await asyncpg.connect(site.database_url)
    async with connection.transaction():
        await connection.execute("LOCK TABLE points_entries IN ACCESS EXCLUSIVE MODE")
        async with running("verify", folder=site.folder, settings=site.settings) as process:
            await until_locks_are_awaited(site.database_url)
            exit_code, seconds = await process.stop(signal.SIGINT)
    await connection.close()

    assert (exit_code, process.err) == (130, "")
    assert process.out.startswith("Stopped before the end.")
    assert seconds < 5.0


async def test_standard_input_is_imported(site: Site) -> None:
    file = write(site, HEADER + rows(50))
    async with site.server():
        await site.put_store()
        line = f"cat {file} | {POINTBOOK} import - --format csv {' '.join(site.options)}"
        finished = await finish("bash", "-c", line, environment=clean_environment(site.settings))

    assert finished.exit_code == 0, finished
    assert "50 applied" in finished.out
    assert site.token not in finished.out + finished.err


@pytest.mark.skipif(not HAS_PROC, reason="which signals a process handles is looked up in /proc")
@pytest.mark.parametrize("text", ["", HEADER, f"{HEADER}cut off"])
async def test_an_import_from_an_idle_pipe_can_be_interrupted(text: str, site: Site) -> None:
    process = await asyncio.create_subprocess_exec(
        POINTBOOK,
        *("import", "-", "--format", "csv", *site.options),
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        env=clean_environment(site.settings),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(text.encode())
    await until(lambda: handles_sigterm(process.pid), START_SECONDS_MAX)
    process.send_signal(signal.SIGINT)
    try:
        exit_code = await asyncio.wait_for(process.wait(), 10.0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()

    assert exit_code == 130
    out = (await process.stdout.read()).decode()
    assert "Stopped." in out
    assert "0 refused" in out
    assert await process.stderr.read() == b""


async def test_a_full_disk_is_reported_in_one_line(site: Site) -> None:
    file = write(site, HEADER + rows(60_000))
    line = f"ulimit -f 2000; exec {POINTBOOK} import {file} {' '.join(site.options)}"

    finished = await finish("bash", "-c", line, environment=clean_environment(site.settings), seconds=300.0)
    # On a busy machine, the progress comes before it.
    message = one_line(Finished(finished.exit_code, finished.out, PROGRESS.sub("", finished.err)))

    assert "cannot be sorted on disk" in message
    assert "TMPDIR" in message


async def test_a_refused_call_is_reported_in_one_line(site: Site) -> None:
    file = write(site, HEADER + rows(10))
    async with site.server():
        line = one_line(await pointbook("import", file, *site.options, GRPC_ADDRESS=site.address))

    assert "UNAUTHENTICATED" in line
    assert "0 lines" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("events.txt",), "--format"),
        (("events.csv", "--format", "xml"), "--format"),
        (("events.csv", "--at", "yesterday"), "--at"),
        (("events.csv", "--at", "1798761600"), "milliseconds since 1970, from the year 2000 on"),
        (("missing.csv",), "missing.csv"),
        (("events.csv", "--server", "nowhere"), "POINTBOOK_GRPC_ADDRESS"),
        (("events.csv",), "lacks columns: 'merchant_id'"),
    ],
)
async def test_invalid_options_and_files_are_reported_in_one_line(
    arguments: tuple[str, ...], message: str, site: Site
) -> None:
    write(site, HEADER)
    environment = clean_environment({"GRPC_ADDRESS": site.address})

    finished = await finish(POINTBOOK, "import", *arguments, environment=environment, cwd=site.folder)

    assert message in one_line(finished)


async def test_a_token_is_not_sent_in_plaintext_beyond_loopback(site: Site) -> None:
    file = write(site, HEADER)
    finished = await pointbook("import", file, *site.options, GRPC_ADDRESS="198.51.100.1:50051", TOKEN="pw-never-shown")

    assert "POINTBOOK_ALLOW_PLAINTEXT" in one_line(finished)
    assert "pw-never-shown" not in finished.err
