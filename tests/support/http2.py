"""HTTP/2 frames for clients that misuse a gRPC server.

No client library sends these.

Of the header compression only plain literals are used.

Source: https://www.rfc-editor.org/rfc/rfc9113 and https://www.rfc-editor.org/rfc/rfc7541
"""

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Iterable, Mapping
from enum import IntEnum

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_HEADER_BYTES = 9
FRAME_BYTES_MAX = 16_384
WINDOW_BYTES = 65_535
ACK = END_STREAM = 0x1
END_HEADERS = 0x4
HEADER_TABLE_SIZE = 0x1
INITIAL_WINDOW_SIZE = 0x4
HEALTH_CHECK = "/grpc.health.v1.Health/Check"
HEALTH_WATCH = "/grpc.health.v1.Health/Watch"


class Frame(IntEnum):
    """The frame types."""

    DATA = 0
    HEADERS = 1
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


def frame(kind: Frame, payload: bytes = b"", *, flags: int = 0, stream_id: int = 0) -> bytes:
    """Return an encoded frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream_id) + payload


def settings_frame(settings: Mapping[int, int]) -> bytes:
    """Return a SETTINGS frame."""
    return frame(Frame.SETTINGS, b"".join(struct.pack(">HI", *item) for item in settings.items()))


async def read_frame(reader: asyncio.StreamReader) -> tuple[int, int, int, bytes]:
    """Return the type, the flags, the stream and the payload of the next frame.

    Raises IncompleteReadError at the end, and OSError.
    """
    header = await reader.readexactly(FRAME_HEADER_BYTES)
    payload = await reader.readexactly(int.from_bytes(header[:3]))
    return header[3], header[4], int.from_bytes(header[5:]) & 0x7FFF_FFFF, payload


def header_block(headers: Iterable[tuple[str, str]]) -> bytes:
    """Return a header block of literals that use no table."""
    return b"".join(b"\x00" + _literal(name) + _literal(value) for name, value in headers)


def call_headers(method: str, metadata: Iterable[tuple[str, str]] = ()) -> bytes:
    """Return the header block of a call of a method, such as HEALTH_CHECK."""
    return header_block(
        [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", method),
            (":authority", "localhost"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            *metadata,
        ]
    )


def grpc_message(payload: bytes = b"", *, declared_bytes: int | None = None) -> bytes:
    """Return a gRPC message. One that declares more bytes than it has never ends."""
    return b"\x00" + struct.pack(">I", len(payload) if declared_bytes is None else declared_bytes) + payload


def header_value(block: bytes, name: str) -> str:
    """Return the value of a header, or an empty text.

    The server must send literals: set HEADER_TABLE_SIZE to 0.
    """
    start = block.find(name.encode()) + len(name)
    return block[start + 1 : start + 1 + block[start]].decode() if start >= len(name) else ""


@contextlib.asynccontextmanager
async def dying_server() -> AsyncIterator[tuple[int, asyncio.Event]]:
    """Run a server that ends at its first call, as if it was killed.

    Yields its port, and an event that is set when it has ended.
    """
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(settings_frame({}))
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readexactly(len(PREFACE))
            while (await read_frame(reader))[0] != Frame.HEADERS:
                pass
            ended.set()
        server.close()
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], ended
    finally:
        server.close()


class Http2Connection:
    """A connection that obeys the server's flow control and no other rule.

    With `reads=False` nothing is read after the preface, so the server's data stays in the socket buffers.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, reads: bool) -> None:
        self._reader, self._writer = reader, writer
        self._stream_id = -1
        self._initial_window = WINDOW_BYTES
        self._windows: dict[int, int] = {0: WINDOW_BYTES}
        self._window_grew = asyncio.Event()
        self.received: dict[int, bytes] = {}
        """The DATA by stream."""
        self.trailers: dict[int, bytes] = {}
        """The last header block of each stream that the server has ended."""
        self.ended: set[int] = set()
        """The streams that the server has ended."""
        self.closed = asyncio.Event()
        """Set when the server has closed the connection."""
        self.stream_ended = asyncio.Event()
        """Set when any stream ends. Clear it before waiting for the next one."""
        self._reading = asyncio.create_task(self._read()) if reads else None

    @classmethod
    async def open(
        cls, address: str, *, settings: Mapping[int, int] | None = None, reads: bool = True
    ) -> "Http2Connection":
        """Connect, and send the preface and settings. Raises OSError."""
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        writer.write(PREFACE + settings_frame(settings or {}))
        return cls(reader, writer, reads=reads)

    @property
    def started(self) -> int:
        """The number of started streams."""
        return (self._stream_id + 1) // 2

    async def close(self) -> None:
        """Close the connection at once."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        self._writer.transport.abort()

    async def start(self, method: str, metadata: Iterable[tuple[str, str]] = ()) -> int:
        """Start a call, and return the id of its stream. Raises OSError."""
        self._stream_id += 2
        stream_id = self._stream_id
        self._windows[stream_id] = self._initial_window
        block = call_headers(method, metadata)
        self._writer.write(frame(Frame.HEADERS, block, flags=END_HEADERS, stream_id=stream_id))
        await self._writer.drain()
        return stream_id

    async def call(self, method: str, message: bytes = b"", metadata: Iterable[tuple[str, str]] = ()) -> int:
        """Start a call with its message, and return its stream's id. Raises OSError."""
        stream_id = await self.start(method, metadata)
        await self.send(stream_id, grpc_message(message), end=True)
        return stream_id

    async def send(self, stream_id: int, data: bytes, *, end: bool = False) -> None:
        """Send DATA as fast as the server's windows allow.

        Raises OSError if the stream or connection has ended.
        """
        sent = 0
        while sent < len(data) or (end and not data):
            size = await self._reserve_window(stream_id, min(len(data) - sent, FRAME_BYTES_MAX))
            flags = END_STREAM if end and sent + size == len(data) else 0
            self._writer.write(frame(Frame.DATA, data[sent : sent + size], flags=flags, stream_id=stream_id))
            await self._writer.drain()
            sent += size
            if not data:
                return

    async def reset(self, stream_id: int, code: int = 8) -> None:
        """Cancel a call. Raises OSError."""
        self._writer.write(frame(Frame.RST_STREAM, struct.pack(">I", code), stream_id=stream_id))
        await self._writer.drain()

    async def write(self, data: bytes) -> None:
        """Send raw bytes. Raises OSError."""
        self._writer.write(data)
        await self._writer.drain()

    async def _reserve_window(self, stream_id: int, size_max: int) -> int:
        """Wait until the windows allow DATA, and return how many bytes of it."""
        while True:
            if self.closed.is_set() or stream_id in self.ended:
                raise ConnectionResetError
            size = min(size_max, self._windows[0], self._windows[stream_id])
            if size > 0 or size_max == 0:
                self._windows[0] -= size
                self._windows[stream_id] -= size
                return size
            self._window_grew.clear()
            await self._window_grew.wait()

    async def _read(self) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                self._take(*await read_frame(self._reader))
        self.closed.set()
        self._window_grew.set()
        self.stream_ended.set()

    def _take(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == Frame.SETTINGS and not flags & ACK:
            for number, value in struct.iter_unpack(">HI", payload):
                if number == INITIAL_WINDOW_SIZE:
                    self._set_initial_window(value)
            self._writer.write(frame(Frame.SETTINGS, flags=ACK))
        elif kind == Frame.PING and not flags & ACK:
            self._writer.write(frame(Frame.PING, payload, flags=ACK))
        elif kind == Frame.WINDOW_UPDATE:
            self._windows[stream_id] = self._windows.get(stream_id, 0) + int.from_bytes(payload)
            self._window_grew.set()
        elif kind == Frame.DATA:
            self.received[stream_id] = self.received.get(stream_id, b"") + payload
            if payload:
                self._writer.write(frame(Frame.WINDOW_UPDATE, struct.pack(">I", len(payload))))
        if kind == Frame.HEADERS and flags & END_STREAM:
            self.trailers[stream_id] = payload
        if kind == Frame.RST_STREAM or (kind in {Frame.DATA, Frame.HEADERS} and flags & END_STREAM):
            self.ended.add(stream_id)
            self._windows.pop(stream_id, None)
            self.stream_ended.set()
            self._window_grew.set()

    def _set_initial_window(self, initial_window: int) -> None:
        growth, self._initial_window = initial_window - self._initial_window, initial_window
        for stream_id in self._windows.keys() - {0}:
            self._windows[stream_id] += growth
        self._window_grew.set()


@contextlib.asynccontextmanager
async def http2(
    address: str, count: int = 1, *, settings: Mapping[int, int] | None = None, reads: bool = True
) -> AsyncIterator[list[Http2Connection]]:
    """Open a number of connections, and close them after the block. Raises OSError."""
    connections: list[Http2Connection] = []
    try:
        for _ in range(count):
            connections.append(await Http2Connection.open(address, settings=settings, reads=reads))  # noqa: PERF401 - close the opened ones even if one fails
        yield connections
    finally:
        for connection in connections:
            await connection.close()


def _literal(text: str) -> bytes:
    raw = text.encode()
    if len(raw) < 127:
        return bytes((len(raw),)) + raw
    rest, size = len(raw) - 127, bytearray((127,))
    while rest >= 128:
        size.append(rest % 128 + 128)
        rest //= 128
    size.append(rest)
    return bytes(size) + raw
