"""A proxy that can cut, freeze, slow down or redirect a database's connections."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from urllib.parse import parse_qs, urlsplit


class DatabaseProxy:
    """Forwards a local port to the Unix socket of a database."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._user, self._database = parts.username, parts.path
        self.redirect(url)
        self._flows = [_flowing()]
        """Events that are set while connections forward: the last for new ones, the others for abandoned ones."""
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._forwards: set[asyncio.Task[None]] = set()
        self._port = 0
        self.delay_seconds = 0.0
        """The delay of forwarded data, in each direction."""
        self.drops = False
        """Whether connections are accepted and closed, as by a balancer whose database is starting up."""

    @property
    def url(self) -> str:
        """The URL of the database through this proxy."""
        return f"postgresql://{self._user}@127.0.0.1:{self._port}{self._database}"

    def redirect(self, url: str) -> None:
        """Forward new connections to the server of another URL."""
        query = {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
        self._socket = f"{query['host']}/.s.PGSQL.{query['port']}"

    async def restore(self) -> None:
        """Accept connections again."""
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        """Close all connections, and refuse new ones."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        for flow in self._flows:
            flow.set()
        # Wait until both ends have noticed.
        await asyncio.gather(*self._forwards, return_exceptions=True)

    def freeze(self) -> None:
        """Forward nothing, but keep connections open and accept new ones."""
        self._flows[-1].clear()

    def thaw(self) -> None:
        """Forward delayed and new data."""
        self._flows[-1].set()

    def abandon(self) -> None:
        """Freeze current connections for good, but forward new ones.

        This is a failover whose old connections get no RST.
        """
        self.freeze()
        self._flows.append(_flowing())

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.drops:
            writer.close()
            return
        flow = self._flows[-1]
        database_reader, database_writer = await asyncio.open_unix_connection(self._socket)
        self._writers |= {writer, database_writer}
        forward = asyncio.ensure_future(
            _both(self._pump(reader, database_writer, flow), self._pump(database_reader, writer, flow))
        )
        self._forwards.add(forward)
        await asyncio.wait([forward])
        self._forwards.discard(forward)
        self._writers -= {writer, database_writer}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flow: asyncio.Event) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                if self.delay_seconds:
                    await asyncio.sleep(self.delay_seconds)
                await flow.wait()
                writer.write(data)
                await writer.drain()
        writer.close()


def _flowing() -> asyncio.Event:
    flow = asyncio.Event()
    flow.set()
    return flow


async def _both(one: Coroutine[None, None, None], other: Coroutine[None, None, None]) -> None:
    await asyncio.gather(one, other)


@contextlib.asynccontextmanager
async def proxied(url: str) -> AsyncIterator[DatabaseProxy]:
    """Run a proxy of a database."""
    proxy = DatabaseProxy(url)
    await proxy.restore()
    try:
        yield proxy
    finally:
        await proxy.cut()
