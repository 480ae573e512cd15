"""The gRPC server over TLS: callers, renewed certificates, and bound tokens."""

import asyncio
import contextlib
import math
import re
import shutil
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from pointbook.v1 import access_pb2
from pointbook_cli.health_probe import ProbeSettings, probe_server
from pointbook_common.errors import SettingError
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.rpc import tls
from pointbook_server.server import Server
from support.certificates import Authority, Issued, handshake, old_context, replace, serial_of, served_serial
from support.clients import Client
from support.refusals import refusal
from support.servers import Service, server_settings
from support.tokens import make_token
from support.waiting import until

AUTHORITY = Authority()
OTHER_AUTHORITY = Authority()
LOOP_CALLS_MAX = 400


def trust(authority: Authority = AUTHORITY, identity: Issued | None = None) -> grpc.ChannelCredentials:
    """Return credentials that trust an authority, with a client certificate if given."""
    return grpc.ssl_channel_credentials(
        authority.pem, identity.key if identity else None, identity.chain if identity else None
    )


@contextlib.asynccontextmanager
async def tls_server(database_url: str, folder: Path, **changes: Any) -> AsyncIterator[Server]:
    """Run a server whose certificate is in a folder."""
    cert, key = AUTHORITY.issue().write(folder, "server")
    server = Server(server_settings(tls_cert_file=cert, tls_key_file=key, **changes), database_url, senders={})
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def caller(
    port: int, token: str, credentials: grpc.ChannelCredentials | None, name: str = ""
) -> AsyncIterator[Client]:
    """Open a client of its own connection, for another server name if given."""
    options: list[tuple[str, Any]] = [("grpc.use_local_subchannel_pool", 1)]
    if name:
        options.append(("grpc.ssl_target_name_override", name))
    client = Client(port, token, options=options, credentials=credentials)
    try:
        yield client
    finally:
        await client.close()


async def outcome(port: int, token: str, credentials: grpc.ChannelCredentials | None, name: str = "") -> str:
    """Call once with a token; return OK, UNAVAILABLE, or the reason of the error."""
    async with caller(port, token, credentials, name) as client:
        try:
            await client.access.GetCallerAccess(access_pb2.GetCallerAccessRequest(), timeout=10)
        except grpc.aio.AioRpcError as error:
            code = error.code()
            return code.name if code is grpc.StatusCode.UNAVAILABLE else refusal(error).reason
        return "OK"


@pytest.fixture
async def client_ca(tmp_path: Path) -> Path:
    """The file of the CA that signs client certificates."""
    path = tmp_path / "clients.crt"
    path.write_bytes(AUTHORITY.pem)
    return path


async def test_only_tls_callers_that_trust_the_server_are_served(
    service: Service, admin_token: str, tmp_path: Path
) -> None:
    """In all other cases the token is not sent."""
    async with tls_server(service.database_url, tmp_path) as server:
        assert await outcome(server.port, admin_token, trust()) == "OK"
        assert await outcome(server.port, admin_token, None) == "UNAVAILABLE"
        assert await outcome(server.port, admin_token, trust(OTHER_AUTHORITY)) == "UNAVAILABLE"
        assert await outcome(server.port, admin_token, trust(), "pointbook.example") == "OK"
        assert await outcome(server.port, admin_token, trust(), "elsewhere.example") == "UNAVAILABLE"


async def test_client_ca_restricts_callers_to_its_certificates(
    service: Service, admin_token: str, tmp_path: Path, client_ca: Path
) -> None:
    """Another CA can be added to the file while the server runs."""
    async with tls_server(service.database_url, tmp_path, tls_client_ca_file=client_ca) as server:
        assert await outcome(server.port, admin_token, trust(identity=AUTHORITY.issue("till"))) == "OK"
        assert await outcome(server.port, admin_token, trust()) == "UNAVAILABLE"
        other = trust(identity=OTHER_AUTHORITY.issue("till"))
        assert await outcome(server.port, admin_token, other) == "UNAVAILABLE"
        replace(client_ca, AUTHORITY.pem + OTHER_AUTHORITY.pem)
        assert await outcome(server.port, admin_token, other) == "OK"


