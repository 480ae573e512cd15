"""The files of deploy/ agree with the settings, with each other and with the code."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from pointbook_common.open_files import CONNECTIONS_MAX
from pointbook_common.secret_files import secret_file_fields
from pointbook_server.rpc.listening import MESSAGE_BYTES_MAX, METADATA_BYTES_MAX
from pointbook_server.rpc.pagination import PAGE_BYTES_MAX
from pointbook_server.settings import ServerSettings
from shopline_shim.settings import ShimSettings
from support.deploy_files import (
    COMPOSE,
    DEPLOY,
    KUBERNETES,
    SECRETS,
    SYSTEMD,
    DeployedProcess,
    compose,
    documents,
    kubernetes_objects,
    pod_specs,
    processes,
    unit,
)
from support.message_fuzzing import METHODS
from support.processes import BIN, ROOT

PROCESSES = {each.place: each for each in processes()}
SERVERS = [each for each in PROCESSES.values() if each.command == "serve"]
SHIMS = [each for each in PROCESSES.values() if each.command == "shim"]
FRAME_BYTES = 5
"""The header of a gRPC message."""
END_SECONDS = 3.0
"""How long the end of all workers may take after the drain time."""
EXPOSURE_MAX = 2.0
"""systemd's measure of what a unit may do, from 0 to 10."""
UNITS = sorted(SYSTEMD.glob("*.service"))


def settings_of(process: DeployedProcess) -> type[ServerSettings] | type[ShimSettings]:
    """Return the settings that a process reads."""
    return ShimSettings if process.command == "shim" else ServerSettings


def load(process: DeployedProcess, secrets: Mapping[str, str], folder: Path, patch: pytest.MonkeyPatch) -> Any:
    """Load the settings of a process, with secrets in files of a folder."""
    for name in [name for name in os.environ if name.startswith("POINTBOOK_")]:
        patch.delenv(name)
    for name, value in process.environment.items():
        setting = name.removesuffix("_FILE")
        if setting in secrets:
            (folder / setting).write_text(secrets[setting])
        patch.setenv(name, str(folder / setting) if setting in secrets else value)
    return settings_of(process)()


def test_every_deployment_has_a_server_and_a_shim() -> None:
    assert {each.place.split()[0] for each in SERVERS} == {"compose", "kubernetes", "systemd"}
    assert {each.place.split()[0] for each in SHIMS} == {"compose", "kubernetes", "systemd"}


@pytest.mark.parametrize("place", PROCESSES)
def test_settings_are_known_and_accepted(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = PROCESSES[place]
    settings = settings_of(process)
    known = {f"POINTBOOK_{name.upper()}" for name in settings.model_fields}
    known |= {f"POINTBOOK_{name.upper()}_FILE" for name in secret_file_fields(settings)}

    assert set(process.environment) - known == set()
    load(process, SECRETS, tmp_path, monkeypatch)


@pytest.mark.parametrize("place", PROCESSES)
def test_secrets_come_from_files(place: str) -> None:
    process = PROCESSES[place]
    secret = {f"POINTBOOK_{name.upper()}" for name in secret_file_fields(settings_of(process))}

    assert not secret & set(process.environment)
    assert [name for name in process.environment if name.removesuffix("_FILE") in secret]


@pytest.mark.parametrize("process", [*SERVERS, *SHIMS], ids=lambda each: each.place)
def test_the_time_to_stop_covers_the_drain_time(process: DeployedProcess) -> None:
    name = "POINTBOOK_DRAIN_SECONDS" if process.command == "serve" else "POINTBOOK_DRAIN_TIMEOUT_SECONDS"

    assert process.stop_seconds >= float(process.environment[name]) + END_SECONDS


def test_prometheus_scrapes_the_server_and_the_shim() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}

    server, shim = PROCESSES["compose server"], PROCESSES["compose shim"]
    assert targets["pointbook-server"] == [f"server:{server.port('METRICS_ADDRESS')}"]
    assert targets["pointbook-shim"] == [f"shim:{shim.port('SHIM_METRICS_ADDRESS')}"]
    assert set(compose()["services"]["prometheus"]["networks"]) <= set(compose()["services"]["server"]["networks"])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_accepts_its_configuration() -> None:
    path = DEPLOY / "prometheus" / "prometheus.yml"

    subprocess.run(["promtool", "check", "config", "--syntax-only", path], check=True, capture_output=True)


