"""Checks of the certificates and keys of server, shim, clients and database."""

import stat
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from pointbook_cli.doctor.findings import Finding, Page, ok, problem, unchecked, warning
from pointbook_cli.terminal import count_of
from pointbook_common.certificates import (
    DAY_SECONDS,
    EXPIRES_SOON_SECONDS,
    SettingFile,
    TlsFiles,
    TlsMaterial,
    load,
)
from pointbook_common.errors import SettingError
from pointbook_server.settings import ServerSettings
from shopline_shim.settings import ShimSettings

RENEW = "renew it; running processes use the new files at the next handshake"
_DATABASE = "POINTBOOK_DATABASE_URL"


class Endpoint(NamedTuple):
    """A role in which certificates are used, and their files.

    `ca_noun` names the certificates in the CA file.
    """

    name: str
    files: TlsFiles
    ca_noun: str = "CA"


def check_tls(server: ServerSettings | None, shim: ShimSettings | None, *, is_valid: bool = True) -> Iterator[Finding]:
    """Check every certificate that the settings name.

    Settings that are not valid may be replaced by defaults, and so may name more than is known here.
    """
    endpoints = [*(_server_endpoints(server) if server else ()), *(_shim_endpoints(shim) if shim else ())]
    used = [each for each in endpoints if each.files != TlsFiles()]
    for endpoint in used:
        yield from _check_endpoint(endpoint)
    if not used:
        plaintext = ok("tls", "no certificates are set: plaintext")
        yield plaintext if is_valid else unchecked("tls", "the settings are wrong")


def _server_endpoints(settings: ServerSettings) -> Iterator[Endpoint]:
    cert = _file("POINTBOOK_TLS_CERT_FILE", settings.tls_cert_file)
    key = _file("POINTBOOK_TLS_KEY_FILE", settings.tls_key_file)
    yield Endpoint(
        "server", TlsFiles(cert, key, _file("POINTBOOK_TLS_CLIENT_CA_FILE", settings.tls_client_ca_file)), "client CA"
    )
    if settings.database_url is not None:
        query = parse_qs(urlsplit(settings.database_url.get_secret_value()).query)
        # The driver accepts more kinds of keys than gRPC does, so that only the validity is checked.
        for name, parameter, noun in (("database", "sslrootcert", "CA"), ("database client", "sslcert", "certificate")):
            if parameter in query:
                file = SettingFile(f"{_DATABASE} ({parameter})", Path(query[parameter][-1]))
                yield Endpoint(name, TlsFiles(ca=file), noun)


def _shim_endpoints(settings: ShimSettings) -> Iterator[Endpoint]:
    cert = _file("POINTBOOK_HTTP_TLS_CERT_FILE", settings.http_tls_cert_file)
    yield Endpoint("shim", TlsFiles(cert, _file("POINTBOOK_HTTP_TLS_KEY_FILE", settings.http_tls_key_file)))
    cert = _file("POINTBOOK_CLIENT_CERT_FILE", settings.client_cert_file)
    key = _file("POINTBOOK_CLIENT_KEY_FILE", settings.client_key_file)
    yield Endpoint("client", TlsFiles(cert, key, _file("POINTBOOK_SERVER_CA_FILE", settings.server_ca_file)))


def _file(variable: str, path: Path | None) -> SettingFile | None:
    return None if path is None else SettingFile(variable, path)


def _check_endpoint(endpoint: Endpoint) -> Iterator[Finding]:
    """Check the form, the key, the chain and the validity of an endpoint's files."""
    try:
        material = load(endpoint.files)
    except SettingError as error:
        yield problem("tls", f"{endpoint.name}: {error}", "correct the file", Page.CERTIFICATES)
        return
    found = [*_check_chain(endpoint, material), *_check_authorities(endpoint, material), *_check_key_mode(endpoint)]
    yield from found or [ok("tls", f"{endpoint.name}: {_describe(endpoint, material)}")]


def _check_chain(endpoint: Endpoint, material: TlsMaterial) -> Iterator[Finding]:
    """Check that a chain is valid for some time, and in order."""
    if material.chain is None or endpoint.files.cert is None:
        return
    chain = x509.load_pem_x509_certificates(material.chain)
    name = f"{endpoint.name}: {endpoint.files.cert.variable}"
    for number, certificate in enumerate(chain, 1):
        yield from _check_validity(name if number == 1 else f"{name}: certificate {number} of the chain", certificate)
    for certificate, issuer in pairwise(chain):
        if not _is_issued_by(certificate, issuer):
            text = f"{name}: the chain is incomplete or out of order"
            yield problem("tls", text, "write each certificate before the one that issued it", Page.CERTIFICATES)
            return


def _check_authorities(endpoint: Endpoint, material: TlsMaterial) -> Iterator[Finding]:
    """Check that a CA certificate is valid for some time.

    Others beside it may have expired.
    """
    if material.ca is None or endpoint.files.ca is None:
        return
    authorities = x509.load_pem_x509_certificates(material.ca)
    lasting = max(authorities, key=lambda certificate: certificate.not_valid_after_utc)
    yield from _check_validity(f"{endpoint.name}: {endpoint.files.ca.variable}", lasting)


def _check_validity(name: str, certificate: x509.Certificate) -> Iterator[Finding]:
    now = time.time()
    left_seconds = certificate.not_valid_after_utc.timestamp() - now
    if certificate.not_valid_before_utc.timestamp() > now:
        text = f"{name} is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        yield problem("tls", text, "wait, or correct the clock of this machine", Page.EXPIRY)
    elif left_seconds <= 0:
        yield problem("tls", f"{name} expired {_days(-left_seconds)} ago", RENEW, Page.EXPIRY)
    elif left_seconds < EXPIRES_SOON_SECONDS:
        yield warning("tls", f"{name} expires in {_days(left_seconds)}", RENEW, Page.EXPIRY)


def _check_key_mode(endpoint: Endpoint) -> Iterator[Finding]:
    key = endpoint.files.key
    if key is not None and key.path.stat().st_mode & stat.S_IROTH:
        text = f"{endpoint.name}: {key.variable} is readable by every user of this machine"
        yield warning("tls", text, "chmod o-r the file", Page.CERTIFICATES)


def _is_issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _describe(endpoint: Endpoint, material: TlsMaterial) -> str:
    """Return what is set up, and for how long it is valid."""
    parts: list[str] = []
    if material.certificate is not None:
        parts.append(f"certificate valid for {_left(material.certificate)}")
    if material.ca is not None:
        authorities: Sequence[x509.Certificate] = x509.load_pem_x509_certificates(material.ca)
        lasting = max(authorities, key=lambda certificate: certificate.not_valid_after_utc)
        parts.append(f"{endpoint.ca_noun} valid for {_left(lasting)}")
    return ", ".join(parts)


def _left(certificate: x509.Certificate) -> str:
    return _days(certificate.not_valid_after_utc.timestamp() - time.time())


def _days(seconds: float) -> str:
    return count_of(int(seconds // DAY_SECONDS), "day", "days")
