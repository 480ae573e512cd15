"""TLS of the gRPC server: credentials that follow their files, and the names in a client's certificate."""

import time
from functools import lru_cache
from typing import Any

import grpc
from cryptography import x509

from pointbook_common.certificates import SettingFile, TlsFiles, TlsMaterial, TlsSource
from pointbook_server.settings import ServerSettings

RESUMPTION_SECONDS = 60.0
"""How long a client can resume its TLS session, which checks neither its certificate's expiry nor its CA again."""
CERTIFICATES_MAX = 256
"""Of how many client certificates the names are kept in memory."""


def tls_source(settings: ServerSettings) -> TlsSource | None:
    """Return the server's TLS material; None where it speaks plaintext. Raises SettingError."""
    cert, key, client_ca = settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file
    if cert is None or key is None:
        return None
    return TlsSource(
        TlsFiles(
            cert=SettingFile("POINTBOOK_TLS_CERT_FILE", cert),
            key=SettingFile("POINTBOOK_TLS_KEY_FILE", key),
            ca=None if client_ca is None else SettingFile("POINTBOOK_TLS_CLIENT_CA_FILE", client_ca),
        )
    )


def server_credentials(source: TlsSource) -> grpc.ServerCredentials:
    """Build credentials that use the newest material at every handshake. With a client CA, clients need a certificate.

    gRPC itself speaks TLS 1.2 and later only.
    """
    served, built_at = source.current(), time.monotonic()

    # gRPC calls it in a thread of its own, one call at a time.
    def changed_configuration() -> Any:
        nonlocal served, built_at
        material, now = source.current(), time.monotonic()
        # Every configuration has keys of its own for the sessions that can be resumed.
        if material is served and (material.ca is None or now < built_at + RESUMPTION_SECONDS):
            return None
        served, built_at = material, now
        return _configuration(material)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(served), changed_configuration, require_client_authentication=served.ca is not None
    )


def client_names(context: Any) -> frozenset[str]:
    """Return the common name and the alternative names of a client's verified certificate; none without one."""
    # gRPC cuts the names that it offers at their first NUL.
    certificates = context.auth_context().get("x509_pem_cert", ())
    return frozenset().union(*map(_names_in, certificates))


@lru_cache(maxsize=CERTIFICATES_MAX)
def _names_in(pem: bytes) -> frozenset[str]:
    """Return the common name, and the alternative names that are DNS names, URIs or IP addresses."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        common = {str(name.value) for name in certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)}
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return frozenset(common)
    except ValueError:
        # Extensions that are broken name nobody.
        return frozenset()
    return frozenset(
        {
            *common,
            *names.get_values_for_type(x509.DNSName),
            *names.get_values_for_type(x509.UniformResourceIdentifier),
            *map(str, names.get_values_for_type(x509.IPAddress)),
        }
    )


def _configuration(material: TlsMaterial) -> Any:
    assert material.key is not None and material.chain is not None, "tls_source names both files"  # noqa: S101, PT018 - narrows
    return grpc.ssl_server_certificate_configuration([(material.key, material.chain)], material.ca)
