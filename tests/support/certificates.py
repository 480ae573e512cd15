"""Certificates for loopback, and a CA for servers and clients."""

import socket
import ssl
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes, CertificatePublicKeyTypes


def loopback_tls(folder: Path) -> tuple[ssl.SSLContext, Path]:
    """Return a server's TLS context for localhost, and the file that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    chain, trusted = folder / "chain.pem", folder / "trusted.pem"
    encoded = certificate.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    chain.write_bytes(private + encoded)
    trusted.write_bytes(encoded)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(chain)
    return context, trusted


@dataclass(frozen=True)
class Issued:
    """A certificate with its key, in PEM."""

    chain: bytes
    key: bytes

    def write(self, folder: Path, stem: str) -> tuple[Path, Path]:
        """Write both to files atomically, as certificate managers do; return the paths."""
        paths = folder / f"{stem}.crt", folder / f"{stem}.key"
        for path, content in zip(paths, (self.chain, self.key), strict=True):
            replace(path, content)
        return paths


class Authority:
    """A CA that issues certificates of servers and clients."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Test CA")])
        self.pem = self._sign(self._name, self._key.public_key(), timedelta(days=1), ca=True, names=[])

    def issue(
        self,
        common_name: str = "pointbook",
        *,
        names: Sequence[str] = ("pointbook.example", "localhost"),
        uris: Sequence[str] = (),
        life: timedelta = timedelta(days=365),
        key: CertificateIssuerPrivateKeyTypes | None = None,
    ) -> Issued:
        """Issue a certificate for names and URIs, and for the loopback address."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])
        all_names = [
            *map(x509.DNSName, names),
            *map(x509.UniformResourceIdentifier, uris),
            x509.IPAddress(ip_address("127.0.0.1")),
        ]
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return Issued(self._sign(subject, key.public_key(), life, ca=False, names=all_names), private)

    def _sign(
        self,
        subject: x509.Name,
        public_key: CertificatePublicKeyTypes,
        life: timedelta,
        *,
        ca: bool,
        names: Sequence[x509.GeneralName],
    ) -> bytes:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + life)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def replace(path: Path, content: bytes) -> None:
    """Replace a file atomically; only its owner may read it."""
    new = path.with_suffix(".new")
    new.touch(0o600)
    new.write_bytes(content)
    new.replace(path)


def serial_of(chain: bytes) -> int:
    """Return the serial number of a certificate."""
    return x509.load_pem_x509_certificate(chain).serial_number


def served_serial(port: int) -> int:
    """Return the serial number of the certificate that a local port serves."""
    return serial_of(ssl.get_server_certificate(("127.0.0.1", port), timeout=10).encode())


def old_context(authority: Authority, folder: Path) -> ssl.SSLContext:
    """Return the TLS context of a server that supports TLS 1.0 and 1.1."""
    cert, key = authority.issue().write(folder, "old")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return _with_old_versions(context, ssl.TLSVersion.TLSv1)


def _with_old_versions(context: ssl.SSLContext, version: ssl.TLSVersion) -> ssl.SSLContext:
    """Allow versions that OpenSSL disables by default."""
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = version
    return context


def handshake(port: int, version: ssl.TLSVersion, authority: Authority) -> str:
    """Connect with one version of TLS and return it; empty if it is refused."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=authority.pem.decode())
    context.set_alpn_protocols(["h2", "http/1.1"])
    _with_old_versions(context, version)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.maximum_version = version
    try:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=10) as connection,
            context.wrap_socket(connection) as wrapped,
        ):
            return wrapped.version() or ""
    except OSError:
        return ""
