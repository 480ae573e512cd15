"""The limit of open files, and the number of client connections within it."""

import resource
import subprocess
import sys

import pytest

from pointbook_common.open_files import CONNECTIONS_MAX, RESERVED_FILES, max_client_connections

RAISE = """
import resource
from pointbook_common.open_files import raise_open_files
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
raise_open_files()
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
"""


def test_soft_limit_is_raised_to_the_hard_limit() -> None:
    subprocess.run([sys.executable, "-c", RAISE], check=True)


@pytest.mark.parametrize(
    ("files", "connections"),
    [
        (1_024, 1_024 - RESERVED_FILES - 10),
        (100, 1),
        (10**6, CONNECTIONS_MAX),
        (resource.RLIM_INFINITY, CONNECTIONS_MAX),
    ],
)
def test_connection_limit_leaves_files_for_database_logs_and_health(
    monkeypatch: pytest.MonkeyPatch, files: int, connections: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (files, files))
    assert max_client_connections(10) == connections
