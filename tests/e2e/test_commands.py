"""The `pointbook` command: exit codes, one-line errors, and no secrets."""

import asyncio
import contextlib
import os
import re
import signal
import socket
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path

import asyncpg
import grpc
import pytest

from pointbook.v1 import programs_pb2
from pointbook_client.testing.ports import free_port
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.db.migrations import migrate
from pointbook_server.db.migrations.revisions import all_revisions
from support.clients import Client
from support.connections import connected
from support.embedded_database import Cluster
from support.http2 import HEALTH_CHECK, http2
from support.probes import grpc_health, is_alive
from support.processes import HAS_PROC, Finished, Running, one_line, pointbook, running
from support.refusals import refused
from support.schema_revisions import revisions_before
from support.shops import Shop
from support.unique_names import unique
from support.waiting import until

SECRET = "app-secret"
STOP_SECONDS_MAX = 10.0
REVOKED_SECONDS_MAX = 2.5
CONNECTIONS = 32
LISTENING, ESTABLISHED = "0A", "01"


@pytest.fixture
async def empty_url(cluster: Cluster) -> str:
    """A database without tables."""

    async def nothing(_url: str) -> None:
        pass

    await cluster.template("empty", nothing)
    return await cluster.clone("empty")


@contextlib.asynccontextmanager
async def serving(folder: Path, *options: str, **settings: str) -> AsyncIterator[Running]:
    """Run `pointbook serve`; it serves while the context is open."""

    async def serves() -> bool:
        return await grpc_health(settings["GRPC_ADDRESS"]) == "SERVING"

    async with running("serve", *options, folder=folder, settings=settings) as process:
        await process.until(serves)
        yield process


def free_address() -> str:
    """Return a loopback address with a free port."""
    return f"127.0.0.1:{free_port()}"


async def test_migrate_can_be_repeated(empty_url: str) -> None:
    first = await pointbook("migrate", DATABASE_URL=empty_url)
    second = await pointbook("migrate", DATABASE_URL=empty_url)

    assert (first.exit_code, first.err) == (0, "")
    revision = re.fullmatch(r"The database was migrated from revision nothing to (\w+)\.\n", first.out)
    assert revision is not None
    assert second == Finished(0, f"The database is already at revision {revision[1]}.\n", "")


async def test_check_lists_pending_migrations_and_writes_nothing(empty_url: str) -> None:
    async with connected(empty_url) as operator:
        name = await operator.fetchval("SELECT current_database()")
        await operator.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
        empty = await pointbook("migrate", "--check", DATABASE_URL=empty_url)
        await operator.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
    await migrate(empty_url, revisions=revisions_before("0029"))
    older = await pointbook("migrate", "--check", DATABASE_URL=empty_url)
    await migrate(empty_url)
    current = await pointbook("migrate", "--check", DATABASE_URL=empty_url)

    count, newest = len(all_revisions()), all_revisions()[-1].number
    head, *lines = empty.out.splitlines()
    assert (empty.exit_code, empty.err) == (1, "")
    assert head == f"The database is at revision nothing; {count} migrations are pending:"
    assert [line[:11] for line in lines] == [f"{each.number} {each.phase:.6}" for each in all_revisions()]
    assert older.exit_code == 1
    assert older.out.startswith("The database is at revision 0028; ")
    assert "\n0029 expand: The oldest revision whose release can use the schema\n" in older.out
    assert current == Finished(0, f"The database is at revision {newest}; no migrations are pending.\n", "")


async def test_database_of_a_later_release_is_checked_and_not_migrated(empty_url: str) -> None:
    await migrate(empty_url)
    settings = {"DATABASE_URL": empty_url}
    async with connected(empty_url) as operator:
        await operator.execute("UPDATE alembic_version SET version_num = '9999', compatible_from = '0028'")
        check, migrated = await pointbook("migrate", "--check", **settings), await pointbook("migrate", **settings)
        await operator.execute("UPDATE alembic_version SET compatible_from = '9998'")
        commands = (("migrate", "--check"), ("migrate",), ("serve",), ("verify",))
        refused = [await pointbook(*each, **settings, GRPC_ADDRESS=free_address()) for each in commands]

    assert check == Finished(0, "The database is at revision 9999 of a later release, which this one can use.\n", "")
    assert migrated == Finished(0, "The database is already at revision 9999.\n", "")
    for each in refused:
        assert one_line(each).endswith("install a later release")


