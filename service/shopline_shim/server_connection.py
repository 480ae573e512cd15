"""How the shim and the commands connect to the server in the settings."""

from typing import TypedDict

from pointbook_client import CredentialsSource
from shopline_shim.settings import ShimSettings


class ServerTls(TypedDict):
    """The arguments of `connect` for TLS with the server."""

    tls: CredentialsSource | bool
    channel_options: tuple[tuple[str, str], ...]


def server_tls(settings: ShimSettings) -> ServerTls:
    """Return the TLS with the server; plaintext if no CA is set.

    Raises SettingError if TLS files are wrong.
    """
    options = server_name_options(settings.server_name)
    if settings.server_ca_file is None:
        return ServerTls(tls=False, channel_options=options)
    from shopline_shim.server_credentials import TlsCredentials  # noqa: PLC0415 - plaintext starts faster without it

    return ServerTls(tls=TlsCredentials(settings), channel_options=options)


def server_name_options(name: str) -> tuple[tuple[str, str], ...]:
    """Return the channel options for the name in the server's certificate, if any."""
    return (("grpc.ssl_target_name_override", name),) if name else ()
