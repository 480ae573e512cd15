"""The process of the tests' database, which owns the database's folder.

`python -m pointbook_client.testing.database_process PARENT FOLDER` deletes the folder when its parent asks for its end,
or is killed.
"""

import asyncio
import shutil
import sys
from pathlib import Path
from typing import Any

from pointbook_cli.embedded_postgres import EmbeddedPostgres
from pointbook_client.testing.requests import serve_requests


async def run(parent: int, folder: Path) -> None:
    """Run a PostgreSQL in a folder, and delete the folder at the end."""
    postgres = EmbeddedPostgres(folder / "postgres", fsync=False)

    async def start() -> dict[str, Any]:
        await postgres.start()
        return {"url": postgres.url()}

    try:
        await serve_requests(parent, {"start": start})
    finally:
        await postgres.stop()
        shutil.rmtree(folder)


if __name__ == "__main__":
    asyncio.run(run(int(sys.argv[1]), Path(sys.argv[2])))
