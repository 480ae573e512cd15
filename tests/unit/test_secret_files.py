"""Secrets from files: POINTBOOK_X_FILE instead of POINTBOOK_X."""

import os
from base64 import b64encode
from pathlib import Path

import pytest
from pydantic import ValidationError

from pointbook_cli.settings_checks import settings_problems
from pointbook_common.secret_files import FILE_BYTES_MAX, secret_file_fields
from pointbook_server.settings import ServerSettings
from shopline_shim.settings import ShimSettings

KEY = "k1:" + b64encode(b"k" * 32).decode()


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the machine's own settings."""
    for settings in (ServerSettings, ShimSettings):
        for name in settings.model_fields:
            monkeypatch.delenv(f"POINTBOOK_{name.upper()}", raising=False)
            monkeypatch.delenv(f"POINTBOOK_{name.upper()}_FILE", raising=False)


def test_every_secret_can_come_from_a_file() -> None:
    assert set(secret_file_fields(ServerSettings)) >= {
        "database_url", "code_keys", "quarantine_keys", "sms_url", "sms_headers", "sms_body", "smtp_url",
        "apprise_sms_url", "apprise_email_url",
    }  # fmt: skip
    assert set(secret_file_fields(ShimSettings)) >= {"token", "shopline_secrets", "missed_call_secrets"}
    assert "grpc_address" not in secret_file_fields(ServerSettings)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("pb_id_secret", "pb_id_secret"),
        ("pb_id_secret\n", "pb_id_secret"),
        ("pb_id_secret\r\n", "pb_id_secret"),
    ],
)
def test_one_line_break_at_the_end_is_dropped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str, expected: str
) -> None:
    """Editors and `echo` add it."""
    file = tmp_path / "token"
    file.write_bytes(content.encode())
    monkeypatch.setenv("POINTBOOK_TOKEN_FILE", str(file))

    assert ShimSettings().token.get_secret_value() == expected


def test_lists_and_keys_can_come_from_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The format is that of the variable, and names of variables are case-insensitive."""
    secrets, keys = tmp_path / "secrets", tmp_path / "keys"
    secrets.write_text("first-secret, second-secret\n")
    keys.write_text(f"{KEY}\n")
    monkeypatch.setenv("pointbook_shopline_secrets_file", str(secrets))
    monkeypatch.setenv("POINTBOOK_CODE_KEYS_FILE", str(keys))

    assert [secret.get_secret_value() for secret in ShimSettings().shopline_secrets] == [
        "first-secret",
        "second-secret",
    ]
    assert list(ServerSettings().code_key_bytes()) == ["k1"]


def test_file_satisfies_a_required_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The setting is not missing, and its variable is known."""
    file = tmp_path / "url"
    file.write_text("postgresql://localhost/pointbook\n")
    environment = {"POINTBOOK_DATABASE_URL_FILE": str(file)}
    monkeypatch.setenv("POINTBOOK_DATABASE_URL_FILE", str(file))

    assert settings_problems([ServerSettings], environment, required=("database_url",), overrides={}) == []


def test_only_secrets_can_come_from_files() -> None:
    (problem,) = settings_problems([ServerSettings], {"POINTBOOK_GRPC_ADDRESS_FILE": "/x"}, overrides={})

    assert problem.startswith("POINTBOOK_GRPC_ADDRESS_FILE: there is no such setting")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"\n", "is empty"),
        (b"\xff\xfe secret", "is not UTF-8"),
        (b"s" * (FILE_BYTES_MAX + 1), f"cannot be read: Larger than {FILE_BYTES_MAX} bytes"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_unusable_secret_file_prevents_the_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, problem: str
) -> None:
    """The error names the variable, but neither the file's content nor its path."""
    file = tmp_path / "hidden"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setenv("POINTBOOK_SMTP_URL_FILE", str(file))
    with pytest.raises(ValidationError) as caught:
        ServerSettings()

    (error,) = caught.value.errors(include_url=False, include_input=False, include_context=False)
    assert error["loc"] == ("smtp_url",)
    assert f"the file of POINTBOOK_SMTP_URL_FILE {problem}" in error["msg"]
    assert "secret" not in error["msg"]
    assert "hidden" not in error["msg"]


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_special_file_as_secret_prevents_the_start_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    """Reading a pipe can block, and its content can be read only once."""
    path = tmp_path / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path = Path("/dev/zero")
    monkeypatch.setenv("POINTBOOK_TOKEN_FILE", str(path))

    with pytest.raises(ValidationError, match=r"POINTBOOK_TOKEN_FILE cannot be read: (Not a reg|Is a dir)"):
        ShimSettings()


def test_secret_set_twice_prevents_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(KEY)
    monkeypatch.setenv("POINTBOOK_QUARANTINE_KEYS_FILE", str(file))
    monkeypatch.setenv("POINTBOOK_QUARANTINE_KEYS", KEY)

    with pytest.raises(ValidationError, match="is set twice: remove it or POINTBOOK_QUARANTINE_KEYS_FILE"):
        ServerSettings()
