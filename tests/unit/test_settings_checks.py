"""Problems of settings are all reported at once."""

from typing import Any

import pytest
from pydantic_settings import BaseSettings

from pointbook_cli.settings_checks import settings_problems, unknown_variables
from pointbook_server.settings import ServerSettings
from shopline_shim.settings import ShimSettings


def problems(
    monkeypatch: pytest.MonkeyPatch,
    *classes: type[BaseSettings],
    required: tuple[str, ...] = (),
    **environment: str,
) -> dict[str, str]:
    """Return the problems of an environment by variable, without the prefix."""
    variables = {f"POINTBOOK_{name}": value for name, value in environment.items()}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    clauses = settings_problems(classes, variables, required=required, overrides={})
    return {
        name.removeprefix("POINTBOOK_"): problem for name, _, problem in (clause.partition(": ") for clause in clauses)
    }


def test_cross_setting_checks_are_reported_with_other_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    found = problems(
        monkeypatch,
        ServerSettings,
        required=("database_url",),
        WORKERS="0",
        GRPC_ADDRESS="0.0.0.0:50051",
        METRICS_ADDRESS="[::]:9000",
        SMS_URL="http://sms.example.com/",
        APPRISE_SMS_URL="json://localhost/{to}",
        SMTP_URL="smtps://mail.example.com",
        POOL_SIZE="5",
    )

    # The gateway is invalid itself, so that there is no second sender of the channel.
    assert set(found) == {
        "WORKERS", "GRPC_ADDRESS", "METRICS_ADDRESS", "SMS_URL", "SMTP_FROM", "DATABASE_URL", "POOL_SIZE",
    }  # fmt: skip
    assert found["POOL_SIZE"] == "there is no such setting; did you mean POINTBOOK_DATABASE_POOL_SIZE?"


def test_all_problems_of_the_shims_settings_are_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = problems(
        monkeypatch,
        ShimSettings,
        required=("shopline_secrets",),
        HTTP_ADDRESS="0.0.0.0:8080",
        GRPC_ADDRESS="pointbook.internal:50051",
        TOKEN="pb_x_y",
        MAX_BODY_BYTES="0",
        SHOPLINE_SECRETS=" ",
    )

    assert set(found) == {"HTTP_ADDRESS", "TOKEN", "MAX_BODY_BYTES", "SHOPLINE_SECRETS"}


@pytest.mark.parametrize("secrets", ["", " ", ",", " , ,", "\t,\n"])
def test_a_list_of_commas_counts_as_a_missing_secret(monkeypatch: pytest.MonkeyPatch, secrets: str) -> None:
    found = problems(monkeypatch, ShimSettings, required=("shopline_secrets",), SHOPLINE_SECRETS=secrets)

    assert found.keys() == {"SHOPLINE_SECRETS"}
    assert found["SHOPLINE_SECRETS"].startswith("is not set")


def test_endpoints_replace_required_app_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = '{"an-endpoint-000001": {"merchant_id": "m", "store_ids": ["s"], "topics": ["customers/update"], '
    endpoints = endpoint + '"secrets": ["endpoint-secret"]}}'

    assert not problems(monkeypatch, ShimSettings, required=("shopline_secrets",), SHOPLINE_ENDPOINTS=endpoints)


@pytest.mark.parametrize("name", ["POINTBOOK_DATABASE_URL", "pointbook_database_url", "Pointbook_Database_Url"])
def test_names_of_required_settings_are_case_insensitive(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    url = "postgresql://localhost/pointbook"
    monkeypatch.setenv(name, url)

    assert settings_problems([ServerSettings], {name: url}, required=("database_url",), overrides={}) == []


def test_a_setting_of_server_and_shim_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clauses = settings_problems([ServerSettings, ShimSettings], {}, overrides={"grpc_address": "x"})

    assert [clause.partition(":")[0] for clause in clauses] == ["POINTBOOK_GRPC_ADDRESS"]
    assert problems(monkeypatch, ServerSettings, ShimSettings, ALLOW_PLAINTEXT="perhaps").keys() == {"ALLOW_PLAINTEXT"}


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("POINTBOOK_GRPC_ADRESS", "POINTBOOK_GRPC_ADDRESS"),
        ("POINTBOOK_DATABASE", "POINTBOOK_DATABASE_URL"),
        ("POINTBOOK_SHOPLINE_SECRET", "POINTBOOK_SHOPLINE_SECRETS"),
        ("POINTBOOK_CODE_KEY", "POINTBOOK_CODE_KEYS"),
        ("POINTBOOK_LOGLEVEL", "POINTBOOK_LOG_LEVEL"),
        ("pointbook_log_levle", "POINTBOOK_LOG_LEVEL"),
    ],
)
def test_a_mistyped_variable_is_reported_with_the_nearest_setting(name: str, meant: str) -> None:
    (problem,) = unknown_variables({name: "value-never-shown"})

    assert problem == f"{name}: there is no such setting; did you mean {meant}?"


def test_an_unknown_variable_without_a_similar_setting_gets_no_suggestion() -> None:
    assert unknown_variables({"POINTBOOK_XYZZY": "1"}) == ["POINTBOOK_XYZZY: there is no such setting"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("POINTBOOK_A\nB", "POINTBOOK_A?B"),
        ("POINTBOOK_\x1b[31m", "POINTBOOK_?[31m"),
        ("POINTBOOK_\udcff", "POINTBOOK_?"),
        ("POINTBOOK_A B", "POINTBOOK_A?B"),
    ],
)
def test_unprintable_bytes_in_a_variables_name_are_replaced(name: str, shown: str) -> None:
    assert unknown_variables({name: "1"}) == [f"{shown}: there is no such setting"]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"PATH": "/bin", "POINTBOOKS": "1", "MY_POINTBOOK_TOKEN": "1"},
        {"POINTBOOK_TOKEN": "x", "POINTBOOK_WORKERS": "2", "pointbook_data_dir": "x"},
        # Variables that Kubernetes sets for services named pointbook and pointbook-shim.
        {
            "POINTBOOK_SERVICE_HOST": "10.0.0.1",
            "POINTBOOK_SERVICE_PORT": "50051",
            "POINTBOOK_SERVICE_PORT_GRPC": "50051",
            "POINTBOOK_PORT": "tcp://10.0.0.1:50051",
            "POINTBOOK_PORT_50051_TCP": "tcp://10.0.0.1:50051",
            "POINTBOOK_PORT_50051_TCP_PROTO": "tcp",
            "POINTBOOK_PORT_50051_TCP_PORT": "50051",
            "POINTBOOK_PORT_50051_TCP_ADDR": "10.0.0.1",
            "POINTBOOK_SHIM_SERVICE_HOST": "10.0.0.2",
            "POINTBOOK_SHIM_PORT_8080_TCP_ADDR": "10.0.0.2",
            "POINTBOOK_SHIM_PORT": "tcp://10.0.0.2:8080",
        },
    ],
)
def test_variables_of_other_programs_and_kubernetes_are_ignored(environment: dict[str, Any]) -> None:
    assert unknown_variables(environment) == []


def test_pointbook_port_is_a_service_link_only_if_its_value_is_a_url() -> None:
    assert len(unknown_variables({"POINTBOOK_PORT": "8080", "POINTBOOK_HTTP_PORT": "8080"})) == 2