async def test_migration_without_a_lock_gives_up_and_can_be_repeated(empty_url: str) -> None:
    await migrate(empty_url, revisions=revisions_before("0029"))
    async with connected(empty_url) as operator, operator.transaction():
        await operator.fetch("SELECT FROM alembic_version")
        gave_up = await pointbook("migrate", "--lock-wait", "0", DATABASE_URL=empty_url)
    again = await pointbook("migrate", DATABASE_URL=empty_url)

    assert one_line(gave_up).startswith("migration 0029 got no lock in 0 s: other transactions use its tables; ")
    assert (again.exit_code, again.err) == (0, "")


@pytest.mark.parametrize(
    "command",
    [
        ("serve",),
        ("serve", "--workers", "2"),
        ("verify",),
        ("token", "list"),
        ("token", "revoke", "id"),
        ("token", "create", "--name", "shim", "--merchant", "m", "--scope", "points.write"),
    ],
)
async def test_an_unmigrated_database_is_reported_in_one_line(empty_url: str, command: tuple[str, ...]) -> None:
    finished = await pointbook(*command, DATABASE_URL=empty_url, GRPC_ADDRESS=free_address())

    assert "`pointbook migrate`" in one_line(finished)


@pytest.mark.parametrize("command", [("serve",), ("migrate",), ("verify",), ("token", "list")])
async def test_a_missing_database_url_is_reported_in_one_line(command: tuple[str, ...]) -> None:
    assert "POINTBOOK_DATABASE_URL" in one_line(await pointbook(*command))


@pytest.mark.parametrize("command", [("migrate",), ("verify",), ("token", "list")])
async def test_an_unavailable_database_is_reported_in_one_line_without_its_password(command: tuple[str, ...]) -> None:
    url = f"postgresql://pointbook:pw-never-shown@{free_address()}/pointbook"
    line = one_line(await pointbook(*command, DATABASE_URL=url))

    assert "database" in line
    assert "pw-never-shown" not in line


async def test_a_database_that_does_not_respond_is_reported_as_such() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        line = one_line(
            await pointbook("token", "list", DATABASE_URL=f"postgresql://u@127.0.0.1:{silent.getsockname()[1]}/x")
        )

    assert line == "The database is not available right now; retry. (no response)"


async def test_a_role_without_privileges_on_the_tables_stops_the_start(database_url: str) -> None:
    connection = await asyncpg.connect(database_url)
    name = unique("role").replace("-", "_")
    await connection.execute(f"CREATE ROLE {name} LOGIN")
    url = database_url.replace("pointbook@", f"{name}@", 1)
    for command in (("serve",), ("serve", "--workers", "2")):
        line = one_line(await pointbook(*command, DATABASE_URL=url, GRPC_ADDRESS=free_address()))
        assert "POINTBOOK_DATABASE_URL" in line
        assert "points_accounts" in line
    assert "permission denied" in one_line(await pointbook("token", "list", DATABASE_URL=url))
    await connection.execute(f"ALTER ROLE {name} SET search_path = elsewhere")
    assert "search_path" in one_line(await pointbook("serve", DATABASE_URL=url, GRPC_ADDRESS=free_address()))
    await connection.close()


async def test_a_refused_database_login_is_logged_and_the_server_waits(database_url: str, tmp_path: Path) -> None:
    url = database_url.replace("pointbook@", "missing_role:pw-never-shown@", 1)
    address = free_address()
    settings = {"DATABASE_URL": url, "GRPC_ADDRESS": address}
    async with running("serve", folder=tmp_path, settings=settings) as process:
        await process.printed('"serving"')
        assert await grpc_health(address) == "NOT_SERVING"
        await process.printed("the database cannot be used")
        assert (await process.terminate())[0] == 0
    errors = [line for line in process.err.splitlines() if '"level": "error"' in line]
    assert all("missing_role" in line for line in errors)
    assert len(errors) == 2
    assert "pw-never-shown" not in process.err


async def test_calls_with_invalid_headers_are_not_logged(database_url: str, tmp_path: Path) -> None:
    address = free_address()
    settings = {"DATABASE_URL": database_url, "GRPC_ADDRESS": address}
    # gRPC reads how much it is to log while it is imported.
    async with running("serve", folder=tmp_path, settings=settings, is_fork=False) as process:
        await process.printed('"serving"')
        async with http2(address) as (stranger,):
            streams = {await stranger.start(HEALTH_CHECK, [("grpc-encoding", "none-such")]) for _ in range(10)}
            await until(lambda: streams <= stranger.ended)
        assert all(line.startswith("{") for line in process.err.splitlines())


