"""gRPC channels of the shim and of the commands, in plaintext or TLS."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import grpc

from pointbook_common.certificates import SettingFile, TlsFiles, TlsMaterial, TlsSource, load
from shopline_shim.settings import ShimSettings

TLS_CHECK_SECONDS = 1.0
"""The interval at which a channel checks its TLS files."""
REPLACED_CHANNEL_SECONDS = 60.0
"""How long a replaced channel stays open for its calls, which all have shorter timeouts."""

Options = Sequence[tuple[str, Any]]


def open_channel(settings: ShimSettings, address: str) -> grpc.Channel:
    """Open a channel for a command. Raises SettingError if TLS files are wrong."""
    options = (("grpc.enable_http_proxy", 0), *_server_name_options(settings))
    files = client_tls_files(settings)
    if files is None:
        return grpc.insecure_channel(address, options=options)
    material = load(files)
    return grpc.secure_channel(address, channel_credentials(material.ca, material), options=options)


def open_aio_channel(settings: ShimSettings, address: str, options: Options, tls: TlsSource | None) -> grpc.aio.Channel:
    """Open a channel in the running event loop that follows its TLS files."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    all_options = (*options, *_server_name_options(settings))

    def open_with(material: TlsMaterial) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(address, channel_credentials(material.ca, material), all_options)

    return RenewingChannel(tls, open_with)


def client_tls_source(settings: ShimSettings) -> TlsSource | None:
    """Return the TLS material for the gRPC server, or None if no CA is set.

    Raises SettingError if the files are wrong.
    """
    files = client_tls_files(settings)
    return None if files is None else TlsSource(files)


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


def channel_credentials(ca: bytes | None, identity: TlsMaterial) -> grpc.ChannelCredentials:
    """Build credentials from a CA and, if it has one, an identity's certificate."""
    return grpc.ssl_channel_credentials(ca, identity.key, identity.chain)


def _server_name_options(settings: ShimSettings) -> Options:
    return (("grpc.ssl_target_name_override", settings.server_name),) if settings.server_name else ()


class RenewingChannel(grpc.aio.Channel):
    """A channel that is reopened when its TLS files change.

    gRPC credentials are immutable.

    Running calls finish on the replaced channel.
    """

    def __init__(self, source: TlsSource, open_with: Callable[[TlsMaterial], grpc.aio.Channel]) -> None:
        self._source = source
        self._open_with = open_with
        self._material = source.current()
        self._channel = open_with(self._material)
        self._checked_at = time.monotonic()
        self._closing: set[asyncio.Task[None]] = set()

    def current(self) -> grpc.aio.Channel:
        """Return the channel for new calls."""
        if time.monotonic() - self._checked_at < TLS_CHECK_SECONDS:
            return self._channel
        self._checked_at = time.monotonic()
        material = self._source.current()
        if material is not self._material:
            closing = asyncio.create_task(_close_later(self._channel))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            self._material, self._channel = material, self._open_with(material)
        return self._channel

    def unary_unary(self, method: str, *serializers: Any, **more: Any) -> Any:
        """Return a callable that makes each call on the current channel."""
        last_channel, callable_ = self._channel, self._channel.unary_unary(method, *serializers, **more)

        def call(request: Any, **options: Any) -> Any:
            nonlocal last_channel, callable_
            channel = self.current()
            if channel is not last_channel:
                last_channel, callable_ = channel, channel.unary_unary(method, *serializers, **more)
            return callable_(request, **options)

        return call

    def unary_stream(self, method: str, *serializers: Any, **more: Any) -> Any:
        """Return a callable of the current channel."""
        return self.current().unary_stream(method, *serializers, **more)

    def stream_unary(self, method: str, *serializers: Any, **more: Any) -> Any:
        """Return a callable of the current channel."""
        return self.current().stream_unary(method, *serializers, **more)

    def stream_stream(self, method: str, *serializers: Any, **more: Any) -> Any:
        """Return a callable of the current channel."""
        return self.current().stream_stream(method, *serializers, **more)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:  # noqa: FBT001, FBT002 - gRPC's own
        """Return the state of the current channel."""
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """Wait until the current channel has another state."""
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """Wait until the current channel is connected."""
        await self._channel.channel_ready()

    async def close(self, grace: float | None = None) -> None:
        """Close the current and all replaced channels."""
        await self._channel.close(grace)
        for closing in self._closing:
            closing.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


async def _close_later(channel: grpc.aio.Channel) -> None:
    """Close a replaced channel after its calls have ended.

    gRPC's own grace ignores calls that have just started.
    """
    try:
        await asyncio.sleep(REPLACED_CHANNEL_SECONDS)
    finally:
        await channel.close()