async def test_bound_token_looks_unknown_to_other_clients(
    service: Service, tmp_path: Path, client_ca: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names are compared exactly. The log names the token, once a minute."""
    by_name, by_uri = [
        await make_token(service.database_url, [ALL_MERCHANTS], list(Scope), client_names=[name])
        for name in ("till 7", "spiffe://shop.example/till")
    ]
    with_name = AUTHORITY.issue("till 7", names=["a.example"])
    truncated = AUTHORITY.issue("till 7\0.example", names=["till 7\0.example"])
    with_uri = AUTHORITY.issue("till 70", names=["till.shop.example"], uris=["spiffe://shop.example/till"])
    async with tls_server(service.database_url, tmp_path, tls_client_ca_file=client_ca) as server:
        assert await outcome(server.port, by_name, trust(identity=with_name)) == "OK"
        for _ in range(3):
            assert await outcome(server.port, by_name, trust(identity=with_uri)) == "TOKEN_INVALID"
        assert await outcome(server.port, by_uri, trust(identity=with_uri)) == "OK"
        assert await outcome(server.port, by_uri, trust(identity=with_name)) == "TOKEN_INVALID"
        assert await outcome(server.port, by_name, trust(identity=truncated)) == "TOKEN_INVALID"

    logged = capsys.readouterr()
    assert (logged.out + logged.err).count("token used by a client that it is not bound to") == 2
    # Without a client certificate there is no name to match.
    assert await outcome(service.server.port, by_name, None) == "TOKEN_INVALID"


async def test_resumed_sessions_verify_client_certificates_again(
    service: Service, tmp_path: Path, client_ca: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise an expired certificate would stay valid for days."""
    identity = AUTHORITY.issue("till").write(tmp_path, "till")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=AUTHORITY.pem.decode())
    context.load_cert_chain(*identity)
    context.set_alpn_protocols(["h2"])

    def connect(session: ssl.SSLSession | None) -> tuple[ssl.SSLSession | None, bool | None]:
        with (
            socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection,
            context.wrap_socket(connection, session=session) as wrapped,
        ):
            # The first bytes from the server include the session ticket.
            assert wrapped.recv(9)
            return wrapped.session, wrapped.session_reused

    async with tls_server(service.database_url, tmp_path, tls_client_ca_file=client_ca) as server:
        session, _ = await asyncio.to_thread(connect, None)
        session, resumed = await asyncio.to_thread(connect, session)
        monkeypatch.setattr(tls, "RESUMPTION_SECONDS", 0.0)
        _, resumed_late = await asyncio.to_thread(connect, session)

    assert (resumed, resumed_late) == (True, False)


async def test_renewed_certificates_are_served_without_a_failed_call(
    service: Service, admin_token: str, tmp_path: Path
) -> None:
    """Files are replaced one after the other, under calls on old and new connections."""
    done = asyncio.Event()
    outcomes: list[str] = []

    async def keep_connecting() -> None:
        while not done.is_set() and len(outcomes) < LOOP_CALLS_MAX:
            outcomes.append(await outcome(server.port, admin_token, trust()))

    async with (
        tls_server(service.database_url, tmp_path) as server,
        caller(server.port, admin_token, trust()) as connected,
    ):
        loops = [asyncio.create_task(keep_connecting()) for _ in range(4)]
        for _ in range(5):
            renewed = AUTHORITY.issue()
            renewed.write(tmp_path, "server")
            assert await asyncio.to_thread(served_serial, server.port) == serial_of(renewed.chain)
            await connected.access.GetCallerAccess(access_pb2.GetCallerAccessRequest(), timeout=10)
            expected = len(outcomes) + 8
            await until(lambda expected=expected: len(outcomes) >= expected)  # type: ignore[misc] # mypy infers no defaults
        done.set()
        await asyncio.gather(*loops)

    assert len(outcomes) >= 40
    assert set(outcomes) == {"OK"}


