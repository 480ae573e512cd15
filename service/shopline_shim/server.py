"""The shim's applications on uvicorn."""

import asyncio
import contextlib
import functools
import math
import socket
from collections.abc import Callable, Iterator

import structlog
import uvicorn
from starlette.applications import Starlette

from pointbook_common import metrics_endpoint
from pointbook_common.metrics_endpoint import MetricsEndpoint, exposition_of
from shopline_shim.app import create_app
from shopline_shim.http_protocol import LimitedHttpProtocol
from shopline_shim.metrics import Metrics
from shopline_shim.settings import ShimSettings
from shopline_shim.tcp_listener import bound_address, listen
from shopline_shim.tls_context import build_tls_context, server_tls_source
from shopline_shim.tls_listener import TlsListener, TlsOptions

log = structlog.get_logger()


class ShimServer:
    """The shim, served in the running event loop.

    It leaves signals to its caller, which stops it by an event. `address` is the bound `host:port` after `ready` is
    set. With a `listener` it accepts connections from that socket, which worker processes share, and serves its
    metrics on a `metrics_listener` instead of the address in the settings.
    """

    def __init__(
        self,
        settings: ShimSettings,
        listener: socket.socket | None = None,
        metrics_listener: socket.socket | None = None,
    ) -> None:
        self.address = ""
        self.metrics_address = ""
        self._settings = settings
        self._listener = listener
        self._metrics_listener = metrics_listener
        self._app = create_app(settings)

    async def serve(self, *, stop: asyncio.Event, ready: asyncio.Event | None = None) -> None:
        """Serve until `stop` is set, then drain for `drain_timeout_seconds` at most.

        Raises OSError if an address cannot be bound, and SettingError if TLS files are wrong.
        """
        tls = self._tls_options()
        with contextlib.ExitStack() as listeners:
            listener = listeners.enter_context(self._listener or listen(self._settings.http_address))
            self.address = bound_address(listener)
            listeners.enter_context(self._serve_metrics())
            server = _UvicornServer(self._config(self._app), stop, ready or asyncio.Event(), self._log_listening, tls)
            await server.serve(sockets=[listener])

    def _tls_options(self) -> TlsOptions | None:
        """Return the TLS of the webhooks' address, if any.

        The expiry of its certificate becomes a metric.
        """
        source = server_tls_source(self._settings)
        if source is None:
            return None
        metrics: Metrics = self._app.state.metrics
        metrics.tls_certificate_expiry.set_function(
            lambda: expires_at.timestamp() if (expires_at := source.current().expires_at) else math.nan
        )
        return TlsOptions(build_tls_context(source), self._settings.header_timeout_seconds)

    @contextlib.contextmanager
    def _serve_metrics(self) -> Iterator[None]:
        """Serve the metrics on an address of their own during the block, if there is one."""
        address = self._settings.shim_metrics_address
        listener = self._metrics_listener
        if listener is None and address not in {"", self._settings.http_address}:
            listener = metrics_endpoint.listen("POINTBOOK_SHIM_METRICS_ADDRESS", address)
        if listener is None:
            yield
            return
        with listener:
            self.metrics_address = bound_address(listener)
            endpoint = MetricsEndpoint(exposition_of(self._app.state.metrics.registry), listener)
            try:
                yield
            finally:
                endpoint.close()

    def _config(self, app: Starlette) -> uvicorn.Config:
        return uvicorn.Config(
            app,
            http=LimitedHttpProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            # At WARNING uvicorn logs every request that is not HTTP, so anyone could fill the log.
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=self._settings.drain_timeout_seconds,
        )

    def _log_listening(self) -> None:
        log.info(
            "listening",
            address=self.address,
            tls=self._settings.http_tls_cert_file is not None,
            grpc_address=self._settings.grpc_address,
            grpc_tls=self._settings.server_ca_file is not None,
            metrics_address=self.metrics_address or None,
            endpoints=len(self._settings.shopline_endpoints),
            missed_calls=bool(self._settings.missed_call_secrets),
        )


class _UvicornServer(uvicorn.Server):
    """uvicorn's server, controlled by events instead of signals."""

    def __init__(
        self,
        config: uvicorn.Config,
        stop: asyncio.Event,
        ready: asyncio.Event,
        on_started: Callable[[], None],
        tls: TlsOptions | None,
    ) -> None:
        super().__init__(config)
        self._tls = tls
        self._stop = stop
        self._ready = ready
        self._on_started = on_started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the process's signal handlers unchanged."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections, then set the ready event."""
        if self._tls is None:
            await super().startup(sockets)
        else:
            await super().startup([])
            protocol = functools.partial(
                LimitedHttpProtocol,
                config=self.config,
                server_state=self.server_state,
                app_state=self.lifespan.state,
            )
            limits = self.lifespan.state["connection_limits"]
            self.servers = [
                TlsListener(self._tls, listener, protocol, limits)  # type: ignore[misc] # uvicorn only closes them
                for listener in sockets or ()
            ]
        self._on_started()
        self._ready.set()

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop. uvicorn calls this ten times a second."""
        return await super().on_tick(counter) or self._stop.is_set()
