"""A proxy of a server that loses requests or answers, stalls and cuts connections."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field


@dataclass
class Direction:
    """What happens to the data of one direction."""

    flow: asyncio.Event = field(default_factory=asyncio.Event)
    """Data waits until it is set, as it is at first."""
    is_lost: bool = False
    """Whether data is dropped. A connection that has lost some forwards no more."""

    def __post_init__(self) -> None:
        self.flow.set()


class ServerProxy:
    """Forwards a local port to that of a server."""

    def __init__(self, port: int) -> None:
        self.target = port
        """The server of new connections."""
        self.requests = Direction()
        self.answers = Direction()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._forwards: set[asyncio.Task[None]] = set()
        self.port = 0

    @property
    def address(self) -> str:
        """The address of this proxy."""
        return f"127.0.0.1:{self.port}"

    async def open(self) -> None:
        """Accept connections."""
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def abort(self) -> None:
        """End all connections at once, as the kill of a server does."""
        for writer in tuple(self._writers):
            writer.transport.abort()

    async def close(self) -> None:
        """End all connections, and refuse new ones."""
        if self._server is not None:
            self._server.close()
        self.heal()
        self.abort()
        await asyncio.gather(*self._forwards, return_exceptions=True)

    def heal(self) -> None:
        """Forward everything again, and delayed data at once.

        Ends connections that have lost some.
        """
        if self.requests.is_lost or self.answers.is_lost:
            self.abort()
        for direction in (self.requests, self.answers):
            direction.is_lost = False
            direction.flow.set()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._forwards.add(task)
        self._writers.add(writer)
        try:
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.target)
            self._writers.add(server_writer)
            await asyncio.gather(
                self._pump(reader, server_writer, self.requests), self._pump(server_reader, writer, self.answers)
            )
            self._writers.discard(server_writer)
        except OSError:
            writer.transport.abort()
        finally:
            self._writers.discard(writer)
            self._forwards.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction) -> None:
        has_lost = False
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                await direction.flow.wait()
                has_lost |= direction.is_lost
                if not has_lost:
                    writer.write(data)
                    await writer.drain()
        writer.close()


@contextlib.asynccontextmanager
async def server_proxy(port: int) -> AsyncIterator[ServerProxy]:
    """Run a proxy of a server during the block."""
    proxy = ServerProxy(port)
    await proxy.open()
    try:
        yield proxy
    finally:
        await proxy.close()
