"""The addresses that a service and its workers listen on."""

import contextlib
import errno
import socket
from collections.abc import Iterator


def check_unused(name: str, address: str) -> None:
    """Check that a HOST:PORT address is free. Raises OSError with the setting's name.

    gRPC's own error takes several lines, and there is none if another server shares its port between workers.
    """
    with _bind(name, address, reuse_port=False):
        pass


@contextlib.contextmanager
def reserve_for_workers(name: str, address: str) -> Iterator[None]:
    """Reserve a HOST:PORT address for workers while the context is open.

    Workers share the port by SO_REUSEPORT. A bound socket that does not listen gets no connections, but keeps the port
    from other programs while a worker is replaced. Raises OSError as `check_unused` does.
    """
    check_unused(name, address)
    with _bind(name, address, reuse_port=True) as sockets:
        for reserved in sockets:
            # Needed for binding after a restart; afterwards, it would allow other programs to listen.
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        yield


@contextlib.contextmanager
def _bind(name: str, address: str, *, reuse_port: bool) -> Iterator[list[socket.socket]]:
    """Bind sockets to all addresses of a HOST:PORT.

    Raises OSError with the setting's name.
    """
    host, _, port = address.rpartition(":")
    try:
        resolved = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise OSError(f"{name}: there is no host {host}") from None
    failures: list[OSError] = []
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket(family, socket.SOCK_STREAM)) for family, *_ in resolved]
        for bound, (*_, socket_address) in zip(sockets, resolved, strict=True):
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(reuse_port))
            try:
                bound.bind(socket_address)
            except OSError as error:
                failures.append(error)
        # A name may have an address that this machine lacks, as localhost does without IPv6.
        if len(failures) == len(resolved) or any(failure.errno == errno.EADDRINUSE for failure in failures):
            raise OSError(f"{name}: cannot listen on {address}: {failures[0].strerror}")
        yield sockets
