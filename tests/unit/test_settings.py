"""The server's settings: validated at the start, without showing secrets."""

import base64
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from pointbook_common.addresses import is_loopback
from pointbook_server.settings import ServerSettings

OLD, NEW = (base64.b64encode(letter * 32).decode() for letter in (b"o", b"n"))


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the machine's own settings."""
    for name in ServerSettings.model_fields:
        monkeypatch.delenv(f"POINTBOOK_{name.upper()}", raising=False)


def test_defaults_serve_loopback_without_reflection_or_database() -> None:
    settings = ServerSettings()

    assert settings.grpc_address == "127.0.0.1:50051"
    assert not settings.reflection
    assert not settings.allow_plaintext
    assert settings.database_url is None
    assert settings.code_key_bytes() == {}


def test_every_field_is_described() -> None:
    """The descriptions are the table in docs/configuration.md."""
    assert all(field.description for field in ServerSettings.model_fields.values())


def test_settings_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POINTBOOK_GRPC_ADDRESS", "127.0.0.1:7")
    monkeypatch.setenv("POINTBOOK_REFLECTION", "true")
    monkeypatch.setenv("POINTBOOK_DATA_DIR", "/var/lib/pointbook")
    settings = ServerSettings()

    assert (settings.grpc_address, settings.reflection) == ("127.0.0.1:7", True)
    assert settings.data_dir == Path("/var/lib/pointbook")


def test_code_keys_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first key signs. Spaces and a trailing comma are allowed."""
    monkeypatch.setenv("POINTBOOK_CODE_KEYS", f"new:{NEW}, old:{OLD},")
    keys = ServerSettings().code_key_bytes()

    assert list(keys.items()) == [("new", b"n" * 32), ("old", b"o" * 32)]


@pytest.mark.parametrize(
    "keys",
    [
        "k1",
        "k1:",
        f":{NEW}",
        "k1:not base64",
        "k1:é",
        f"k1:{NEW[:-5]}",
        f"k1:{base64.b64encode(b'x' * 31).decode()}",
        f"k1:{NEW},k1:{OLD}",
    ],
)
def test_invalid_code_keys_prevent_the_start(monkeypatch: pytest.MonkeyPatch, keys: str) -> None:
    """Short keys make codes guessable; a duplicate id makes them unverifiable."""
    monkeypatch.setenv("POINTBOOK_CODE_KEYS", keys)

    with pytest.raises(ValidationError, match="code_keys"):
        ServerSettings()


def test_quarantine_keys_are_read_like_code_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first key encrypts, with AES-256."""
    monkeypatch.setenv("POINTBOOK_QUARANTINE_KEYS", f"new:{NEW}, old:{OLD},")
    settings = ServerSettings()

    assert list(settings.quarantine_key_bytes().items()) == [("new", b"n" * 32), ("old", b"o" * 32)]
    assert settings.code_key_bytes() == {}
    for length in (0, 16, 31, 33, 64):
        encoded = base64.b64encode(b"x" * length).decode()
        monkeypatch.setenv("POINTBOOK_QUARANTINE_KEYS", f"new:{encoded}")
        with pytest.raises(ValidationError, match="quarantine_keys") as caught:
            ServerSettings()
        assert not encoded or encoded not in str(caught.value)


