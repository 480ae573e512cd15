"""The settings of the gRPC server, from POINTBOOK_* variables."""

from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from pointbook_common.addresses import is_loopback
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
"""The length of a key: the minimum for signing codes, the exact length for encryption."""
PORT_MAX = 65_535
_SECRET_CHECKS: dict[str, Callable[[str], object]] = {
    "sms_url": check_http_url,
    "sms_headers": parse_headers,
    "sms_body": parse_body,
    "smtp_url": parse_smtp_url,
    "apprise_sms_url": check_apprise_url,
    "apprise_email_url": check_apprise_url,
}
"""The checks of the providers' secret settings."""
_KEEP_DAYS_MIN = {
    # The triggers of customer_audit protect rows for as long.
    "customer_audit_keep_days": 90,
    "redemption_audit_keep_days": 90,
    "validation_audit_keep_days": 90,
    # Well above the 48 hours for which SHOPLINE retries a webhook.
    "customer_updates_keep_days": 7,
    "finished_webhooks_keep_days": 7,
}
"""The lowest retention of rows that 0 stores forever."""
_ALTERNATIVES = {"apprise_sms_url": "sms_url", "apprise_email_url": "smtp_url"}
"""Pairs of settings for the same channel, of which only one may be set."""


class ServerSettings(SecretFileSettings):
    """The settings of the gRPC server: each field is a variable POINTBOOK_<NAME>.

    An invalid one prevents the start. A check of several fields belongs to the last of them: a check of the whole model
    would run only after every field is valid, and so report its error one start later.
    """

    model_config = SettingsConfigDict(env_prefix="POINTBOOK_", frozen=True, extra="ignore", hide_input_in_errors=True)

    allow_plaintext: bool = Field(
        default=False,
        description="Allow the server to listen, to call an SMS gateway and to reach its database without verified "
        "TLS beyond loopback, in a network that encrypts traffic itself.",
    )
    database_url: SecretStr | None = Field(
        default=None,
        description="The PostgreSQL database (15 or later), as postgresql://USER:PASSWORD@HOST:PORT/NAME, with "
        "?sslmode=verify-full&sslrootcert=FILE beyond loopback and Unix sockets. Without it, `pointbook dev` runs an "
        "embedded one; the other commands require it.",
    )
    tls_cert_file: Path | None = Field(
        default=None,
        description="The server's certificate and its chain, in PEM; gRPC then uses TLS 1.2 or later. Renewed files "
        "are used from the next handshake on.",
    )
    tls_key_file: Path | None = Field(
        default=None,
        description="The private key of POINTBOOK_TLS_CERT_FILE, in PEM, without a password.",
    )
    tls_client_ca_file: Path | None = Field(
        default=None,
        description="The CA certificates for clients, in PEM; clients then need a certificate signed by one of them.",
    )
    grpc_address: str = Field(
        default="127.0.0.1:50051",
        description="HOST:PORT on which the gRPC server listens, and at which the shim calls it.",
    )
    workers: int = Field(
        default=1, ge=1, le=64, description="The number of server processes that share the port, to use several cores."
    )
    heartbeat_timeout_seconds: float = Field(
        default=10.0,
        ge=3,
        le=600,
        description="Seconds that a worker's event loop may be blocked before the worker is killed and replaced.",
    )
    reflection: bool = Field(
        default=False, description="Allow holders of a token to explore the API by gRPC reflection; always on in `dev`."
    )
    health_address: str = Field(
        default="",
        description="HOST:PORT of a second listener for gRPC health only, so that probes get through when clients use "
        "all connections of the main one. It uses TLS if the main one does. Empty: none. `pointbook health` uses it if "
        "it is set.",
    )
    connections_max: int = Field(
        default=0,
        ge=0,
        le=10**6,
        description="The maximum number of client connections of one server process; further ones are closed at "
        "once. 0: 4,000, or fewer if the limit of open files is low.",
    )
    waiting_calls_max: int = Field(
        default=1_000,
        ge=1,
        le=10_000,
        description="The maximum number of calls that wait because one server process is busy; further ones are "
        "refused at once, with CANCELLED. With a lower value, calls wait less while the server is overloaded, and more "
        "calls of a burst are refused.",
    )
    token_calls_max: int = Field(
        default=500,
        ge=1,
        le=1_000,
        description="The maximum number of concurrent calls of one token in one server process.",
    )
    token_calls_per_second_max: float = Field(
        default=0.0,
        ge=0,
        le=10**6,
        description="The maximum number of calls per second of one token to one server process, also the size of "
        "a burst; 0: unlimited.",
    )
    database_pool_size: int = Field(
        default=10,
        ge=1,
        le=500,
        description="The database connections that the calls of one server process share. Health checks and token "
        "look-ups have one more each.",
    )
    token_staleness_seconds: float = Field(
        default=30.0,
        ge=3,
        le=3_600,
        description="Seconds that cached tokens stay valid while the database is unavailable; then all calls are "
        "refused with UNAVAILABLE.",
    )
    call_deadline_seconds: float = Field(
        default=30.0,
        gt=0,
        le=600,
        description="The maximum duration of a call, in seconds, even if its caller set a longer deadline.",
    )
    drain_seconds: float = Field(
        default=6.0, ge=0, le=600, description="Seconds that a stopping server waits for running calls."
    )
    code_keys: Annotated[dict[str, SecretStr], NoDecode] = Field(
        default_factory=dict,
        description="The keys of one-time codes, as ID:BASE64,... with at least 32 bytes each: the first signs, all "
        "verify. Required to issue codes and to redact customers; `dev` creates its own.",
    )
    contact_pause_seconds: float = Field(
        default=86_400.0,
        ge=0,
        le=31 * 86_400,
        description="Seconds that a changed mobile number or e-mail address gets no one-time codes; 0 in `dev`.",
    )
    merchant_sends_max: int = Field(
        default=1_000, ge=1, le=10**9, description="The maximum number of one-time codes of a merchant in 10 minutes."
    )
    refusals_keep_days: int = Field(
        default=30,
        ge=0,
        le=3_650,
        description="The number of days that refused redemptions and validations are stored for support; 0: none are "
        "stored.",
    )
    codes_keep_days: int = Field(
        default=1,
        ge=1,
        le=3_650,
        description="The number of days that one-time codes and missed calls are stored after they expire.",
    )
    validation_audit_keep_days: int = Field(
        default=0,
        le=36_500,
        description="The number of days that the audit of one-time codes is stored, at least 90; 0: forever.",
    )
    redemption_audit_keep_days: int = Field(
        default=0,
        le=36_500,
        description="The number of days that the audit of settled and released holds is stored, at least 90; 0: "
        "forever.",
    )
    customer_audit_keep_days: int = Field(
        default=0,
        le=36_500,
        description="The number of days that the audit of moved and erased identifiers is stored, at least 90; 0: "
        "forever.",
    )
    customer_updates_keep_days: int = Field(
        default=0,
        le=36_500,
        description="The number of days, by the time in the webhook, that applied customer webhooks are recognized, at "
        "least 7; 0: forever. Not below POINTBOOK_WEBHOOK_MAX_AGE_HOURS.",
    )
    finished_webhooks_keep_days: int = Field(
        default=90,
        le=36_500,
        description="The number of days that quarantined webhooks are stored after they were replayed or erased, at "
        "least 7; 0: forever.",
    )
    quarantine_keys: Annotated[dict[str, SecretStr], NoDecode] = Field(
        default_factory=dict,
        description="The keys that encrypt quarantined webhooks, as ID:BASE64,... with exactly 32 bytes each: the "
        "first encrypts, all decrypt. Without a key, webhooks of customers or without a topic are not stored, and "
        "others are stored in plaintext; `dev` creates its own.",
    )
    quarantine_webhooks_max: int = Field(
        default=100_000, ge=1, le=10**9, description="The maximum number of webhooks in the quarantine of one merchant."
    )
    quarantine_bytes_max: int = Field(
        default=1024**3,
        ge=1,
        le=10**15,
        description="The maximum number of bytes of headers and bodies in the quarantine of one merchant.",
    )
    quarantine_shared_webhooks_max: int = Field(
        default=20_000,
        ge=1,
        le=10**9,
        description="The maximum number of webhooks in the shared quarantine; webhooks of merchants without a store "
        "may use half of it.",
    )
    quarantine_shared_bytes_max: int = Field(
        default=256 * 1024**2,
        ge=1,
        le=10**15,
        description="The maximum number of bytes of headers and bodies in the shared quarantine, with the same half.",
    )
    quarantine_total_webhooks_max: int = Field(
        default=1_000_000, ge=1, le=10**9, description="The maximum number of webhooks in all quarantines together."
    )
    quarantine_total_bytes_max: int = Field(
        default=4 * 1024**3,
        ge=1,
        le=10**15,
        description="The maximum number of bytes of headers and bodies in all quarantines together.",
    )
    sms_url: SecretStr | None = Field(
        default=None,
        description="The HTTP gateway for codes by SMS, as https://HOST:PORT/PATH.",
    )
    sms_method: Literal["POST", "PUT"] = Field(
        default="POST", description="The HTTP method of the gateway: POST or PUT."
    )
    sms_headers: SecretStr = Field(
        default=SecretStr("{}"),
        description='Headers for the gateway as a JSON object, such as {"Authorization": "Bearer …"}.',
    )
    sms_body: SecretStr = Field(
        default=SecretStr('{"to": "{to}", "text": "{text}", "challenge_id": "{challenge_id}"}'),
        description="The body for the gateway: JSON, in whose string values {to}, {text} and {challenge_id} are "
        "replaced.",
    )
    sms_success: str = Field(
        default="200-299",
        description="The HTTP statuses that mean the gateway has accepted a message, such as 200-299,302.",
    )
    smtp_url: SecretStr | None = Field(
        default=None,
        description="The SMTP server for codes by e-mail, as smtp://USER:PASSWORD@HOST:PORT or smtps://…. "
        "?starttls=automatic, required or off: required with a password, automatic without.",
    )
    smtp_from: str | None = Field(
        default=None,
        validate_default=True,
        description="The sender of codes by e-mail: an address, or Name <address>. Required with SMTP.",
    )
    apprise_sms_url: SecretStr | None = Field(
        default=None,
        description="An Apprise URL for codes by SMS, in which {to} is the number; requires pointbook[apprise].",
    )
    apprise_email_url: SecretStr | None = Field(
        default=None,
        description="An Apprise URL for codes by e-mail, in which {to} is the address; requires pointbook[apprise].",
    )
    metrics_address: str = Field(
        default="",
        description="HOST:PORT on which the server serves GET /metrics for Prometheus, over plain HTTP, with "
        "those of all workers; empty: none.",
    )
    log_level: str = Field(
        default="INFO", pattern=r"^(DEBUG|INFO|WARNING|ERROR)$", description="DEBUG, INFO, WARNING or ERROR."
    )
    call_log_lines_per_second_max: int = Field(
        default=100,
        ge=0,
        le=100_000,
        description="The most calls of one outcome that a process logs singly per second; it counts further ones. "
        "Refusals that cost their callers nothing have 10 at most.",
    )
    tracing: bool = Field(
        default=False,
        description="Export traces by OpenTelemetry, which the standard variables OTEL_* configure; requires "
        "pointbook[otel].",
    )
    data_dir: Path = Field(
        default=Path(".pointbook"), description="The directory in which `pointbook dev` keeps the embedded database."
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
            raise ValueError("must be set if POINTBOOK_TLS_CERT_FILE is set")
        return value

    @field_validator("grpc_address", "health_address", "metrics_address")
    @classmethod
    def _check_address(cls, value: str, info: ValidationInfo) -> str:
        if not value and info.field_name != "grpc_address":
            return value
        # gRPC itself wraps a port that is too large.
        host, _, port = value.rpartition(":")
        if not host or " " in host or not (port.isascii() and port.isdigit() and int(port) <= PORT_MAX):
            raise ValueError("must be HOST:PORT")
        may_have_tls = info.field_name in {"grpc_address", "health_address"}
        has_tls = may_have_tls and info.data.get("tls_cert_file") is not None
        if not has_tls and not _may_use_plaintext(value, info):
            remedy = "set POINTBOOK_ALLOW_PLAINTEXT=true if the network encrypts traffic itself"
            if may_have_tls:
                remedy = f"set POINTBOOK_TLS_CERT_FILE, or {remedy}"
            raise ValueError(f"is beyond loopback and the server uses plaintext: {remedy}")
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

    @field_validator(*_KEEP_DAYS_MIN)
    @classmethod
    def _check_keep_days(cls, value: int, info: ValidationInfo) -> int:
        days_min = _KEEP_DAYS_MIN[str(info.field_name)]
        if value != 0 and value < days_min:
            raise ValueError(f"must be at least {days_min} days, or 0 to store them forever")
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
            raise ValueError("must be set if POINTBOOK_SMTP_URL is set")
        return value

    @field_validator("sms_url")
    @classmethod
    def _check_sms_plaintext(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        parts = urlsplit(value.get_secret_value() if value else "")
        if parts.scheme == "http" and not _may_use_plaintext(f"{parts.hostname}:0", info):
            raise ValueError(
                "is http:// beyond loopback: use https://, or set POINTBOOK_ALLOW_PLAINTEXT=true if the network "
                "encrypts traffic itself"
            )
        return value

    @field_validator(*_ALTERNATIVES)
    @classmethod
    def _check_alternatives(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        other = _ALTERNATIVES[str(info.field_name)]
        if value is not None and info.data.get(other) is not None:
            raise ValueError(f"is set for the same channel as POINTBOOK_{other.upper()}: set only one of them")
        return value

    # The last validator runs first.
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
        """Return the sender of e-mails, which is always set if there is an SMTP server."""
        return None if self.smtp_from is None else parse_mail_sender(self.smtp_from)


def _plaintext_allowed(info: ValidationInfo) -> bool:
    """Return allow_plaintext; true if it is invalid, which is a separate error."""
    return bool(info.data.get("allow_plaintext", True))


def _may_use_plaintext(address: str, info: ValidationInfo) -> bool:
    """Return whether an address may use plaintext."""
    return _plaintext_allowed(info) or is_loopback(address)


def _key_bytes(keys: dict[str, SecretStr]) -> dict[str, bytes]:
    return {key_id: b64decode(encoded.get_secret_value()) for key_id, encoded in keys.items()}
