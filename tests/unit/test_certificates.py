"""TLS files: what is refused, renewed and logged."""

import json
import os
from collections.abc import Iterator
from datetime import timedelta
from io import StringIO
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes

from pointbook_common import certificates
from pointbook_common.certificates import DAY_SECONDS, SettingFile, TlsFiles, TlsSource, load, name_of
from pointbook_common.errors import SettingError
from support.certificates import Authority, Issued, replace
from support.json_logs import json_logs

AUTHORITY = Authority()


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def logs() -> Iterator[StringIO]:
    """The log lines of the module."""
    with json_logs(certificates) as stream:
        yield stream


def files_in(folder: Path, issued: Issued) -> TlsFiles:
    """Write a certificate and its key into a folder."""
    cert, key = issued.write(folder, "own")
    return TlsFiles(cert=SettingFile("CERT", cert), key=SettingFile("KEY", key))


def events(logs: StringIO) -> list[str]:
    """Return the logged events in order."""
    return [json.loads(line)["event"] for line in logs.getvalue().splitlines()]


def test_tls_material_is_the_same_object_until_its_files_change(tmp_path: Path) -> None:
    """Callers compare by identity at every handshake."""
    source = TlsSource(files_in(tmp_path, AUTHORITY.issue()))
    first = source.current()

    assert source.current() is first
    renewed = AUTHORITY.issue()
    renewed.write(tmp_path, "own")
    assert source.current().chain == renewed.chain
    assert source.current().key == renewed.key


def test_files_are_reloaded_when_a_symbolic_link_changes(tmp_path: Path) -> None:
    """Kubernetes mounts secrets this way: one link points to the folder of both files."""
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
    (tmp_path / "now").symlink_to("1")
    source = TlsSource(files_in(tmp_path / "now", AUTHORITY.issue()))
    renewed = AUTHORITY.issue()
    renewed.write(tmp_path / "2", "own")
    (tmp_path / "next").symlink_to("2")
    (tmp_path / "next").replace(tmp_path / "now")

    assert source.current().chain == renewed.chain


def test_incomplete_renewal_is_logged_once(tmp_path: Path, logs: StringIO) -> None:
    """The old pair stays in use: a new certificate is never served with the old key."""
    source = TlsSource(files_in(tmp_path, AUTHORITY.issue()))
    first, renewed = source.current(), AUTHORITY.issue()
    replace(tmp_path / "own.crt", renewed.chain)

    assert [source.current() is first for _ in range(3)] == [True, True, True]
    replace(tmp_path / "own.key", renewed.key)
    assert source.current().chain == renewed.chain
    assert events(logs) == [
        "TLS certificate loaded",
        "changed TLS files are invalid, still using the previous ones",
        "TLS files renewed",
    ]


def test_invalid_files_are_read_again_even_if_they_look_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two writes within one tick of the file system's clock have the same time."""
    source = TlsSource(files_in(tmp_path, AUTHORITY.issue()))
    renewed = AUTHORITY.issue()
    replace(tmp_path / "own.crt", renewed.chain)
    monkeypatch.setattr(certificates, "_stat", lambda _: (1,))
    first = source.current()
    replace(tmp_path / "own.key", renewed.key)

    assert source.current() is first
    source._retry_at = 0.0
    assert source.current().chain == renewed.chain


def test_certificate_that_expires_soon_is_logged_once_a_day(tmp_path: Path, logs: StringIO) -> None:
    """From 14 days before the expiry until the renewal."""
    clock = Clock()
    issued = AUTHORITY.issue(life=timedelta(days=30))
    expires = x509.load_pem_x509_certificate(issued.chain).not_valid_after_utc.timestamp()
    clock.now = expires - 14 * DAY_SECONDS
    source = TlsSource(files_in(tmp_path, issued), clock)
    source.current()
    for days_left in (13.5, 13.4, 12.6, 12.4, -0.1, -0.2):
        clock.now = expires - days_left * DAY_SECONDS
        source.current()
    AUTHORITY.issue(life=timedelta(days=5)).write(tmp_path, "own")
    clock.now = expires - 29 * DAY_SECONDS
    source.current()
    source.current()

    soon = "TLS certificate expires soon"
    assert events(logs) == [
        "TLS certificate loaded", soon, soon, "TLS certificate has expired", "TLS files renewed", soon,
    ]  # fmt: skip


def test_key_readable_by_every_user_is_logged(tmp_path: Path, logs: StringIO) -> None:
    """It is used nevertheless: Kubernetes mounts secrets with this mode."""
    files = files_in(tmp_path, AUTHORITY.issue())
    (tmp_path / "own.key").chmod(0o644)
    TlsSource(files)

    assert "private key is readable by every user of this machine" in events(logs)


def test_encrypted_key_is_refused_without_prompting(tmp_path: Path) -> None:
    """OpenSSL would read the password from the terminal."""
    issued = AUTHORITY.issue()
    files = files_in(tmp_path, issued)
    encrypted = serialization.load_pem_private_key(issued.key, None).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"password"),
    )
    replace(tmp_path / "own.key", encrypted)

    with pytest.raises(SettingError, match="KEY: the key is encrypted with a password"):
        load(files)


@pytest.mark.parametrize(
    "key",
    [
        ed25519.Ed25519PrivateKey.generate(),
        ed448.Ed448PrivateKey.generate(),
        ec.generate_private_key(ec.SECP521R1()),
        ec.generate_private_key(ec.SECP256K1()),
        rsa.generate_private_key(65_537, 1_024),  # noqa: S505 - weak on purpose
    ],
)
def test_key_algorithms_that_grpc_lacks_are_refused(tmp_path: Path, key: CertificateIssuerPrivateKeyTypes) -> None:
    """Otherwise gRPC reports a wrong cause, or serves what no client accepts."""
    files = files_in(tmp_path, AUTHORITY.issue(key=key))

    with pytest.raises(SettingError, match="CERT: the certificate's key must be RSA with 2048 bits or more, or EC"):
        load(files)


def test_pipes_devices_and_large_files_are_refused_at_once(tmp_path: Path) -> None:
    """Reading a pipe would block, and a large file would be read in part."""
    pipe, large = tmp_path / "pipe", tmp_path / "large"
    os.mkfifo(pipe)
    large.write_bytes(AUTHORITY.pem + b"#" * certificates.FILE_BYTES_MAX)

    for path, problem in ((pipe, "Not a regular file"), (large, "Larger than"), (tmp_path, "Is a directory")):
        with pytest.raises(SettingError, match=f"CA: cannot read {path}: {problem}"):
            load(TlsFiles(ca=SettingFile("CA", path)))


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["a.example", "b.example"], "a.example"), (["*.a.example"], "any.a.example"), ([], "127.0.0.1")],
)
def test_name_of_a_certificate_is_one_that_it_is_valid_for(names: list[str], expected: str) -> None:
    certificate = x509.load_pem_x509_certificate(AUTHORITY.issue(names=names).chain)

    assert name_of(certificate) == expected
