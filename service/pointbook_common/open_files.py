"""The limit of open files, which bounds how many connections a process can hold."""

import resource

CONNECTIONS_MAX = 4_000
"""As many as cost less than 100 MB when all of them are idle."""
RESERVED_FILES = 200
"""For logs, health, libraries, and connections to other services."""


def raise_open_files() -> None:
    """Raise this process's limit of open files as far as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connections_that_fit(database_connections: int) -> int:
    """Return how many clients a server may hold, so that its other connections can always be opened."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return CONNECTIONS_MAX
    return max(1, min(CONNECTIONS_MAX, soft - RESERVED_FILES - database_connections))
