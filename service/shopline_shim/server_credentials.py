"""gRPC's credentials of the settings' TLS files for the server."""

import grpc

from pointbook_common.certificates import SettingFile, TlsFiles, TlsMaterial, TlsSource
from shopline_shim.settings import ShimSettings


class TlsCredentials:
    """The credentials of TLS files: another object once the files change.

    While changed files are invalid, the previous credentials are used.
    """

    def __init__(self, settings: ShimSettings) -> None:
        self._source = TlsSource(client_tls_files(settings))
        self._material = self._source.current()
        self._credentials = to_credentials(self._material)

    def __call__(self) -> grpc.ChannelCredentials:
        """Return the credentials for new calls."""
        material = self._source.current()
        if material is not self._material:
            self._material, self._credentials = material, to_credentials(material)
        return self._credentials


def client_tls_files(settings: ShimSettings) -> TlsFiles:
    """Return the TLS files for the gRPC server."""
    cert, key, ca = settings.client_cert_file, settings.client_key_file, settings.server_ca_file
    return TlsFiles(
        cert=None if cert is None else SettingFile("POINTBOOK_CLIENT_CERT_FILE", cert),
        key=None if key is None else SettingFile("POINTBOOK_CLIENT_KEY_FILE", key),
        ca=None if ca is None else SettingFile("POINTBOOK_SERVER_CA_FILE", ca),
    )


def to_credentials(material: TlsMaterial) -> grpc.ChannelCredentials:
    """Build gRPC's credentials."""
    return grpc.ssl_channel_credentials(material.ca, material.key, material.chain)
