"""Listening TCP sockets of the shim."""

import socket

from shopline_shim.settings import split_address


def listen(address: str) -> socket.socket:
    """Listen on a `host:port` address, which workers may share.

    Raises OSError if that is not possible.
    """
    host, port = split_address(address)
    family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.create_server(target[:2], family=family)
    # Accepted connections inherit this. Without it, Nagle's algorithm delays a response by 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def bound_address(listener: socket.socket) -> str:
    """Return the `host:port` or `[IPv6]:port` that a socket is bound to."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
