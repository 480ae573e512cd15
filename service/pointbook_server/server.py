"""The server process: starts, drains and stops everything that it has built once."""

import asyncio
import math
import socket
from collections.abc import Mapping
from typing import Any

import grpc
import structlog

from pointbook_common.metric_registry import observe_loop_lag
from pointbook_common.metrics_endpoint import MetricsEndpoint, exposition_of, listen
from pointbook_common.open_files import max_client_connections
from pointbook_common.tracing import Tracing
from pointbook_server.access.token_cache import TokenCache
from pointbook_server.access.transactions import TokenTransactions
from pointbook_server.db.clock_skew import SYSTEM_CLOCK, ClockSkew, ServerClock
from pointbook_server.db.database import Database
from pointbook_server.db.database_health import DatabaseHealth
from pointbook_server.db.schema import check_schema
from pointbook_server.delivery.sender import Sender
from pointbook_server.delivery.senders import close_senders
from pointbook_server.maintenance import Maintenance
from pointbook_server.metrics import Metrics
from pointbook_server.programs.model import Channel
from pointbook_server.rpc.admission import Admission
from pointbook_server.rpc.authentication import Authenticator
from pointbook_server.rpc.call_log import CallLog
from pointbook_server.rpc.health import SERVICE_NAME as HEALTH
from pointbook_server.rpc.health import HealthService
from pointbook_server.rpc.listening import grpc_options, health_options, open_port
from pointbook_server.rpc.method_handlers import MethodHandlers
from pointbook_server.rpc.pacer import Pacer
from pointbook_server.rpc.reflection import add_reflection
from pointbook_server.rpc.running_calls import RunningCalls
from pointbook_server.rpc.tls import tls_source
from pointbook_server.services import SERVICE_NAMES, Services
from pointbook_server.settings import ServerSettings

GOAWAY_SECONDS = 0.05
"""How long gRPC takes to send all clients a GOAWAY, so that they connect to another server."""
CLEANUP_SECONDS = 1.5
"""How long handlers and background work may take to end after gRPC has stopped."""

log = structlog.get_logger()


