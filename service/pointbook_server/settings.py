"""The settings of the gRPC server, from POINTBOOK_* variables."""

from base64 import b64decode
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

KEY_BYTES = 32
"""How long a key is: at least, to sign codes; exactly, to encrypt."""
PORT_MAX = 65_535


def is_loopback(address: str) -> bool:
    """Tell whether a HOST:PORT address can be reached from this machine only."""
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class ServerSettings(BaseSettings):
    """How the gRPC server runs. Each field is a variable POINTBOOK_<NAME>; a wrong one stops the start."""

    model_config = SettingsConfigDict(env_prefix="POINTBOOK_", frozen=True, extra="ignore", hide_input_in_errors=True)

    database_url: SecretStr | None = Field(
        default=None,
        description="The PostgreSQL (15 or later) to use, as postgresql://USER:PASSWORD@HOST:PORT/NAME. "
        "Without it `pointbook dev` runs an embedded one; the other commands need it.",
    )
    grpc_address: str = Field(
        default="127.0.0.1:50051",
        description="HOST:PORT of the gRPC server: where it listens, and where the shim calls it.",
    )
    allow_plaintext: bool = Field(
        default=False,
        description="Lets the server listen without TLS beyond loopback, for a network that encrypts by itself.",
    )
    workers: int = Field(
        default=1, ge=1, le=64, description="Server processes that share the port, for more than one core."
    )
    reflection: bool = Field(
        default=False, description="Lets holders of a token explore the API by gRPC reflection; always on in `dev`."
    )
    database_pool_size: int = Field(default=10, ge=1, le=500, description="Database connections of one server process.")
    call_deadline_seconds: float = Field(
        default=30.0, gt=0, le=600, description="The longest that a call may take, whatever deadline its caller set."
    )
    drain_seconds: float = Field(
        default=6.0, ge=0, le=600, description="How long a stopping server lets running calls finish."
    )
    code_keys: Annotated[dict[str, SecretStr], NoDecode] = Field(
        default_factory=dict,
        description="The keys of one-time codes as ID:BASE64,... with at least 32 bytes each: the first signs, all "
        "verify. Needed to issue codes and to redact customers; `dev` makes its own.",
    )
    contact_pause_seconds: float = Field(
        default=86_400.0,
        ge=0,
        le=31 * 86_400,
        description="How long a mobile number or e-mail address that has changed gets no one-time codes, in seconds; "
        "0 in `dev`.",
    )
    quarantine_keys: Annotated[dict[str, SecretStr], NoDecode] = Field(
        default_factory=dict,
        description="The keys that encrypt what is in quarantine as ID:BASE64,... with exactly 32 bytes each: the "
        "first encrypts, all decrypt. Without one customer webhooks are not kept, and others in clear; `dev` makes "
        "its own.",
    )
    quarantine_webhooks_max: int = Field(
        default=100_000, ge=1, le=10**9, description="How many webhooks the quarantine of one merchant may hold."
    )
    quarantine_bytes_max: int = Field(
        default=1024**3,
        ge=1,
        le=10**15,
        description="How many bytes of headers and bodies the quarantine of one merchant may hold.",
    )
    metrics_address: str = Field(
        default="",
        description="HOST:PORT on which the server answers GET /metrics for Prometheus, over plain HTTP; empty: "
        "nowhere. Each of several workers takes the next port.",
    )
    log_level: str = Field(
        default="INFO", pattern=r"^(DEBUG|INFO|WARNING|ERROR)$", description="DEBUG, INFO, WARNING or ERROR."
    )
    data_dir: Path = Field(
        default=Path(".pointbook"), description="The folder in which `pointbook dev` keeps the embedded database."
    )

    @field_validator("database_url")
    @classmethod
    def _check_database_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        scheme, _, rest = value.get_secret_value().partition("://")
        try:
            _ = urlsplit(f"postgresql://{rest}").port
        except ValueError:
            scheme = ""
        if scheme not in {"postgresql", "postgres", "postgresql+asyncpg"}:
            raise ValueError("must be postgresql://USER:PASSWORD@HOST:PORT/NAME")
        return SecretStr(f"postgresql://{rest}")

    @field_validator("grpc_address", "metrics_address")
    @classmethod
    def _check_address(cls, value: str, info: ValidationInfo) -> str:
        if not value and info.field_name == "metrics_address":
            return value
        # gRPC itself takes a port that is too large for a smaller one.
        host, _, port = value.rpartition(":")
        if not host or " " in host or not (port.isascii() and port.isdigit() and int(port) <= PORT_MAX):
            raise ValueError("must be HOST:PORT")
        return value

    @field_validator("code_keys", "quarantine_keys", mode="before")
    @classmethod
    def _split_keys(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        pairs = [pair.strip().partition(":") for pair in value.split(",") if pair.strip()]
        keys = {key_id: encoded for key_id, _, encoded in pairs}
        if len(keys) != len(pairs):
            raise ValueError("names a key id twice")
        return keys

    @field_validator("code_keys", "quarantine_keys")
    @classmethod
    def _check_keys(cls, value: dict[str, SecretStr], info: ValidationInfo) -> dict[str, SecretStr]:
        for key_id, encoded in value.items():
            try:
                key = b64decode(encoded.get_secret_value(), validate=True)
            except ValueError:
                raise ValueError("must be ID:BASE64,...") from None
            if not key_id or len(key) < KEY_BYTES:
                raise ValueError("must be ID:BASE64,... with at least 32 bytes in each key")
            if info.field_name == "quarantine_keys" and len(key) != KEY_BYTES:
                raise ValueError("must be ID:BASE64,... with exactly 32 bytes in each key")
        return value

    @model_validator(mode="after")
    def _check_plaintext(self) -> Self:
        addresses = {"GRPC": self.grpc_address, "METRICS": self.metrics_address}
        for name, address in addresses.items():
            if address and not self.allow_plaintext and not is_loopback(address):
                raise ValueError(
                    f"POINTBOOK_{name}_ADDRESS {address} is beyond loopback and the server speaks plaintext: "
                    "set POINTBOOK_ALLOW_PLAINTEXT=true if the network encrypts by itself"
                )
        return self

    def code_key_bytes(self) -> dict[str, bytes]:
        """Return the code keys by id, the signing one first."""
        return _key_bytes(self.code_keys)

    def quarantine_key_bytes(self) -> dict[str, bytes]:
        """Return the quarantine's keys by id, the encrypting one first."""
        return _key_bytes(self.quarantine_keys)


def _key_bytes(keys: dict[str, SecretStr]) -> dict[str, bytes]:
    return {key_id: b64decode(encoded.get_secret_value()) for key_id, encoded in keys.items()}
