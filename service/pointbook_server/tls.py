"""TLS of the gRPC server: credentials that follow their files, and the names in a client's certificate."""

from typing import Any

import grpc

from pointbook_server.certificates import SettingFile, TlsFiles, TlsMaterial, TlsSource
from pointbook_server.settings import ServerSettings

_NAME_PROPERTIES = ("x509_common_name", "x509_subject_alternative_name")


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
    served = source.current()

    # gRPC calls it in a thread of its own, one call at a time.
    def changed_configuration() -> Any:
        nonlocal served
        material = source.current()
        if material is served:
            return None
        served = material
        return _configuration(material)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(served), changed_configuration, require_client_authentication=served.ca is not None
    )


def client_names(context: Any) -> frozenset[str]:
    """Return the common name and the alternative names of a client's verified certificate; none without one."""
    properties = context.auth_context()
    return frozenset(
        name.decode(errors="replace") for property_ in _NAME_PROPERTIES for name in properties.get(property_, ())
    )


def _configuration(material: TlsMaterial) -> Any:
    assert material.key is not None and material.chain is not None, "tls_source names both files"  # noqa: S101, PT018 - narrows
    return grpc.ssl_server_certificate_configuration([(material.key, material.chain)], material.ca)
