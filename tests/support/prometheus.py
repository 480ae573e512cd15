"""A real Prometheus that scrapes services quickly, with shortened rules."""

import contextlib
import shutil
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pointbook_client.testing.ports import free_port
from support.alert_rules import RULES, shorten
from support.http_clients import http_client
from support.probes import http_get
from support.processes import Running, clean_environment

PROMETHEUS = shutil.which("prometheus")
INTERVAL = "500ms"


@dataclass(frozen=True)
class FiringAlert:
    """An alert that fires, with the job that it is about."""

    name: str
    job: str
    severity: str


@dataclass
class Prometheus:
    """A running Prometheus."""

    url: str

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the samples of an expression now: `metric` and `value`."""
        data = await self._get("query", query=expression)
        result: list[dict[str, Any]] = data["result"]
        return result

    async def alerts(self) -> list[dict[str, Any]]:
        """Return the alerts that fire: `labels` and `annotations`."""
        return [alert for alert in (await self._get("alerts"))["alerts"] if alert["state"] == "firing"]

    async def firing(self) -> set[FiringAlert]:
        """Return the alerts that fire."""
        labels = [alert["labels"] for alert in await self.alerts()]
        return {FiringAlert(each["alertname"], each.get("job", ""), each["severity"]) for each in labels}

    async def _get(self, path: str, **params: str) -> dict[str, Any]:
        async with http_client() as http:
            response = await http.get(f"{self.url}/api/v1/{path}", params=params)
        data: dict[str, Any] = response.raise_for_status().json()["data"]
        return data


@contextlib.asynccontextmanager
async def running_prometheus(folder: Path, targets: Mapping[str, str], factor: int) -> AsyncIterator[Prometheus]:
    """Run Prometheus with the rules of deploy/, whose durations are divided.

    `targets` are addresses by job.
    """
    assert PROMETHEUS is not None
    (folder / "rules.yml").write_text(shorten(RULES.read_text(), factor))
    settings = {
        "global": {"scrape_interval": INTERVAL, "scrape_timeout": INTERVAL, "evaluation_interval": INTERVAL},
        "rule_files": ["rules.yml"],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [address]}]} for job, address in targets.items()
        ],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    address = f"127.0.0.1:{free_port()}"
    process = await Running.start(
        PROMETHEUS,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
        environment=clean_environment({}),
        folder=folder,
    )

    async def is_ready() -> bool:
        return await http_get(f"http://{address}/-/ready") == 200

    try:
        await process.until(is_ready)
        yield Prometheus(f"http://{address}")
    finally:
        await process.kill()
