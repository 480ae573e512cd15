"""Ports for servers that restart."""

import random
import socket

# Below the ephemeral ports, so that no client occupies one of these while a server restarts.
_PORTS = range(20_000, 30_000)


def free_port() -> int:
    """Return a port on which nothing listens, also for a process that restarts."""
    while True:
        port = random.choice(_PORTS)  # noqa: S311 - it need not be a secret
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
