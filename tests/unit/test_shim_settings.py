"""Settings of the shim."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pointbook_common.secret_files import secret_file_fields
from shopline_shim.app import create_app
from shopline_shim.settings import ShimSettings, split_address


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delete POINTBOOK_* variables of the machine."""
    for name in ShimSettings.model_fields:
        monkeypatch.delenv(f"POINTBOOK_{name.upper()}", raising=False)


def test_defaults_use_loopback_only() -> None:
    settings = ShimSettings()

    assert settings.http_address == "127.0.0.1:8080"
    assert settings.grpc_address == "127.0.0.1:50051"
    assert settings.max_body_bytes == 256 * 1024


def test_every_setting_has_a_description() -> None:
    assert all(field.description for field in ShimSettings.model_fields.values())


@pytest.mark.parametrize("name", ["shopline_secrets", "missed_call_secrets"])
def test_secrets_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(f"POINTBOOK_{name.upper()}", "new-secret, old-secret,")

    actual = [secret.get_secret_value() for secret in getattr(ShimSettings(), name)]

    assert actual == ["new-secret", "old-secret"]


def test_missed_call_field_names_are_a_json_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POINTBOOK_MISSED_CALL_FIELDS", '{"caller_number": "From", "call_time": "Timestamp"}')

    assert ShimSettings().missed_call_fields == {"caller_number": "From", "call_time": "Timestamp"}


def test_secrets_are_in_neither_repr_nor_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POINTBOOK_SHOPLINE_SECRETS", "hidden-secret")
    monkeypatch.setenv("POINTBOOK_MISSED_CALL_SECRETS", "hidden-secret")
    monkeypatch.setenv("POINTBOOK_TOKEN", "hidden-token")
    shown = repr(ShimSettings()) + str(ShimSettings().model_dump())
    monkeypatch.setenv("POINTBOOK_SHOPLINE_SECRETS", "hidden-secret,geh\u00e4im")
    with pytest.raises(ValidationError) as caught:
        ShimSettings()

    assert "hidden" not in shown + str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTP_ADDRESS", "8080"),
        ("HTTP_ADDRESS", "127.0.0.1:65536"),
        ("HTTP_ADDRESS", "0.0.0.0:8080"),
        ("GRPC_ADDRESS", "localhost:"),
        ("SHOP_ID_MISMATCH", "ignore"),
        ("MAX_BODY_BYTES", "0"),
        ("MAX_BODY_BYTES", "262145"),
        ("HEADER_TIMEOUT_SECONDS", "nan"),
        ("GRPC_TIMEOUT_SECONDS", "inf"),
        ("SHOPLINE_SECRETS", "geh\u00e4im"),
        ("TOKEN", "two words"),
        ("MISSED_CALL_SECRETS", "geh\u00e4im"),
        ("MISSED_CALL_FIELDS", "From"),
        ("MISSED_CALL_FIELDS", "[" * 100_000),
        ("MISSED_CALL_FIELDS", '["From"]'),
        ("MISSED_CALL_FIELDS", '{"caller_number": 1}'),
        ("MISSED_CALL_FIELDS", '{"From": "caller_number"}'),
        ("MISSED_CALL_FIELDS", '{"caller_number": ""}'),
    ],
)
def test_wrong_setting_is_one_error_that_names_it(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"POINTBOOK_{name}", value)

    with pytest.raises(ValidationError) as caught:
        ShimSettings()

    assert name.lower() in str(caught.value).lower()
    assert caught.value.error_count() == 1


def test_plaintext_beyond_loopback_must_be_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POINTBOOK_TOKEN", "token")
    monkeypatch.setenv("POINTBOOK_GRPC_ADDRESS", "pointbook.internal:50051")
    with pytest.raises(ValidationError, match="POINTBOOK_GRPC_ADDRESS"):
        ShimSettings()
    monkeypatch.setenv("POINTBOOK_HTTP_ADDRESS", "[::]:8080")
    monkeypatch.setenv("POINTBOOK_ALLOW_PLAINTEXT", "true")

    assert ShimSettings().http_address == "[::]:8080"


def test_tls_needs_no_allowed_plaintext(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "TOKEN": "token",
        "GRPC_ADDRESS": "pointbook.internal:50051",
        "HTTP_ADDRESS": "[::]:8080",
        "SERVER_CA_FILE": "ca.crt",
        "HTTP_TLS_CERT_FILE": "shim.crt",
        "HTTP_TLS_KEY_FILE": "shim.key",
    }.items():
        monkeypatch.setenv(f"POINTBOOK_{name}", value)

    assert not ShimSettings().allow_plaintext


