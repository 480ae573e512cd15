"""The shim over HTTPS, before a gRPC server that asks it for a certificate."""

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from pydantic import SecretStr

from pointbook.v1 import access_pb2, access_pb2_grpc
from pointbook_common import certificates
from pointbook_common.errors import SettingError
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.server import Server
from shopline_shim import grpc_channel, tls_context
from shopline_shim.grpc_channel import RenewingChannel, client_tls_source, open_aio_channel
from shopline_shim.server import ShimServer
from shopline_shim.settings import ShimSettings
from shopline_shim.signature import sign
from support.certificates import Authority, Issued, handshake, replace, serial_of, served_serial
from support.harness import Service, Shop, make_token, server_settings
from support.json_logs import json_logs
from support.shims import PATH, SECRET

AUTHORITY = Authority()


def webhook(shop: Shop, buyer_id: str, value: int = 20) -> tuple[bytes, dict[str, str]]:
    """Make a signed points webhook, and its headers."""
    content = {
        "buyer_id": buyer_id,
        "points_balance": value,
        "points_expiry_time": "",
        "store_id": shop.store_id,
        "update_type": "INCREASE",
        "updated_at": 1_721_829_526_566,
        "updated_scene": "SUCCESSFUL_REGISTRATION",
        "updated_value": value,
    }
    body = json.dumps(content).encode()
    headers = {
        "X-Shopline-Topic": "app_memberSystem_points/challenged",
        "X-Shopline-Hmac-Sha256": sign(SECRET, body),
        "X-Shopline-Shop-Id": shop.store_id,
        "X-Shopline-Merchant-Id": shop.merchant_id,
    }
    return body, headers


@contextlib.asynccontextmanager
async def shim(settings: ShimSettings) -> AsyncIterator[str]:
    """Run a shim, and yield its address."""
    running, stop, ready = ShimServer(settings), asyncio.Event(), asyncio.Event()
    serving = asyncio.create_task(running.serve(stop=stop, ready=ready))
    await asyncio.wait_for(ready.wait(), 5)
    try:
        yield running.address
    finally:
        stop.set()
        await serving


@contextlib.asynccontextmanager
async def server_with_mtls(service: Service, folder: Path) -> AsyncIterator[Server]:
    """Run a server that asks clients for certificates, on the database of the tests."""
    cert, key = AUTHORITY.issue("server", names=["pointbook.internal"]).write(folder, "server")
    (folder / "ca.crt").write_bytes(AUTHORITY.pem)
    settings = server_settings(tls_cert_file=cert, tls_key_file=key, tls_client_ca_file=folder / "ca.crt")
    server = Server(settings, service.database_url, senders={})
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


def shim_settings(folder: Path, **changes: Any) -> ShimSettings:
    """Return the settings of a shim with HTTPS and a client certificate."""
    http_cert, http_key = AUTHORITY.issue("shim").write(folder, "http")
    cert, key = AUTHORITY.issue("shim.internal").write(folder, "client")
    values: dict[str, Any] = {
        "http_address": "127.0.0.1:0",
        "http_tls_cert_file": http_cert,
        "http_tls_key_file": http_key,
        "server_ca_file": folder / "ca.crt",
        "server_name": "pointbook.internal",
        "client_cert_file": cert,
        "client_key_file": key,
        "shopline_secrets": (SecretStr(SECRET),),
    }
    return ShimSettings(**{**values, **changes})


def port_of(address: str) -> int:
    """Return the port of a shim's address."""
    return int(address.rpartition(":")[2])


def trusting() -> ssl.SSLContext:
    """Build the context of a client that trusts the authority."""
    return ssl.create_default_context(cadata=AUTHORITY.pem.decode())


@pytest.fixture
def logs() -> Iterator[StringIO]:
    """What is logged of TLS files, and by the libraries."""
    with json_logs(certificates) as written:
        yield written


