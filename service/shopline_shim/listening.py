"""The shim's listening socket."""

import socket

from shopline_shim.settings import split_address


def listen(address: str, *, reuse_port: bool = False) -> socket.socket:
    """Listen on a `host:port` address, which workers may share. Raises OSError where that is not possible."""
    host, port = split_address(address)
    family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.create_server(target[:2], family=family, reuse_port=reuse_port)
    # Connections inherit this; asyncio itself would leave them to Nagle's algorithm, at 40 ms an answer.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
