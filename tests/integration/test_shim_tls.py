"""The shim over HTTPS, in front of a gRPC server with mTLS."""

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from pydantic import SecretStr

from pointbook.v1 import access_pb2
from pointbook_client import PointbookError, connect, connections
from pointbook_common import certificates
from pointbook_common.errors import SettingError
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.server import Server
from shopline_shim import tls_context
from shopline_shim.server import ShimServer
from shopline_shim.server_connection import server_tls
from shopline_shim.settings import ShimSettings
from shopline_shim.signature import sign
from support.certificates import Authority, Issued, handshake, replace, serial_of, served_serial
from support.json_logs import json_logs
from support.servers import Service, server_settings
from support.shims import PATH, SECRET, running_shim
from support.shops import Shop
from support.tokens import make_token

AUTHORITY = Authority()


def webhook(shop: Shop, buyer_id: str, value: int = 20) -> tuple[bytes, dict[str, str]]:
    """Return the body and headers of a signed points webhook."""
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
async def server_with_mtls(service: Service, folder: Path) -> AsyncIterator[Server]:
    """Run a server that requires client certificates during the block."""
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
    """Return settings with HTTPS and a client certificate."""
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


def trusting_context() -> ssl.SSLContext:
    """Return a client context that trusts the authority."""
    return ssl.create_default_context(cadata=AUTHORITY.pem.decode())


@pytest.fixture
def logs() -> Iterator[StringIO]:
    """The logs of TLS files and of libraries."""
    with json_logs(certificates) as written:
        yield written


async def test_webhook_is_sent_over_https_and_mtls(service: Service, shop: Shop, tmp_path: Path) -> None:
    scopes = [Scope.POINTS_WRITE, Scope.WEBHOOKS]
    token = await make_token(service.database_url, [ALL_MERCHANTS], scopes, client_names=["shim.internal"])
    body, headers = webhook(shop, "over-tls")
    async with server_with_mtls(service, tmp_path) as server:
        settings = shim_settings(tmp_path, grpc_address=f"127.0.0.1:{server.port}", token=SecretStr(token))
        async with (
            running_shim(settings) as shim,
            httpx.AsyncClient(verify=trusting_context(), trust_env=False) as http,
        ):
            ready = await http.get(f"https://{shim.address}/readyz")
            response = await http.post(f"https://{shim.address}{PATH}", content=body, headers=headers)
            with pytest.raises(httpx.HTTPError):
                await http.get(f"http://{shim.address}/readyz")

    assert (ready.status_code, response.status_code, response.json()) == (200, 200, {"outcome": "APPLIED"})
    account = await service.client.account(shop.merchant_id, shop.store_id, "over-tls")
    assert account.points_balance == 20


async def test_renewed_certificate_is_served_without_a_failed_request(tmp_path: Path, logs: StringIO) -> None:
    (tmp_path / "ca.crt").write_bytes(AUTHORITY.pem)
    context = trusting_context()

    async def is_alive() -> bool:
        async with httpx.AsyncClient(verify=context, trust_env=False) as http:
            return (await http.get(f"https://{shim.address}/healthz")).is_success

    async with running_shim(shim_settings(tmp_path)) as shim:
        for _ in range(3):
            old = await asyncio.to_thread(served_serial, port_of(shim.address))
            renewed = AUTHORITY.issue("shim")
            replace(tmp_path / "http.crt", renewed.chain)
            assert all(await asyncio.gather(*(is_alive() for _ in range(5))))
            assert await asyncio.to_thread(served_serial, port_of(shim.address)) == old
            replace(tmp_path / "http.key", renewed.key)
            assert all(await asyncio.gather(*(is_alive() for _ in range(5))))
            assert await asyncio.to_thread(served_serial, port_of(shim.address)) == serial_of(renewed.chain)

    assert logs.getvalue().count("changed TLS files are invalid, still using the previous ones") == 3


async def test_slow_and_malformed_handshakes_time_out_without_error_logs(tmp_path: Path, logs: StringIO) -> None:
    (tmp_path / "ca.crt").write_bytes(AUTHORITY.pem)
    async with running_shim(shim_settings(tmp_path, header_timeout_seconds=0.3)) as shim:
        host, _, port = shim.address.rpartition(":")
        started = time.monotonic()
        silent_connections = [await asyncio.open_connection(host, int(port)) for _ in range(20)]
        garbage, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /healthz HTTP/1.1\r\n\r\n")
        async with asyncio.timeout(10):
            for reader, _ in [*silent_connections, (garbage, writer)]:
                with contextlib.suppress(ConnectionError):
                    await reader.read()
        seconds = time.monotonic() - started
        for _, each in [*silent_connections, (garbage, writer)]:
            each.close()
        async with httpx.AsyncClient(verify=trusting_context(), trust_env=False) as http:
            assert (await http.get(f"https://{shim.address}/healthz")).is_success

    assert 0.25 <= seconds < 5
    assert "Traceback" not in logs.getvalue()
    assert '"level": "error"' not in logs.getvalue()