async def test_a_webhook_is_encrypted_all_the_way(service: Service, shop: Shop, tmp_path: Path) -> None:
    """HTTPS to the shim, and mTLS to the server, with a token that only the shim's certificate may use."""
    scopes = [Scope.POINTS_WRITE, Scope.WEBHOOKS]
    token = await make_token(service.database_url, [ALL_MERCHANTS], scopes, client_names=["shim.internal"])
    body, headers = webhook(shop, "over-tls")
    async with server_with_mtls(service, tmp_path) as server:
        settings = shim_settings(tmp_path, grpc_address=f"127.0.0.1:{server.port}", token=SecretStr(token))
        async with shim(settings) as address, httpx.AsyncClient(verify=trusting(), trust_env=False) as http:
            ready = await http.get(f"https://{address}/readyz")
            answer = await http.post(f"https://{address}{PATH}", content=body, headers=headers)
            with pytest.raises(httpx.HTTPError):
                await http.get(f"http://{address}/readyz")

    assert (ready.status_code, answer.status_code, answer.json()) == (200, 200, {"outcome": "APPLIED"})
    account = await service.client.account(shop.merchant_id, shop.store_id, "over-tls")
    assert account.points_balance == 20


async def test_https_follows_its_files_without_a_failed_request(tmp_path: Path, logs: StringIO) -> None:
    """Half a renewal leaves the old certificate; requests over new connections never fail."""
    (tmp_path / "ca.crt").write_bytes(AUTHORITY.pem)
    context = trusting()

    async def is_alive() -> bool:
        async with httpx.AsyncClient(verify=context, trust_env=False) as http:
            return (await http.get(f"https://{address}/healthz")).is_success

    async with shim(shim_settings(tmp_path)) as address:
        for _ in range(3):
            old = await asyncio.to_thread(served_serial, port_of(address))
            renewed = AUTHORITY.issue("shim")
            replace(tmp_path / "http.crt", renewed.chain)
            assert all(await asyncio.gather(*(is_alive() for _ in range(5))))
            assert await asyncio.to_thread(served_serial, port_of(address)) == old
            replace(tmp_path / "http.key", renewed.key)
            assert all(await asyncio.gather(*(is_alive() for _ in range(5))))
            assert await asyncio.to_thread(served_serial, port_of(address)) == serial_of(renewed.chain)

    assert logs.getvalue().count("changed TLS files are invalid, still using the previous ones") == 3


async def test_slow_and_broken_handshakes_end_quietly(tmp_path: Path, logs: StringIO) -> None:
    """A stranger who sends nothing, or no TLS, has as long as a client has for its headers."""
    (tmp_path / "ca.crt").write_bytes(AUTHORITY.pem)
    async with shim(shim_settings(tmp_path, header_timeout_seconds=0.3)) as address:
        host, _, port = address.rpartition(":")
        began = time.monotonic()
        silent = [await asyncio.open_connection(host, int(port)) for _ in range(20)]
        garbage, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /healthz HTTP/1.1\r\n\r\n")
        async with asyncio.timeout(10):
            for reader, _ in [*silent, (garbage, writer)]:
                with contextlib.suppress(ConnectionError):
                    await reader.read()
        seconds = time.monotonic() - began
        for _, each in [*silent, (garbage, writer)]:
            each.close()
        async with httpx.AsyncClient(verify=trusting(), trust_env=False) as http:
            assert (await http.get(f"https://{address}/healthz")).is_success

    assert 0.25 <= seconds < 5
    assert "Traceback" not in logs.getvalue()
    assert '"level": "error"' not in logs.getvalue()


