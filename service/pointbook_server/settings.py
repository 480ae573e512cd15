"""The settings of the gRPC server, from POINTBOOK_* variables."""

from base64 import b64decode
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from pointbook_common.secret_files import SecretFileSettings, read_secret_file
from pointbook_server.db.database_url import check_database_url
from pointbook_server.provider_settings import (
    HttpGateway,
    MailSender,
    SmtpServer,
    check_apprise_url,
    check_http_url,
    parse_body,
    parse_headers,
    parse_mail_sender,
    parse_smtp_url,
    parse_statuses,
)

KEY_BYTES = 32
"""How long a key is: at least, to sign codes; exactly, to encrypt."""
PORT_MAX = 65_535
_SECRET_CHECKS: dict[str, Callable[[str], object]] = {
    "sms_url": check_http_url,
    "sms_headers": parse_headers,
    "sms_body": parse_body,
    "smtp_url": parse_smtp_url,
    "apprise_sms_url": check_apprise_url,
    "apprise_email_url": check_apprise_url,
}
"""What judges the secret settings of providers."""
_RIVALS = {"apprise_sms_url": "sms_url", "apprise_email_url": "smtp_url"}
"""Two ways of one channel, of which a server has one."""


def is_loopback(address: str) -> bool:
    """Tell whether a HOST:PORT address can be reached from this machine only."""
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class ServerSettings(SecretFileSettings):
    """How the gRPC server runs. Each field is a variable POINTBOOK_<NAME>; a wrong one stops the start.

    Checks of several fields belong to the last of them: a check of the whole model runs only once every field is
    right, so that its errors would appear one start later.
    """

    model_config = SettingsConfigDict(env_prefix="POINTBOOK_", frozen=True, extra="ignore", hide_input_in_errors=True)

    allow_plaintext: bool = Field(
        default=False,
        description="Lets the server listen, post to an SMS gateway, and reach its database without verified TLS "
        "beyond loopback, for a network that encrypts by itself.",
    )
    database_url: SecretStr | None = Field(
        default=None,
        description="The PostgreSQL (15 or later) to use, as postgresql://USER:PASSWORD@HOST:PORT/NAME, with "
        "?sslmode=verify-full&sslrootcert=FILE beyond loopback and Unix sockets. Without it `pointbook dev` runs an "
        "embedded one; the other commands need it.",
    )
    tls_cert_file: Path | None = Field(
        default=None,
        description="The server's certificate with its chain, in PEM: gRPC then speaks TLS 1.2 or later. Renewed files "
        "are used from the next handshake on. See Encryption.",
    )
    tls_key_file: Path | None = Field(
        default=None,
        description="The private key of POINTBOOK_TLS_CERT_FILE, in PEM without a password.",
    )
    tls_client_ca_file: Path | None = Field(
        default=None,
        description="The CA certificates of clients, in PEM: clients then need a certificate that one of them has "
        "signed.",
    )
    grpc_address: str = Field(
        default="127.0.0.1:50051",
        description="HOST:PORT of the gRPC server: where it listens, and where the shim calls it.",
    )
    workers: int = Field(
        default=1, ge=1, le=64, description="Server processes that share the port, for more than one core."
    )
    heartbeat_timeout_seconds: float = Field(
        default=10.0,
        ge=3,
        le=600,
        description="How long a worker's event loop may be blocked until the worker is killed and replaced, in "
        "seconds.",
    )
    reflection: bool = Field(
        default=False, description="Lets holders of a token explore the API by gRPC reflection; always on in `dev`."
    )
    health_address: str = Field(
        default="",
        description="HOST:PORT of a second listener that answers gRPC health alone, for probes: clients that hold all "
        "connections of the other one do not keep them out. It speaks TLS where that one does. Empty: none. `pointbook "
        "health` asks it where it is set.",
    )
    connections_max: int = Field(
        default=0,
        ge=0,
        le=10**6,
        description="Client connections that one server process holds; those beyond are closed at once. 0: 4,000, or "
        "fewer where the limit of open files is low.",
    )
    token_calls_max: int = Field(
        default=500, ge=1, le=1_000, description="Calls of one token that may run at once in one server process."
    )
    token_calls_per_second_max: float = Field(
        default=0.0,
        ge=0,
        le=10**6,
        description="Calls that one token may make a second to one server process, with as many at once after a "
        "pause; 0 sets no limit.",
    )
    database_pool_size: int = Field(
        default=10,
        ge=1,
        le=500,
        description="Database connections that the calls of one server process share. Health and tokens have one more "
        "each.",
    )
    token_staleness_seconds: float = Field(
        default=30.0,
        ge=3,
        le=3_600,
        description="How long tokens stay in force that cannot be read again, since the database is away, in seconds; "
        "then all calls are refused with UNAVAILABLE.",
    )
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
    merchant_sends_max: int = Field(
        default=1_000, ge=1, le=10**9, description="How many one-time codes a merchant may send in 10 minutes."
    )
    refusals_keep_days: int = Field(
        default=30,
        ge=0,
        le=3_650,
        description="How many days refused redemptions and validations are kept for support; 0 keeps none.",
    )
    quarantine_keys: Annotated[dict[str, SecretStr], NoDecode] = Field(
        default_factory=dict,
        description="The keys that encrypt what is in quarantine as ID:BASE64,... with exactly 32 bytes each: the "
        "first encrypts, all decrypt. Without one, webhooks of customers or without a topic are not kept, and others "
        "in clear; `dev` makes its own.",
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
    quarantine_shared_webhooks_max: int = Field(
        default=20_000,
        ge=1,
        le=10**9,
        description="How many webhooks the shared quarantine may hold, of which those of merchants without any store "
        "half.",
    )
    quarantine_shared_bytes_max: int = Field(
        default=256 * 1024**2,
        ge=1,
        le=10**15,
        description="How many bytes of headers and bodies the shared quarantine may hold, likewise.",
    )
    quarantine_total_webhooks_max: int = Field(
        default=1_000_000, ge=1, le=10**9, description="How many webhooks all quarantines together may hold."
    )
    quarantine_total_bytes_max: int = Field(
        default=4 * 1024**3,
        ge=1,
        le=10**15,
        description="How many bytes of headers and bodies all quarantines together may hold.",
    )
    sms_url: SecretStr | None = Field(
        default=None,
        description="The HTTP gateway that takes codes by SMS, as https://HOST:PORT/PATH. See Delivering codes.",
    )
    sms_method: Literal["POST", "PUT"] = Field(default="POST", description="How the gateway is called: POST or PUT.")
    sms_headers: SecretStr = Field(
        default=SecretStr("{}"),
        description='Headers for the gateway as a JSON object, such as {"Authorization": "Bearer …"}.',
    )
    sms_body: SecretStr = Field(
        default=SecretStr('{"to": "{to}", "text": "{text}", "challenge_id": "{challenge_id}"}'),
        description="What the gateway is sent: JSON, in whose string values {to}, {text} and {challenge_id} are "
        "replaced.",
    )
    sms_success: str = Field(
        default="200-299", description="The HTTP statuses with which the gateway takes a message, such as 200-299,302."
    )
    smtp_url: SecretStr | None = Field(
        default=None,
        description="The SMTP server that takes codes by e-mail, as smtp://USER:PASSWORD@HOST:PORT or smtps://…. "
        "?starttls=automatic, required or off: required with a password, automatic without.",
    )
    smtp_from: str | None = Field(
        default=None,
        validate_default=True,
        description="Whom codes by e-mail are from: an address, or Name <address>. Needed by SMTP.",
    )
    apprise_sms_url: SecretStr | None = Field(
        default=None,
        description="An Apprise URL for codes by SMS, in which {to} stands for the number; needs pointbook[apprise].",
    )
    apprise_email_url: SecretStr | None = Field(
        default=None,
        description="An Apprise URL for codes by e-mail, in which {to} stands for the address; needs "
        "pointbook[apprise].",
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
    def _check_database_url(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if value is None:
            return None
        return SecretStr(check_database_url(value.get_secret_value(), allow_plaintext=_plaintext_allowed(info)))

    @field_validator("tls_cert_file", "tls_key_file", "tls_client_ca_file", mode="before")
    @classmethod
    def _unset_empty(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("tls_key_file", "tls_client_ca_file")
    @classmethod
    def _check_tls_files(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        has_cert = info.data.get("tls_cert_file") is not None
        if value is not None and not has_cert:
            raise ValueError("needs POINTBOOK_TLS_CERT_FILE")
        if value is None and has_cert and info.field_name == "tls_key_file":
            raise ValueError("must be set where POINTBOOK_TLS_CERT_FILE is")
        return value

    @field_validator("grpc_address", "health_address", "metrics_address")
    @classmethod
    def _check_address(cls, value: str, info: ValidationInfo) -> str:
        if not value and info.field_name != "grpc_address":
            return value
        # gRPC itself takes a port that is too large for a smaller one.
        host, _, port = value.rpartition(":")
        if not host or " " in host or not (port.isascii() and port.isdigit() and int(port) <= PORT_MAX):
            raise ValueError("must be HOST:PORT")
        may_have_tls = info.field_name in {"grpc_address", "health_address"}
        has_tls = may_have_tls and info.data.get("tls_cert_file") is not None
        if not has_tls and not _may_speak_plaintext(value, info):
            ways = "set POINTBOOK_ALLOW_PLAINTEXT=true if the network encrypts by itself"
            if may_have_tls:
                ways = f"set POINTBOOK_TLS_CERT_FILE, or {ways}"
            raise ValueError(f"is beyond loopback and the server speaks plaintext: {ways}")
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

    @field_validator(*_SECRET_CHECKS)
    @classmethod
    def _check_secret(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if value is not None:
            _SECRET_CHECKS[str(info.field_name)](value.get_secret_value())
        return value

    @field_validator("sms_success")
    @classmethod
    def _check_statuses(cls, value: str) -> str:
        parse_statuses(value)
        return value

    @field_validator("smtp_from")
    @classmethod
    def _check_mail_sender(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None:
            parse_mail_sender(value)
        elif info.data.get("smtp_url") is not None:
            raise ValueError("must be set where POINTBOOK_SMTP_URL is")
        return value

    @field_validator("sms_url")
    @classmethod
    def _check_sms_plaintext(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        parts = urlsplit(value.get_secret_value() if value else "")
        if parts.scheme == "http" and not _may_speak_plaintext(f"{parts.hostname}:0", info):
            raise ValueError(
                "is http:// beyond loopback: use https://, or set POINTBOOK_ALLOW_PLAINTEXT=true if the network "
                "encrypts by itself"
            )
        return value

    @field_validator(*_RIVALS)
    @classmethod
    def _check_one_way(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        rival = _RIVALS[str(info.field_name)]
        if value is not None and info.data.get(rival) is not None:
            raise ValueError(f"is a second way of the same channel beside POINTBOOK_{rival.upper()}: set one of them")
        return value

    # The last validator is the first to run.
    _read_secret_file = field_validator("*", mode="before")(read_secret_file)

    def code_key_bytes(self) -> dict[str, bytes]:
        """Return the code keys by id, the signing one first."""
        return _key_bytes(self.code_keys)

    def quarantine_key_bytes(self) -> dict[str, bytes]:
        """Return the quarantine's keys by id, the encrypting one first."""
        return _key_bytes(self.quarantine_keys)

    def sms_gateway(self) -> HttpGateway | None:
        """Return the HTTP gateway for SMS, if there is one."""
        if self.sms_url is None:
            return None
        return HttpGateway(
            url=self.sms_url.get_secret_value(),
            method=self.sms_method,
            headers=parse_headers(self.sms_headers.get_secret_value()),
            body=parse_body(self.sms_body.get_secret_value()),
            success=parse_statuses(self.sms_success),
        )

    def smtp_server(self) -> SmtpServer | None:
        """Return the SMTP server, if there is one."""
        return None if self.smtp_url is None else parse_smtp_url(self.smtp_url.get_secret_value())

    def mail_sender(self) -> MailSender | None:
        """Return whom e-mails are from; there is somebody wherever there is an SMTP server."""
        return None if self.smtp_from is None else parse_mail_sender(self.smtp_from)


def _plaintext_allowed(info: ValidationInfo) -> bool:
    """Return allow_plaintext; true where it is wrong, which is an error by itself."""
    return bool(info.data.get("allow_plaintext", True))


def _may_speak_plaintext(address: str, info: ValidationInfo) -> bool:
    """Return whether an address may use plaintext."""
    return _plaintext_allowed(info) or is_loopback(address)


def _key_bytes(keys: dict[str, SecretStr]) -> dict[str, bytes]:
    return {key_id: b64decode(encoded.get_secret_value()) for key_id, encoded in keys.items()}