class Server:
    """One server process. Call `start` and `stop` in the same event loop.

    `development` is for `pointbook dev` on loopback only: without tokens, with reflection, and with stores registered
    on first sight. Metrics are served on `metrics_listener`, if given, instead of the address in the settings.
    """

    def __init__(
        self,
        settings: ServerSettings,
        database_url: str,
        *,
        senders: Mapping[Channel, Sender],
        development: bool = False,
        clock: ServerClock = SYSTEM_CLOCK,
        metrics_listener: socket.socket | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._settings = settings
        self._senders = senders
        self.metrics = Metrics(tracing)
        self._database = Database(database_url, pool_size=settings.database_pool_size, metrics=self.metrics)
        self._tokens = (
            None
            if development
            else TokenCache(
                TokenTransactions(self._database), clock, staleness_seconds=settings.token_staleness_seconds
            )
        )
        self._skew = ClockSkew(clock, self.metrics)
        self._pacer = Pacer()
        self._running_calls = RunningCalls()
        self._admission = Admission(
            token_calls_max=settings.token_calls_max,
            token_calls_per_second_max=settings.token_calls_per_second_max,
            check_clock=self._skew.check_call,
        )
        self._health = HealthService(SERVICE_NAMES, self._pacer)
        checks = (self._skew.check, check_schema)
        self._database_health = DatabaseHealth(self._database, self._health.set_serving, checks)
        self._background: list[asyncio.Task[None]] = []
        self._metrics_listener = metrics_listener
        if metrics_listener is None and settings.metrics_address:
            self._metrics_listener = listen("POINTBOOK_METRICS_ADDRESS", settings.metrics_address)
        self._metrics_endpoint: MetricsEndpoint | None = None
        self._server = grpc.aio.server(
            options=grpc_options(
                reuse_port=settings.workers > 1,
                connections_max=settings.connections_max or max_client_connections(settings.database_pool_size),
                waiting_calls_max=settings.waiting_calls_max,
            ),
        )
        self.services = Services(settings, self._database, senders, clock, self.metrics, development=development)
        self._health.add_to_server(self._server)
        self._server.add_generic_rpc_handlers((self._build_method_handlers(),))
        self.maintenance = self._build_maintenance(clock)
        self._watch_process()
        self.port = self._listen(settings)
        self._health_server = self._build_health_server(settings)

    async def start(self) -> None:
        """Start serving. Health is NOT_SERVING until the database can be used."""
        if self._metrics_listener is not None:
            self._metrics_endpoint = MetricsEndpoint(exposition_of(self.metrics.registry), self._metrics_listener)
        if self._tokens is not None:
            await self._tokens.start()
        await self._server.start()
        if self._health_server is not None:
            await self._health_server.start()
        await self._database_health.check()
        self._database_health.start()
        self._background = [
            asyncio.create_task(self.maintenance.run_maintenance()),
            asyncio.create_task(observe_loop_lag(self.metrics.loop_lag_seconds.observe)),
        ]

    async def stop(self) -> None:
        """Stop serving.

        Health turns NOT_SERVING, running calls finish within the drain time, and then everything is closed.
        """
        for task in self._background:
            task.cancel()
        self._health.stop()
        half_seconds = self._settings.drain_seconds / 2
        await self._admission.pause(half_seconds)
        stopping = asyncio.create_task(self._server.stop(half_seconds))
        await asyncio.sleep(GOAWAY_SECONDS)
        self._health.end_watches()
        self._admission.refuse()
        await stopping
        if self._health_server is not None:
            await self._health_server.stop(0)
        # gRPC stops before its handlers have cleaned up, which needs the database.
        try:
            async with asyncio.timeout(CLEANUP_SECONDS):
                await self._running_calls.drain()
                await self.services.drain()
                await self.maintenance.write_token_use()
                await self.services.webhook_times.write()
        except TimeoutError:
            log.warning("some calls did not end in time")
        # Only now: until here, the check has ended calls that hung in the database.
        await self._database_health.close()
        if self._tokens is not None:
            await self._tokens.close()
        await close_senders(self._senders.values())
        await self._database.dispose()
        if self._metrics_endpoint is not None:
            self._metrics_endpoint.close()
        if self.metrics.tracing is not None:
            await asyncio.to_thread(self.metrics.tracing.shutdown)

    def _build_maintenance(self, clock: ServerClock) -> Maintenance:
        """Return the jobs that run at intervals."""
        return Maintenance(
            self._database,
            clock,
            self._skew,
            self.metrics,
            tokens=self._tokens,
            redemptions=self.services.redemptions,
            clean_ups=self.services.clean_ups,
            sources={
                "drift": self.services.ledger,
                "holds": self.services.redemptions,
                "quarantine": self.services.quarantine,
                "store_erasures": self.services.store_erasures,
                "webhook_times": self.services.webhook_times,
            },
        )

    def _watch_process(self) -> None:
        """Set the gauges that are read from this process at each scrape."""
        self.metrics.calls_running.set_function(lambda: len(self._running_calls))
        self.metrics.serving.set_function(lambda: self._health.is_serving)
        tokens = self._tokens
        if tokens is not None:
            self.metrics.token_expiry.set_function(
                lambda: math.nan if (expiry_ms := tokens.next_expiry_ms()) is None else expiry_ms / 1_000
            )

    def _build_method_handlers(self) -> MethodHandlers:
        """Return the guarded handlers of all services but health."""
        handlers = MethodHandlers(
            Authenticator(self._tokens),
            self._admission,
            self._running_calls,
            deadline_seconds=self._settings.call_deadline_seconds,
            call_log=CallLog(self._settings.call_log_lines_per_second_max),
            metrics=self.metrics,
            pacer=self._pacer,
        )
        server: Any = handlers  # Generated code expects a server, and calls only its methods that add handlers.
        self.services.add_to_server(server)
        if self._tokens is None or self._settings.reflection:
            add_reflection(handlers, (*SERVICE_NAMES, HEALTH))
        return handlers

    def _listen(self, settings: ServerSettings) -> int:
        """Open the port, and return its number.

        Raises OSError, and SettingError if TLS files are invalid.
        """
        tls = tls_source(settings)
        if tls is not None:
            self.metrics.tls_certificate_expiry.set_function(
                lambda: expires_at.timestamp() if (expires_at := tls.current().expires_at) else math.nan
            )
        return open_port(self._server, "POINTBOOK_GRPC_ADDRESS", settings.grpc_address, tls)

    def _build_health_server(self, settings: ServerSettings) -> grpc.aio.Server | None:
        """Return the server for health probes, or None without its address.

        Probes reach it when clients hold all connections of the main server.
        """
        if not settings.health_address:
            return None
        server = grpc.aio.server(options=health_options(reuse_port=settings.workers > 1))
        self._health.add_to_server(server)
        open_port(server, "POINTBOOK_HEALTH_ADDRESS", settings.health_address, tls_source(settings))
        return server
