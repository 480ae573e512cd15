"""A process with imported libraries that forks to start `pointbook` commands.

A command spends most of its time on these imports. A fork runs the installed script with its own arguments,
environment, folder and streams, and imports Pointbook's modules itself: only libraries are shared.
`python fork_server.py DESCRIPTOR` serves the socket of that number; each request is the length of a JSON document with
the four descriptors of `DESCRIPTORS`, and then the document.
"""

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

LENGTH = struct.Struct("!I")
DESCRIPTORS = ("stdin", "stdout", "stderr", "reply")
"""The descriptors of a request. `reply` receives the process id and then the exit code, each as a line."""
LIBRARIES = (
    "aiosmtplib",
    "alembic.operations",
    "alembic.runtime.migration",
    "alembic.script",
    "asyncpg",
    "cryptography.hazmat.primitives.ciphers.aead",
    "cryptography.hazmat.primitives.serialization",
    "cryptography.x509",
    "email_validator",
    "google.api.annotations_pb2",
    "google.protobuf.json_format",
    "google.protobuf.struct_pb2",
    "google.protobuf.timestamp_pb2",
    "google.protobuf.wrappers_pb2",
    "google.rpc.error_details_pb2",
    "grpc.aio",
    "grpc_health.v1.health_pb2_grpc",
    "grpc_reflection.v1alpha.reflection",
    "grpc_status.rpc_status",
    "httptools",
    "httpx",
    "iso4217",
    "phonenumbers",
    "prometheus_client.core",
    "pydantic_settings",
    "rich.markdown",
    "rich.table",
    "sqlalchemy.dialects.postgresql.asyncpg",
    "sqlalchemy.ext.asyncio",
    "starlette.applications",
    "structlog",
    "typer._adapters",
    "typer._click.decorators",
    "typer.main",
    "typer.rich_utils",
    "uvicorn.protocols.http.httptools_impl",
    "uvloop",
)


def main(control: socket.socket) -> None:
    """Serve until the other end of the socket closes. In a fork, run its command."""
    for library in LIBRARIES:
        importlib.import_module(library)
    # Otherwise a fork would collect the garbage of the libraries at its end, and copy their memory.
    gc.freeze()
    request = serve(control)
    if request is not None:
        apply_request(request)
        # As a fresh interpreter does, without any name of this file.
        runpy.run_path(sys.argv[0], run_name="__main__")


def serve(control: socket.socket) -> dict[str, Any] | None:
    """Fork for each request; return the request in a fork, and None at the end."""
    replies: dict[int, socket.socket] = {}
    woken, wake = os.pipe()
    for descriptor in (woken, wake):
        os.set_blocking(descriptor, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake)
    while True:
        ready, _, _ = select.select([control.fileno(), woken], [], [])
        if woken in ready:
            os.read(woken, 1_024)
            report_ended(replies)
        if control.fileno() not in ready:
            continue
        head, descriptors, _, _ = socket.recv_fds(control, LENGTH.size, len(DESCRIPTORS))
        if not head:
            return None
        request = json.loads(receive(control, LENGTH.unpack(head)[0]))
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for closed in (woken, wake, control.detach(), *(reply.detach() for reply in replies.values())):
                os.close(closed)
            return {**request, **dict(zip(DESCRIPTORS, descriptors, strict=True))}
        *streams, reply = descriptors
        for descriptor in streams:
            os.close(descriptor)
        replies[pid] = socket.socket(fileno=reply)


def receive(control: socket.socket, length: int) -> bytes:
    """Receive exactly `length` bytes."""
    received = b""
    while len(received) < length:
        received += control.recv(length - len(received))
    return received


def report_ended(replies: dict[int, socket.socket]) -> None:
    """Send the exit codes of the processes that have ended."""
    while replies:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        with replies.pop(pid) as reply:
            reply.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def apply_request(request: dict[str, Any]) -> None:
    """Set this process's session, streams, folder, environment and arguments."""
    if request["has_own_session"]:
        os.setsid()
    for number, name in enumerate(DESCRIPTORS[:3]):
        os.dup2(request[name], number)
        os.close(request[name])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    sys.argv = request["command"]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    with socket.socket(fileno=request["reply"]) as reply:
        reply.sendall(b"%d\n" % os.getpid())


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