async def test_mismatching_files_leave_the_previous_certificate(
    service: Service, admin_token: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each kind of mismatch is logged once."""
    async with tls_server(service.database_url, tmp_path) as server:
        old = await asyncio.to_thread(served_serial, server.port)
        new = AUTHORITY.issue()
        for content in (new.chain, new.chain[:200], None):
            if content is None:
                (tmp_path / "server.crt").unlink()
            else:
                replace(tmp_path / "server.crt", content)
            for _ in range(3):
                assert await asyncio.to_thread(served_serial, server.port) == old
            assert await outcome(server.port, admin_token, trust()) == "OK"
        new.write(tmp_path, "server")
        assert await asyncio.to_thread(served_serial, server.port) == serial_of(new.chain)
        assert await outcome(server.port, admin_token, trust()) == "OK"

    logged = capsys.readouterr()
    assert (logged.out + logged.err).count("changed TLS files are invalid, still using the previous ones") == 3


async def test_metric_has_the_expiry_of_the_served_certificate(service: Service, tmp_path: Path) -> None:
    """NaN without TLS, since 0 would be 1970."""
    name = "pointbook_tls_certificate_expiry_timestamp_seconds"
    async with tls_server(service.database_url, tmp_path) as server:
        for _ in range(2):
            issued = AUTHORITY.issue()
            issued.write(tmp_path, "server")
            expires_at = x509.load_pem_x509_certificate(issued.chain).not_valid_after_utc
            assert server.metrics.registry.get_sample_value(name) == expires_at.timestamp()

    assert math.isnan(service.server.metrics.registry.get_sample_value(name) or 0)


async def test_versions_before_tls_1_2_are_refused(service: Service, tmp_path: Path) -> None:
    """The same client connects to another server with TLS 1.1."""
    async with tls_server(service.database_url, tmp_path) as server:
        versions = [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]
        negotiated = [await asyncio.to_thread(handshake, server.port, version, AUTHORITY) for version in versions]
    old_server = await asyncio.start_server(
        lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=old_context(AUTHORITY, tmp_path)
    )
    async with old_server:
        old_port = old_server.sockets[0].getsockname()[1]
        assert await asyncio.to_thread(handshake, old_port, ssl.TLSVersion.TLSv1_1, AUTHORITY) == "TLSv1.1"

    assert negotiated == ["", "", "TLSv1.2", "TLSv1.3"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("server.crt", b"no PEM", "POINTBOOK_TLS_CERT_FILE: the file contains no certificate in PEM"),
        ("server.crt", None, "POINTBOOK_TLS_CERT_FILE: cannot read"),
        ("server.key", b"no PEM", "POINTBOOK_TLS_KEY_FILE: the file contains no private key in PEM"),
        ("server.key", AUTHORITY.issue().key, "POINTBOOK_TLS_KEY_FILE: the key does not belong to"),
        ("clients.crt", b"", "POINTBOOK_TLS_CLIENT_CA_FILE: the file contains no certificate in PEM"),
    ],
)
async def test_invalid_files_prevent_the_start_and_are_named(
    service: Service, tmp_path: Path, *, name: str, content: bytes | None, message: str
) -> None:
    cert, key = AUTHORITY.issue().write(tmp_path, "server")
    client_ca = tmp_path / "clients.crt"
    client_ca.write_bytes(AUTHORITY.pem)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    settings = server_settings(tls_cert_file=cert, tls_key_file=key, tls_client_ca_file=client_ca)

    with pytest.raises(SettingError, match=message):
        Server(settings, service.database_url, senders={})


async def test_probe_with_tls_of_a_server_without_tls_names_the_cause(service: Service, tmp_path: Path) -> None:
    """The certificate was configured after the server's start."""
    cert, key = AUTHORITY.issue().write(tmp_path, "server")
    probe = ProbeSettings(grpc_address=f"127.0.0.1:{service.server.port}", tls_cert_file=cert, tls_key_file=key)
    serving, cause = await asyncio.to_thread(probe_server, probe)

    assert (serving, "SSL" in cause) == (False, True)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
async def test_documented_openssl_commands_make_working_certificates(service: Service, tmp_path: Path) -> None:
    """Including the server's own probe, and a token bound to a name."""
    page = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    (lines,) = re.findall(r"^```bash\n(openssl .*?)^```$", page, re.MULTILINE | re.DOTALL)
    process = await asyncio.create_subprocess_exec(
        "bash", "-euc", lines, cwd=tmp_path, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    assert await process.wait() == 0
    token = await make_token(service.database_url, [ALL_MERCHANTS], list(Scope), client_names=["shim.internal"])
    files: dict[str, Any] = {"tls_cert_file": tmp_path / "server.crt", "tls_key_file": tmp_path / "server.key"}
    settings = server_settings(**files, tls_client_ca_file=tmp_path / "ca.crt")
    ca, chain, key = ((tmp_path / name).read_bytes() for name in ("ca.crt", "shim.crt", "shim.key"))
    server = Server(settings, service.database_url, senders={})
    await server.start()
    try:
        credentials = grpc.ssl_channel_credentials(ca, key, chain)
        assert await outcome(server.port, token, credentials, "server.internal") == "OK"
        address, ca_file = f"127.0.0.1:{server.port}", tmp_path / "ca.crt"
        probe = ProbeSettings(grpc_address=address, **files, tls_client_ca_file=ca_file)
        assert await asyncio.to_thread(probe_server, probe) == (True, "")
        other_name = ProbeSettings(grpc_address=address, server_ca_file=ca_file, server_name="elsewhere.example")
        serving, cause = await asyncio.to_thread(probe_server, other_name)
        assert (serving, "Hostname Verification Check failed" in cause) == (False, True)
    finally:
        await server.stop()