@pytest.mark.parametrize(
    ("command", "wrong", "names"),
    [
        (
            "serve",
            {
                "WORKERS": "0",
                "DRAIN_SECONDS": "pw-never-shown",
                "CODE_KEYS": "k1:pw-never-shown",
                "LOG_LEVEL": "pw-never-shown",
                "GRPC_ADDRESS": "127.0.0.1:65536",
                "DATABASE_URL": "mysql://root:pw-never-shown@localhost/pointbook",
            },
            {"WORKERS", "DRAIN_SECONDS", "CODE_KEYS", "LOG_LEVEL", "GRPC_ADDRESS", "DATABASE_URL"},
        ),
        ("serve", {"DATABASE_URL": "postgresql://u:pw-never-shown@host:port/name"}, {"DATABASE_URL"}),
        ("migrate", {"DATABASE_URL": "pw-never-shown"}, {"DATABASE_URL"}),
        (
            "shim",
            {
                "SHOPLINE_SECRETS": "pw-never-shown,not visible",
                "TOKEN": "pw-never-shown not visible",
                "HTTP_ADDRESS": "8080",
                "MAX_BODY_BYTES": "0",
            },
            {"SHOPLINE_SECRETS", "TOKEN", "HTTP_ADDRESS", "MAX_BODY_BYTES"},
        ),
        ("shim", {"SHOPLINE_SECRETS": "pw-never-shown", "HTTP_ADDRESS": "0.0.0.0:8080"}, {"HTTP_ADDRESS"}),
        ("dev", {"DRAIN_SECONDS": "x", "HTTP_ADDRESS": "x", "GRPC_ADDRESS": "x"}, {"HTTP_ADDRESS", "GRPC_ADDRESS"}),
        ("serve", {"WORKERS": "0", "GRPC_ADDRESS": "0.0.0.0:1"}, {"WORKERS", "GRPC_ADDRESS", "DATABASE_URL"}),
        ("serve", {"GRPC_ADRESS": "pw-never-shown"}, {"GRPC_ADRESS", "GRPC_ADDRESS", "DATABASE_URL"}),
        ("shim", {"SHOPLINE_SECRET": "pw-never-shown"}, {"SHOPLINE_SECRET", "SHOPLINE_SECRETS"}),
        ("dev", {"WORKER": "2"}, {"WORKER", "WORKERS"}),
        ("health", {"HTTP_ADRESS": "x"}, {"HTTP_ADRESS", "HTTP_ADDRESS"}),
        ("health", {"GRPC_ADDRESS": "50051"}, {"GRPC_ADDRESS"}),
    ],
)
async def test_invalid_settings_stop_the_start(command: str, wrong: dict[str, str], names: set[str]) -> None:
    line = one_line(await pointbook(command, **wrong))

    assert line.startswith("wrong settings: ")
    assert names <= set(re.findall(r"POINTBOOK_(\w+)", line))
    assert "pw-never-shown" not in line


@pytest.mark.parametrize("command", [("serve",), ("serve", "--workers", "2"), ("dev",)])
@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (
            {"SMS_URL": "https://pw-never-shown/", "APPRISE_SMS_URL": "json://pw-never-shown/{to}"},
            {"SMS_URL", "APPRISE_SMS_URL"},
        ),
        ({"APPRISE_EMAIL_URL": "nothing://pw-never-shown/{to}"}, {"APPRISE_EMAIL_URL"}),
    ],
)
async def test_invalid_senders_stop_the_start(
    database_url: str, command: tuple[str, ...], settings: dict[str, str], names: set[str], tmp_path: Path
) -> None:
    addresses = {"GRPC_ADDRESS": free_address(), "HTTP_ADDRESS": free_address()}
    more = {"DATABASE_URL": database_url, "DATA_DIR": str(tmp_path), **addresses}
    line = one_line(await pointbook(*command, **settings, **more))

    assert set(re.findall(r"POINTBOOK_(\w+)", line)) == names
    assert "pw-never-shown" not in line


async def test_plaintext_beyond_loopback_needs_the_setting(empty_url: str) -> None:
    settings = {"DATABASE_URL": empty_url, "GRPC_ADDRESS": f"0.0.0.0:{free_port()}"}
    line = one_line(await pointbook("serve", **settings))
    assert "POINTBOOK_GRPC_ADDRESS" in line
    assert "POINTBOOK_ALLOW_PLAINTEXT" in line

    # The next check stops the start, so that the test does not listen beyond loopback.
    allowed = one_line(await pointbook("serve", **settings, ALLOW_PLAINTEXT="true"))
    assert "`pointbook migrate`" in allowed


