"""Points updates at a fixed rate, sent by a process of their own.

Calls start when they are due, whether or not earlier ones have ended, as calls of many independent callers do. The
client speaks HTTP/2 itself: a call costs it a fraction of what it costs the server, so that one core can overload
another.

Run as a program, it reads a job per line of JSON, runs it, and prints a report as a line of JSON.
"""

import asyncio
import gc
import itertools
import json
import os
import struct
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass

import uvloop

from pointbook.v1 import points_pb2
from support.http2 import (
    ACK,
    END_HEADERS,
    END_STREAM,
    FRAME_HEADER_BYTES,
    HEADER_TABLE_SIZE,
    INITIAL_WINDOW_SIZE,
    PREFACE,
    WINDOW_BYTES,
    Frame,
    call_headers,
    frame,
    grpc_message,
    header_value,
    settings_frame,
)

APPLY = "/pointbook.v1.PointsService/ApplyPointsUpdate"
MAX_CONCURRENT_STREAMS = 0x3
LARGE_WINDOW = 1 << 30
TICK_SECONDS = 0.001
DRAIN_SECONDS_MAX = 20.0
POINTS = 20
OK = "OK"
CODES = {"0": OK, "1": "CANCELLED", "4": "DEADLINE_EXCEEDED", "8": "RESOURCE_EXHAUSTED", "14": "UNAVAILABLE"}


@dataclass(frozen=True, slots=True)
class Job:
    """Calls for a number of seconds: at a fixed rate, or a fixed number at a time."""

    seconds: float
    rate: float = 0.0
    in_flight: int = 0