async def test_tls_1_1_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_bytes(AUTHORITY.pem)
    async with running_shim(shim_settings(tmp_path)) as shim:
        versions = [
            await asyncio.to_thread(handshake, port_of(shim.address), version, AUTHORITY)
            for version in (ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
        ]

    assert versions == ["", "TLSv1.2", "TLSv1.3"]


async def test_renewed_client_certificate_is_used_without_a_failed_call(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logs: StringIO
) -> None:
    monkeypatch.setattr(connections, "CREDENTIALS_CHECK_SECONDS", 0.0)
    tokens = [
        await make_token(service.database_url, [ALL_MERCHANTS], [Scope.REDEEM], client_names=[name])
        for name in ("first.internal", "second.internal")
    ]
    async with server_with_mtls(service, tmp_path) as server:
        settings = shim_settings(tmp_path)
        AUTHORITY.issue("first.internal").write(tmp_path, "client")
        async with connect(f"127.0.0.1:{server.port}", **server_tls(settings)) as client:

            async def access_code(token: str) -> str:
                metadata = (("authorization", f"Bearer {token}"),)
                try:
                    await client.access.GetCallerAccess(access_pb2.GetCallerAccessRequest(), metadata=metadata)
                except PointbookError as error:
                    return error.grpc_code.name
                return "OK"

            assert [await access_code(token) for token in tokens] == ["OK", "UNAUTHENTICATED"]
            running = [asyncio.create_task(access_code(tokens[0])) for _ in range(20)]
            await asyncio.sleep(0)
            second = AUTHORITY.issue("second.internal")
            replace(tmp_path / "client.crt", second.chain)
            assert [await access_code(token) for token in tokens] == ["OK", "UNAUTHENTICATED"]
            replace(tmp_path / "client.key", second.key)
            assert [await access_code(token) for token in tokens] == ["UNAUTHENTICATED", "OK"]
            assert set(await asyncio.gather(*running)) == {"OK"}

    assert logs.getvalue().count("changed TLS files are invalid, still using the previous ones") == 1


async def test_files_that_openssl_rejects_are_logged_once_per_renewal(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_bytes(AUTHORITY.pem)
    settings = shim_settings(tmp_path)
    weak = AUTHORITY.issue("weak", key=rsa.generate_private_key(65_537, 1_024))  # noqa: S505 - OpenSSL must reject it
    with json_logs(tls_context) as logged:
        async with running_shim(settings) as shim:
            old = await asyncio.to_thread(served_serial, port_of(shim.address))
            renewed = AUTHORITY.issue("shim")
            Issued(renewed.chain + weak.chain, renewed.key).write(tmp_path, "http")
            served = [await asyncio.to_thread(served_serial, port_of(shim.address)) for _ in range(3)]
        source = tls_context.server_tls_source(settings)
        assert source is not None
        with pytest.raises(OSError, match=r"POINTBOOK_HTTP_TLS_CERT_FILE: .*TOO_SMALL"):
            tls_context.build_tls_context(source)

    assert served == [old] * 3
    assert logged.getvalue().count("changed TLS files are invalid, still using the previous ones") == 1


async def test_key_of_another_certificate_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_bytes(AUTHORITY.pem)
    settings = shim_settings(tmp_path)
    replace(tmp_path / "http.key", AUTHORITY.issue().key)

    with pytest.raises(SettingError, match="POINTBOOK_HTTP_TLS_KEY_FILE: the key does not belong to"):
        await ShimServer(settings).serve(stop=asyncio.Event())


async def test_connections_without_a_handshake_count_towards_the_limit(service: Service, tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_bytes(AUTHORITY.pem)
    settings = shim_settings(
        tmp_path, grpc_address=f"127.0.0.1:{service.server.port}", max_connections=10, header_timeout_seconds=60
    )
    async with running_shim(settings) as shim:
        idle_connections = [await asyncio.open_connection("127.0.0.1", port_of(shim.address)) for _ in range(15)]
        try:
            async with httpx.AsyncClient(verify=trusting_context(), trust_env=False) as http:
                alive = await http.get(f"https://localhost:{port_of(shim.address)}/healthz")
            evicted = [reader for reader, _ in idle_connections[:6]]
            assert alive.status_code == 200
            assert [await asyncio.wait_for(reader.read(), 5) for reader in evicted] == [b""] * 6
            assert not any(reader.at_eof() for reader, _ in idle_connections[6:])
        finally:
            for _, writer in idle_connections:
                writer.close()


async def test_running_handshake_ends_when_the_shim_stops(service: Service, tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_bytes(AUTHORITY.pem)
    settings = shim_settings(
        tmp_path, grpc_address=f"127.0.0.1:{service.server.port}", max_connections=10, header_timeout_seconds=60
    )
    async with asyncio.timeout(5):
        async with running_shim(settings) as shim:
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(shim.address))
            async with httpx.AsyncClient(verify=trusting_context(), trust_env=False) as http:
                await http.get(f"https://localhost:{port_of(shim.address)}/healthz")
        assert await reader.read() == b""
        writer.close()