def test_grafana_reads_the_files_that_compose_mounts() -> None:
    grafana = compose()["services"]["grafana"]
    source, target, _ = grafana["volumes"][0].split(":")
    folder = COMPOSE.parent / source
    provisioning = grafana["environment"]["GF_PATHS_PROVISIONING"].removeprefix(f"{target}/")
    (datasource,) = yaml.safe_load((folder / provisioning / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    (provider,) = yaml.safe_load((folder / provisioning / "dashboards" / "pointbook.yaml").read_text())["providers"]

    assert datasource["url"] == "http://prometheus:9090"
    assert provider["options"]["path"] == f"{target}/dashboards"


def test_files_and_names_of_the_compose_file_exist() -> None:
    content = compose()
    for name, service in content["services"].items():
        mounts = [each.split(":")[0] for each in service.get("volumes", ())]
        assert {each for each in mounts if "/" not in each} <= set(content["volumes"]), name
        assert all((COMPOSE.parent / each).is_dir() for each in mounts if "/" in each), name
        assert set(service.get("secrets", ())) <= set(content["secrets"]), name
        assert set(service["networks"]) <= set(content["networks"]), name
        assert set(service.get("depends_on", ())) <= set(content["services"]), name
        files = [value for key, value in service.get("environment", {}).items() if key.endswith("_FILE")]
        secrets = {Path(value).name for value in files if value.startswith("/run/secrets/")}
        assert secrets == set(service.get("secrets", ())), name


@pytest.mark.parametrize("name", compose()["services"])
def test_containers_are_hardened(name: str) -> None:
    service = compose()["services"][name]

    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "build" in service or service["user"] not in {"root", "0"}, "our image has its own user"
    assert re.fullmatch(r"[\w./-]+:[\w.-]+", service["image"])
    assert not service["image"].endswith(":latest")
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert "healthcheck" in service


def test_the_script_creates_valid_secrets_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "compose"
    folder.mkdir()
    shutil.copy(COMPOSE.parent / "up.sh", folder)
    docker = tmp_path / "docker"
    docker.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    docker.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.defpath}"}

    def run() -> dict[str, str]:
        subprocess.run(["sh", folder / "up.sh"], env=environment, check=True, capture_output=True, cwd=tmp_path)
        return {path.name: path.read_text() for path in (folder / "secrets").iterdir()}

    secrets = run()
    assert run() == secrets
    assert (tmp_path / "calls").read_text() == "compose up --build --detach --wait\n" * 2
    assert set(secrets) == set(compose()["secrets"])
    assert (folder / "secrets").stat().st_mode & 0o777 == 0o700
    assert f":{secrets['postgres-password']}@postgres/" in secrets["database-url"]
    by_setting = {f"POINTBOOK_{name.upper().replace('-', '_')}": value for name, value in secrets.items()}
    for place in ("compose server", "compose shim", "compose migrate"):
        load(PROCESSES[place], {"POINTBOOK_TOKEN": "pb_token"} | by_setting, tmp_path, monkeypatch)


def test_the_kustomization_lists_all_files() -> None:
    (kustomization,) = documents(KUBERNETES / "kustomization.yaml")
    files = {path.name for path in KUBERNETES.glob("*.yaml")} - {"kustomization.yaml"}

    assert set(kustomization["resources"]) == files
    assert [image["name"] for image in kustomization["images"]] == ["pointbook"]


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_builds_the_base() -> None:
    built = subprocess.run(["kubectl", "kustomize", KUBERNETES], check=True, capture_output=True, text=True).stdout
    objects = [each for each in yaml.safe_load_all(built) if each["kind"] != "Namespace"]

    assert {each["metadata"]["namespace"] for each in objects} == {"pointbook"}
    assert "image: pointbook\n" not in built


@pytest.mark.parametrize("name", pod_specs())
def test_pods_are_hardened(name: str) -> None:
    spec = pod_specs()[name]
    (container,) = spec["containers"]

    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"cpu", "memory"} == set(container["resources"]["requests"])
    assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("name", pod_specs())
