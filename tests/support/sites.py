"""A server and a shim as processes on one database, with a merchant of their own."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from pointbook_server.access.model import ALL_MERCHANTS, Scope
from support.harness import CODE_KEY, QUARANTINE_KEY, Client, Shop, make_token, unique
from support.honest import Honest, honest_client
from support.processes import POINTBOOK, Running, clean_environment, free_port, grpc_health, http_get, running

SECRET = "app-secret-of-the-soak"
FAULTS = ("Traceback", '"exception"', "internal error", "stray cancellation", "never retrieved", "never awaited")
SOFT_LIMIT = 'ulimit -Sn "$0" && exec "$@"'


@dataclass
class Site:
    """Settings for a server and a shim on one database, and a merchant with a store."""

    folder: Path
    database_url: str
    token: str
    shop: Shop = field(default_factory=lambda: Shop(unique("merchant"), unique("store")))
    grpc_address: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")
    http_address: str = field(default_factory=lambda: f"127.0.0.1:{free_port()}")

    @classmethod
    async def on(cls, database_url: str, folder: Path) -> "Site":
        """Make a site, with a token that may do everything."""
        return cls(folder, database_url, await make_token(database_url, [ALL_MERCHANTS], list(Scope)))

    @contextlib.asynccontextmanager
    async def server(self, *arguments: str, **settings: str) -> AsyncIterator[Running]:
        """Run the server until it serves, and while the block runs."""
        async with running("serve", *arguments, folder=self.folder, settings=self._server | settings) as process:
            await process.until(self.serves)
            yield process

    @contextlib.asynccontextmanager
    async def server_with_files(self, files_max: int) -> AsyncIterator[Running]:
        """Run the server with a soft limit of open files, as a system may set it."""
        process = await Running.start(
            *("/bin/sh", "-c", SOFT_LIMIT, str(files_max), POINTBOOK, "serve"),
            environment=clean_environment(self._server),
            folder=self.folder,
        )
        try:
            await process.until(self.serves)
            yield process
        finally:
            await process.kill()

    @contextlib.asynccontextmanager
    async def shim(self, **settings: str) -> AsyncIterator[Running]:
        """Run the shim until it is ready, and while the block runs."""
        own = {
            "GRPC_ADDRESS": self.grpc_address,
            "HTTP_ADDRESS": self.http_address,
            "SHOPLINE_SECRETS": SECRET,
            "TOKEN": self.token,
        }
        async with running("shim", folder=self.folder, settings=own | settings) as process:
            await process.until(self.is_ready)
            yield process

    @property
    def _server(self) -> dict[str, str]:
        return {
            "DATABASE_URL": self.database_url,
            "GRPC_ADDRESS": self.grpc_address,
            "CODE_KEYS": f"k1:{CODE_KEY}",
            "QUARANTINE_KEYS": f"q1:{QUARANTINE_KEY}",
        }

    async def serves(self) -> bool:
        """Return whether the server's health is SERVING."""
        return await grpc_health(self.grpc_address) == "SERVING"

    async def is_ready(self) -> bool:
        """Return whether the shim is ready."""
        return await http_get(f"http://{self.http_address}/readyz") == 200

    async def client(self) -> Client:
        """Return a client whose token may do everything, with the shop's store registered."""
        client = Client(int(self.grpc_address.rpartition(":")[2]), self.token)
        await client.put_store(self.shop.merchant_id, self.shop.store_id)
        return client

    @contextlib.asynccontextmanager
    async def honest_calls(self) -> AsyncIterator[Honest]:
        """Run an honest client of the server."""
        place = (self.shop.merchant_id, self.shop.store_id)
        async with honest_client("grpc", self.grpc_address, self.token, *place) as honest:
            yield honest

    @contextlib.asynccontextmanager
    async def honest_webhooks(self) -> AsyncIterator[Honest]:
        """Run an honest sender of webhooks."""
        place = (self.shop.merchant_id, self.shop.store_id)
        async with honest_client("webhooks", self.http_address, SECRET, *place) as honest:
            yield honest


def resident_mb(pid: int) -> float:
    """Return how much memory a process holds, in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1_000


def faults(log: str) -> list[str]:
    """Return what a log holds that no caller may cause: the first lines that tell of exceptions."""
    return [line[:2_000] for line in log.splitlines() if any(mark in line for mark in FAULTS)][:10]
