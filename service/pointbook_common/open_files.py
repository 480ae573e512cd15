"""The limit of open files, which limits the connections of a process."""

import resource

CONNECTIONS_MAX = 4_000
"""Cost less than 100 MB when all are idle."""
RESERVED_FILES = 200
"""Reserved for logs, health, libraries, and connections to other services."""


def raise_open_files() -> None:
    """Raise the soft limit of open files to the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def max_client_connections(database_connections: int) -> int:
    """Return how many client connections the limit of open files allows.

    The rest is for the server's other connections and files.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return CONNECTIONS_MAX
    return max(1, min(CONNECTIONS_MAX, soft - RESERVED_FILES - database_connections))