def test_files_of_pods_are_in_mounted_secrets(name: str) -> None:
    spec = pod_specs()[name]
    (container,) = spec["containers"]
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    folders = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    files = [each["value"] for each in container["env"] if each["name"].endswith("_FILE")]

    assert files
    for file in files:
        assert folders[str(Path(file).parent)]["secret"]["defaultMode"] == 0o440
    assert {volume["name"] for volume in spec["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize("process", [PROCESSES[f"kubernetes pointbook-{name}"] for name in ("server", "shim")])
def test_ports_of_pods_are_those_of_the_settings(process: DeployedProcess) -> None:
    name = process.place.split()[1]
    deployment = kubernetes_objects("Deployment")[name]["spec"]["template"]
    (container,) = deployment["spec"]["containers"]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    addresses = {
        "serve": ("GRPC_ADDRESS", "HEALTH_ADDRESS", "METRICS_ADDRESS"),
        "shim": ("HTTP_ADDRESS", "SHIM_METRICS_ADDRESS"),
    }

    assert sorted(ports.values()) == sorted(map(process.port, addresses[process.command]))
    assert deployment["metadata"]["annotations"]["prometheus.io/port"] == str(ports["metrics"])
    service = kubernetes_objects("Service")[name]["spec"]
    assert {each["port"] for each in service["ports"]} == {ports[each["targetPort"]] for each in service["ports"]}
    policy = kubernetes_objects("NetworkPolicy")[name]["spec"]
    allowed = {port["port"] for rule in policy["ingress"] for port in rule["ports"]}
    assert allowed == set(ports.values())
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        port = container[probe].get("tcpSocket", container[probe].get("httpGet", {})).get("port")
        assert port in ports if port else container[probe]["exec"] == {"command": ["pointbook", "health"]}


def test_the_shim_calls_the_service_of_the_servers() -> None:
    address = PROCESSES["kubernetes pointbook-shim"].environment["POINTBOOK_GRPC_ADDRESS"]
    host, _, port = address.partition(":")
    service = kubernetes_objects("Service")[host]

    assert service["spec"]["clusterIP"] == "None"
    assert int(port) in {each["port"] for each in service["spec"]["ports"]}


@pytest.mark.parametrize("name", kubernetes_objects("Deployment"))
def test_deployments_survive_the_loss_of_a_pod(name: str) -> None:
    scaler = kubernetes_objects("HorizontalPodAutoscaler")[name]["spec"]
    budget = kubernetes_objects("PodDisruptionBudget")[name]["spec"]
    deployment = kubernetes_objects("Deployment")[name]["spec"]

    assert scaler["scaleTargetRef"]["name"] == name
    assert scaler["minReplicas"] >= 2
    assert budget["maxUnavailable"] == 1
    assert budget["selector"] == deployment["selector"]
    assert deployment["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert deployment["minReadySeconds"] >= 5


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_units_read_the_credentials_that_they_load(path: Path) -> None:
    options = unit(path)
    loaded = {each.split(":")[0] for each in options["LoadCredential"]}
    read = {each.rpartition("%d/")[2] for each in options["Environment"] if "%d/" in each}

    assert read == loaded


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_systemd_accepts_the_units(path: Path, tmp_path: Path) -> None:
    """The command is the one of this environment, because systemd looks for it."""
    copy = tmp_path / path.name
    copy.write_text(path.read_text().replace("/opt/pointbook/bin/", f"{BIN}/"))

    verified = subprocess.run(["systemd-analyze", "verify", copy], check=False, capture_output=True, text=True)
    assert (verified.returncode, verified.stderr) == (0, "")
    exposure = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", copy], check=True, capture_output=True, text=True
    ).stdout
    assert float(exposure.rpartition("service: ")[2].split()[0]) <= EXPOSURE_MAX


def test_envoy_has_the_limits_of_server_and_shim() -> None:
    config = yaml.safe_load((DEPLOY / "envoy" / "envoy.yaml").read_text())
    listeners = {each["name"]: each["filter_chains"][0]["filters"] for each in config["static_resources"]["listeners"]}
    connections, manager = (each["typed_config"] for each in listeners["grpc"])
    (route, _) = manager["route_config"]["virtual_hosts"][0]["routes"]
    buffer = listeners["webhooks"][1]["typed_config"]["http_filters"][0]["typed_config"]

    assert route["request_body_buffer_limit"] == MESSAGE_BYTES_MAX + FRAME_BYTES
    assert manager["max_request_headers_kb"] * 1024 < METADATA_BYTES_MAX
    assert connections["max_connections"] == CONNECTIONS_MAX
    seconds = f"{ServerSettings.model_fields['call_deadline_seconds'].default:g}s"
    assert route["route"]["max_stream_duration"] == {"grpc_timeout_header_max": seconds, "max_stream_duration": seconds}
    assert buffer["max_request_bytes"] == ShimSettings.model_fields["max_body_bytes"].default


def test_json_has_the_methods_and_limits_of_grpc() -> None:
    grpc, json = (
        yaml.safe_load((DEPLOY / "envoy" / name).read_text())["static_resources"]["listeners"][0]["filter_chains"][0]
        for name in ("envoy.yaml", "json.yaml")
    )
    grpc_manager, manager = (each["filters"][1]["typed_config"] for each in (grpc, json))
    buffer, transcoder, _ = (each["typed_config"] for each in manager["http_filters"])
    grpc_route, route = (
        next(
            each
            for each in every["route_config"]["virtual_hosts"][0]["routes"]
            if "retry_policy" in each.get("route", {})
        )
        for every in (grpc_manager, manager)
    )

    assert transcoder["services"] == sorted({method.containing_service.full_name for method in METHODS})
    assert buffer["max_request_bytes"] == transcoder["max_request_body_size"] == MESSAGE_BYTES_MAX
    assert transcoder["max_response_body_size"] >= 4 * PAGE_BYTES_MAX
    assert json["transport_socket"]["typed_config"]["common_tls_context"] == {
        **grpc["transport_socket"]["typed_config"]["common_tls_context"],
        "alpn_protocols": ["h2", "http/1.1"],
    }
    assert route["route"] == grpc_route["route"]
    assert route["request_body_buffer_limit"] == grpc_route["request_body_buffer_limit"]
    for name in ("max_request_headers_kb", "http2_protocol_options", "common_http_protocol_options"):
        assert manager[name] == grpc_manager[name]


def test_envoy_calls_the_ports_of_the_other_deployments() -> None:
    config = yaml.safe_load((DEPLOY / "envoy" / "envoy.yaml").read_text())
    clusters = {
        each["name"]: [host["endpoint"] for host in each["load_assignment"]["endpoints"][0]["lb_endpoints"]]
        for each in config["static_resources"]["clusters"]
    }
    ports = {each["address"]["socket_address"]["port_value"] for each in clusters["servers"]}
    health = {each["health_check_config"]["port_value"] for each in clusters["servers"]}
    (shim,) = clusters["shims"]

    assert {(*ports, *health)} == {(each.port("GRPC_ADDRESS"), each.port("HEALTH_ADDRESS")) for each in SERVERS}
    assert {shim["address"]["socket_address"]["port_value"]} == {each.port("HTTP_ADDRESS") for each in SHIMS}
    assert config["admin"]["address"]["socket_address"]["address"] == "127.0.0.1"


def test_secrets_stay_out_of_the_repository_and_the_image() -> None:
    folder = "deploy/compose/secrets"

    assert folder in (ROOT / ".gitignore").read_text().replace("secrets/", "secrets").splitlines()
    assert folder in (ROOT / ".dockerignore").read_text().splitlines()