async def test_an_address_with_an_unknown_host_is_reported_in_one_line(database_url: str) -> None:
    settings = {"DATABASE_URL": database_url, "GRPC_ADDRESS": "no..host:50051", "ALLOW_PLAINTEXT": "true"}
    for options in ((), ("--workers", "2")):
        assert "POINTBOOK_GRPC_ADDRESS" in one_line(await pointbook("serve", *options, **settings))


async def test_a_tokens_secret_is_printed_only_at_its_creation(database_url: str, tmp_path: Path) -> None:
    shop = Shop(unique("merchant"), unique("store"))
    options = ("--name", "shim", "--merchant", shop.merchant_id, "--scope", "stores", "--days", "30")
    made = await pointbook("token", "create", *options, DATABASE_URL=database_url)
    assert (made.exit_code, made.err) == (0, "")
    bearer = made.out.strip()
    _, token_id, secret = bearer.split("_", 2)

    listed = await pointbook("token", "list", DATABASE_URL=database_url)
    assert listed.exit_code == 0
    assert token_id in listed.out
    assert secret not in listed.out

    address = free_address()
    async with serving(tmp_path, DATABASE_URL=database_url, GRPC_ADDRESS=address) as process:
        request = programs_pb2.ListStoresRequest(merchant_id=shop.merchant_id)
        client = Client(int(address.rpartition(":")[2]), bearer)
        await client.programs.ListStores(request)
        forbidden = await refused(client.apply(shop.update()))
        assert (forbidden.code, forbidden.reason) == (grpc.StatusCode.PERMISSION_DENIED, "SCOPE_MISSING")

        revoked = await pointbook("token", "revoke", token_id, DATABASE_URL=database_url)
        assert revoked.exit_code == 0

        async def is_refused() -> bool:
            try:
                await client.programs.ListStores(request)
            except grpc.aio.AioRpcError as error:
                return error.code() is grpc.StatusCode.UNAUTHENTICATED
            return False

        await until(is_refused, REVOKED_SECONDS_MAX)
        await client.close()
        assert secret not in process.err
        assert bearer not in process.out

    assert token_id in one_line(await pointbook("token", "revoke", token_id, DATABASE_URL=database_url))


async def test_dev_names_every_address_in_use(tmp_path: Path, default_addresses: tuple[str, ...]) -> None:
    line = one_line(await pointbook("dev", DATA_DIR=str(tmp_path / "data")))

    assert all(address in line for address in default_addresses)
    assert not (tmp_path / "data").exists()


async def test_an_unknown_scope_is_reported_with_the_known_ones(database_url: str) -> None:
    options = ("--name", "shim", "--merchant", "m", "--scope", "points.wrote")
    line = one_line(await pointbook("token", "create", *options, DATABASE_URL=database_url))

    assert "points.wrote" in line
    assert all(scope in line for scope in Scope)


def sockets(pid: int, port: int, state: str) -> int:
    """Count a process's sockets of a local port and state."""
    targets = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            targets.append(os.readlink(descriptor))  # noqa: PTH115 - no path: socket:[number]
    rows = [line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()]
    return sum(
        1 for row in rows if row[1].endswith(f":{port:04X}") and row[3] == state and f"socket:[{row[9]}]" in targets
    )


@contextlib.asynccontextmanager
async def two_workers(folder: Path, database_url: str, address: str) -> AsyncIterator[tuple[Running, list[int]]]:
    """Run `pointbook serve --workers 2`; both serve while the context is open."""
    if not HAS_PROC:
        pytest.skip("which process has which socket is looked up in /proc, which this system does not have")
    settings = {"DATABASE_URL": database_url, "GRPC_ADDRESS": address}
    async with serving(folder, "--workers", "2", **settings) as process:

        async def both() -> bool:
            return process.err.count('"serving"') == 2

        await process.until(both)
        workers = process.workers()
        try:
            yield process, workers
        finally:
            for worker in filter(is_alive, workers):
                os.kill(worker, signal.SIGKILL)


