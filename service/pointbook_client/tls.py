"""TLS of a client: which certificates it trusts, and its own."""

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

CredentialsSource = Callable[[], grpc.ChannelCredentials]
"""Returns the credentials for new calls: the same object until they change."""


@dataclass(frozen=True, slots=True)
class Tls:
    """TLS with files in PEM.

    Renewed files are used within a second, without a restart. Without `ca_file` the client trusts the certificates that
    gRPC's roots have signed. `cert_file` and `key_file` are the client's own certificate, for servers or tokens that
    ask for one. `server_name` is the name in the server's certificate, if it differs from the host of the address.

    >>> Tls(ca_file="/etc/pointbook/ca.crt").server_name
    ''
    """

    ca_file: str | Path | None = None
    cert_file: str | Path | None = None
    key_file: str | Path | None = None
    server_name: str = ""

    def __post_init__(self) -> None:
        if (self.cert_file is None) is not (self.key_file is None):
            raise ValueError("cert_file and key_file belong together")

    def credentials_source(self) -> CredentialsSource:
        """Return a source that reads the files again whenever they have changed.

        Raises OSError if a file cannot be read or used now. Later, the last usable files stay in use.
        """
        material = self._read()
        self._check(material)
        credentials = _credentials(material)

        def current() -> grpc.ChannelCredentials:
            nonlocal material, credentials
            try:
                renewed = self._read()
                if renewed != material:
                    self._check(renewed)
                    material, credentials = renewed, _credentials(renewed)
            except OSError:
                return credentials
            return credentials

        return current

    def _read(self) -> tuple[bytes | None, ...]:
        """Return the contents of the files; None for those that are not set."""
        paths = (self.ca_file, self.key_file, self.cert_file)
        return tuple(None if path is None else Path(path).read_bytes() for path in paths)

    def _check(self, material: tuple[bytes | None, ...]) -> None:
        """Raise OSError unless the files can be used, and still have these contents.

        Between the renewals of a certificate and of its key, no server accepts the two, and calls would wait for one.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.ca_file is not None:
            context.load_verify_locations(self.ca_file)
        if self.cert_file is not None:
            # Without a password, OpenSSL would ask for that of an encrypted key at the terminal.
            context.load_cert_chain(self.cert_file, self.key_file, password="")
        if self._read() != material:
            raise OSError("the files have changed while they were read")


def _credentials(material: tuple[bytes | None, ...]) -> grpc.ChannelCredentials:
    ca, key, cert = material
    return grpc.ssl_channel_credentials(ca, key, cert)
