"""TLS of the gRPC server: reloaded credentials, and client certificates' names."""

import time
from functools import lru_cache
from typing import Any

import grpc
from cryptography import x509

from pointbook_common.certificates import SettingFile, TlsFiles, TlsMaterial, TlsSource
from pointbook_server.settings import ServerSettings

RESUMPTION_SECONDS = 60.0
"""How long a client can resume a TLS session; resumption does not check its certificate again."""
CERTIFICATES_MAX = 256
"""How many client certificates have their names cached."""


def tls_source(settings: ServerSettings) -> TlsSource | None:
    """Return the server's TLS material, or None for plaintext. Raises SettingError."""
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
    """Return credentials that use the latest material at each handshake.

    With a client CA, they require a client certificate. gRPC itself supports only TLS 1.2 and later.
    """
    served, built_at = source.current(), time.monotonic()

    # gRPC calls this in its own thread, one call at a time.
    def changed_configuration() -> Any:
        nonlocal served, built_at
        material, now = source.current(), time.monotonic()
        # A new configuration has new session keys, so it ends the resumption of older sessions.
        if material is served and (material.ca is None or now < built_at + RESUMPTION_SECONDS):
            return None
        served, built_at = material, now
        return _configuration(material)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(served), changed_configuration, require_client_authentication=served.ca is not None
    )


def client_names(context: Any) -> frozenset[str]:
    """Return the names in a client's verified certificate; empty without one.

    These are the common name and the alternative names.
    """
    # Parsed here because gRPC cuts names at their first NUL.
    certificates = context.auth_context().get("x509_pem_cert", ())
    return frozenset().union(*map(_names_in, certificates))


@lru_cache(maxsize=CERTIFICATES_MAX)
def _names_in(pem: bytes) -> frozenset[str]:
    """Return a certificate's common name, DNS names, URIs and IP addresses."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        common = {str(name.value) for name in certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)}
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return frozenset(common)
    except ValueError:
        # A certificate with invalid extensions names no client.
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
