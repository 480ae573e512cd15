"""The addresses that a service listens on, alone or as several workers."""

import contextlib
import errno
import socket
from collections.abc import Iterator

PORT_MAX = 65_535


def worker_addresses(name: str, address: str, count: int) -> list[str]:
    """Return a HOST:PORT address for each of several workers, port after port; none where the address is empty.

    Raises OSError, naming the setting, where there are no such ports.
    """
    if not address:
        return []
    host, _, port = address.rpartition(":")
    last = int(port) + count - 1
    if int(port) == 0 or last > PORT_MAX:
        raise OSError(f"{name}: each worker takes the next port, and {port} to {last} are not all ports; name another")
    return [f"{host}:{int(port) + number}" for number in range(count)]


def check_unused(name: str, address: str) -> None:
    """Raise OSError, naming the setting, where something listens on a HOST:PORT address already, or nothing can.

    gRPC would tell so in several lines, and not at all where both share their ports between workers.
    """
    with _bound(name, address, reuse_port=False):
        pass


@contextlib.contextmanager
def reserved_for_workers(*addresses: tuple[str, str]) -> Iterator[None]:
    """Keep addresses, each with the name of its setting, so that only workers of this service can listen on them.

    Workers share ports by SO_REUSEPORT, also with a socket that is bound and does not listen: it gets no connections,
    and no other program gets the port while a worker is replaced. Raises OSError as `check_unused` does.
    """
    with contextlib.ExitStack() as stack:
        for name, address in addresses:
            check_unused(name, address)
            for holder in stack.enter_context(_bound(name, address, reuse_port=True)):
                # With it, which binding needs after a restart, any program could listen while no worker does.
                holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        yield


@contextlib.contextmanager
def _bound(name: str, address: str, *, reuse_port: bool) -> Iterator[list[socket.socket]]:
    """Bind a socket to everything that a HOST:PORT address stands for. Raises OSError, naming the setting."""
    host, _, port = address.rpartition(":")
    try:
        places = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise OSError(f"{name}: there is no host {host}") from None
    failures: list[OSError] = []
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket(family, socket.SOCK_STREAM)) for family, *_ in places]
        for bound, (*_, place) in zip(sockets, places, strict=True):
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(reuse_port))
            try:
                bound.bind(place)
            except OSError as error:
                failures.append(error)
        # A name may stand for an address that this machine does not have, as localhost does where there is no IPv6.
        if len(failures) == len(places) or any(failure.errno == errno.EADDRINUSE for failure in failures):
            raise OSError(f"{name}: cannot listen on {address}: {failures[0].strerror}")
        yield sockets