def test_secrets_are_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POINTBOOK_CODE_KEYS", f"k1:{NEW}")
    monkeypatch.setenv("POINTBOOK_DATABASE_URL", "postgresql://pointbook:hidden@localhost/pointbook")
    shown = repr(ServerSettings()) + str(ServerSettings().model_dump())
    for keys in (f"k1:{NEW},k1:{OLD}", f"k1:{NEW},k2:short", f"k1:{NEW},k2"):
        monkeypatch.setenv("POINTBOOK_CODE_KEYS", keys)
        with pytest.raises(ValidationError) as caught:
            ServerSettings()
        shown += str(caught.value)
    monkeypatch.setenv("POINTBOOK_CODE_KEYS", f"k1:{NEW}")
    monkeypatch.setenv("POINTBOOK_GRPC_ADDRESS", "0.0.0.0:50051")
    with pytest.raises(ValidationError) as caught:
        ServerSettings()
    shown += str(caught.value)

    assert NEW[:12] not in shown
    assert "hidden" not in shown


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:50051", True),
        ("127.9.9.9:1", True),
        ("localhost:50051", True),
        ("[::1]:50051", True),
        ("0.0.0.0:50051", False),
        ("[::]:50051", False),
        (":50051", False),
        ("10.0.0.1:50051", False),
        ("127.0.0.1.example.com:50051", False),
        ("localhost.example.com:50051", False),
    ],
)
def test_only_loopback_addresses_count_as_loopback(address: str, *, expected: bool) -> None:
    assert expected is is_loopback(address)


def test_plaintext_beyond_loopback_must_be_allowed() -> None:
    with pytest.raises(ValidationError, match="POINTBOOK_ALLOW_PLAINTEXT"):
        ServerSettings(grpc_address="0.0.0.0:50051")

    assert ServerSettings(grpc_address="0.0.0.0:50051", allow_plaintext=True).allow_plaintext


def test_server_with_tls_may_listen_beyond_loopback() -> None:
    """Metrics remain in plaintext."""
    files: dict[str, Any] = {"tls_cert_file": Path("server.crt"), "tls_key_file": Path("server.key")}

    assert ServerSettings(grpc_address="0.0.0.0:50051", **files).tls_client_ca_file is None
    with pytest.raises(ValidationError, match="metrics_address"):
        ServerSettings(metrics_address="0.0.0.0:9000", **files)


@pytest.mark.parametrize(
    ("variables", "invalid"),
    [
        ({"TLS_CERT_FILE": "x"}, "tls_key_file"),
        ({"TLS_KEY_FILE": "x"}, "tls_key_file"),
        ({"TLS_CERT_FILE": "", "TLS_KEY_FILE": "x"}, "tls_key_file"),
        ({"TLS_CLIENT_CA_FILE": "x"}, "tls_client_ca_file"),
    ],
)
def test_incomplete_tls_settings_prevent_the_start(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], invalid: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"POINTBOOK_{name}", value)

    with pytest.raises(ValidationError, match=rf"1 validation error[\s\S]*{invalid}[\s\S]*POINTBOOK_TLS_CERT_FILE"):
        ServerSettings()


