"""The files of deploy/, and the processes of Pointbook that they start."""

import configparser
import functools
import shlex
from base64 import b64encode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from support.processes import ROOT

DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose" / "compose.yaml"
KUBERNETES = DEPLOY / "kubernetes" / "base"
SYSTEMD = DEPLOY / "systemd"
KEY = b64encode(bytes(32)).decode()
SECRETS = {
    "POINTBOOK_DATABASE_URL": "postgresql://pointbook:secret@127.0.0.1/pointbook",
    "POINTBOOK_CODE_KEYS": f"k1:{KEY}",
    "POINTBOOK_QUARANTINE_KEYS": f"q1:{KEY}",
    "POINTBOOK_TOKEN": "pb_token",
    "POINTBOOK_SHOPLINE_SECRETS": "app-secret-of-the-shop",
}
"""A valid value of each setting that deployments read from a file."""


@dataclass(frozen=True)
class DeployedProcess:
    """A process of Pointbook as a deployment starts it."""

    place: str
    command: str
    """The subcommand of `pointbook`."""
    environment: Mapping[str, str]
    stop_seconds: float
    """How long the deployment waits for it after SIGTERM."""

    def port(self, setting: str) -> int:
        """Return the port of an address among its settings."""
        return int(self.environment[f"POINTBOOK_{setting}"].rpartition(":")[2])


@functools.cache  # Parsing takes long, and many tests read the same files.
def documents(path: Path) -> list[Any]:
    """Return the documents of a YAML file."""
    return list(yaml.safe_load_all(path.read_text()))


def compose() -> dict[str, Any]:
    """Return the compose file."""
    content: dict[str, Any]
    (content,) = documents(COMPOSE)
    return content


def kubernetes_objects(kind: str) -> dict[str, Any]:
    """Return the objects of a kind by name."""
    objects = [each for path in sorted(KUBERNETES.glob("*.yaml")) for each in documents(path)]
    return {each["metadata"]["name"]: each for each in objects if each["kind"] == kind}


def pod_specs() -> dict[str, Any]:
    """Return the specification of each pod by the name of what creates it."""
    owners = kubernetes_objects("Deployment") | kubernetes_objects("Job")
    return {name: owner["spec"]["template"]["spec"] for name, owner in owners.items()}


def unit(path: Path) -> dict[str, list[str]]:
    """Return the options of a systemd unit, each with all of its values."""
    options: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        name, is_option, value = line.partition("=")
        if is_option and not line.startswith("#"):
            options.setdefault(name, []).append(value)
    return options


def environment_file(path: Path) -> dict[str, str]:
    """Return the variables of a file for EnvironmentFile."""
    parser = configparser.ConfigParser()
    parser.optionxform = str  # type: ignore[assignment,method-assign] # how configparser keeps upper case
    parser.read_string("[file]\n" + path.read_text())
    return dict(parser["file"])


def processes() -> list[DeployedProcess]:
    """Return all processes of Pointbook of all deployments."""
    return [*_composed(), *_in_pods(), *_units()]


def _composed() -> Iterator[DeployedProcess]:
    for name, service in compose()["services"].items():
        if service["image"].startswith("pointbook:"):
            command = service["command"][0] if "entrypoint" not in service else "token"
            seconds = float(service.get("stop_grace_period", "10s").removesuffix("s"))
            yield DeployedProcess(f"compose {name}", command, service["environment"], seconds)


def _in_pods() -> Iterator[DeployedProcess]:
    for name, spec in pod_specs().items():
        (container,) = spec["containers"]
        environment = {each["name"]: each["value"] for each in container["env"]}
        pause = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
        seconds = spec.get("terminationGracePeriodSeconds", 30) - float(pause[1])
        yield DeployedProcess(f"kubernetes {name}", container["args"][0], environment, seconds)


def _units() -> Iterator[DeployedProcess]:
    for path in sorted(SYSTEMD.glob("*.service")):
        options = unit(path)
        environment = dict(each.split("=", 1) for each in options["Environment"])
        for file in options.get("EnvironmentFile", ()):
            environment |= environment_file(SYSTEMD / Path(file).name)
        command = shlex.split(options["ExecStart"][0])[1]
        yield DeployedProcess(
            f"systemd {path.stem}", command, environment, float(options.get("TimeoutStopSec", ["90"])[0])
        )