async def test_two_workers_share_the_port(database_url: str, admin_token: str, tmp_path: Path) -> None:
    address = free_address()
    port = int(address.rpartition(":")[2])
    async with two_workers(tmp_path, database_url, address) as (process, workers):
        assert len(workers) == 2
        assert [sockets(worker, port, LISTENING) for worker in workers] == [1, 1]
        options = (("grpc.use_local_subchannel_pool", 1),)
        channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(CONNECTIONS)]
        await asyncio.gather(*(channel.channel_ready() for channel in channels))
        assert all(sockets(worker, port, ESTABLISHED) for worker in workers)
        # Clients of an earlier test may still connect to the port.
        assert sum(sockets(worker, port, ESTABLISHED) for worker in workers) >= CONNECTIONS
        await asyncio.gather(*(channel.close() for channel in channels))
        shop = Shop(unique("merchant"), unique("store"))
        client = Client(port, admin_token)
        await client.put_store(shop.merchant_id, shop.store_id)
        assert (await client.apply(shop.update())).account.points_balance == 20
        await client.close()

        exit_code, stop_seconds = await process.terminate()

        assert exit_code == 0, process.err
        assert stop_seconds < STOP_SECONDS_MAX
        assert not any(map(is_alive, workers))
        assert "Traceback" not in process.err


async def test_workers_end_with_their_killed_parent(database_url: str, tmp_path: Path) -> None:
    address = free_address()
    async with two_workers(tmp_path, database_url, address) as (process, workers):
        await process.kill()
        await until(lambda: not any(map(is_alive, workers)))
    async with serving(tmp_path, DATABASE_URL=database_url, GRPC_ADDRESS=address) as process:
        assert (await process.terminate())[0] == 0


async def test_a_second_server_on_a_port_is_refused(database_url: str, tmp_path: Path) -> None:
    address = free_address()
    settings = {"DATABASE_URL": database_url, "GRPC_ADDRESS": address}
    async with serving(tmp_path, **settings):
        assert address in one_line(await pointbook("serve", **settings))
        assert address in one_line(await pointbook("serve", "--workers", "2", **settings))
        http = await pointbook("shim", SHOPLINE_SECRETS=SECRET, HTTP_ADDRESS=address)
        assert address.rpartition(":")[2] in one_line(http)


async def test_workers_share_their_ports_with_no_other_program(database_url: str, tmp_path: Path) -> None:
    address = free_address()
    settings = {"DATABASE_URL": database_url, "GRPC_ADDRESS": address}
    async with two_workers(tmp_path, database_url, address):
        assert address in one_line(await pointbook("serve", **settings))
        assert address in one_line(await pointbook("serve", "--workers", "2", **settings))
    unnamed = await pointbook("serve", "--workers", "2", DATABASE_URL=database_url, GRPC_ADDRESS="127.0.0.1:0")
    assert "POINTBOOK_GRPC_ADDRESS" in one_line(unnamed)


