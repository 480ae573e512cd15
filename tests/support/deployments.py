"""A server and a shim as processes on one database, with a merchant."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from pointbook_client.testing.ports import free_port
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from support.clients import Client
from support.honest_client import HonestClient, run_honest_client
from support.probes import grpc_health, http_get
from support.processes import POINTBOOK, Running, clean_environment, running
from support.servers import CODE_KEY, QUARANTINE_KEY
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique

SECRET = "app-secret-of-the-soak"
ERROR_MARKS = ("Traceback", '"exception"', "internal error", "stray cancellation", "never retrieved", "never awaited")
LIMIT_FILES_AND_RUN = 'ulimit -Sn "$0" && exec "$@"'


@dataclass
class Deployment:
    """Settings of a server and a shim on one database, and a merchant's store."""

    folder: Path
    database_url: str
    token: str
    shop: Shop = field(default_factory=lambda: Shop(unique("merchant"), unique("store")))
    grpc_address: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")
    http_address: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")

    @classmethod
    async def create(cls, database_url: str, folder: Path) -> "Deployment":
        """Return a deployment whose token has all scopes for all merchants."""
        return cls(folder, database_url, await make_token(database_url, [ALL_MERCHANTS], list(Scope)))

    @contextlib.asynccontextmanager
    async def server(self, *arguments: str, **settings: str) -> AsyncIterator[Running]:
        """Start the server, and run it during the block."""
        async with running(
            "serve", *arguments, folder=self.folder, settings=self._server_settings | settings
        ) as process:
            await process.until(self.is_serving)
            yield process

    @contextlib.asynccontextmanager
    async def server_with_files(self, files_max: int) -> AsyncIterator[Running]:
        """Run the server during the block with a soft limit on open files."""
        process = await Running.start(
            *("/bin/sh", "-c", LIMIT_FILES_AND_RUN, str(files_max), POINTBOOK, "serve"),
            environment=clean_environment(self._server_settings),
            folder=self.folder,
        )
        try:
            await process.until(self.is_serving)
            yield process
        finally:
            await process.kill()

    @contextlib.asynccontextmanager
    async def shim(self, **settings: str) -> AsyncIterator[Running]:
        """Start the shim, and run it during the block."""
        values = {
            "GRPC_ADDRESS": self.grpc_address,
            "HTTP_ADDRESS": self.http_address,
            "SHOPLINE_SECRETS": SECRET,
            "TOKEN": self.token,
        }
        async with running("shim", folder=self.folder, settings=values | settings) as process:
            await process.until(self.is_ready)
            yield process

    @property
    def _server_settings(self) -> dict[str, str]:
        return {
            "DATABASE_URL": self.database_url,
            "GRPC_ADDRESS": self.grpc_address,
            "CODE_KEYS": f"k1:{CODE_KEY}",
            "QUARANTINE_KEYS": f"q1:{QUARANTINE_KEY}",
        }

    async def is_serving(self) -> bool:
        """Return whether the server's health is SERVING."""
        return await grpc_health(self.grpc_address) == "SERVING"

    async def is_ready(self) -> bool:
        """Return whether the shim is ready."""
        return await http_get(f"http://{self.http_address}/readyz") == 200

    async def client(self) -> Client:
        """Return a client whose token has all scopes, after registering the shop's store."""
        client = Client(int(self.grpc_address.rpartition(":")[2]), self.token)
        await client.put_store(self.shop.merchant_id, self.shop.store_id)
        return client

    @contextlib.asynccontextmanager
    async def honest_calls(self) -> AsyncIterator[HonestClient]:
        """Run an honest client of the server during the block."""
        store = (self.shop.merchant_id, self.shop.store_id)
        async with run_honest_client("grpc", self.grpc_address, self.token, *store) as honest:
            yield honest

    @contextlib.asynccontextmanager
    async def honest_webhooks(self) -> AsyncIterator[HonestClient]:
        """Run an honest sender of webhooks during the block."""
        store = (self.shop.merchant_id, self.shop.store_id)
        async with run_honest_client("webhooks", self.http_address, SECRET, *store) as honest:
            yield honest


def resident_mb(pid: int) -> float:
    """Return the resident memory of a process, in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1_000


def error_lines(log: str) -> list[str]:
    """Return the first log lines with exceptions, which no caller may cause."""
    return [line[:2_000] for line in log.splitlines() if any(mark in line for mark in ERROR_MARKS)][:10]
