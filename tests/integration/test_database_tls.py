"""TLS to a remote database: no login before the server's name is verified."""

import asyncio
import ssl
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, urlsplit

import pytest
from sqlalchemy import text

from pointbook_server.db.database import Database, Statement
from pointbook_server.errors import PointbookError
from pointbook_server.reasons import Reason
from support.certificates import loopback_tls

SSL_REQUEST = bytes.fromhex("0000000804d2162f")
SELECT_ONE = Statement(text("SELECT 1 AS one"))


class TlsGateway:
    """Negotiates TLS as PostgreSQL does, and forwards to a database's Unix socket."""

    def __init__(self, url: str, context: ssl.SSLContext | None, host: str = "127.0.0.1") -> None:
        query = {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
        self._socket = f"{query['host']}/.s.PGSQL.{query['port']}"
        self._context = context
        self._host = host
        self.plaintext = b""
        """The bytes received before TLS."""
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, self._host, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.plaintext += await reader.read(4_096)
        writer.write(b"S" if self._context else b"N")
        await writer.drain()
        if self._context is None:
            # A login in plaintext would arrive here.
            self.plaintext += await reader.read(4_096)
            writer.close()
            return
        try:
            await writer.start_tls(self._context)
        except (ssl.SSLError, OSError):
            return
        database_reader, database_writer = await asyncio.open_unix_connection(self._socket)
        await asyncio.gather(_pump(reader, database_writer), _pump(database_reader, writer))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
    writer.close()


def verified(url: str, port: int, trusted: Path, host: str = "localhost") -> str:
    """Return the URL of a database behind a gateway whose name must be verified."""
    parts = urlsplit(url)
    query = f"sslmode=verify-full&sslrootcert={trusted}"
    return f"postgresql://{parts.username}:hidden@{host}:{port}{parts.path}?{query}"


async def select_one(url: str) -> int:
    """Select 1 from a database."""
    database = Database(url, pool_size=1)
    try:
        async with database.autocommit() as connection:
            row = await connection.fetch_one(SELECT_ONE)
            assert row is not None
            return int(row.one)
    finally:
        await database.dispose()


async def test_login_to_a_verified_server_is_encrypted(database_url: str, tmp_path: Path) -> None:
    context, trusted = loopback_tls(tmp_path)
    async with TlsGateway(database_url, context) as gateway:
        assert await select_one(verified(database_url, gateway.port, trusted)) == 1

    assert gateway.plaintext == SSL_REQUEST


async def test_server_without_tls_gets_no_login(database_url: str, tmp_path: Path) -> None:
    """Neither user name nor password is sent in plaintext."""
    _, trusted = loopback_tls(tmp_path)
    async with TlsGateway(database_url, None) as gateway:
        with pytest.raises(PointbookError) as caught:
            await select_one(verified(database_url, gateway.port, trusted))

    assert caught.value.reason is Reason.DATABASE_UNAVAILABLE
    assert gateway.plaintext == SSL_REQUEST


@pytest.mark.parametrize("mismatch", ["authority", "name"])
async def test_unverified_server_gets_no_login(database_url: str, tmp_path: Path, mismatch: str) -> None:
    context, trusted = loopback_tls(tmp_path)
    if mismatch == "authority":
        (tmp_path / "other").mkdir()
        _, trusted = loopback_tls(tmp_path / "other")
    # The certificate is for localhost and 127.0.0.1.
    host = "127.0.0.2" if mismatch == "name" else "127.0.0.1"
    async with TlsGateway(database_url, context, host) as gateway:
        with pytest.raises(PointbookError) as caught:
            await select_one(verified(database_url, gateway.port, trusted, host))

    assert caught.value.reason is Reason.DATABASE_UNAVAILABLE
    assert gateway.plaintext == SSL_REQUEST
