"""The state of processes, as a monitor sees it: health, signals, children."""

import fcntl
import os
import signal
from collections.abc import Iterable
from pathlib import Path

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support.http_clients import http_client


async def grpc_health(address: str, seconds: float = 2.0) -> str:
    """Return a gRPC server's health (SERVING, NOT_SERVING), or the code of the error."""
    async with grpc.aio.insecure_channel(address) as channel:
        try:
            response = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=seconds)
        except grpc.aio.AioRpcError as error:
            return error.code().name
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))


async def http_get(url: str) -> int:
    """Return the status of a GET request, or 0 without a server."""
    async with http_client(timeout=5.0) as client:
        try:
            return (await client.get(url)).status_code
        except httpx.TransportError:
            return 0


async def http_text(url: str) -> str:
    """Return the text of a GET request that succeeds."""
    async with http_client(timeout=5.0) as client:
        return (await client.get(url)).raise_for_status().text


def handles_sigterm(pid: int) -> bool:
    """Return whether a process handles SIGTERM. Python does once its event loop runs."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def is_alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    return _state(pid) not in {"", "Z"}


def zombies(pids: Iterable[int]) -> list[int]:
    """Return the processes that have ended and whose parent has not waited for them."""
    return [pid for pid in pids if _state(pid) == "Z"]


def children_of(pid: int) -> list[int]:
    """Return the ids of a process's children, oldest first, including zombies."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def database_is_stopped(data_dir: Path) -> bool:
    """Return whether no process of the embedded database runs; each locks its folder."""
    try:
        lock = os.open(data_dir / "postgres" / "server.lock", os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True
