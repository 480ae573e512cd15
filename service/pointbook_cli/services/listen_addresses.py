"""The addresses that a service and its workers listen on."""

import contextlib
import errno
import socket
from collections.abc import Iterator

PORT_MAX = 65_535


def worker_addresses(name: str, address: str, count: int) -> list[str]:
    """Return a HOST:PORT address for each worker, on consecutive ports.

    None if the address is empty. Raises OSError with the setting's name if a port is 0 or above 65535.
    """
    if not address:
        return []
    host, _, port = address.rpartition(":")
    last = int(port) + count - 1
    if int(port) == 0 or last > PORT_MAX:
        raise OSError(f"{name}: each worker uses the next port, and {port} to {last} are not all valid ports")
    return [f"{host}:{int(port) + number}" for number in range(count)]


def check_unused(name: str, address: str) -> None:
    """Check that a HOST:PORT address is free. Raises OSError with the setting's name.

    gRPC's own error takes several lines, and there is none if another server shares its port between workers.
    """
    with _bind(name, address, reuse_port=False):
        pass


@contextlib.contextmanager
def reserve_for_workers(*addresses: tuple[str, str]) -> Iterator[None]:
    """Reserve addresses for workers while the context is open.

    `addresses` are pairs of a setting's name and HOST:PORT. Workers share ports by SO_REUSEPORT. A bound socket that
    does not listen gets no connections, but keeps the port from other programs while a worker is replaced. Raises
    OSError as `check_unused` does.
    """
    with contextlib.ExitStack() as stack:
        for name, address in addresses:
            check_unused(name, address)
            for reserved in stack.enter_context(_bind(name, address, reuse_port=True)):
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
