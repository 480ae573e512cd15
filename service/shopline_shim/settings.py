"""The shim's settings: `POINTBOOK_*` environment variables, one field each."""

import ipaddress
import json
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from pointbook_common.secret_files import SecretFileSettings, read_secret_file
from shopline_shim.endpoints import Endpoint, parse_endpoints

SECRET_LENGTH_MIN = 10
"""The length of the shortest shared secret: SHOPLINE's are longer, and a shorter one can be found by trying."""
_VISIBLE = re.compile(r"[!-~]+")
_CALL_FIELDS = ("merchant_id", "caller_number", "called_number", "provider_call_id", "call_time")


class ShimSettings(SecretFileSettings):
    """What the shim needs to know before it starts; nothing is read later.

    Raises pydantic's ValidationError where a setting is wrong; its text never holds a setting's value, as that may be
    a secret.
    """

    model_config = SettingsConfigDict(env_prefix="POINTBOOK_", frozen=True, extra="forbid", hide_input_in_errors=True)

    allow_plaintext: bool = Field(
        default=False,
        description="Let plaintext leave loopback: HTTP without POINTBOOK_HTTP_TLS_CERT_FILE behind a proxy, and gRPC "
        "without POINTBOOK_SERVER_CA_FILE in a network that encrypts by itself.",
    )
    server_ca_file: Path | None = Field(
        default=None,
        description="The CA certificates, in PEM, that the gRPC server's certificate is verified against; with it the "
        "shim and the commands speak TLS. The system's own are a file too, such as "
        "/etc/ssl/certs/ca-certificates.crt.",
    )
    server_name: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9._:-]*$",
        description="The name that the server's certificate must have, where it is not the host of "
        "POINTBOOK_GRPC_ADDRESS.",
    )
    client_cert_file: Path | None = Field(
        default=None,
        description="The certificate with its chain, in PEM, that the shim and the commands show the gRPC server. "
        "Renewed files are used within a second.",
    )
    client_key_file: Path | None = Field(
        default=None,
        description="The private key of POINTBOOK_CLIENT_CERT_FILE, in PEM without a password.",
    )
    http_tls_cert_file: Path | None = Field(
        default=None,
        description="The shim's certificate with its chain, in PEM: it then serves HTTPS by TLS 1.2 or later, where no "
        "proxy does. Renewed files are used from the next handshake on.",
    )
    http_tls_key_file: Path | None = Field(
        default=None,
        description="The private key of POINTBOOK_HTTP_TLS_CERT_FILE, in PEM without a password.",
    )
    http_address: str = Field(
        default="127.0.0.1:8080",
        description="Where the shim listens, host:port. Port 0 takes any free port.",
    )
    grpc_address: str = Field(
        default="127.0.0.1:50051",
        description="The gRPC server that the shim calls, host:port.",
    )
    token: SecretStr = Field(
        default=SecretStr(""),
        description="The bearer token that the shim calls the server with; it needs the scopes points.write and "
        "webhooks, for all merchants if it shall also keep webhooks that name none, and telephony to confirm missed "
        "calls. Empty: none is sent, which only a server without access control accepts.",
    )
    shopline_secrets: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(),
        description="SHOPLINE's app secrets, separated by commas; a webhook signed with any of them is authentic, so "
        "that a secret can be rotated. At least 10 characters each. The shim starts without one only where it has "
        "POINTBOOK_SHOPLINE_ENDPOINTS.",
    )
    shopline_endpoints: Annotated[dict[str, Endpoint], NoDecode] = Field(
        default={},
        description="Endpoints of their own for SHOPLINE's subscriptions, as a JSON object such as "
        '{"ID": {"merchant_id": "…", "store_ids": ["…"], "topics": ["…"], "secrets": ["…"]}}: '
        "POST /webhooks/shopline/ID takes that merchant's webhooks, stores and topics alone. IDs have at least 16 "
        "characters.",
    )
    webhook_max_age_hours: float = Field(
        default=0,
        ge=0,
        allow_inf_nan=False,
        description="The age, by the time in its body, beyond which a webhook is quarantined and not applied; 0: none. "
        "SHOPLINE sends a webhook again for up to 48 hours. Requests to erase have no such age.",
    )
    shop_id_mismatch: Literal["quarantine", "warn"] = Field(
        default="quarantine",
        description="What becomes of a webhook whose X-Shopline-Shop-Id differs from its body's store: quarantine "
        "keeps it without applying it, warn logs it and applies it to the body's store.",
    )
    missed_call_secrets: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(),
        description="The telephony provider's secrets, separated by commas; a callback that knows any of them is "
        "authentic, so that a secret can be rotated. At least 10 characters each. Empty: there is no POST "
        "/callbacks/missed-call.",
    )
    missed_call_fields: Annotated[dict[str, str], NoDecode] = Field(
        default={},
        description="How the telephony provider names the fields of a missed call, as a JSON object such as "
        '{"caller_number": "From", "called_number": "To", "provider_call_id": "CallSid"}; those that it leaves out '
        "have our names.",
    )
    max_body_bytes: int = Field(
        default=262_144,
        ge=1,
        le=262_144,
        description="The largest body of a webhook or callback, in bytes; a larger one is answered 413. The quarantine "
        "holds no larger.",
    )
    max_connections: int = Field(
        default=1_000,
        ge=10,
        le=1_000_000,
        description="The most open connections of one shim process, as far as its limit on open files has room; "
        "beyond, the oldest one without an authentic request is cut.",
    )
    max_unverified_bytes: int = Field(
        default=32 * 1024**2,
        ge=1024**2,
        le=1024**4,
        description="The most bytes of bodies that one shim process holds before it knows their senders; beyond, the "
        "oldest connection without an authentic request is cut that holds more than its share.",
    )
    shim_metrics_address: str = Field(
        default="",
        description="host:port on which the shim answers GET /metrics for Prometheus, over plain HTTP; empty: nowhere. "
        "Each of several workers takes the next port. The address of POINTBOOK_HTTP_ADDRESS adds it to the webhooks' "
        "port, as `dev` does.",
    )
    header_timeout_seconds: float = Field(
        default=5,
        gt=0,
        allow_inf_nan=False,
        description="How long a client may take to send a request's headers, in seconds.",
    )
    request_timeout_seconds: float = Field(
        default=10,
        gt=0,
        allow_inf_nan=False,
        description="How long a request may take from its first byte to the end of its answer, in seconds.",
    )
    grpc_timeout_seconds: float = Field(
        default=4,
        gt=0,
        allow_inf_nan=False,
        description="How long the gRPC server may take for one webhook, its quarantine included, or one missed call, "
        "in seconds. "
        "SHOPLINE waits 5 for the answer.",
    )
    drain_timeout_seconds: int = Field(
        default=4,
        ge=1,
        description="How long running requests may take to end when the shim stops, in whole seconds.",
    )

    shim_workers: int = Field(
        default=1, ge=1, le=64, description="Shim processes that share the port, for more than one core."
    )
    heartbeat_timeout_seconds: float = Field(
        default=10,
        ge=3,
        le=600,
        description="How long a worker's event loop may be blocked until the worker is killed and replaced, in "
        "seconds.",
    )

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="DEBUG, INFO, WARNING or ERROR; DEBUG tells every webhook."
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
        # An unknown value is wrong by itself.
        if cert in info.data and (value is None) is not (info.data[cert] is None):
            told = "must be set where {} is" if value is None else "needs {}"
            raise ValueError(told.format(f"POINTBOOK_{cert.upper()}"))
        return value

    @field_validator("http_address", "grpc_address", "shim_metrics_address")
    @classmethod
    def _check_address(cls, address: str, info: ValidationInfo) -> str:
        if address or info.field_name != "shim_metrics_address":
            split_address(address)
        return address

    @field_validator("shopline_endpoints", mode="before")
    @classmethod
    def _parse_endpoints(cls, endpoints: object) -> object:
        return parse_endpoints(endpoints) if isinstance(endpoints, str) else endpoints

    @field_validator("shopline_endpoints")
    @classmethod
    def _check_endpoints(cls, endpoints: dict[str, Endpoint], info: ValidationInfo) -> dict[str, Endpoint]:
        unbound = set(info.data.get("shopline_secrets", ()))
        for number, endpoint in enumerate(endpoints.values(), start=1):
            cls._check_secrets(endpoint.secrets)
            if unbound.intersection(endpoint.secrets):
                raise ValueError(
                    f"endpoint {number}: POINTBOOK_SHOPLINE_SECRETS has its secret, so that its webhooks would be "
                    "authentic without it, too"
                )
        return endpoints

    @field_validator("shopline_secrets", "missed_call_secrets", mode="before")
    @classmethod
    def _split_secrets(cls, secrets: object) -> object:
        if isinstance(secrets, str):
            return tuple(part.strip() for part in secrets.split(",") if part.strip())
        return secrets

    @field_validator("shopline_secrets", "missed_call_secrets")
    @classmethod
    def _check_secrets(cls, secrets: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        texts = [secret.get_secret_value() for secret in secrets]
        if not all(_VISIBLE.fullmatch(text) and len(text) >= SECRET_LENGTH_MIN for text in texts):
            raise ValueError(f"every secret must be visible ASCII characters, at least {SECRET_LENGTH_MIN}")
        return secrets

    @field_validator("missed_call_fields", mode="before")
    @classmethod
    def _parse_names(cls, names: object) -> object:
        if isinstance(names, str):
            try:
                return json.loads(names)
            except (ValueError, RecursionError):
                raise ValueError("must be a JSON object") from None
        return names

    @field_validator("missed_call_fields")
    @classmethod
    def _check_names(cls, names: dict[str, str]) -> dict[str, str]:
        if not names.keys() <= set(_CALL_FIELDS):
            raise ValueError(f"must name no other fields than {', '.join(_CALL_FIELDS)}")
        if not all(_VISIBLE.fullmatch(name) for name in names.values()):
            raise ValueError("every name must be visible ASCII characters, at least one")
        return names

    @field_validator("http_address", "shim_metrics_address")
    @classmethod
    def _keep_http_on_loopback(cls, address: str, info: ValidationInfo) -> str:
        has_tls = info.field_name == "http_address" and info.data.get("http_tls_cert_file") is not None
        # The same address is the same listener, and so has its TLS.
        is_covered = not address or has_tls or address == info.data.get("http_address")
        if not is_covered and not info.data.get("allow_plaintext", True) and not _is_loopback(address):
            way = "set POINTBOOK_HTTP_TLS_CERT_FILE, or " if info.field_name == "http_address" else "set "
            raise ValueError(f"is beyond loopback: {way}POINTBOOK_ALLOW_PLAINTEXT=true behind a TLS proxy")
        return address

    @field_validator("token")
    @classmethod
    def _check_token(cls, token: SecretStr, info: ValidationInfo) -> SecretStr:
        if not token.get_secret_value():
            return token
        if not _VISIBLE.fullmatch(token.get_secret_value()):
            raise ValueError("must be visible ASCII characters, as it travels in a header")
        # Unknown values are wrong by themselves.
        may_speak_plaintext = info.data.get("allow_plaintext", True) or _is_loopback(
            info.data.get("grpc_address", "localhost:0")
        )
        if info.data.get("server_ca_file") is None and not may_speak_plaintext:
            raise ValueError(
                "would be sent in clear to POINTBOOK_GRPC_ADDRESS, which is beyond loopback: set "
                "POINTBOOK_SERVER_CA_FILE for TLS, or POINTBOOK_ALLOW_PLAINTEXT=true in a network that encrypts by "
                "itself"
            )
        return token

    # The last validator is the first to run.
    _read_secret_file = field_validator("*", mode="before")(read_secret_file)


def split_address(address: str) -> tuple[str, int]:
    """Split `host:port` or `[IPv6]:port` into its host and its port, 0 to 65535. Raises ValueError where it is not."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdigit() and int(port) < 2**16):
        raise ValueError("must be host:port")
    return host, int(port)


def _is_loopback(address: str) -> bool:
    host, _ = split_address(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
