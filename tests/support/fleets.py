"""Servers behind an Envoy."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from pointbook_server.access.model import ALL_MERCHANTS, Scope
from support.certificates import Authority
from support.envoy import SERVERS, SERVICE_CONFIG, SHIMS, Envoy, Upstream
from support.processes import Running, running
from support.retrying_callers import RetryingCallers
from support.shops import Shop
from support.tokens import make_token
from support.waiting import until

POLICY = (("grpc.service_config", SERVICE_CONFIG.read_text()),)
"""The options of a client that follows the documentation."""


@dataclass
class Fleet:
    """Two servers that require client certificates, behind an Envoy."""

    folder: Path
    database_url: str
    token: str
    stack: AsyncExitStack
    """Ends the servers."""
    authority: Authority = field(default_factory=Authority)
    servers: tuple[Upstream, ...] = field(default_factory=lambda: (Upstream(), Upstream()))
    shim: Upstream = field(default_factory=Upstream)
    processes: dict[Upstream, Running] = field(default_factory=dict)
    json_port: int | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    """Further settings of the servers."""

    def __post_init__(self) -> None:
        self.cert, self.key = self.authority.issue("server", names=["server.internal"]).write(self.folder, "server")
        self.ca = self.folder / "ca.crt"
        self.ca.write_bytes(self.authority.pem)
        upstreams = {SERVERS: self.servers, SHIMS: [self.shim]}
        self.envoy = Envoy(self.folder, self.authority, upstreams, json_port=self.json_port)

    @property
    def credentials(self) -> grpc.ChannelCredentials:
        """The credentials of a client that trusts Envoy's certificate."""
        return grpc.ssl_channel_credentials(self.authority.pem)

    async def start(self, upstream: Upstream) -> None:
        """Start a server."""
        settings = {
            "DATABASE_URL": self.database_url,
            "GRPC_ADDRESS": f"127.0.0.1:{upstream.port}",
            "HEALTH_ADDRESS": f"127.0.0.1:{upstream.health_port}",
            "TLS_CERT_FILE": str(self.cert),
            "TLS_KEY_FILE": str(self.key),
            "TLS_CLIENT_CA_FILE": str(self.ca),
            **self.settings,
        }
        process = await self.stack.enter_async_context(running("serve", folder=self.folder, settings=settings))
        self.processes[upstream] = process
        await process.printed('"serving"')

    async def until_balanced(self) -> None:
        """Wait until Envoy sends calls to all servers, as a rolling update does."""

        async def are_healthy() -> bool:
            return len(await self.envoy.healthy(SERVERS)) == len(self.servers)

        await until(are_healthy, seconds=30.0)

    def callers(self, shop: Shop) -> RetryingCallers:
        """Return callers that repeat calls as the documentation says."""
        return RetryingCallers(f"127.0.0.1:{self.envoy.grpc_port}", self.token, shop, POLICY, self.credentials)


@asynccontextmanager
async def running_fleet(
    database_url: str, folder: Path, json_port: int | None = None, settings: Mapping[str, str] | None = None
) -> AsyncIterator[Fleet]:
    """Run a fleet during the block, with a token for everything."""
    token = await make_token(database_url, [ALL_MERCHANTS], list(Scope))
    async with AsyncExitStack() as stack:
        fleet = Fleet(folder, database_url, token, stack, json_port=json_port, settings=settings or {})
        await asyncio.gather(*map(fleet.start, fleet.servers))
        envoy = await stack.enter_async_context(fleet.envoy.run())
        await fleet.until_balanced()
        yield fleet
        assert envoy.process.returncode is None, envoy.err