@contextlib.asynccontextmanager
async def answering(response: bytes, rest: bytes) -> AsyncIterator[str]:
    """Yield the address of a server that sends a response, then the rest forever."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError), contextlib.closing(writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(response)
            while rest:
                writer.write(rest)
                await writer.drain()
                # A slow sender: each read of the probe gets something in time.
                await asyncio.sleep(0.1)

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


NOT_READY = b"HTTP/1.1 503 Service Unavailable\r\n\r\n"


@pytest.mark.parametrize(
    ("response", "rest", "cause"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"Endless: header", ""),
        (NOT_READY, b"x", ""),
        (b"\xff\r\n\r\n", b"", ""),
        (b"HTTP/1.1 302 Found\r\nLocation: /livez\r\n\r\n", b"", ""),
        (NOT_READY + b"[" * 60_000, b"", ""),
        (NOT_READY + b'{"detail": "two\\nlines \\ud800"}', b"", r": two\nlines \ud800"),
    ],
    ids=["endless header", "endless body", "garbage", "redirect", "nested", "unprintable"],
)
async def test_health_ends_in_time_and_with_one_line_for_any_response(response: bytes, rest: bytes, cause: str) -> None:
    async with asyncio.timeout(20), answering(response, rest) as address:
        finished = await pointbook("health", "--shim", HTTP_ADDRESS=address)

    assert finished == Finished(1, f"not serving{cause}\n", "")


async def test_the_exit_code_of_health_is_the_servers_state(database_url: str, tmp_path: Path) -> None:
    address, http_address = free_address(), free_address()
    settings = {"GRPC_ADDRESS": address, "HTTP_ADDRESS": http_address}
    not_serving = Finished(1, "not serving\n", "")
    assert await pointbook("health", **settings) == not_serving
    assert await pointbook("health", "--shim", **settings) == not_serving

    async with serving(tmp_path, DATABASE_URL=database_url, GRPC_ADDRESS=address):
        assert await pointbook("health", **settings) == Finished(0, "serving\n", "")
        assert await pointbook("health", "--shim", **settings) == not_serving

    away = f"postgresql://pointbook@{free_address()}/pointbook"
    async with running("serve", folder=tmp_path, settings=settings | {"DATABASE_URL": away}) as process:
        await process.printed('"serving"')
        assert await pointbook("health", **settings) == not_serving
        assert (await process.terminate())[0] == 0


async def test_a_shim_needs_a_secret() -> None:
    line = one_line(await pointbook("shim", HTTP_ADDRESS=free_address()))

    assert "POINTBOOK_SHOPLINE_SECRETS" in line


async def test_a_shim_starts_before_its_server(tmp_path: Path) -> None:
    http_address = free_address()
    settings = {"SHOPLINE_SECRETS": SECRET, "HTTP_ADDRESS": http_address, "GRPC_ADDRESS": free_address()}
    async with running("shim", folder=tmp_path, settings=settings) as process:
        await process.printed('"listening"')
        assert http_address in process.err
        assert settings["GRPC_ADDRESS"] in process.err

        async def listens() -> bool:
            finished = await pointbook("webhook", "send", "--url", f"http://{http_address}/webhooks/shopline")
            return finished.out.startswith("401 ")

        await process.until(listens)
        url = f"http://{http_address}/webhooks/shopline"
        sent = await pointbook("webhook", "send", "--url", url, SHOPLINE_SECRETS=SECRET)
        assert (sent.exit_code, sent.out[:4]) == (1, "503 ")
        exit_code, stop_seconds = await process.terminate()
        assert (exit_code, stop_seconds < STOP_SECONDS_MAX) == (0, True)


async def test_webhook_send_reports_a_missing_shim_or_file_in_one_line(tmp_path: Path) -> None:
    url = f"http://{free_address()}/webhooks/shopline"
    assert url in one_line(await pointbook("webhook", "send", "--url", url))
    missing = tmp_path / "missing.json"
    assert str(missing) in one_line(await pointbook("webhook", "send", missing, "--url", url))


async def test_usage_is_shown_without_tracebacks() -> None:
    for arguments in ((), ("token",), ("serve", "--workers", "0"), ("nonsense",)):
        finished = await pointbook(*arguments)
        assert finished.exit_code == 2
        assert "Usage: pointbook" in finished.out + finished.err
        assert "Traceback" not in finished.err
    helped = await pointbook("--help")
    assert helped.exit_code == 0
    assert {"dev", "serve", "shim", "migrate", "import", "verify", "health", "token", "webhook"} <= set(
        helped.out.split()
    )
    assert ALL_MERCHANTS in (await pointbook("token", "create", "--help")).out


async def test_the_version_is_printed() -> None:
    assert await pointbook("--version") == Finished(0, f"pointbook {version('pointbook')}\n", "")


async def test_an_invalid_ssl_mode_is_reported_in_one_line(database_url: str) -> None:
    for command in ("migrate", "serve"):
        url = f"{database_url}&sslmode=bogus"
        finished = await pointbook(command, DATABASE_URL=url, GRPC_ADDRESS=free_address())
        assert "sslmode" in one_line(finished)


@pytest.mark.parametrize(
    "options", [("--name", "[/x]", "--days", "3000000"), ("--name", "a b"), ("--name", "x", "--merchant", "two words")]
)
async def test_invalid_token_names_and_expiry_times_are_refused(database_url: str, options: tuple[str, ...]) -> None:
    made = await pointbook(
        "token", "create", *options, "--merchant", "m", "--scope", "redeem", DATABASE_URL=database_url
    )

    assert made.exit_code == 2
    assert (await pointbook("token", "list", DATABASE_URL=database_url)).exit_code == 0


async def test_a_token_name_with_brackets_is_printed_unchanged(database_url: str) -> None:
    options = ("--name", "[/x]", "--merchant", "m", "--scope", "redeem")
    made = await pointbook("token", "create", *options, DATABASE_URL=database_url)
    listed = await pointbook("token", "list", DATABASE_URL=database_url)

    assert made.exit_code == 0
    assert "[/x]" in listed.out
