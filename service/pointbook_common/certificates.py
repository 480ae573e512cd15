"""Certificates and private keys from files, reloaded when the files change."""

import os
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import structlog
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from pointbook_common.errors import SettingError
from pointbook_common.regular_files import read_regular_file

DAY_SECONDS = 86_400
EXPIRES_SOON_SECONDS = 14 * DAY_SECONDS
RETRY_SECONDS = 1.0
"""How long invalid files are not read again, unless they change."""
FILE_BYTES_MAX = 1024 * 1024
RSA_BITS_MIN = 2_048
CURVES = (ec.SECP256R1, ec.SECP384R1)
FileStates = tuple[tuple[int, ...], ...]
"""The state of each file, which changes when a file is written or replaced."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class SettingFile:
    """A file, and the variable that names it."""

    variable: str
    path: Path


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The PEM files of a TLS endpoint; `ca` verifies its peers."""

    cert: SettingFile | None = None
    key: SettingFile | None = None
    ca: SettingFile | None = None


@dataclass(frozen=True, slots=True)
class TlsMaterial:
    """The contents of TlsFiles, in PEM; `certificate` is the first of the chain."""

    chain: bytes | None
    key: bytes | None
    ca: bytes | None
    certificate: x509.Certificate | None

    @property
    def expires_at(self) -> datetime | None:
        """When the certificate expires; None without one."""
        return None if self.certificate is None else self.certificate.not_valid_after_utc


class TlsSource:
    """TLS material that follows its files.

    While changed files do not match each other, the previous material is used. `current` can be called from any thread
    and at each handshake; it costs a stat of each file. The constructor raises SettingError if the files are invalid.
    """

    def __init__(self, files: TlsFiles, clock: Callable[[], float] = time.time) -> None:
        self.files = files
        self._clock = clock
        self._lock = threading.Lock()
        self._paths = [file.path for file in (files.cert, files.key, files.ca) if file is not None]
        self._states = self._stat_files()
        self._material = load(files)
        self._invalid_states: FileStates | None = None
        self._retry_at = 0.0
        self._warned_at = float("-inf")
        self._log_expiry("TLS certificate loaded")
        if files.key is not None and files.key.path.stat().st_mode & stat.S_IROTH:
            log.warning("private key is readable by every user of this machine", variable=files.key.variable)

    def current(self) -> TlsMaterial:
        """Return the latest material whose files match each other.

        It is the same object until the files change.
        """
        with self._lock:
            states = self._stat_files()
            # A file can be rewritten within one tick of its file system's clock, so invalid files are read again.
            if states != self._states and (states != self._invalid_states or time.monotonic() >= self._retry_at):
                self._reload(states)
            self._warn_of_expiry()
            return self._material

    def _reload(self, states: FileStates) -> None:
        try:
            self._material = load(self.files)
        except SettingError as error:
            if states != self._invalid_states:
                log.warning("changed TLS files are invalid, still using the previous ones", cause=str(error))
            self._invalid_states = states
            self._retry_at = time.monotonic() + RETRY_SECONDS
        else:
            self._states, self._invalid_states = states, None
            self._warned_at = float("-inf")
            self._log_expiry("TLS files renewed")

    def _stat_files(self) -> FileStates:
        return tuple(_stat(path) for path in self._paths)

    def _log_expiry(self, event: str) -> None:
        expires_at = self._material.expires_at
        if expires_at is not None and self.files.cert is not None:
            log.info(event, variable=self.files.cert.variable, expires=expires_at.isoformat())

    def _warn_of_expiry(self) -> None:
        """Log once a day if the certificate has expired or expires soon."""
        expires_at, now = self._material.expires_at, self._clock()
        if expires_at is None or self.files.cert is None or now < self._warned_at + DAY_SECONDS:
            return
        left_seconds = expires_at.timestamp() - now
        if left_seconds >= EXPIRES_SOON_SECONDS:
            return
        self._warned_at = now
        expiry_log = log.bind(variable=self.files.cert.variable, expires=expires_at.isoformat())
        if left_seconds <= 0:
            expiry_log.error("TLS certificate has expired")
        else:
            expiry_log.warning("TLS certificate expires soon", days_left=int(left_seconds // DAY_SECONDS))


def load(files: TlsFiles) -> TlsMaterial:
    """Read and check TLS files.

    Raises SettingError, which names the variable of the invalid one.
    """
    chain = key = ca = certificate = None
    if files.ca is not None:
        ca, _ = _load_certificates(files.ca)
    if files.cert is not None and files.key is not None:
        chain, certificate = _load_certificates(files.cert)
        _check_algorithm(files.cert, certificate)
        key = _read(files.key)
        try:
            public_key = load_pem_private_key(key, password=None).public_key()
        except TypeError:
            raise SettingError(f"{files.key.variable}: the key is encrypted with a password") from None
        except (ValueError, UnsupportedAlgorithm):
            raise SettingError(f"{files.key.variable}: the file contains no private key in PEM") from None
        if public_key != certificate.public_key():
            raise SettingError(f"{files.key.variable}: the key does not belong to {files.cert.variable}")
    return TlsMaterial(chain, key, ca, certificate)


def _check_algorithm(file: SettingFile, certificate: x509.Certificate) -> None:
    """Raise SettingError if gRPC, its clients or OpenSSL would refuse the certificate."""
    try:
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        key = None
    is_rsa = certificate.public_key_algorithm_oid == x509.oid.PublicKeyAlgorithmOID.RSAES_PKCS1_v1_5
    if is_rsa and isinstance(key, rsa.RSAPublicKey) and key.key_size >= RSA_BITS_MIN:
        return
    if not (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, CURVES)):
        raise SettingError(
            f"{file.variable}: the certificate's key must be RSA with {RSA_BITS_MIN} bits or more, or EC on the curve "
            "P-256 or P-384"
        )


def name_of(certificate: x509.Certificate) -> str:
    """Return a name that a certificate is valid for; empty if it has none."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        common = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        return str(common[0].value) if common else ""
    values = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    return values[0].replace("*", "any", 1) if values else ""


def _load_certificates(file: SettingFile) -> tuple[bytes, x509.Certificate]:
    """Return the contents of a certificate file, and its first certificate."""
    content = _read(file)
    try:
        return content, x509.load_pem_x509_certificates(content)[0]
    except ValueError:
        raise SettingError(f"{file.variable}: the file contains no certificate in PEM") from None


def _read(file: SettingFile) -> bytes:
    try:
        return read_regular_file(file.path, FILE_BYTES_MAX)
    except OSError as error:
        raise SettingError(f"{file.variable}: cannot read {file.path}: {error.strerror}") from None


def _stat(path: Path) -> tuple[int, ...]:
    """Return a file's state, which changes when it is written or replaced.

    Symbolic links are followed.
    """
    try:
        state = os.stat(path)  # noqa: PTH116 - three times faster than Path.stat, and called at each handshake
    except OSError:
        return ()
    return (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
