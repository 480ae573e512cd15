"""Settings of the shim: one field for each `POINTBOOK_*` environment variable."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from pointbook_common.addresses import is_loopback
from pointbook_common.secret_files import SecretFileSettings, read_secret_file
from shopline_shim.endpoint_bindings import EndpointBinding, parse_endpoint_bindings

SECRET_LENGTH_MIN = 10
"""The minimum length of a shared secret: SHOPLINE's are longer, and shorter ones can be guessed."""
_VISIBLE = re.compile(r"[!-~]+")
_MISSED_CALL_FIELDS = ("merchant_id", "caller_number", "called_number", "provider_call_id", "call_time")


class ShimSettings(SecretFileSettings):
    """The settings of the shim, read once at the start.

    Raises pydantic's ValidationError if a setting is wrong. Its text never contains a value, which may be a secret.
    """

    model_config = SettingsConfigDict(env_prefix="POINTBOOK_", frozen=True, extra="forbid", hide_input_in_errors=True)

    allow_plaintext: bool = Field(
        default=False,
        description="Allow plaintext beyond loopback: HTTP without POINTBOOK_HTTP_TLS_CERT_FILE behind a proxy, and "
        "gRPC without POINTBOOK_SERVER_CA_FILE in a network that encrypts traffic itself.",
    )
    server_ca_file: Path | None = Field(
        default=None,
        description="The CA certificates, in PEM, that verify the gRPC server's certificate. With it, the shim and the "
        "commands use TLS. For the system's CAs, name their file, such as /etc/ssl/certs/ca-certificates.crt.",
    )
    server_name: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9._:-]*$",
        description="The name in the server's certificate, if it differs from the host of POINTBOOK_GRPC_ADDRESS.",
    )
    client_cert_file: Path | None = Field(
        default=None,
        description="The certificate with its chain, in PEM, that the shim and the commands present to the gRPC "
        "server. Renewed files are used within a second.",
    )
    client_key_file: Path | None = Field(
        default=None,
        description="The private key of POINTBOOK_CLIENT_CERT_FILE, in PEM without a password.",
    )
    http_tls_cert_file: Path | None = Field(
        default=None,
        description="The shim's certificate with its chain, in PEM. With it, the shim serves HTTPS with TLS 1.2 or "
        "later. Renewed files are used from the next handshake on.",
    )
    http_tls_key_file: Path | None = Field(
        default=None,
        description="The private key of POINTBOOK_HTTP_TLS_CERT_FILE, in PEM without a password.",
    )
    http_address: str = Field(
        default="127.0.0.1:8080",
        description="The host:port that the shim listens on. Port 0 selects a free port.",
    )
    grpc_address: str = Field(
        default="127.0.0.1:50051",
        description="The host:port of the gRPC server that the shim calls.",
    )
    token: SecretStr = Field(
        default=SecretStr(""),
        description="The bearer token for the gRPC server. It needs the scopes points.write and webhooks, telephony to "
        "confirm missed calls, and access to all merchants to quarantine webhooks that name none. Empty: no "
        "token is sent, which only a server without access control accepts.",
    )
    shopline_secrets: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(),
        description="SHOPLINE's app secrets, separated by commas. A webhook signed with any of them is authentic, "
        "so that a secret can be rotated. At least 10 characters each. Required unless "
        "POINTBOOK_SHOPLINE_ENDPOINTS is set.",
    )
    shopline_endpoints: Annotated[dict[str, EndpointBinding], NoDecode] = Field(
        default={},
        description='Separate endpoints for SHOPLINE\'s subscriptions, as a JSON object such as {"ID": {"merchant_id": '
        '"…", "store_ids": ["…"], "topics": ["…"], "secrets": ["…"]}}: POST /webhooks/shopline/ID accepts '
        "only webhooks of that merchant, those stores and those topics. IDs have at least 16 characters.",
    )
    webhook_max_age_hours: float = Field(
        default=0,
        ge=0,
        allow_inf_nan=False,
        description="The maximum age of a webhook, by the time in its body; older ones are quarantined. 0: no maximum. "
        "SHOPLINE retries for up to 48 hours. Erasure requests have no maximum age.",
    )
    shop_id_mismatch: Literal["quarantine", "warn"] = Field(
        default="quarantine",
        description="What to do with a webhook whose X-Shopline-Shop-Id differs from the store in its body: quarantine "
        "stores it without applying it, warn logs a warning and applies it to the store in the body.",
    )
    missed_call_secrets: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(),
        description="The telephony provider's secrets, separated by commas. A callback with any of them is authentic, "
        "so that a secret can be rotated. At least 10 characters each. Empty: POST /callbacks/missed-call does "
        "not exist.",
    )
    missed_call_fields: Annotated[dict[str, str], NoDecode] = Field(
        default={},
        description="The telephony provider's names of a missed call's fields, as a JSON object such as "
        '{"caller_number": "From", "called_number": "To", "provider_call_id": "CallSid"}. Other fields have '
        "our names.",
    )
    max_body_bytes: int = Field(
        default=262_144,
        ge=1,
        le=262_144,
        description="The maximum size of the body of a webhook or callback, in bytes. Larger ones get 413. The "
        "quarantine accepts no larger bodies.",
    )
    max_connections: int = Field(
        default=1_000,
        ge=10,
        le=1_000_000,
        description="The maximum number of open connections of a shim process, if its limit on open files allows as "
        "many. Beyond it, the oldest connection without an authentic request is closed.",
    )
    max_unverified_bytes: int = Field(
        default=32 * 1024**2,
        ge=1024**2,
        le=1024**4,
        description="The maximum number of bytes that a shim process holds of bodies that are not verified yet. Beyond "
        "it, the oldest connection without an authentic request that holds more than its share is closed.",
    )
    shim_metrics_address: str = Field(
        default="",
        description="The host:port of GET /metrics for Prometheus, over plain HTTP, with the metrics of all workers. "
        "Empty: none. If it equals POINTBOOK_HTTP_ADDRESS, the metrics are served on the webhooks' port, as in `dev`; "
        "several workers need an address of its own.",
    )
    header_timeout_seconds: float = Field(
        default=5,
        gt=0,
        allow_inf_nan=False,
        description="The maximum time for a client to send a request's headers, in seconds.",
    )
    request_timeout_seconds: float = Field(
        default=10,
        gt=0,
        allow_inf_nan=False,
        description="The maximum time from a request's first byte to the end of its response, in seconds.",
    )
    grpc_timeout_seconds: float = Field(
        default=4,
        gt=0,
        allow_inf_nan=False,
        description="The maximum time for the gRPC calls of one webhook, including its quarantine, or of one missed "
        "call, in seconds. SHOPLINE waits 5 for the response.",
    )
    drain_timeout_seconds: int = Field(
        default=4,
        ge=1,
        description="The maximum time for running requests to end when the shim stops, in whole seconds.",
    )

    shim_workers: int = Field(
        default=1,
        ge=1,
        le=64,
        description="The number of shim processes that share the port, to use more than one core.",
    )
    heartbeat_timeout_seconds: float = Field(
        default=10,
        ge=3,
        le=600,
        description="How long a worker's event loop may be blocked before the worker is killed and replaced, in "
        "seconds.",
    )

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="DEBUG, INFO, WARNING or ERROR."
    )
    tracing: bool = Field(
        default=False,
        description="Export traces by OpenTelemetry, which the standard variables OTEL_* configure; requires "
        "pointbook[otel].",
    )
    webhook_log_lines_per_second_max: int = Field(
        default=100,
        ge=0,
        le=100_000,
        description="The most webhooks of one outcome that a process logs singly per second; it counts further ones. "
        "Those without a valid signature have 10 at most.",
    )

    @field_validator(
        "server_ca_file",
        "client_cert_file",
        "client_key_file",
        "http_tls_cert_file",
        "http_tls_key_file",
        mode="before",
    )
    @classmethod
    def _unset_empty(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("server_name", "client_cert_file")
    @classmethod
    def _check_server_ca(cls, value: Path | str | None, info: ValidationInfo) -> Path | str | None:
        if value and info.data.get("server_ca_file") is None:
            raise ValueError("needs POINTBOOK_SERVER_CA_FILE")
        return value

    @field_validator("client_key_file", "http_tls_key_file")
    @classmethod
    def _check_key_file(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        cert = str(info.field_name).replace("_key_", "_cert_")
        # If the certificate's value is invalid, it has its own error.
        if cert in info.data and (value is None) is not (info.data[cert] is None):
            rule = "must be set if {} is" if value is None else "needs {}"
            raise ValueError(rule.format(f"POINTBOOK_{cert.upper()}"))
        return value

    @field_validator("http_address", "grpc_address", "shim_metrics_address")
    @classmethod
    def _check_address(cls, address: str, info: ValidationInfo) -> str:
        if address or info.field_name != "shim_metrics_address":
            split_address(address)
        return address

    @field_validator("shopline_endpoints", mode="before")
    @classmethod
    def _parse_endpoint_bindings(cls, endpoints: object) -> object:
        return parse_endpoint_bindings(endpoints) if isinstance(endpoints, str) else endpoints

    @field_validator("shopline_endpoints")
    @classmethod
    def _check_endpoints(cls, bindings: dict[str, EndpointBinding], info: ValidationInfo) -> dict[str, EndpointBinding]:
        shared_secrets = set(info.data.get("shopline_secrets", ()))
        for number, binding in enumerate(bindings.values(), start=1):
            cls._check_secrets(binding.secrets)
            if shared_secrets.intersection(binding.secrets):
                raise ValueError(
                    f"endpoint {number}: POINTBOOK_SHOPLINE_SECRETS has its secret, so that its webhooks would also be "
                    "authentic at /webhooks/shopline"
                )
        return bindings

    @field_validator("shopline_secrets", "missed_call_secrets", mode="before")
    @classmethod
    def _split_secrets(cls, secrets: object) -> object:
        if isinstance(secrets, str):
            return tuple(part.strip() for part in secrets.split(",") if part.strip())
        return secrets

    @field_validator("shopline_secrets", "missed_call_secrets")
    @classmethod
    def _check_secrets(cls, secrets: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        texts = secret_values(secrets)
        if not all(_VISIBLE.fullmatch(text) and len(text) >= SECRET_LENGTH_MIN for text in texts):
            raise ValueError(f"every secret must be visible ASCII characters, at least {SECRET_LENGTH_MIN}")
        return secrets

    @field_validator("missed_call_fields", mode="before")
    @classmethod
    def _parse_field_names(cls, names: object) -> object:
        if isinstance(names, str):
            try:
                return json.loads(names)
            except (ValueError, RecursionError):
                raise ValueError("must be a JSON object") from None
        return names

    @field_validator("missed_call_fields")
    @classmethod
    def _check_field_names(cls, names: dict[str, str]) -> dict[str, str]:
        if not names.keys() <= set(_MISSED_CALL_FIELDS):
            raise ValueError(f"must only name the fields {', '.join(_MISSED_CALL_FIELDS)}")
        if not all(_VISIBLE.fullmatch(name) for name in names.values()):
            raise ValueError("every name must be visible ASCII characters, at least one")
        return names

    @field_validator("http_address", "shim_metrics_address")
    @classmethod
    def _check_http_plaintext(cls, address: str, info: ValidationInfo) -> str:
        has_tls = info.field_name == "http_address" and info.data.get("http_tls_cert_file") is not None
        # Metrics on the webhooks' address share its listener, and so its TLS.
        is_protected = not address or has_tls or address == info.data.get("http_address")
        if not is_protected and not info.data.get("allow_plaintext", True) and not is_loopback(address):
            remedy = "set POINTBOOK_HTTP_TLS_CERT_FILE, or " if info.field_name == "http_address" else "set "
            raise ValueError(f"is beyond loopback: {remedy}POINTBOOK_ALLOW_PLAINTEXT=true behind a TLS proxy")
        return address

    @field_validator("token")
    @classmethod
    def _check_token(cls, token: SecretStr, info: ValidationInfo) -> SecretStr:
        if not token.get_secret_value():
            return token
        if not _VISIBLE.fullmatch(token.get_secret_value()):
            raise ValueError("must be visible ASCII characters, because it is sent in a header")
        # Invalid values have their own errors.
        plaintext_allowed = info.data.get("allow_plaintext", True) or is_loopback(
            info.data.get("grpc_address", "localhost:0")
        )
        if info.data.get("server_ca_file") is None and not plaintext_allowed:
            raise ValueError(
                "would be sent in plaintext to POINTBOOK_GRPC_ADDRESS, which is beyond loopback: set "
                "POINTBOOK_SERVER_CA_FILE for TLS, or POINTBOOK_ALLOW_PLAINTEXT=true in a network that encrypts "
                "traffic itself"
            )
        return token

    # Validators in mode "before" run in reverse order, so this one runs first.
    _read_secret_file = field_validator("*", mode="before")(read_secret_file)


def secret_values(secrets: Iterable[SecretStr]) -> list[str]:
    """Return the plain texts of secrets."""
    return [secret.get_secret_value() for secret in secrets]


def split_address(address: str) -> tuple[str, int]:
    """Return the host and port of `host:port` or `[IPv6]:port`.

    Raises ValueError if it has another form, or a port above 65535.
    """
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdigit() and int(port) < 2**16):
        raise ValueError("must be host:port")
    return host, int(port)
