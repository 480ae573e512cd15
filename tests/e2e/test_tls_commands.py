"""TLS of all processes and commands."""

import asyncio
import json
import socket
from collections.abc import Mapping
from pathlib import Path

import grpc

from pointbook_client.testing.ports import free_port
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from support.certificates import Authority
from support.clients import Client
from support.processes import POINTBOOK, Running, clean_environment, finish, one_line, pointbook, running
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique

AUTHORITY = Authority()
STRANGERS = 20


async def is_healthy(*options: str, settings: Mapping[str, str]) -> bool:
    """Return whether `pointbook health` succeeds."""
    return (await pointbook("health", *options, **settings)).exit_code == 0


def write_files(folder: Path) -> dict[str, str]:
    """Write a server's files; return settings that require client certificates."""
    cert, key = AUTHORITY.issue("server", names=["pointbook.internal"]).write(folder, "server")
    (folder / "ca.crt").write_bytes(AUTHORITY.pem)
    return {"TLS_CERT_FILE": str(cert), "TLS_KEY_FILE": str(key), "TLS_CLIENT_CA_FILE": str(folder / "ca.crt")}


def client_files(folder: Path) -> dict[str, str]:
    """Write a client's certificate; return the settings of a client of that server."""
    cert, key = AUTHORITY.issue("operator").write(folder, "client")
    return {
        "SERVER_CA_FILE": str(folder / "ca.crt"),
        "SERVER_NAME": "pointbook.internal",
        "CLIENT_CERT_FILE": str(cert),
        "CLIENT_KEY_FILE": str(key),
    }


async def test_every_process_and_command_works_with_mtls(database_url: str, tmp_path: Path) -> None:
    token = await make_token(database_url, [ALL_MERCHANTS], list(Scope), client_names=["operator"])
    files, http = write_files(tmp_path), AUTHORITY.issue("shim").write(tmp_path, "http")
    grpc_address, http_address = f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}"
    server_settings = {"DATABASE_URL": database_url, "GRPC_ADDRESS": grpc_address, "WORKERS": "2", **files}
    client = {"GRPC_ADDRESS": grpc_address, "TOKEN": token, **client_files(tmp_path)}
    shim_settings = {
        **client,
        "HTTP_ADDRESS": http_address,
        "HTTP_TLS_CERT_FILE": str(http[0]),
        "HTTP_TLS_KEY_FILE": str(http[1]),
        "SHOPLINE_SECRETS": "app-secret",
    }
    shop = Shop(unique("merchant"), unique("store"))
    lines = tmp_path / "events.csv"
    lines.write_text("buyer_id,points_balance\nada,120\n")
    async with (
        running("serve", folder=tmp_path, settings=server_settings) as server,
        running("shim", folder=tmp_path, settings=shim_settings) as shim,
    ):
        await server.printed('"serving"')
        await shim.printed('"listening"')
        # A probe may exceed its three seconds on a busy machine.
        await server.until(lambda: is_healthy(settings=server_settings))
        await server.until(lambda: is_healthy(settings=client))
        await shim.until(lambda: is_healthy("--shim", settings=shim_settings))
        assert not await is_healthy(settings={**client, "SERVER_NAME": "elsewhere.example"})

        await put_store(shop, int(grpc_address.rpartition(":")[2]), token, tmp_path)
        store = ("--merchant", shop.merchant_id, "--store", shop.store_id)
        opened = ("--opening-balances", "--at", "2026-01-01T00:00:00Z")
        imported = await pointbook("import", lines, *opened, *store, **client)
        assert imported.exit_code == 0, imported
        url = f"https://localhost:{http_address.rpartition(':')[2]}/webhooks/shopline"
        secret = clean_environment({"SHOPLINE_SECRETS": "app-secret"})
        trusting = {**secret, "SSL_CERT_FILE": files["TLS_CLIENT_CA_FILE"]}
        sent = await finish(POINTBOOK, "webhook", "send", *store, "--url", url, environment=trusting)
        assert (sent.exit_code, sent.out) == (0, '200 {"outcome":"APPLIED"}\n'), sent
        await break_handshakes(server, int(grpc_address.rpartition(":")[2]))


async def put_store(shop: Shop, port: int, token: str, folder: Path) -> None:
    """Register a store as the operator."""
    credentials = grpc.ssl_channel_credentials(
        AUTHORITY.pem, (folder / "client.key").read_bytes(), (folder / "client.crt").read_bytes()
    )
    options = [("grpc.ssl_target_name_override", "pointbook.internal")]
    client = Client(port, token, options=options, credentials=credentials)
    await client.put_store(shop.merchant_id, shop.store_id)
    await client.close()


async def break_handshakes(server: Running, port: int) -> None:
    """Break off handshakes, which must not be logged."""
    before = server.err
    for _ in range(STRANGERS):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            await asyncio.to_thread(connection.recv, 1_000)
    assert [json.loads(line) for line in server.err.removeprefix(before).splitlines()] == []


async def test_invalid_tls_files_stop_the_start_in_one_line(database_url: str, tmp_path: Path) -> None:
    files = write_files(tmp_path)
    (tmp_path / "server.key").write_text("no key")
    settings = {"DATABASE_URL": database_url, "GRPC_ADDRESS": f"0.0.0.0:{free_port()}", **files}
    for options in ((), ("--workers", "2")):
        assert one_line(await pointbook("serve", *options, **settings)).startswith("POINTBOOK_TLS_KEY_FILE: ")
    shim_settings = {
        "HTTP_ADDRESS": "127.0.0.1:0",
        "SHOPLINE_SECRETS": "app-secret",
        "SERVER_CA_FILE": str(tmp_path / "missing.crt"),
    }
    assert one_line(await pointbook("shim", **shim_settings)).startswith("POINTBOOK_SERVER_CA_FILE: ")
