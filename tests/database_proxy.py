"""A way to a database that a test can cut, and mend again."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from urllib.parse import parse_qs, urlsplit


class DatabaseProxy:
    """Forwards a local port to the Unix socket of a database."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        self._socket = f"{query['host']}/.s.PGSQL.{query['port']}"
        self._user, self._database = parts.username, parts.path
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._forwards: set[asyncio.Task[None]] = set()
        self._port = 0
        self.drops = False
        """Whether connections are accepted and then closed, as by a database that is starting up behind a balancer."""

    @property
    def url(self) -> str:
        """The database's URL by this way."""
        return f"postgresql://{self._user}@127.0.0.1:{self._port}{self._database}"

    async def mend(self) -> None:
        """Let connections through."""
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        """Close all connections, and refuse new ones."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        # Both ends shall have noticed when this returns.
        await asyncio.gather(*self._forwards, return_exceptions=True)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.drops:
            writer.close()
            return
        database_reader, database_writer = await asyncio.open_unix_connection(self._socket)
        self._writers |= {writer, database_writer}
        forward = asyncio.ensure_future(_both(_pump(reader, database_writer), _pump(database_reader, writer)))
        self._forwards.add(forward)
        await asyncio.wait([forward])
        self._forwards.discard(forward)
        self._writers -= {writer, database_writer}


async def _both(one: Coroutine[None, None, None], other: Coroutine[None, None, None]) -> None:
    await asyncio.gather(one, other)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def proxied(url: str) -> AsyncIterator[DatabaseProxy]:
    """Run a proxy of a database."""
    proxy = DatabaseProxy(url)
    await proxy.mend()
    yield proxy
    await proxy.cut()