def test_empty_tls_settings_are_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose files set variables to empty strings."""
    for name in ("TLS_CERT_FILE", "TLS_KEY_FILE", "TLS_CLIENT_CA_FILE"):
        monkeypatch.setenv(f"POINTBOOK_{name}", "")

    assert ServerSettings().tls_cert_file is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grpc_address", "localhost"),
        ("grpc_address", "127.0.0.1:x"),
        ("workers", 0),
        ("workers", 65),
        ("database_pool_size", 0),
        ("database_pool_size", 501),
        ("call_deadline_seconds", 0),
        ("call_deadline_seconds", 601),
        ("drain_seconds", -1),
        ("quarantine_webhooks_max", 0),
        ("quarantine_webhooks_max", 10**9 + 1),
        ("quarantine_bytes_max", 0),
        ("quarantine_bytes_max", 2**63),
        ("log_level", "LOUD"),
        ("sms_url", "ftp://gateway"),
        ("sms_method", "GET"),
        ("sms_headers", "X-Key: k"),
        ("sms_body", '{"to": "{to}"}'),
        ("sms_success", "2xx"),
        ("smtp_url", "mail.example.com"),
        ("smtp_from", "points"),
        ("apprise_sms_url", "json://localhost/"),
        ("apprise_email_url", "json://localhost/"),
    ],
)
def test_invalid_values_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=name):
        ServerSettings(**{name: value})


def test_providers_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POINTBOOK_SMS_URL", "https://sms.example.com/v1")
    monkeypatch.setenv("POINTBOOK_SMS_HEADERS", '{"X-Key": "k"}')
    monkeypatch.setenv("POINTBOOK_SMS_SUCCESS", "202")
    monkeypatch.setenv("POINTBOOK_SMTP_URL", "smtps://mail.example.com")
    monkeypatch.setenv("POINTBOOK_SMTP_FROM", "Points <points@example.com>")
    settings = ServerSettings()
    gateway, server, mail_sender = settings.sms_gateway(), settings.smtp_server(), settings.mail_sender()

    assert gateway is not None
    assert (gateway.url, gateway.method, gateway.headers) == ("https://sms.example.com/v1", "POST", {"X-Key": "k"})
    assert gateway.body == {"to": "{to}", "text": "{text}", "challenge_id": "{challenge_id}"}
    assert gateway.success == {202}
    assert server is not None
    assert (server.host, server.tls) == ("mail.example.com", True)
    assert mail_sender is not None
    assert (mail_sender.display_name, mail_sender.domain) == ("Points", "example.com")


def test_no_providers_by_default() -> None:
    settings = ServerSettings()

    assert (settings.sms_gateway(), settings.smtp_server(), settings.mail_sender()) == (None, None, None)


def test_secrets_of_providers_are_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    valid = {
        "SMS_URL": "https://hidden@sms.example.com/",
        "SMS_HEADERS": '{"X-Key": "hidden"}',
        "SMS_BODY": '{"to": "{to}", "text": "{text}", "key": "hidden"}',
        "SMTP_URL": "smtp://u:hidden@mail",
        "SMTP_FROM": "points@example.com",
    }
    for name, value in valid.items():
        monkeypatch.setenv(f"POINTBOOK_{name}", value)
    shown = repr(ServerSettings()) + str(ServerSettings().model_dump())
    for name in ("SMS_URL", "SMS_HEADERS", "SMS_BODY", "SMTP_URL"):
        monkeypatch.setenv(f"POINTBOOK_{name}", "hidden")
        with pytest.raises(ValidationError) as caught:
            ServerSettings()
        shown += str(caught.value)
        monkeypatch.setenv(f"POINTBOOK_{name}", valid[name])

    assert "hidden" not in shown


def test_smtp_needs_a_sender() -> None:
    with pytest.raises(ValidationError, match=r"smtp_from[\s\S]*POINTBOOK_SMTP_URL"):
        ServerSettings(smtp_url=SecretStr("smtps://mail.example.com"))


def test_sms_gateway_beyond_loopback_needs_https_unless_allowed() -> None:
    """Plaintext can be allowed for networks with their own encryption."""
    with pytest.raises(ValidationError, match=r"sms_url[\s\S]*POINTBOOK_ALLOW_PLAINTEXT"):
        ServerSettings(sms_url=SecretStr("http://sms.example.com/"))

    for url, allowed in (
        ("http://127.0.0.1:80/", False),
        ("http://[::1]/", False),
        ("http://localhost/", False),
        ("http://sms/", True),
    ):
        assert ServerSettings(sms_url=SecretStr(url), allow_plaintext=allowed).sms_url is not None


@pytest.mark.parametrize(
    ("name", "days_min"),
    [
        ("customer_audit_keep_days", 90),
        ("redemption_audit_keep_days", 90),
        ("validation_audit_keep_days", 90),
        ("customer_updates_keep_days", 7),
        ("finished_webhooks_keep_days", 7),
    ],
)
def test_retention_is_forever_or_has_a_lower_bound(name: str, days_min: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for days in (0, days_min):
        monkeypatch.setenv(f"POINTBOOK_{name.upper()}", str(days))
        assert getattr(ServerSettings(), name) == days
    for days in (-1, days_min - 1):
        monkeypatch.setenv(f"POINTBOOK_{name.upper()}", str(days))
        with pytest.raises(ValidationError, match=rf"{name}[\s\S]*must be at least {days_min} days, or 0"):
            ServerSettings()


def test_settings_are_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ServerSettings().workers = 2
