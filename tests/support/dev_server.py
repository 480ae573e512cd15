"""A `pointbook dev` that a test kills and restarts with the same ports and data."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from pointbook_client.testing.ports import free_port
from support.probes import http_get
from support.processes import Running, clean_environment, pointbook
from support.waiting import until


@dataclass
class DevServer:
    """A running `pointbook dev`."""

    folder: Path
    grpc_address: str
    http_address: str
    process: Running

    async def kill_and_restart(self) -> None:
        """Kill it as a crash does, and start it again."""
        await self.process.kill()
        await self.restart()

    async def restart(self) -> None:
        """Start it again, and wait until it is ready."""
        self.process = await _start(self.folder, self.grpc_address, self.http_address)
        await self.until_ready()

    async def add_points(self, buyer_id: str, points: int) -> None:
        """Add points to a new buyer's account, by SHOPLINE's webhook."""
        url, amount = f"http://{self.http_address}/webhooks/shopline", str(points)
        sent = await pointbook(
            "webhook", "send", "--url", url, "--buyer", buyer_id, "--value", amount, "--balance", amount
        )
        assert sent.out == '200 {"outcome":"APPLIED"}\n', sent

    async def code_of(self, challenge_id: str) -> str:
        """Return the code of a challenge, from the terminal."""
        pattern = rf"message \(challenge {challenge_id}\): .*?\b(\d{{6}})\b"
        await until(lambda: re.search(pattern, self.process.err) is not None)
        codes: list[str] = re.findall(pattern, self.process.err)
        return codes[-1]

    async def until_ready(self) -> None:
        """Wait until it is ready."""

        async def ready() -> bool:
            return await http_get(f"http://{self.http_address}/readyz") == 200

        await self.process.until(ready)


@asynccontextmanager
async def dev_server(folder: Path) -> AsyncIterator[DevServer]:
    """Run a `pointbook dev` with new data during the block, then stop it."""
    grpc_address, http_address = (f"127.0.0.1:{free_port()}" for _ in range(2))
    server = DevServer(folder, grpc_address, http_address, await _start(folder, grpc_address, http_address))
    try:
        await server.until_ready()
        yield server
        await server.process.stop()
    finally:
        await server.process.kill()


async def _start(folder: Path, grpc_address: str, http_address: str) -> Running:
    settings = {"DATA_DIR": str(folder / "data"), "GRPC_ADDRESS": grpc_address, "HTTP_ADDRESS": http_address}
    return await Running.fork("dev", environment=clean_environment(settings), folder=folder)
