"""How the shim and the commands connect to the server in the settings."""

from typing import TypedDict

import grpc

from pointbook_client import CredentialsSource
from pointbook_common.certificates import SettingFile, TlsFiles, TlsMaterial, TlsSource
from shopline_shim.settings import ShimSettings


class ServerTls(TypedDict):
    """The arguments of `connect` for TLS with the server."""

    tls: CredentialsSource | bool
    channel_options: tuple[tuple[str, str], ...]


class TlsCredentials:
    """The credentials of TLS files: another object once the files change.

    While changed files are invalid, the previous credentials are used.
    """

    def __init__(self, source: TlsSource) -> None:
        self._source = source
        self._material = source.current()
        self._credentials = to_credentials(self._material)

    def __call__(self) -> grpc.ChannelCredentials:
        """Return the credentials for new calls."""
        material = self._source.current()
        if material is not self._material:
            self._material, self._credentials = material, to_credentials(material)
        return self._credentials


def server_tls(settings: ShimSettings) -> ServerTls:
    """Return the TLS with the server; plaintext if no CA is set.

    Raises SettingError if TLS files are wrong.
    """
    files = client_tls_files(settings)
    return ServerTls(
        tls=False if files is None else TlsCredentials(TlsSource(files)),
        channel_options=server_name_options(settings.server_name),
    )


def server_name_options(name: str) -> tuple[tuple[str, str], ...]:
    """Return the channel options for the name in the server's certificate, if any."""
    return (("grpc.ssl_target_name_override", name),) if name else ()


def client_tls_files(settings: ShimSettings) -> TlsFiles | None:
    """Return the TLS files for the gRPC server, or None if no CA is set."""
    ca, cert, key = settings.server_ca_file, settings.client_cert_file, settings.client_key_file
    if ca is None:
        return None
    return TlsFiles(
        cert=None if cert is None else SettingFile("POINTBOOK_CLIENT_CERT_FILE", cert),
        key=None if key is None else SettingFile("POINTBOOK_CLIENT_KEY_FILE", key),
        ca=SettingFile("POINTBOOK_SERVER_CA_FILE", ca),
    )


def to_credentials(material: TlsMaterial) -> grpc.ChannelCredentials:
    """Build gRPC's credentials."""
    return grpc.ssl_channel_credentials(material.ca, material.key, material.chain)