@pytest.mark.parametrize(
    ("variables", "wrong"),
    [
        ({"HTTP_TLS_CERT_FILE": "x"}, "http_tls_key_file"),
        ({"HTTP_TLS_KEY_FILE": "x"}, "http_tls_key_file"),
        ({"SERVER_CA_FILE": "x", "CLIENT_CERT_FILE": "x"}, "client_key_file"),
        ({"SERVER_CA_FILE": "x", "CLIENT_KEY_FILE": "x"}, "client_key_file"),
        ({"CLIENT_CERT_FILE": "x", "CLIENT_KEY_FILE": "x"}, "client_cert_file"),
        ({"SERVER_NAME": "pointbook"}, "server_name"),
        ({"SERVER_CA_FILE": "x", "SERVER_NAME": "point book"}, "server_name"),
    ],
)
def test_incomplete_tls_settings_are_an_error(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], wrong: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"POINTBOOK_{name}", value)

    with pytest.raises(ValidationError, match=rf"1 validation error[\s\S]*{wrong}"):
        ShimSettings()


def test_split_address_reads_ipv6_in_brackets() -> None:
    assert split_address("localhost:0") == ("localhost", 0)
    assert split_address("[::1]:8080") == ("::1", 8080)


def test_app_without_any_secret_is_an_error() -> None:
    with pytest.raises(ValueError, match="POINTBOOK_SHOPLINE_SECRETS"):
        create_app(ShimSettings())


ENDPOINT = {"merchant_id": "m", "store_ids": ["s"], "topics": ["customers/update"], "secrets": ["endpoint-secret"]}
ENDPOINT_ID = "an-endpoint-000001"


def test_endpoints_are_a_json_object_whose_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POINTBOOK_SHOPLINE_ENDPOINTS", json.dumps({ENDPOINT_ID: ENDPOINT}))
    settings = ShimSettings()

    assert settings.shopline_endpoints[ENDPOINT_ID].store_ids == ("s",)
    assert "endpoint-secret" not in repr(settings) + str(settings.model_dump())
    assert "shopline_endpoints" in secret_file_fields(ShimSettings)


@pytest.mark.parametrize(
    ("endpoints", "problem"),
    [
        ("[]", "must be a JSON object"),
        ("{", "must be a JSON object"),
        ({"short": ENDPOINT}, "endpoint 1: the id must be 16 to 128"),
        ({"an/endpoint/with/slashes": ENDPOINT}, "endpoint 1: the id must be 16 to 128"),
        ({ENDPOINT_ID: 1}, "endpoint 1: the binding: Input should be"),
        ({ENDPOINT_ID: ENDPOINT, ENDPOINT_ID + "-b": {}}, "endpoint 2: merchant_id: Field required"),
        ({ENDPOINT_ID: ENDPOINT | {"merchant_id": "a b"}}, "endpoint 1: merchant_id: "),
        ({ENDPOINT_ID: ENDPOINT | {"merchant_id": 7}}, "endpoint 1: merchant_id: "),
        ({ENDPOINT_ID: ENDPOINT | {"store_ids": []}}, "endpoint 1: store_ids: "),
        ({ENDPOINT_ID: ENDPOINT | {"topics": ["orders/create"]}}, "endpoint 1: topics: must be of app_memberSystem"),
        ({ENDPOINT_ID: ENDPOINT | {"secrets": []}}, "endpoint 1: secrets: "),
        (
            {ENDPOINT_ID: ENDPOINT | {"secrets": ["short"]}},
            "every secret must be visible ASCII characters, at least 10",
        ),
        ({ENDPOINT_ID: ENDPOINT | {"secrets": ["shared-secret"]}}, "endpoint 1: POINTBOOK_SHOPLINE_SECRETS has its"),
        ({ENDPOINT_ID: ENDPOINT | {"stores": ["s"]}}, "endpoint 1: stores: "),
    ],
)
def test_wrong_endpoint_is_an_error_that_names_its_number_and_field(
    monkeypatch: pytest.MonkeyPatch, endpoints: object, problem: str
) -> None:
    """The id of an endpoint is a secret, so it is not in the error."""
    text = endpoints if isinstance(endpoints, str) else json.dumps(endpoints)
    monkeypatch.setenv("POINTBOOK_SHOPLINE_SECRETS", "shared-secret")
    monkeypatch.setenv("POINTBOOK_SHOPLINE_ENDPOINTS", text)
    with pytest.raises(ValidationError) as caught:
        ShimSettings()

    (error,) = caught.value.errors(include_url=False, include_input=False, include_context=False)
    assert problem in error["msg"]
    assert ENDPOINT_ID not in str(caught.value)
    assert "-secret" not in str(caught.value)


def test_metrics_on_the_webhooks_address_use_its_tls(tmp_path: Path) -> None:
    files: dict[str, Any] = {"http_tls_cert_file": tmp_path / "shim.crt", "http_tls_key_file": tmp_path / "shim.key"}
    address = "192.0.2.1:8443"
    assert ShimSettings(http_address=address, shim_metrics_address=address, **files).shim_metrics_address == address
    with pytest.raises(ValidationError, match="is beyond loopback"):
        ShimSettings(http_address=address, shim_metrics_address="192.0.2.1:9100", **files)