async def test_tls_1_1_is_refused(tmp_path: Path) -> None:
    """Both versions from 1.2 on are spoken."""
    (tmp_path / "ca.crt").write_bytes(AUTHORITY.pem)
    async with shim(shim_settings(tmp_path)) as address:
        spoken = [
            await asyncio.to_thread(handshake, port_of(address), version, AUTHORITY)
            for version in (ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
        ]

    assert spoken == ["", "TLSv1.2", "TLSv1.3"]


async def test_a_renewed_client_certificate_is_used_without_a_failed_call(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The channel is opened again, and calls that run go on over the one before."""
    monkeypatch.setattr(grpc_channel, "TLS_CHECK_SECONDS", 0.0)
    tokens = [
        await make_token(service.database_url, [ALL_MERCHANTS], [Scope.REDEEM], client_names=[name])
        for name in ("first.internal", "second.internal")
    ]
    async with server_with_mtls(service, tmp_path) as server:
        AUTHORITY.issue("shim").write(tmp_path, "http")
        settings = shim_settings(tmp_path)
        AUTHORITY.issue("first.internal").write(tmp_path, "client")
        tls = client_tls_source(settings)
        async with open_aio_channel(settings, f"127.0.0.1:{server.port}", (), tls) as channel:
            assert isinstance(channel, RenewingChannel)
            access = access_pb2_grpc.AccessServiceStub(channel)

            async def ask(token: str) -> str:
                metadata = (("authorization", f"Bearer {token}"),)
                try:
                    await access.GetCallerAccess(access_pb2.GetCallerAccessRequest(), timeout=10, metadata=metadata)
                except grpc.aio.AioRpcError as error:
                    return error.code().name
                return "OK"

            assert [await ask(token) for token in tokens] == ["OK", "UNAUTHENTICATED"]
            running = [asyncio.create_task(ask(tokens[0])) for _ in range(20)]
            await asyncio.sleep(0)
            before = channel.current()
            AUTHORITY.issue("second.internal").write(tmp_path, "client")
            assert channel.current() is not before
            assert [await ask(token) for token in tokens] == ["UNAUTHENTICATED", "OK"]
            assert set(await asyncio.gather(*running)) == {"OK"}


async def test_files_that_openssl_refuses_are_logged_once_a_renewal(tmp_path: Path) -> None:
    """A chain with a key that is too short is in order for us; strangers must not write the log by connecting."""
    (tmp_path / "ca.crt").write_bytes(AUTHORITY.pem)
    settings = shim_settings(tmp_path)
    weak = AUTHORITY.issue("weak", key=rsa.generate_private_key(65_537, 1_024))  # noqa: S505 - it is refused
    with json_logs(tls_context) as logged:
        async with shim(settings) as address:
            old = await asyncio.to_thread(served_serial, port_of(address))
            renewed = AUTHORITY.issue("shim")
            Issued(renewed.chain + weak.chain, renewed.key).write(tmp_path, "http")
            served = [await asyncio.to_thread(served_serial, port_of(address)) for _ in range(3)]
        with pytest.raises(OSError, match=r"POINTBOOK_HTTP_TLS_CERT_FILE: .*TOO_SMALL"):
            tls_context.build_tls_context(settings)

    assert served == [old] * 3
    assert logged.getvalue().count("changed TLS files are invalid, still using the previous ones") == 1


async def test_wrong_files_stop_the_start(tmp_path: Path) -> None:
    """Those of HTTPS and those of the channel."""
    (tmp_path / "ca.crt").write_bytes(AUTHORITY.pem)
    settings = shim_settings(tmp_path)
    replace(tmp_path / "http.key", AUTHORITY.issue().key)

    with pytest.raises(SettingError, match="POINTBOOK_HTTP_TLS_KEY_FILE: the key does not belong to"):
        await ShimServer(settings).serve(stop=asyncio.Event())


async def test_connections_without_a_handshake_count(service: Service, tmp_path: Path) -> None:
    """Strangers who send nothing over TCP are cut like all others, and keep nobody out."""
    (tmp_path / "ca.crt").write_bytes(AUTHORITY.pem)
    settings = shim_settings(
        tmp_path, grpc_address=f"127.0.0.1:{service.server.port}", max_connections=10, header_timeout_seconds=60
    )
    async with shim(settings) as address:
        strangers = [await asyncio.open_connection("127.0.0.1", port_of(address)) for _ in range(15)]
        try:
            async with httpx.AsyncClient(verify=trusting(), trust_env=False) as http:
                alive = await http.get(f"https://localhost:{port_of(address)}/healthz")
            cut = [reader for reader, _ in strangers[:6]]
            assert alive.status_code == 200
            assert [await asyncio.wait_for(reader.read(), 5) for reader in cut] == [b""] * 6
            assert not any(reader.at_eof() for reader, _ in strangers[6:])
        finally:
            for _, writer in strangers:
                writer.close()


async def test_a_handshake_under_way_delays_no_end(service: Service, tmp_path: Path) -> None:
    """Nor does it go on after the shim's end."""
    (tmp_path / "ca.crt").write_bytes(AUTHORITY.pem)
    settings = shim_settings(
        tmp_path, grpc_address=f"127.0.0.1:{service.server.port}", max_connections=10, header_timeout_seconds=60
    )
    async with asyncio.timeout(5):
        async with shim(settings) as address:
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(address))
            async with httpx.AsyncClient(verify=trusting(), trust_env=False) as http:
                await http.get(f"https://localhost:{port_of(address)}/healthz")
        assert await reader.read() == b""
        writer.close()