@dataclass(frozen=True, slots=True)
class Latencies:
    """The latencies of calls with the same result.

    They count from the time when a call was due, or from when it was sent.
    """

    calls: int
    p50_ms: float
    p99_ms: float
    sent_p50_ms: float
    sent_p99_ms: float


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The results of a job by name: OK, or the code and message of a refusal."""

    by_result: Mapping[str, Latencies]
    goodput: float
    """The calls per second that were accepted while the job ran, without those that ended later."""
    late_p99_ms: float
    """How late the client itself was with its calls."""

    @property
    def accepted(self) -> Latencies:
        """The latencies of accepted calls."""
        return self.by_result[OK]

    @property
    def refused(self) -> dict[str, Latencies]:
        """The latencies of refused calls, by code and message."""
        return {result: each for result, each in self.by_result.items() if result != OK}


class OpenLoopClient:
    """The client's process, controlled by a test."""

    def __init__(self, process: Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    async def run(self, job: Job) -> LoadReport:
        """Run a job, and return its report."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
        async with asyncio.timeout(job.seconds + 2 * DRAIN_SECONDS_MAX):
            line = await self._process.stdout.readline()
        assert line, "the client ended; its error is printed above"
        values = json.loads(line)
        by_result = {result: Latencies(**each) for result, each in values["by_result"].items()}
        return LoadReport(**{**values, "by_result": by_result})


@asynccontextmanager
async def run_open_loop_client(
    address: str, tokens: Sequence[str], merchant_id: str, store_id: str, *, accounts: int, connections: int
) -> AsyncIterator[OpenLoopClient]:
    """Run a client during the block."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {"TOKENS": ",".join(tokens), "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = (address, merchant_id, store_id, str(accounts), str(connections))
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, *arguments, stdin=PIPE, stdout=PIPE, env=environment
    )
    try:
        yield OpenLoopClient(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


class _Call:
    """A call, its account, and the times when it was due and sent."""

    __slots__ = ("account", "due", "sent")

    def __init__(self, account: int, due: float) -> None:
        self.account, self.due, self.sent = account, due, due


class _Connection(asyncio.Protocol):
    """An HTTP/2 connection with calls in flight."""

    def __init__(self, load: "_Load", headers: bytes) -> None:
        self._load, self._headers = load, headers
        self._buffer = bytearray()
        self._out: list[bytes] = []
        self._window = WINDOW_BYTES
        self._stream_id = -1
        self._streams_max = 0
        self._calls: dict[int, _Call] = {}
        self.is_open = True
        self.has_settings = asyncio.Event()
        """Whether the server has sent how many calls it takes at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        settings = settings_frame({HEADER_TABLE_SIZE: 0, INITIAL_WINDOW_SIZE: LARGE_WINDOW})
        transport.write(PREFACE + settings + frame(Frame.WINDOW_UPDATE, struct.pack(">I", LARGE_WINDOW)))  # type: ignore[attr-defined]

    def connection_lost(self, _error: Exception | None) -> None:
        self._end()
        for call in self._calls.values():
            self._load.end(call, "connection closed")
        self._calls.clear()

    def has_capacity(self) -> bool:
        """Return whether one more call may be sent."""
        return self.is_open and len(self._calls) < self._streams_max and self._window > 1_000

    def send(self, call: _Call, body: bytes) -> None:
        """Send a call with the next flush."""
        self._stream_id += 2
        self._calls[self._stream_id] = call
        self._window -= len(body)
        self._out.append(frame(Frame.HEADERS, self._headers, flags=END_HEADERS, stream_id=self._stream_id))
        self._out.append(frame(Frame.DATA, body, flags=END_STREAM, stream_id=self._stream_id))

    def flush(self) -> None:
        """Write what was sent."""
        if self._out:
            self._transport.write(b"".join(self._out))  # type: ignore[attr-defined]
            self._out.clear()

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= FRAME_HEADER_BYTES:
            end = start + FRAME_HEADER_BYTES + int.from_bytes(buffer[start : start + 3])
            if len(buffer) < end:
                break
            stream_id = int.from_bytes(buffer[start + 5 : start + 9]) & 0x7FFF_FFFF
            payload = bytes(buffer[start + FRAME_HEADER_BYTES : end])
            self._take(buffer[start + 3], buffer[start + 4], stream_id, payload)
            start = end
        del buffer[:start]
        self.flush()  # also if this connection takes no further calls
        self._load.send_waiting()

    def _take(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == Frame.HEADERS:
            if flags & END_STREAM and stream_id in self._calls:
                self._load.end(self._calls.pop(stream_id), _result(payload))
        elif kind == Frame.WINDOW_UPDATE:
            if stream_id == 0:
                self._window += int.from_bytes(payload)
        elif kind == Frame.SETTINGS and not flags & ACK:
            values = dict(struct.iter_unpack(">HI", payload))
            self._streams_max = values.get(MAX_CONCURRENT_STREAMS, self._streams_max)
            self._out.append(frame(Frame.SETTINGS, flags=ACK))
            self.has_settings.set()
        elif kind == Frame.PING and not flags & ACK:
            self._out.append(frame(Frame.PING, payload, flags=ACK))
        elif kind == Frame.RST_STREAM and stream_id in self._calls:
            self._load.end(self._calls.pop(stream_id), f"RST_STREAM {int.from_bytes(payload)}")
        elif kind == Frame.GOAWAY:
            self._end()

    def _end(self) -> None:
        """Use another connection for further calls."""
        self.has_settings.set()  # None will come.
        if self.is_open:
            self.is_open = False
            self._load.replace(self)


class _Load:
    """Connections, and the calls of one job after the other."""

    def __init__(self, address: str, tokens: Sequence[str], merchant_id: str, store_id: str, accounts: int) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._headers = itertools.cycle(
            call_headers(APPLY, [("authorization", f"Bearer {token}"), ("grpc-timeout", "10S")]) for token in tokens
        )
        self._update = points_pb2.PointsUpdate(merchant_id=merchant_id, store_id=store_id, updated_value=POINTS)
        self._has_points = bytearray(accounts)
        self._is_busy = bytearray(accounts)
        self._accounts = itertools.cycle(range(accounts))
        self._event_ids = map(f"{os.urandom(6).hex()}-{{}}".format, itertools.count())
        self._connections: list[_Connection] = []
        self._turn = 0
        self._waiting: deque[_Call] = deque()
        self._in_flight = 0
        self._ends_at = 0.0
        self._is_closed_loop = False
        self._in_time = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._results: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        self._late: list[float] = []

    async def connect(self) -> None:
        """Open one more connection."""
        headers = next(self._headers)
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: _Connection(self, headers), self._host, self._port
        )
        await connection.has_settings.wait()
        if connection.is_open:
            self._connections.append(connection)

    def replace(self, connection: _Connection) -> None:
        """Open a connection in place of one that the server ends."""
        if connection in self._connections:
            self._connections.remove(connection)
        task = asyncio.get_running_loop().create_task(self.connect())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def run(self, job: Job) -> LoadReport:
        """Run a job until all its calls have ended."""
        self._results.clear()
        self._late.clear()
        self._in_time = 0
        started = time.perf_counter()
        self._ends_at = started + job.seconds
        self._is_closed_loop = not job.rate
        if job.rate:
            await self._send_at_rate(job, started)
        else:
            self._waiting.extend(self._new_call(started) for _ in range(job.in_flight))
            self.send_waiting()
            await asyncio.sleep(job.seconds)
        async with asyncio.timeout(DRAIN_SECONDS_MAX):
            while self._in_flight or self._waiting:  # noqa: ASYNC110 - polling costs a call nothing
                await asyncio.sleep(0.01)
        late = sorted(self._late)
        by_result = {result: _latencies(times) for result, times in self._results.items()}
        return LoadReport(by_result, self._in_time / job.seconds, 1_000 * late[len(late) * 99 // 100])

    async def _send_at_rate(self, job: Job, started: float) -> None:
        count = 0
        total = int(job.rate * job.seconds)
        while count < total:
            now = time.perf_counter()
            due = min(total, int((now - started) * job.rate) + 1)
            self._waiting.extend(self._new_call(started + each / job.rate) for each in range(count, due))
            count = due
            self.send_waiting()
            await asyncio.sleep(TICK_SECONDS)

    def send_waiting(self) -> None:
        """Send the calls that are due, as far as the connections allow."""
        while self._waiting and (connection := self._next_connection()) is not None:
            call = self._waiting.popleft()
            call.sent = time.perf_counter()
            self._late.append(call.sent - call.due)
            self._in_flight += 1
            connection.send(call, self._request(call.account))
        for connection in self._connections:
            connection.flush()

    def _new_call(self, due: float) -> _Call:
        """Return a call for an account without a call in flight."""
        account = next(account for account in self._accounts if not self._is_busy[account])
        self._is_busy[account] = True
        return _Call(account, due)

    def _next_connection(self) -> _Connection | None:
        count = len(self._connections)
        for number in range(self._turn, self._turn + count):
            connection = self._connections[number % count]
            if connection.has_capacity():
                self._turn = (number + 1) % count
                return connection
        return None

    def _request(self, account: int) -> bytes:
        update = self._update
        update.event_id = next(self._event_ids)
        update.buyer_id = f"buyer-{account}"
        if self._has_points[account]:
            update.update_type = points_pb2.POINTS_UPDATE_TYPE_DECREASE
            update.updated_scene = points_pb2.POINTS_UPDATE_SCENE_REDEEM_PRODUCTS
        else:
            update.update_type = points_pb2.POINTS_UPDATE_TYPE_INCREASE
            update.updated_scene = points_pb2.POINTS_UPDATE_SCENE_SUCCESSFUL_ORDERS
        update.updated_at.FromMilliseconds(int(time.time() * 1_000))
        return grpc_message(points_pb2.ApplyPointsUpdateRequest(update=update).SerializeToString())

    def end(self, call: _Call, result: str) -> None:
        """Record the result of a call."""
        now = time.perf_counter()
        self._in_flight -= 1
        self._is_busy[call.account] = False
        self._results[result].append((now - call.due, now - call.sent))
        if result == OK:
            self._has_points[call.account] ^= 1
            self._in_time += now <= self._ends_at
        if self._is_closed_loop and now < self._ends_at:
            self._waiting.append(self._new_call(now))


def _result(trailers: bytes) -> str:
    """Return OK, or the code of a refused call and its message."""
    number = header_value(trailers, "grpc-status")
    code = CODES.get(number, number)
    return code if code == OK else f"{code}: {header_value(trailers, 'grpc-message')}"


def _latencies(times: Sequence[tuple[float, float]]) -> Latencies:
    columns: Iterator[list[float]] = (sorted(column) for column in zip(*times, strict=True))
    (p50, p99), (sent_p50, sent_p99) = (
        (1_000 * column[len(column) // 2], 1_000 * column[len(column) * 99 // 100]) for column in columns
    )
    return Latencies(len(times), p50, p99, sent_p50, sent_p99)


async def _main(address: str, merchant_id: str, store_id: str, accounts: int, connections: int) -> None:
    load = _Load(address, os.environ["TOKENS"].split(","), merchant_id, store_id, accounts)
    for _ in range(connections):
        await load.connect()
    gc.disable()
    while line := await asyncio.to_thread(sys.stdin.readline):
        report = await load.run(Job(**json.loads(line)))
        print(json.dumps(asdict(report)), flush=True)  # noqa: T201 - the parent process reads this
        gc.collect()


if __name__ == "__main__":
    address, merchant_id, store_id, accounts, connections = sys.argv[1:]
    uvloop.run(_main(address, merchant_id, store_id, int(accounts), int(connections)))
